"""Notes of Megatron-Core and torch about which the user of a run can do nothing; they are not shown."""

from __future__ import annotations

import logging
import warnings


def hide_library_notes() -> None:
    """Call it before Megatron-Core is imported. Errors that it logs are shown, whatever they are about."""
    ignore = warnings.filterwarnings
    ignore("ignore", module=r"megatron\..*")  # about Transformer Engine and Apex, which we do without
    # Seen when Python compiles its files, which uv leaves to the first import; the module is then the file's path.
    ignore("ignore", category=SyntaxWarning, module=r".*[/\\]megatron[/\\].*")
    ignore("ignore", category=FutureWarning, module=r"torch\.distributed\..*")  # Megatron's old calls
    ignore("ignore", message=r"barrier\(\): using the device")  # each process has set its one device
    ignore("ignore", message="torch.distributed is disabled")  # each rank reads a checkpoint for itself
    ignore("ignore", message="The argument order of load has been changed")  # Megatron's call of it
    logging.getLogger("megatron").setLevel(
        logging.ERROR
    )  # what it deprecates: docs/adr and docs/traps.md say what we use
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # no CUDA toolkit; nothing is compiled
