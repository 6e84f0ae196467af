"""Opens the engine on a checkpoint, and serves it until a signal comes."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from m1_stages.checkpoint import CheckpointStore, Committed
from m1_stages.checkpoint.tokenizer_identity import refuse_other_tokenizer
from m1_stages.config import Resolved
from m1_stages.config.sft_runs import for_stage
from m1_stages.errors import CheckpointError, EnvironmentProblem
from m1_stages.generation import EngineOptions
from m1_stages.generation.prompts import PromptEncoder
from m1_stages.jobs.export import choose_checkpoint
from m1_stages.jobs.generate import longest_context
from m1_stages.jobs.prepared import chat_template, open_tokenizer
from m1_stages.packages import require_packages
from m1_stages.run_dir import CHECKPOINTS
from m1_stages.runtime.signals import StopRequest

if TYPE_CHECKING:
    from m1_stages.jobs.serving.app import Version

ONE_DEVICE = (
    "parallel.processes=1", "parallel.tensor=1", "parallel.expert=1", "parallel.expert_tensor=1", "parallel.pipeline=1",
    "parallel.context=1",
)  # fmt: skip
"""A server has one process; checkpoints of every layout can be loaded into it."""
NEWEST = "newest"


@dataclass(frozen=True, kw_only=True, slots=True)
class ServeOptions:
    """What is served, and where."""

    host: str = "127.0.0.1"
    port: int = 8000
    stage: str | None = None
    checkpoint: Path | None = None
    slots: int = 64
    context: int | None = None
    prefill_tokens: int = 32_768


def require_libraries() -> None:
    """Check that the optional libraries are there.

    Raises:
        EnvironmentProblem: one is missing.
    """
    require_packages("starlette", "uvicorn", for_what="--serve", extra="serve")


def refuse_address(host: str, port: int) -> None:
    """Check that a server can listen there, before minutes are spent on loading a model.

    Raises:
        EnvironmentProblem: another one does, or this machine does not have the address.
    """
    try:
        for family, kind, protocol, _, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
            with socket.socket(family, kind, protocol) as trial:
                trial.setsockopt(
                    socket.SOL_SOCKET, socket.SO_REUSEADDR, 1
                )  # as the server will: a port just left is free
                trial.bind(address)
    except OSError as error:
        raise EnvironmentProblem(
            f"no server can listen at {host}:{port}: {error.strerror}", fix="choose another --port, or --host"
        ) from error


def serve(resolved: Resolved, options: ServeOptions, *, on_ready: Callable[[str, Version, int], None]) -> str:
    """Serve until a signal comes; unfinished answers end with an error.

    Args:
        resolved: a configuration for one process (``ONE_DEVICE``).
        on_ready: called once with the address, the weights and the context.

    Returns:
        The name of the signal.

    Raises:
        CheckpointError: there is no such checkpoint, or it is damaged.
        ConfigError: the checkpoint has another tokenizer, or a size that cannot be used.
        EnvironmentProblem: a library is missing, the address is taken, or the device has no room.
    """
    require_libraries()
    refuse_address(options.host, options.port)
    import uvicorn

    from m1_stages.generation.loading import open_engine
    from m1_stages.jobs.serving.app import Version, build_app
    from m1_stages.jobs.serving.protocol import Reader
    from m1_stages.jobs.serving.service import Service

    def version_of(committed: Committed) -> Version:
        meta = committed.meta
        return Version(checkpoint=committed.path.name, step=meta.global_step, stage=meta.stage, sha256=committed.sha256)

    committed = choose_checkpoint(resolved, stage=options.stage, checkpoint=options.checkpoint)
    resolved = for_stage(resolved, committed.meta.stage)
    manifest = open_tokenizer(resolved)
    data_dir = resolved.path(resolved.config.data.out)
    refuse_other_tokenizer(committed, manifest.tokenizer_sha256, data_dir)
    context = longest_context(resolved, committed) if options.context is None else options.context
    sizes = EngineOptions(slots=options.slots, capacity=context, prefill_tokens=options.prefill_tokens)
    template, date = chat_template(resolved), resolved.config.sft.date
    encoder = PromptEncoder(data_dir / "tokenizer", manifest.eod_token, template, date=date)
    try:
        with open_engine(resolved, committed, sizes, decode=encoder.decode) as engine, StopRequest() as stop:
            version = version_of(committed)
            engine.weights_changed(version.name)
            service = Service(engine, encoder.decode)

            def load(name: str | int) -> Version:
                from m1_stages.generation.loading import replace_weights

                new = _named(resolved, name, committed)
                refuse_other_tokenizer(new, manifest.tokenizer_sha256, data_dir)
                found = version_of(new)
                replace_weights(engine, new, found.name)
                return found

            app = build_app(
                service, Reader(encoder=encoder, model=resolved.run_dir.name, context=context), version, load
            )
            config = uvicorn.Config(
                app, host=options.host, port=options.port, log_config=None, timeout_graceful_shutdown=5
            )
            server = _Server(uvicorn.Server(config))
            server.start()
            on_ready(server.address(options), version, context)
            try:
                service.run(lambda: stop.asked() or server.has_ended())
            finally:
                server.stop()
            return stop.received or "request"
    finally:
        encoder.close()


def _named(resolved: Resolved, name: str | int, present: Committed) -> Committed:
    """The checkpoint of the run with this name or step, or its newest one."""
    found = CheckpointStore(resolved.run_dir / CHECKPOINTS).committed()
    chosen = [c for c in found if name in (NEWEST, c.path.name, c.meta.global_step)]
    if not chosen:
        have = ", ".join(c.path.name for c in found) or "none"
        raise CheckpointError(f"there is no checkpoint {name!r} (checkpoints: {have})")
    if len(chosen) > 1 and name != NEWEST:
        raise CheckpointError(
            f"step {name} has several checkpoints: {', '.join(c.path.name for c in chosen)}; name one"
        )
    if chosen[0].meta.extra["model"] != present.meta.extra["model"]:
        raise CheckpointError(f"{chosen[0].path.name} is a model of another shape than the one that is served")
    return chosen[0]


class _Server:
    """uvicorn in a thread of its own: the engine has the main one, where signals arrive."""

    def __init__(self, server: Any) -> None:
        self._server = server
        self._thread = threading.Thread(target=self._run, name="http", daemon=True)

    def start(self) -> None:
        """Return when it listens.

        Raises:
            EnvironmentProblem: it cannot listen at this address.
        """
        config = self._server.config
        self._thread.start()
        while not self._server.started:
            if not self._thread.is_alive():
                raise EnvironmentProblem(
                    f"no server can listen at {config.host}:{config.port}", fix="choose another --port, or --host"
                )
            self._thread.join(0.02)

    def address(self, options: ServeOptions) -> str:
        """Where it listens, with the port that port 0 got."""
        port = self._server.servers[0].sockets[0].getsockname()[1]
        return f"http://{f'[{options.host}]' if ':' in options.host else options.host}:{port}"

    def has_ended(self) -> bool:
        """Whether it stopped by itself."""
        return not self._thread.is_alive()

    def stop(self) -> None:
        """Let it finish what it can, and wait for it."""
        self._server.should_exit = True
        self._thread.join(10)

    def _run(self) -> None:
        try:
            self._server.run()
        except SystemExit:  # uvicorn's way to say that it could not listen
            return
