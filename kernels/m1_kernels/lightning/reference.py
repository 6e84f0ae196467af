"""Float64 quadratic lightning attention: slow, obvious, the truth other backends are compared with."""

from __future__ import annotations

import torch
from torch import Tensor


def lightning_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    doc_lengths: tuple[int, ...],
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute ``o_t = sum_{j<=t} exp(log_decay * (t - j)) (q_t . k_j) v_j`` per document, plus the decayed initial state.

    Packed [tokens, H, D] inputs; returns o [tokens, H, Dv] and final states [documents, H, Dk, Dv]. Everything is
    computed and returned in float64; autograd works.
    Source: MiniMax-01 (arXiv 2501.08313), section 2.2; no scale, the current token undecayed.
    """
    log_decay = log_decay.double()
    documents = zip(*(x.double().split(doc_lengths) for x in (q, k, v)), strict=True)
    outputs, states = [], []
    for n, document in enumerate(documents):
        qd, kd, vd = (x.transpose(0, 1) for x in document)
        length = doc_lengths[n]
        t = torch.arange(length, dtype=torch.float64, device=q.device)
        distance = t[:, None] - t[None, :]
        weight = torch.where(distance >= 0, torch.exp(log_decay[:, None, None] * distance.clamp(min=0)), 0.0)
        out = (qd @ kd.transpose(1, 2) * weight) @ vd
        state = (kd * torch.exp(log_decay[:, None] * (length - 1 - t))[..., None]).transpose(1, 2) @ vd
        if initial_state is not None:
            before = initial_state[n].double()
            out = out + (qd * torch.exp(log_decay[:, None] * (t + 1))[..., None]) @ before
            state = state + torch.exp(log_decay * length)[:, None, None] * before
        outputs.append(out.transpose(0, 1))
        states.append(state)
    return torch.cat(outputs), torch.stack(states)
