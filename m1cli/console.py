"""Defines the consoles of the process. Only rank 0 prints; Rich respects NO_COLOR and non-terminals."""

from __future__ import annotations

import os

from rich.console import Console

is_rank_0 = int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))) == 0

console = Console(quiet=not is_rank_0, highlight=False)
errors = Console(stderr=True, highlight=False, soft_wrap=True)
