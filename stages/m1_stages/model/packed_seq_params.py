"""The packed-sequence parameters that reach every layer of the model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron.core.packed_seq_params import PackedSeqParams as MegatronPackedSeqParams
from torch import Tensor
from torch.distributed import ProcessGroup

from m1_data.sampling.loader import PackedBatch
from m1_kernels.lightning.zigzag import ContextShards, zigzag_shards


@dataclass
class PackedSeqParams(MegatronPackedSeqParams):
    """Megatron's packed-sequence parameters, and what our layers need in addition."""

    cu_seqlens: Tensor | None = None
    """[documents + 1] int32: where the documents start, and the end."""
    doc_lengths: tuple[int, ...] = ()
    """Tokens of each document, on the host, so that no layer waits for the device."""
    positions: Tensor | None = None
    """[T] int64 position of each token in its document."""
    trained_tokens: int = 0
    """Tokens of this micro-batch that carry loss, on this rank."""
    shards: ContextShards | None = None
    """This rank's share of a sequence that is sharded over the context-parallel ranks; None without context parallelism."""
    predict_at: Tensor | None = None
    """[P] int64: the tokens of this rank whose predictions are wanted; None asks for the loss of all tokens."""

    @classmethod
    def of(cls, batch: PackedBatch, cp_group: ProcessGroup) -> PackedSeqParams:
        """Build the parameters of ``batch`` for this rank of ``cp_group``.

        Raises:
            ValueError: the batch was not cut for ``cp_group``.
        """
        if batch.shard != (cp_group.rank(), cp_group.size()):
            raise ValueError(f"the batch is shard {batch.shard}, this is rank {cp_group.rank()} of {cp_group.size()}")
        return cls(
            cu_seqlens=batch.cu_seqlens,
            doc_lengths=batch.doc_lengths,
            positions=batch.position_ids.view(-1),
            trained_tokens=batch.trained_tokens,
            shards=zigzag_shards(batch.doc_lengths, cp_group) if cp_group.size() > 1 else None,
        )

    def documents(self) -> dict[str, Any]:
        """The arguments by which the attention kernels tell documents apart."""
        if self.shards is not None:
            return {"shards": self.shards}
        return {"cu_seqlens": self.cu_seqlens, "doc_lengths": self.doc_lengths}
