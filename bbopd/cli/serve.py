"""``bbopd serve``: host a model as a teacher."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import signal
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bbopd.errors import ConfigError

if TYPE_CHECKING:
    from bbopd.config import ServeConfig
    from bbopd.rpc.security import ServerAccess

__all__ = ["add_arguments", "run"]

_GRACE = 10.0  # seconds for answers under way when asked to stop
_log = logging.getLogger("bbopd.serve")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", nargs="?", metavar="teacher.yaml", help="its configuration; --model alone will do")
    parser.add_argument("--model", help="hub id, folder, or GGUF file")
    parser.add_argument("--host", help="address to serve on (127.0.0.1); any but loopback needs tls and a token in the configuration")
    parser.add_argument("--port", type=int, help="port to serve on (7070); 0 takes a free one")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides", help="change one setting; may be repeated"
    )
    parser.add_argument("--ready-file", type=Path, metavar="PATH", help="write the address here once it is served")
    parser.add_argument("--parent-pid", type=int, metavar="PID", help="stop when this process, the parent, is gone")


def run(args: argparse.Namespace) -> int:
    """Serve until SIGTERM or Ctrl-C, then finish what is under way. Returns the exit code; raises `BbopdError`."""
    config = _configuration(args)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname).1s %(message)s", datefmt="%H:%M:%S")
    if args.parent_pid is not None:
        threading.Thread(target=_follow_parent, args=(args.parent_pid,), daemon=True, name="bbopd-parent").start()

    import asyncio

    from bbopd.rpc.security import ServerAccess
    from bbopd.teachers.hf import HFBackend

    access = ServerAccess.from_config(config)
    _log.info("loading %s", config.model)
    started = time.monotonic()
    backend = HFBackend.from_config(config)
    offers = ", ".join(offer.level for offer in backend.info.offers)
    _log.info("loaded in %.1f s: %d entries of vocabulary, offers %s", time.monotonic() - started, backend.info.vocab_size, offers)
    asyncio.run(_serve(backend, config, access, args.ready_file))
    return 0


def _configuration(args: argparse.Namespace) -> ServeConfig:
    from bbopd.config import ServeConfig
    from bbopd.config_file import parse_config, read_yaml

    given: dict[str, Any] = read_yaml(args.config) if args.config else {}
    given.update({key: getattr(args, key) for key in ("model", "host", "port") if getattr(args, key) is not None})
    if "model" not in given and not any(text.startswith("model=") for text in args.overrides):
        raise ConfigError("nothing to serve: give a teacher.yaml, or --model with a hub id, a folder or a GGUF file")
    return parse_config(given, args.overrides, ServeConfig, args.config or "bbopd serve")


async def _serve(backend: Any, config: ServeConfig, access: ServerAccess, ready_file: Path | None) -> None:
    import asyncio

    from bbopd.rpc.server import start_server

    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    server = await start_server(
        backend,
        host=config.host,
        port=config.port,
        access=access,
        batch_tokens=config.batch_tokens,
        max_inflight_bytes=config.max_inflight_bytes,
    )
    target = f"grpc://[{server.host}]:{server.port}" if ":" in server.host else f"grpc://{server.host}:{server.port}"
    _log.info("serving %s at %s (Ctrl-C ends it)", config.model, target)
    if ready_file is not None:
        _write_whole(ready_file, target + "\n")
    try:
        await stopping.wait()
        _log.info("stopping: finishing what is under way")
    finally:
        await server.stop(_GRACE)
        if ready_file is not None:
            with contextlib.suppress(OSError):
                ready_file.unlink()
        _log.info("stopped")


def _write_whole(path: Path, text: str) -> None:
    """Whoever sees the file sees all of it."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        unfinished.write_text(text, encoding="utf-8")
        unfinished.replace(path)
    except OSError as error:
        raise ConfigError(f"cannot write --ready-file {path}: {error.strerror or error}") from error


def _follow_parent(pid: int) -> None:
    """End as SIGTERM does once the parent is gone. Polled: Linux's own notice is sent when the parent's *thread* ends."""
    while os.getppid() == pid:
        time.sleep(1.0)
    os.kill(os.getpid(), signal.SIGTERM)
