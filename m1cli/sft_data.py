"""The conversations of a fine-tuning run in words, for the terminal and for the report."""

from __future__ import annotations

from typing import Any


def sft_data_lines(mix: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Return what the ``mix`` of a fine-tuning stage says: how its conversations are trained, and what of them is not.

    Both are empty for other stages and for runs of versions that did not count.
    """
    if "read" not in mix:
        return [], []
    rows, read, samples = mix["rows"], mix["read"], mix["samples"]
    data = [f"{file['file']}: {file['dialect']}, {file['rows']:,} rows" for file in mix["files"]]
    if samples != read - sum(mix["bad_rows"].values()):
        data.append(f"{samples:,} samples of {read:,} conversations (sft.earlier_reasoning is split)")
    data += [
        f"{mix['conversations']:,} of {samples:,} conversations in {rows:,} rows: {mix['tokens']:,} tokens, "
        f"{mix['trained_tokens']:,} of them trained, {mix['padding_share']:.1%} of the rows is padding"
    ]
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
