"""What generation keeps of the tokens so far, slot by slot: recurrent states and a cache of keys and values."""

from __future__ import annotations

import torch

from m1_stages.config import ModelConfig


class SlotStates:
    """The states of ``slots`` sequences of at most ``capacity`` tokens, on one tensor-parallel rank.

    Attributes:
        recurrent: [lightning layers, slots, heads here, D, D] fp32: its size does not depend on the context.
        keys, values: [softmax layers, slots, capacity, key heads here, D] in the model's dtype.
    """

    def __init__(
        self, model: ModelConfig, *, slots: int, capacity: int, tp: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        softmax = sum(model.is_softmax(layer) for layer in range(model.num_layers))
        heads, kv, d = model.num_heads // tp, model.num_kv_heads // tp, model.head_dim
        self.slots, self.capacity = slots, capacity
        self.recurrent = torch.zeros(model.num_layers - softmax, slots, heads, d, d, device=device)
        self.keys, self.values = (
            torch.zeros(softmax, slots, capacity, kv, d, dtype=dtype, device=device) for _ in range(2)
        )

    def num_bytes(self) -> dict[str, int]:
        """Return the bytes of the recurrent states ("lightning") and of the cache ("softmax")."""
        return {"lightning": self.recurrent.nbytes, "softmax": self.keys.nbytes + self.values.nbytes}


def state_bytes(model: ModelConfig, *, slots: int, capacity: int, tp: int, dtype: torch.dtype) -> int:
    """Return the bytes that ``SlotStates`` would need."""
    states = SlotStates(model, slots=slots, capacity=capacity, tp=tp, dtype=dtype, device=torch.device("meta"))
    return sum(states.num_bytes().values())
