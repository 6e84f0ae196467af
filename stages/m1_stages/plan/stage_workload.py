"""What a stage asks of the machine: rows, tokens, steps, and how far a token looks back."""

from __future__ import annotations

from dataclasses import dataclass, replace

from m1_data.spec import BUCKET_EDGES_TOKENS
from m1_stages.config import STAGE_NAMES, Config, ModelConfig
from m1_stages.curriculum import SFT


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """One stage."""

    stage: str
    seq_len: int
    """Tokens a row."""
    rows: int
    """Rows of an optimizer step."""
    micro_rows: int
    """Rows of a forward pass at most (``micro_batch_rows``)."""
    steps: int | None
    """None: known only when the data is (fine-tuning)."""
    mix_pairs: float
    """Mean number of tokens a token attends to when documents are as long as the mix says."""

    @property
    def row_pairs(self) -> float:
        """The same when every row is one document: the most it can be."""
        return self.seq_len / 2

    @property
    def tokens_per_step(self) -> int:
        """Tokens of an optimizer step."""
        return self.rows * self.seq_len

    def micro_rows_of(self, data: int) -> int:
        """Rows of a forward pass with ``data`` data-parallel ranks, as the training loop chooses them; 0: impossible."""
        if self.rows % data:
            return 0
        local = self.rows // data
        return max(m for m in range(1, min(self.micro_rows, local) + 1) if local % m == 0)


def works(config: Config) -> list[Work]:
    """The five stages, and fine-tuning if data is configured for it."""
    found = [_stage(config, name) for name in STAGE_NAMES]
    return [*found, _sft(config)] if config.sft.data else found


def model_of(config: Config) -> ModelConfig:
    """The model with a vocabulary: without prepared data the tokenizer's configured size stands in."""
    return replace(config.model, vocab_size=config.model.vocab_size or config.tokenizer.vocab_size)


def _stage(config: Config, name: str) -> Work:
    stage, seq_len = config.stages[name], config.seq_len(name)
    return Work(
        stage=name,
        seq_len=seq_len,
        rows=config.global_batch_rows(name),
        micro_rows=stage.micro_batch_rows,
        steps=config.num_steps(name),
        mix_pairs=_mix_pairs(seq_len, (stage.short, stage.medium, stage.long), config.curriculum.length_scale),
    )


def _sft(config: Config) -> Work:
    seq_len, sft = config.sft_seq_len, config.sft
    return Work(
        stage=SFT,
        seq_len=seq_len,
        rows=max(1, sft.global_batch_tokens // seq_len),
        micro_rows=sft.micro_batch_rows,
        steps=None,
        mix_pairs=seq_len / 2,
    )


def _mix_pairs(seq_len: int, shares: tuple[float, float, float], length_scale: float) -> float:
    """Half the mean length of a token's document; within short, medium and long all lengths hold as many tokens."""
    edges = [0.0, *(edge * length_scale for edge in BUCKET_EDGES_TOKENS[:2]), float(seq_len)]
    mean = 0.0
    for share, low, high in zip(shares, edges[:-1], edges[1:], strict=True):
        low, high = min(low, seq_len), min(max(low, high), seq_len)
        mean += share * (low + high) / 2
    return mean / 2
