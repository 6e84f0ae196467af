"""Where the processes of one machine meet: on a port that the launcher holds until the first of them listens on it. No torch."""

from __future__ import annotations

import datetime
import os
import socket
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed import TCPStore

LISTENER = "M1_LISTENER_FD"
"""Environment variable of the processes that a launcher started here: its listening socket, as rank 0 inherits it."""


def listen() -> socket.socket:
    """Return a socket that listens on a free port of this machine. While it is open nobody else gets that port."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen()
    return listener


def inherited_store(rank: int, world: int, timeout: datetime.timedelta) -> TCPStore | None:
    """Return the store of a launcher that holds the port.

    None under torchrun, srun, or a start by hand: torch makes one itself.
    """
    descriptor = os.environ.get(LISTENER)
    if descriptor is None:
        return None
    from torch.distributed import TCPStore

    return TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        world,
        rank == 0,
        timeout,
        master_listen_fd=int(descriptor) if rank == 0 else None,
    )
