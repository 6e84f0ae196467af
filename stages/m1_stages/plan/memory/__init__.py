"""Memory of a GPU and of its host: by part, and what follows from it."""

from m1_stages.plan.memory.gpu import Activations, Memory, estimate_memory

__all__ = ["Activations", "Memory", "estimate_memory"]
