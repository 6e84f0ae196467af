"""The tensors of a source under our names: compared with what its configuration needs, and read part by part."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from m1_stages.config import ModelConfig
from m1_stages.decay import Slopes, is_released, released_slopes
from m1_stages.errors import CheckpointError
from m1_stages.hf.source.config_json import SourceConfig
from m1_stages.hf.source.folder import SourceFolder
from m1_stages.hf.tensor_names import (
    decay_buffers,
    expert_from_released,
    from_released,
    is_experts,
    our_shapes,
    rows_from_proportional,
    to_released,
)

DECAY = ("slope_rate", "query_decay", "key_decay", "diagonal_decay")
ROUTER = "block_sparse_moe.gate.weight"
_LOOK = 1 << 20
"""Values that are looked at together for NaN and infinity: few, as the allocator keeps what larger pieces leave."""


def released_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return name and shape of every released tensor of ``model``, without decay buffers."""
    return {
        name: tuple(part.shape)
        for ours, shape in our_shapes(model).items()
        for name, part in to_released(ours, torch.empty(shape, device="meta"), model)
    }


def released_bytes(model: ModelConfig, weights: torch.dtype, routers: torch.dtype) -> int:
    """Return the bytes of all released tensors in these dtypes."""
    return sum(
        torch.Size(shape).numel() * (routers if name.endswith(ROUTER) else weights).itemsize
        for name, shape in released_shapes(model).items()
    )


def refuse_other_names(expected: Collection[str], found: Collection[str], where: str) -> None:
    """Refuse tensors that the model does not have, and missing ones.

    Raises:
        CheckpointError: the message counts both and names the first of each.
    """
    missing = [name for name in expected if name not in found]
    extra = sorted(name for name in found if name not in expected)
    if missing or extra:
        groups = {"missing tensors": missing, "tensors that the model does not have": extra}
        parts = [f"{what}: {len(names):,}, {names[0]} first" for what, names in groups.items() if names]
        fused = any(name.endswith(".mlp.experts.gate_up_proj") for name in extra)
        raise CheckpointError(
            "; ".join(parts),
            where=where,
            fix="save it with transformers' save_pretrained(save_original_format=True), its default"
            if fused
            else "the source is not complete, or its config.json belongs to another model",
        )


class SourceTensors:
    """The tensors of ``folder`` as our model holds them.

    Raises:
        CheckpointError: tensors are missing, are not the model's, or have another shape; or decay buffers are not whole.
    """

    def __init__(self, folder: SourceFolder, config: SourceConfig) -> None:
        self._folder, self._config, self.model = folder, config, config.model
        self._buffers = self._named_buffers(folder.entries)
        expected = released_shapes(self.model)
        refuse_other_names(expected, folder.entries.keys() - self._buffers, str(folder.path))
        for name, shape in expected.items():
            self._require(folder.entries[name][1] == shape, name, f"it has shape {list(folder.entries[name][1])}, "
                          f"and config.json needs {list(shape)}")  # fmt: skip

    def dtypes(self) -> dict[str, torch.dtype]:
        """Return the dtype in which every tensor of ours holds the source's values exactly: bf16 or fp32."""
        out = {}
        for name, shape in our_shapes(self.model).items():
            parts = to_released(name, torch.empty(shape, device="meta"), self.model)
            exact = all(self._folder.entries[part][0] == torch.bfloat16 for part, _ in parts)
            out[name] = torch.bfloat16 if exact else torch.float32
        return out

    def read(self, name: str, dtype: torch.dtype, expert: int | None = None) -> Tensor:
        """Read our tensor ``name``, or one expert's part of it, into memory of its own.

        Args:
            dtype: of ``dtypes``.

        Raises:
            CheckpointError: it cannot be read, or a value is not finite.
        """
        if is_experts(name):
            assert expert is not None
            tensor = expert_from_released(name, expert, self._get)[None]
        else:
            tensor = from_released(name, self._get, self.model)
        tensor = tensor.to(dtype).contiguous()
        return tensor.clone() if tensor.untyped_storage().nbytes() != tensor.nbytes else tensor

    def slopes(self) -> Slopes:
        """Return the decay rates: those of the buffers, else the released ones.

        Raises:
            CheckpointError: the four buffers of a layer contradict each other.
        """
        released = released_slopes(self.model.num_layers, self.model.num_heads)
        if not self._buffers:
            return released
        slopes = [self._slopes_of(layer) or row for layer, row in enumerate(released)]
        for name, expected in decay_buffers(self.model, slopes):
            found = self._folder.get(name).float()
            self._require(
                found.shape == expected.shape and torch.allclose(found, expected, rtol=1e-4, atol=1e-6),
                name,
                "it contradicts slope_rate of its layer: transformers' prefill and its decoding would differ",
            )
        return released if is_released(slopes, self.model) else slopes

    def _slopes_of(self, layer: int) -> list[float] | None:
        if self.model.is_softmax(layer):
            return None
        name = f"model.layers.{layer}.self_attn.slope_rate"
        rates = self._folder.get(name).float().flatten()
        self._require(
            rates.numel() == self.model.num_heads and bool((rates.isfinite() & (rates > 0)).all()),
            name,
            f"it must hold {self.model.num_heads} rates above 0",
        )
        return [float(rate) for rate in rates]

    def _named_buffers(self, found: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> set[str]:
        """The decay buffers of all lightning layers when there are any, in fp32."""
        lightning = [n for n in range(self.model.num_layers) if not self.model.is_softmax(n)]
        names = {f"model.layers.{layer}.self_attn.{buffer}" for layer in lightning for buffer in DECAY}
        present = names & found.keys()
        if not present:
            return set()
        for name in sorted(names - present):
            self._require(False, name, f"{len(present)} of {len(names)} decay buffers are there: all, or none")
        for name in sorted(names):
            dtype = str(found[name][0]).removeprefix("torch.")
            self._require(dtype == "float32", name, f"it is {dtype}, which rounds decay rates: save the source in fp32")
        return names

    def _get(self, name: str) -> Tensor:
        tensor = self._folder.get(name)
        for values in tensor.reshape(-1).split(_LOOK):
            self._require(bool(values.isfinite().all()), name, "it has values that are not finite")
        c = self.model
        if self._config.proportional and name.endswith(("q_proj.weight", "k_proj.weight")):
            return rows_from_proportional(tensor, head_dim=c.head_dim, rotary_dim=c.rotary_dim)
        return tensor

    def _require(self, ok: bool, name: str, what: str) -> None:
        if not ok:
            file = self._folder.file_of.get(name)
            where = self._folder.path / file if file else self._folder.path
            raise CheckpointError(f"{name}: {what}", where=str(where), fix="mend the source, or import another one")
