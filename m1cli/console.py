"""The one console. Only rank 0 speaks; NO_COLOR and non-terminals are respected by Rich."""

from __future__ import annotations

import os

from rich.console import Console

is_rank_0 = int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))) == 0

console = Console(quiet=not is_rank_0, highlight=False)
errors = Console(stderr=True, highlight=False, soft_wrap=True)
