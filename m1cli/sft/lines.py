"""The conversations of a fine-tuning run in words, for the terminal and for the report."""

from __future__ import annotations

import math
from typing import Any


def sft_data_lines(mix: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Return what the ``mix`` of a fine-tuning stage says: how its conversations are trained, and what of them is not.

    Both are empty for other stages and for runs of versions that did not count.
    """
    if "read" not in mix:
        return [], []
    rows, read, samples = mix["rows"], mix["read"], mix["samples"]
    data = [_file(file) for file in mix["files"]]
    if samples != read - sum(mix["bad_rows"].values()):
        data.append(f"{samples:,} samples of {read:,} conversations (sft.earlier_reasoning is split)")
    drawn = " samples in a pass" if mix["conversations"] > samples else ""
    data += [
        f"{mix['conversations']:,}{drawn} of {samples:,} conversations in {rows:,} rows: {mix['tokens']:,} tokens, "
        f"{mix['trained_tokens']:,} of them trained, {mix['padding_share']:.1%} of the rows is padding"
    ]
    if math.isfinite(mix["core_share"] if mix["core_share"] is not None else math.nan):
        data.append(
            f"math and code: {mix['core_share']:.1%} of the conversations that name a domain, MiniMax-M1 has "
            f"{mix['core_target']:.0%}; {mix['without_domain']:,} name none"
        )
    if "before_selection" in mix:
        data += _reflection(mix)
    if mix.get("held_out"):
        data.append(f"{mix['held_out']:,} held out, to be measured on at the end (sft.held_out)")
    if mix.get("left_out"):
        data.append(f"{mix['left_out']:,} left out: too few patterns of reflection (sft.reflection_min_per_1k_tokens)")
    if mix["unwanted"]:
        data.append(f"{mix['unwanted']:,} ask for no training (weight 0, train false)")
    if mix["unused_keys"]:
        keys = ", ".join(f"{key} ({count:,})" for key, count in mix["unused_keys"].items())
        data.append(f"keys that nothing reads: {keys}")
    lost = {
        "dropped_over_length": "dropped: longer than a row (sft.over_length is drop)",
        "truncated": "cut to the length of a row (sft.over_length is truncate)",
        "dropped_untrained": "dropped: no answer is left in the row",
    }
    bad = [
        f"{count:,} of {read:,} rows left out (sft.bad_rows is skip): {reason}"
        for reason, count in mix["bad_rows"].items()
    ]
    return data, bad + [f"{mix[key]:,} of {samples:,} conversations {words}" for key, words in lost.items() if mix[key]]


def held_out_lines(measured: dict[str, Any]) -> list[str]:
    """Return what a ``HeldOutMeasured`` says: the loss of all held-out conversations, then that of each domain."""
    conversations = sum(d["conversations"] for d in measured["domains"])
    first = f"held-out conversations: loss {measured['loss']:.4f} over {conversations:,} conversations"
    each = (
        f"  {d['domain'] or 'no domain named'}: loss {d['loss']:.4f} over {d['conversations']:,} conversations, "
        f"{d['trained_tokens']:,} trained tokens"
        for d in measured["domains"]
    )
    return [first, *each]


def domain_rows(stats: dict[str, Any]) -> list[tuple[str, ...]]:
    """Return the rows of a table: a domain, its conversations and its trained tokens, each with its share of a pass."""
    tokens = max(1, stats["trained_tokens"])
    return [
        (
            d["domain"] or "none named",
            f"{d['conversations']:,}",
            f"{d['conversations'] / stats['conversations']:.1%}",
            f"{d['trained_tokens']:,}",
            f"{d['trained_tokens'] / tokens:.1%}",
        )
        for d in stats["domains"]
    ]


def reflection_rows(stats: dict[str, Any]) -> list[tuple[str, ...]]:
    """Return the rows of a table: a pattern, its matches and their density before and after the selection; last all patterns."""
    sides = (stats["before_selection"], stats["after_selection"])
    names = [name for name in sides[0]["matches"] if any(side["matches"].get(name) for side in sides)]
    rows = [(name, *(side["matches"][name] for side in sides)) for name in names]
    rows.append(("all", *(sum(side["matches"].values()) for side in sides)))
    tokens = [max(1, side["trained_tokens"]) for side in sides]
    table = [
        (name, *(text for n, t in zip(counts, tokens, strict=True) for text in (f"{n:,}", f"{1000 * n / t:.2f}")))
        for name, *counts in rows
    ]
    conversations = [
        text for side in sides for text in (f"{side['reflective']:,} of {side['conversations']:,}", _share(side))
    ]
    return [*table, ("conversations", *conversations)]


def _file(file: dict[str, Any]) -> str:
    line = f"{file['file']}: {file['dialect']}, {file['rows']:,} rows"
    weight = file.get("weight", 1.0)
    return line if weight == 1.0 else f"{line}, {file['drawn']:,} samples in a pass (weight {weight:g})"


def _reflection(mix: dict[str, Any]) -> list[str]:
    """One line, when anything matched: what the patterns are before the selection, and after it if that is another."""
    before, after = mix["before_selection"], mix["after_selection"]
    if not sum(before["matches"].values()):
        return []
    line = f"patterns of reflection: {_density(before)}"
    return [line if before == after else f"{line}; after selection: {_density(after)}"]


def _density(side: dict[str, Any]) -> str:
    matches = sum(side["matches"].values())
    return (
        f"{matches:,} in {_share(side)} of {side['conversations']:,} conversations, "
        f"{1000 * matches / max(1, side['trained_tokens']):.2f} in 1,000 trained tokens"
    )


def _share(side: dict[str, Any]) -> str:
    return f"{side['reflective'] / max(1, side['conversations']):.1%}"
