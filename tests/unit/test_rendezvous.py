"""Where ranks meet: the port is held from its choice on, so that two commands at once cannot get the same one."""

from __future__ import annotations

import datetime
import errno
import os
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from m1_stages.runtime.rendezvous import LISTENER, inherited_store, listen
from m1cli import launch

SOON = datetime.timedelta(seconds=20)


def test_nobody_else_gets_the_port_before_the_ranks_are_there() -> None:
    listener = listen()
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as torch does
        with pytest.raises(OSError) as caught:
            other.bind(listener.getsockname())
    assert caught.value.errno == errno.EADDRINUSE
    listener.close()


def test_ranks_meet_at_the_socket_that_rank_0_inherits(monkeypatch: pytest.MonkeyPatch) -> None:
    listener = listen()
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(listener.getsockname()[1]))
    monkeypatch.setenv(LISTENER, str(os.dup(listener.fileno())))  # the store closes it
    listener.close()
    with ThreadPoolExecutor(2) as threads:  # rank 1 is there first
        stores = [threads.submit(inherited_store, rank, 2, SOON) for rank in (1, 0)]
    first, second = (store.result() for store in stores)
    assert first is not None
    assert second is not None
    first.set("said by", "rank 1")
    assert second.get("said by") == b"rank 1"
    monkeypatch.delenv(LISTENER)
    assert inherited_store(0, 2, SOON) is None


def test_the_launcher_gives_the_socket_to_rank_0_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[tuple[str, str, list[int]]] = []

    def popen(command: list[str], *, env: dict[str, str], pass_fds: list[int], **more: object) -> object:
        with socket.socket() as other, pytest.raises(OSError):
            other.bind(("127.0.0.1", int(env["MASTER_PORT"])))
        started.append((env["RANK"], env[LISTENER], pass_fds))
        return ended(("-c", ""))

    def ended(arguments: tuple[str, ...]) -> object:
        return real([sys.executable, *arguments])

    real = subprocess.Popen
    monkeypatch.setattr(launch.subprocess, "Popen", popen)
    assert launch.run_ranks(["sft"], 2, launch.Path("run")) == 0
    (_, number, passed), (_, _, other) = started
    assert ([rank for rank, *_ in started], passed, other) == (["0", "1"], [int(number)], [])
    with pytest.raises(OSError):
        os.fstat(int(number))
