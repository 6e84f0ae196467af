"""Checks of the section ``sft`` and of its named runs."""

from __future__ import annotations

import re
from datetime import date

from m1_stages.config.lora import LORA_TARGETS
from m1_stages.config.requirements import Requirements
from m1_stages.config.schema import STAGE_NAMES, Resolved
from m1_stages.config.sft_runs import IMPORT, SFT, for_run

_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,39}")
"""It becomes a part of the names of files and folders."""
_RESERVED = (*STAGE_NAMES, SFT, IMPORT, "all")


def check_sft(resolved: Resolved) -> None:
    """Check the section, then each run with the values it takes from the section.

    Raises:
        ConfigError: a value that cannot work, of the section or of a run; two runs of one name, a name that stands for
            something else, a base that is not there, or runs that start from each other in a circle.
    """
    _Values(resolved).run()
    runs = resolved.config.sft.runs
    if runs:
        _Names(resolved).run()
    for number, run in enumerate(runs):
        own = {f"sft.{key}": f"sft.runs.{number}.{key}" for key in run.overrides}
        _Values(for_run(resolved, run.name), own).run()


class _Values(Requirements):
    """The values of one fine-tuning; ``own`` names the keys that a run gives itself."""

    def __init__(self, resolved: Resolved, own: dict[str, str] | None = None) -> None:
        super().__init__(resolved)
        self.own = own or {}

    def require(self, ok: bool, key: str, what: str, fix: str) -> None:
        """Refuse ``key`` unless ``ok``, by its name in the run."""
        table = ".".join(key.split(".")[:2])
        what = f"run {self.resolved.sft_run}: {what}" if self.resolved.sft_run else what
        super().require(ok, key.replace(table, self.own.get(table, table), 1), what, fix)

    def run(self) -> None:
        x = self.config.sft
        self.positive("sft", "context_tokens", "epochs", "global_batch_tokens", "micro_batch_rows", "lr_peak")
        self.require(
            0 < x.lr_final <= x.lr_peak, "sft.lr_final", f"lr_final {x.lr_final} is not in (0, lr_peak]", "lower it"
        )
        self.share("sft.lr_warmup_share", x.lr_warmup_share)
        self.cut(self.config.sft_seq_len, "sft")
        self.share("sft.max_dropped_share", x.max_dropped_share)
        self.require(x.processes >= 0, "sft.processes", "sft.processes is negative", "0 takes one per core")
        self.selection()
        self.lora()
        self.require(
            not x.date or _is_date(x.date), "sft.date", f"sft.date {x.date!r} is not a day", "for example 2026-01-31"
        )
        self.require(
            bool(self.resolved.sft_run) or x.base_stage in (*STAGE_NAMES, IMPORT),
            "sft.base_stage",
            f"base_stage {x.base_stage!r} is not a stage",
            f"one of {', '.join(STAGE_NAMES)}, or {IMPORT} for an imported model",
        )

    def selection(self) -> None:
        x = self.config.sft
        self.require(
            0 <= x.held_out < 1, "sft.held_out", f"held_out {x.held_out:g} is not in [0, 1)", "for example 0.02"
        )
        self.not_negative("sft", "reflection_min_per_1k_tokens", "reflection_weight")
        for name, weight in x.weights.items():
            key, known = f"sft.weights.{name}", ", ".join(x.data) or "none"
            self.require(name in x.data, key, f"{name!r} has a weight and is not in sft.data", f"entries: {known}")
            self.require(weight >= 0, key, f"the weight of {name!r} is {weight:g}", "0 leaves it out, 1 is once a pass")
        forms = [" ".join(pattern.lower().split()) for pattern in x.reflection_patterns]
        self.require(
            all(forms) and len(set(forms)) == len(forms),
            "sft.reflection_patterns",
            "a pattern is empty or there twice",
            "take it out",
        )

    def lora(self) -> None:
        x, known = self.config.sft, ", ".join(LORA_TARGETS)
        self.not_negative("sft", "lora_rank")
        self.positive("sft", "lora_alpha")
        unknown = [target for target in x.lora_targets if target not in LORA_TARGETS]
        self.require(
            not unknown,
            "sft.lora_targets",
            f"there are no matrices called {', '.join(unknown)}",
            f"choose among {known}",
        )
        self.require(
            bool(x.lora_targets) and len(set(x.lora_targets)) == len(x.lora_targets),
            "sft.lora_targets",
            "sft.lora_targets is empty, or names one twice",
            f"choose among {known}; lora_rank = 0 trains all weights",
        )


class _Names(Requirements):
    """The names of the runs, and what they start from."""

    def run(self) -> None:
        x = self.config.sft
        names = [run.name for run in x.runs]
        for number, name in enumerate(names):
            key = f"sft.runs.{number}.name"
            self.require(
                _NAME.fullmatch(name) is not None,
                key,
                f"{name[:60]!r} cannot be the name of a run: it is a part of file names",
                "up to 40 of a-z, 0-9, - and _, for example math-1",
            )
            self.require(name not in _RESERVED, key, f"{name!r} stands for something else already", "rename the run")
            self.require(name not in names[:number], key, f"two runs are named {name!r}", "rename one")
        bases = {run.name: run.overrides.get("base_stage", x.base_stage) for run in x.runs}
        for number, name in enumerate(names):
            key = f"sft.runs.{number}.base_stage"
            self.require(
                bases[name] in (*STAGE_NAMES, IMPORT, SFT, *names),
                key,
                f"run {name!r} starts from {bases[name]!r}, which is neither a stage nor a run",
                f"one of {', '.join((*STAGE_NAMES, IMPORT, SFT, *(n for n in names if n != name)))}",
            )
        for number, name in enumerate(names):
            chain = [name]
            while bases.get(chain[-1]) not in (None, *chain):
                chain.append(bases[chain[-1]])
            self.require(
                bases.get(chain[-1]) != name,
                f"sft.runs.{number}.base_stage",
                f"runs start from each other in a circle: {' from '.join([*chain, name])}",
                "let one of them start from a stage",
            )


def _is_date(text: str) -> bool:
    try:
        return date.fromisoformat(text).isoformat() == text
    except ValueError:
        return False
