"""Seconds that collectives take, from what they move over which links. Nothing overlaps with computing: the trainer waits.

Ranks are numbered as Megatron does: tensor fastest, then context, data, pipeline; experts: expert-tensor, expert, replicas,
pipeline. A group whose ranks lie ``stride`` apart therefore fills machines one after another.
"""

from __future__ import annotations

from dataclasses import dataclass

from m1_stages.plan.hardware import CALIBRATION, Calibration, Gpu


@dataclass(frozen=True, slots=True)
class Group:
    """Ranks that talk to each other."""

    size: int
    stride: int
    gpu: Gpu
    c: Calibration = CALIBRATION

    @property
    def here(self) -> int:
        """Ranks of the group on one machine."""
        return min(self.size, max(1, self.gpu.per_node // self.stride))

    def ring(self, total_bytes: float, *, times: float = 1.0) -> float:
        """``times`` all-gathers (or reduce-scatters) of ``total_bytes`` over the group; an all-reduce is two of them.

        Between machines a ring enters and leaves each by the network cards of all its ranks there.
        """
        if self.size == 1 or not times:
            return 0.0
        rate = self.gpu.link_bandwidth * self.c.link
        if self.here < self.size:
            rate = min(rate, self.gpu.network_bandwidth * self.c.network * self.here)
        moved = total_bytes * (self.size - 1) / self.size
        return times * (moved / rate + self._latency)

    def exchange(self, bytes_per_rank: float, *, times: float = 1.0) -> float:
        """``times`` all-to-alls in which each rank sends ``bytes_per_rank``, its own share included."""
        if self.size == 1 or not times:
            return 0.0
        near = bytes_per_rank * (self.here - 1) / self.size / (self.gpu.link_bandwidth * self.c.link)
        far = bytes_per_rank * (self.size - self.here) / self.size / (self.gpu.network_bandwidth * self.c.network)
        return times * (max(near, far) + self._latency)

    def pass_on(self, message_bytes: float, *, times: float = 1.0) -> float:
        """``times`` messages to the next rank."""
        if self.size == 1:
            return 0.0
        near = self.stride < self.gpu.per_node
        rate = self.gpu.link_bandwidth * self.c.link if near else self.gpu.network_bandwidth * self.c.network
        return times * (message_bytes / rate + self.c.latency_s)

    @property
    def _latency(self) -> float:
        return self.c.latency_s + self.c.hop_s * (self.size - self.here)
