"""How the packing of a batch reaches every layer of the model."""

from __future__ import annotations

from dataclasses import dataclass

from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from m1_data.loader import PackedBatch


@dataclass
class Packing(PackedSeqParams):
    """Megatron's packed-sequence parameters with what our layers need besides."""

    cu_seqlens: Tensor | None = None
    """[documents + 1] int32."""
    doc_lengths: tuple[int, ...] = ()
    """The same on the host, so that no layer waits for the device."""
    positions: Tensor | None = None
    """[T] int64 position of each token in its document."""
    trained_tokens: int = 0
    """Tokens of this micro-batch that carry loss, on this data-parallel rank."""

    @classmethod
    def of(cls, batch: PackedBatch) -> Packing:
        """Take over what a ``PackedBatch`` says."""
        return cls(
            cu_seqlens=batch.cu_seqlens,
            doc_lengths=batch.doc_lengths,
            positions=batch.position_ids.view(-1),
            trained_tokens=batch.trained_tokens,
        )
