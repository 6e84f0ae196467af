"""Describes what a stage asks of the machine: rows, tokens, steps, and how far a token looks back."""

from __future__ import annotations

from dataclasses import dataclass, replace

from m1_data.spec import BUCKET_EDGES_TOKENS, SHORTEST_NEEDLE_TOKENS
from m1_stages.config import STAGE_NAMES, Config, ModelConfig
from m1_stages.config.lora import LoraConfig, configured_lora
from m1_stages.config.sft_runs import SFT, config_of_run, stage_of_run
from m1_stages.curriculum import config_section, micro_batch_rows


@dataclass(frozen=True, kw_only=True, slots=True)
class StageWorkload:
    """The rows, tokens and steps of one stage."""

    stage: str
    seq_len: int
    """Tokens of a row."""
    rows: int
    """Rows of an optimizer step."""
    micro_batch_rows: int
    """Largest number of rows of a forward pass, as configured."""
    steps: int | None
    """Optimizer steps; None when they depend on data that is not prepared yet (fine-tuning)."""
    mix_pairs: float
    """Mean number of tokens that a token attends to when documents are as long as the mix says."""
    config_section: str
    """Section of ``m1.toml`` that configures the stage, for advice."""
    evaluated: tuple[tuple[int, int], ...] = ()
    """Rows of the evaluation after the stage, as pairs of their number and their length in tokens."""
    lora: LoraConfig | None = None
    """The adapters that are trained in place of all weights."""

    @property
    def row_pairs(self) -> float:
        """Mean number of tokens that a token attends to when every row is one document: the most it can be."""
        return self.seq_len / 2

    @property
    def tokens_per_step(self) -> int:
        """Tokens of an optimizer step."""
        return self.rows * self.seq_len

    def micro_batch_rows_per_rank(self, dp_size: int) -> int:
        """Return the rows of a forward pass with ``dp_size`` data-parallel ranks; 0 when these do not divide the rows."""
        return 0 if self.rows % dp_size else micro_batch_rows(self.rows, self.micro_batch_rows, dp_size)


def stage_workloads(config: Config) -> list[StageWorkload]:
    """Return the workloads of the five stages, and of each fine-tuning for which data is configured.

    With named runs the section ``sft`` is what they share, and none itself.
    """
    tunings = {stage_of_run(run.name): config_of_run(config, run) for run in config.sft.runs} or {SFT: config}
    found = [_stage(config, name) for name in STAGE_NAMES]
    return [*found, *(_sft(tuning, stage) for stage, tuning in tunings.items() if tuning.sft.data)]


def needle_lengths(config: Config, stage: str) -> list[int]:
    """Lengths of the needle documents of ``stage`` in tokens, shortest first.

    Rounded to what the context- and tensor-parallel ranks can share; those too short to hide a needle are excluded.
    """
    p = config.parallel
    parts = (2 * p.context if p.context > 1 else 1) * p.tensor
    lengths = {round(share * config.seq_len(stage)) // parts * parts for share in config.evaluate.lengths}
    return sorted(length for length in lengths if length >= SHORTEST_NEEDLE_TOKENS)


def model_with_vocab(config: Config) -> ModelConfig:
    """Return the model section with a vocabulary: without prepared data the tokenizer's configured size stands in."""
    return replace(config.model, vocab_size=config.model.vocab_size or config.tokenizer.vocab_size)


def _stage(config: Config, name: str) -> StageWorkload:
    stage, seq_len = config.stages[name], config.seq_len(name)
    return StageWorkload(
        stage=name,
        seq_len=seq_len,
        rows=config.global_batch_rows(name),
        micro_batch_rows=stage.micro_batch_rows,
        steps=config.num_steps(name),
        config_section=config_section(name),
        mix_pairs=_mix_pairs(seq_len, (stage.short, stage.medium, stage.long), config.curriculum.length_scale),
        evaluated=_evaluated(config, name, seq_len),
    )


def _evaluated(config: Config, stage: str, seq_len: int) -> tuple[tuple[int, int], ...]:
    """Rows as ``m1_stages.evaluation`` makes them: needles at each depth and a control, documents whole and in pieces."""
    e = config.evaluate
    if not e.enabled:
        return ()
    needles = tuple((e.samples * (len(e.depths) + 1), length) for length in needle_lengths(config, stage))
    return (*needles, (2 * e.documents, seq_len)) if e.documents else needles


def _sft(config: Config, stage: str) -> StageWorkload:
    seq_len, sft = config.sft_seq_len, config.sft
    return StageWorkload(
        stage=stage,
        seq_len=seq_len,
        rows=max(1, sft.global_batch_tokens // seq_len),
        micro_batch_rows=sft.micro_batch_rows,
        steps=None,
        config_section=config_section(SFT),
        mix_pairs=seq_len / 2,
        lora=configured_lora(sft, stage),
    )


def _mix_pairs(seq_len: int, shares: tuple[float, float, float], length_scale: float) -> float:
    """Return half the mean length of a token's document; within short, medium and long all lengths hold as many tokens."""
    edges = [0.0, *(edge * length_scale for edge in BUCKET_EDGES_TOKENS[:2]), float(seq_len)]
    mean = 0.0
    for share, low, high in zip(shares, edges[:-1], edges[1:], strict=True):
        low, high = min(low, seq_len), min(max(low, high), seq_len)
        mean += share * (low + high) / 2
    return mean / 2
