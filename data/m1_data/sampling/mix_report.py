"""What a stage draws, counted from its rows: token shares and passes over each cell, and why a target is missed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from m1_data.sampling.mix import LONG_QA, LONG_QA_FROM, MixPlan, normalised, wanted_classes
from m1_data.spec import CORE_DOMAINS
from m1_data.storage.cell import Cell

TOLERANCE = 0.005
"""A share further than this from its target is reported with a reason."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Share:
    """A wanted and a reached share of tokens, 0 to 1."""

    wanted: float
    reached: float


@dataclass(frozen=True, kw_only=True, slots=True)
class MixReport:
    """The token shares of a stage, and where they miss the target."""

    stage: str
    tokens: dict[Cell, int]
    """Tokens drawn per cell that the stage uses, long question-answer data included."""
    shares: dict[Cell, float]
    """Share of the drawn tokens per cell; sums to 1."""
    epochs: dict[Cell, float]
    """Passes over each cell."""
    length_classes: dict[str, Share]
    domains: dict[str, Share]
    core: Share
    padding_share: float
    """Share of the rows that holds no document."""
    reasons: tuple[str, ...]
    """One sentence for every target that is missed."""

    def as_dict(self) -> dict[str, Any]:
        """Return the report in plain JSON types."""
        late = 1 - LONG_QA_FROM
        return {
            "stage": self.stage,
            "shares": [{**cell._asdict(), "share": share} for cell, share in self.shares.items()],
            "epochs": [{**cell._asdict(), "epochs": n, "tokens": self.tokens[cell]} for cell, n in self.epochs.items()],
            "long_qa": [
                {**cell._asdict(), "share": share / late}
                for cell, share in self.shares.items()
                if cell.domain == LONG_QA
            ],
            "length_classes": {k: _pair(v) for k, v in self.length_classes.items()},
            "domains": {k: _pair(v) for k, v in self.domains.items()},
            "core": _pair(self.core),
            "padding_share": self.padding_share,
            "reasons": list(self.reasons),
        }


def report_mix(plan: MixPlan, cells: Mapping[Cell, int], drawn: Mapping[Cell, int], *, rows_tokens: int) -> MixReport:
    """Compare what was drawn with what ``plan.mix`` wants.

    Args:
        cells: tokens at hand per cell.
        drawn: tokens of each cell in the rows that count.
        rows_tokens: tokens that these rows have room for.
    """
    tokens = {c: drawn.get(c, 0) for c in plan.quotas}
    total = max(1, sum(tokens.values()))
    shares = {c: n / total for c, n in tokens.items()}
    classes = {
        name: Share(wanted=wanted, reached=_total(shares, length_class=name))
        for name, wanted in normalised(wanted_classes(plan.mix)).items()
    }
    domains = {
        d: Share(wanted=plan.wanted_domains.get(d, 0.0), reached=_total(shares, domain=d))
        for d in sorted({*plan.wanted_domains, *plan.mix.domains} - {LONG_QA})
    }
    core = Share(wanted=plan.mix.core_share, reached=_core(shares))
    long_qa = Share(wanted=plan.mix.long_qa_share, reached=_total(shares, domain=LONG_QA) / (1 - LONG_QA_FROM))
    padding = 1 - sum(tokens.values()) / max(1, rows_tokens)
    return MixReport(
        stage=plan.mix.stage,
        tokens=tokens,
        shares=shares,
        epochs={c: n / cells[c] for c, n in tokens.items()},
        length_classes=classes,
        domains=domains,
        core=core,
        padding_share=padding,
        reasons=tuple(_Reasons(plan, padding).of(classes, domains, core, long_qa)),
    )


