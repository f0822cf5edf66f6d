"""A teacher's whole life in one process: served until SIGTERM or Ctrl-C, then drained."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import signal
from pathlib import Path

from bbopd.config import ServeConfig
from bbopd.errors import ConfigError
from bbopd.rpc.backend import TeacherBackend
from bbopd.rpc.clients import ClientLimits
from bbopd.rpc.freed_memory import keep_freed_memory
from bbopd.rpc.observe import JsonFormatter, TextFormatter, shown_in_text
from bbopd.rpc.renewal import AccessRenewal
from bbopd.rpc.security import ServerAccess
from bbopd.rpc.server import start_server

__all__ = ["serve", "set_up_logs", "write_whole"]

_log = logging.getLogger("bbopd.serve")


def set_up_logs(style: str) -> None:
    """``json``: one object a line, every event. ``text``: for a person at a terminal, without an event for every item."""
    handler = logging.StreamHandler()
    if style == "json":
        handler.setFormatter(JsonFormatter())
    else:
        handler.setFormatter(TextFormatter())
        handler.addFilter(shown_in_text)
    logging.basicConfig(level=logging.INFO, handlers=[handler])


def serve(backend: TeacherBackend, config: ServeConfig, access: ServerAccess | None = None, ready_file: Path | None = None) -> None:
    """Serve ``backend`` until SIGTERM or Ctrl-C, then finish what is under way. SIGHUP reads certificates and tokens again.

    Parameters
    ----------
    config : address, limits and the rest; what belongs to loading a model is not looked at.
    access : certificates and tokens, already read; None reads what ``config`` names.
    ready_file : takes the address once it is served, and goes with the server.

    Raises
    ------
    ConfigError : an address, a port or a file that cannot be used.
    """
    keep_freed_memory()
    asyncio.run(_serve(backend, config, access or ServerAccess.from_config(config), ready_file))


async def _serve(backend: TeacherBackend, config: ServeConfig, access: ServerAccess, ready_file: Path | None) -> None:
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    server = await start_server(
        backend,
        host=config.host,
        port=config.port,
        access=access,
        limits=ClientLimits(
            config.max_client_tokens,
            streams=config.max_client_streams,
            calls=config.max_client_calls,
            requests_per_second=config.max_client_requests_per_second,
        ),
        batch_tokens=config.batch_tokens,
        max_inflight_bytes=config.max_inflight_bytes,
        replay_bytes=config.replay_bytes,
    )
    renewal = AccessRenewal(config, server.renew_access)
    with contextlib.ExitStack() as cleanup:
        try:
            if config.metrics_port is not None:
                cleanup.callback(server.observer.serve_metrics(config.metrics_host, config.metrics_port))
                _log.info("metrics at http://%s:%d/metrics", config.metrics_host, config.metrics_port)
            _log.info("serving %s at %s%s (Ctrl-C ends it)", backend.info.model, server.target, ", with TLS" if access.certificate else "")
            if renewal.files:
                cleanup.callback(asyncio.create_task(renewal.run()).cancel)
                loop.add_signal_handler(signal.SIGHUP, renewal.read)
            if ready_file is not None:
                write_whole(ready_file, server.target + "\n")
                cleanup.callback(ready_file.unlink, missing_ok=True)
            gc.freeze()  # the model and all that was imported: nothing there becomes garbage while it serves, and looking takes long
            await stopping.wait()
            _log.info("stopping: finishing what is under way")
        finally:
            await server.stop(config.drain_seconds)
            _log.info("stopped")


def write_whole(path: Path, text: str) -> None:
    """Whoever sees the file sees all of it."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        unfinished.write_text(text, encoding="utf-8")
        unfinished.replace(path)
    except OSError as error:
        raise ConfigError(f"cannot write --ready-file {path}: {error.strerror or error}") from error
