"""Float64 quadratic lightning attention: slow, obvious, the truth other backends are compared with."""

from __future__ import annotations

import torch
from torch import Tensor


def lightning_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``o_t = sum_{j<=t} exp(log_decay * (t - j)) (q_t . k_j) v_j`` per document, plus the decayed initial state.

    Shapes and arguments as in ``lightning_attention``. Everything is computed and returned in float64; autograd works.
    Source: MiniMax-01 (arXiv 2501.08313), section 2.2; no scale, the current token undecayed.
    """
    shape = v.shape
    bounds = _bounds(q, cu_seqlens)
    q, k, v = (x.double().reshape(-1, *x.shape[2:]) for x in (q, k, v))
    log_decay = log_decay.double()
    outputs, states = [], []
    for n, (start, end) in enumerate(bounds):
        qd, kd, vd = (x[start:end].transpose(0, 1) for x in (q, k, v))
        t = torch.arange(end - start, dtype=torch.float64, device=q.device)
        distance = t[:, None] - t[None, :]
        weight = torch.where(distance >= 0, torch.exp(log_decay[:, None, None] * distance.clamp(min=0)), 0.0)
        out = (qd @ kd.transpose(1, 2) * weight) @ vd
        state = (kd * torch.exp(log_decay[:, None] * (end - start - 1 - t))[..., None]).transpose(1, 2) @ vd
        if initial_state is not None:
            before = initial_state[n].double()
            out = out + (qd * torch.exp(log_decay[:, None] * (t + 1))[..., None]) @ before
            state = state + torch.exp(log_decay * (end - start))[:, None, None] * before
        outputs.append(out.transpose(0, 1))
        states.append(state)
    return torch.cat(outputs).reshape(shape), torch.stack(states)


def _bounds(q: Tensor, cu_seqlens: Tensor | None) -> list[tuple[int, int]]:
    if cu_seqlens is None:
        batch, length = q.shape[:2]
        return [(b * length, (b + 1) * length) for b in range(batch)]
    edges = cu_seqlens.tolist()
    return list(zip(edges[:-1], edges[1:], strict=True))