class _Reasons:
    """Says why each missed target is missed."""

    def __init__(self, plan: MixPlan, padding: float) -> None:
        self._plan, self._mix = plan, plan.mix
        self._planned = {c: n / max(1, plan.stage_tokens) for c, n in plan.quotas.items()}
        full = [c for c in plan.first if plan.limits[c] - plan.quotas[c] <= 1]
        self._unplanned = "; the length classes leave no room"
        if plan.first != plan.last:
            self._unplanned = "; the sources move from those of the stage before"
        if full:
            cells = _list(f"{c.source}/{c.bucket}" for c in full)
            self._unplanned = f"; {plan.mix.max_epochs:g} passes are reached by {cells}"
        self._in_rows = "; documents stay whole where they fit into a row"
        if padding > TOLERANCE:
            self._in_rows += f", which leaves {padding:.1%} of the rows empty"

    def of(
        self, classes: Mapping[str, Share], domains: Mapping[str, Share], core: Share, long_qa: Share
    ) -> Iterable[str]:
        for name, share in classes.items():
            if _missed(share):
                why = self._why(share, _total(self._planned, length_class=name))
                if not any(c.length_class == name for c in self._plan.first):
                    why = f"; there are no {name} documents"
                yield f"{name} documents: {share.reached:.1%} of the tokens instead of {share.wanted:.1%}{why}"
        present = {c.domain for c in self._plan.first}
        for name, weight in self._mix.domains.items():
            if weight > 0 and name != LONG_QA and name not in present:
                yield f"no documents of domain {name} in the length classes this stage uses"
        if _missed(core):
            groups = {d in CORE_DOMAINS for d in present}
            why = self._why(core, _core(self._planned), self._empty_pairs(classes))
            if len(groups) == 1:
                why = "; there is no other data" if True in groups else "; there is no such data"
            yield (
                f"{', '.join(CORE_DOMAINS)} together: {core.reached:.1%} of the tokens instead of {core.wanted:.1%}{why}"
            )
        for name, share in domains.items():
            if name in present and _missed(share):
                why = self._why(share, _total(self._planned, domain=name), self._empty_pairs(classes, name))
                yield f"domain {name}: {share.reached:.1%} of the tokens instead of {share.wanted:.1%}{why}"
        yield from self._of_long_qa(long_qa)

    def _why(self, share: Share, planned: float, empty_pairs: str = "") -> str:
        if not _missed(Share(wanted=share.wanted, reached=planned)):
            return self._in_rows
        return empty_pairs or self._unplanned

    def _of_long_qa(self, share: Share) -> Iterable[str]:
        too_long, wanted = self._plan.too_long, share.wanted
        if too_long and wanted:
            yield f"long question-answer data in {_list(c.bucket for c in too_long)} does not fit into a row"
        if _missed(share) and share.reached < wanted:
            planned = sum(self._plan.long_qa.values())
            why = "there is none" if not planned else "documents stay whole"
            if planned and planned < wanted - TOLERANCE:
                why = f"{self._mix.max_epochs:g} passes hold no more"
            yield f"long question-answer data: {share.reached:.1%} of the last fifth instead of {wanted:.1%}; {why}"

    def _empty_pairs(self, classes: Mapping[str, Share], domain: str = "") -> str:
        present = {(c.domain, c.length_class) for c in self._plan.first}
        missing = [
            f"no {name} documents of domain {d}"
            for name, share in classes.items()
            for d in sorted({c.domain for c in self._plan.first})
            if share.wanted > 0 and (d, name) not in present and domain in ("", d)
        ]
        return f"; {', '.join(missing)}" if missing else ""


def _core(shares: Mapping[Cell, float]) -> float:
    return sum(v for c, v in shares.items() if c.domain in CORE_DOMAINS)


def _missed(share: Share) -> bool:
    return abs(share.wanted - share.reached) > TOLERANCE


def _total(shares: Mapping[Cell, float], **where: str) -> float:
    return sum(v for c, v in shares.items() if all(getattr(c, k) == want for k, want in where.items()))


def _pair(share: Share) -> dict[str, float]:
    return {"wanted": share.wanted, "reached": share.reached}


def _list(names: Iterable[str]) -> str:
    return ", ".join(names)
