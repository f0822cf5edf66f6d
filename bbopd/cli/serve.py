"""``bbopd serve``: host a model as a teacher."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bbopd.errors import ConfigError

if TYPE_CHECKING:
    from bbopd.config import ServeConfig
    from bbopd.rpc.backend import TeacherBackend

__all__ = ["add_arguments", "run"]

_log = logging.getLogger("bbopd.serve")


_SETTINGS = """settings, in teacher.yaml or by --set (all of them: docs/teachers.md):
  model, revision, dtype, device       what is loaded, and how
  engine, gpu_memory                   hf, or vllm (docs/teachers.md says what that offers); its share of a GPU
  levels, max_top_k                    what is offered
  max_sequence_tokens, batch_tokens    tokens of one sequence, and of one forward pass
  host, port                           where; any host but loopback needs tls and a token:
  tls.certificate, tls.key             PEM files; tls.client_ca asks clients for a certificate too
  token_file, token_env                where the tokens are, one a line; never the token itself
  max_client_tokens, max_client_streams, max_client_calls, max_inflight_bytes
                                       what one client may have in flight, open, and not yet taken
  max_client_requests_per_second       of one client; none: any number
  replay_bytes                         answers kept for clients that ask again
  metrics_port, metrics_host           Prometheus metrics over HTTP
  log                                  text, or json: one object a line
  drain_seconds                        for answers under way, on SIGTERM
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class, parser.epilog = argparse.RawDescriptionHelpFormatter, _SETTINGS
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
    if config.engine == "vllm":
        _prepare_vllm(config)
    if args.parent_pid is not None:
        threading.Thread(target=_follow_parent, args=(args.parent_pid,), daemon=True, name="bbopd-parent").start()

    from bbopd.rpc.run_server import serve, set_up_logs
    from bbopd.rpc.security import ServerAccess

    set_up_logs(config.log)
    access = ServerAccess.from_config(config)
    _log.info("loading %s", config.model)
    started = time.monotonic()
    backend = _backend(config)
    offers = ", ".join(offer.level for offer in backend.info.offers)
    _log.info("loaded in %.1f s: %d entries of vocabulary, offers %s", time.monotonic() - started, backend.info.vocab_size, offers)
    serve(backend, config, access, args.ready_file)
    return 0


def _prepare_vllm(config: ServeConfig) -> None:
    """Go on in the environment that vLLM wants: this process is started anew unless it has that already."""
    from bbopd.modeling import resolve_device
    from bbopd.vllm_setup import enter_engine_environment, require_vllm

    require_vllm("engine is vllm", "set engine=hf")
    for note in enter_engine_environment(resolve_device(config.device).type):
        print(f"note: {note}", file=sys.stderr)


def _backend(config: ServeConfig) -> TeacherBackend:
    if config.engine == "vllm":
        from bbopd.teachers.vllm import VLLMBackend

        return VLLMBackend.from_config(config)
    from bbopd.teachers.hf import HFBackend

    return HFBackend.from_config(config)


def _configuration(args: argparse.Namespace) -> ServeConfig:
    from bbopd.config import ServeConfig
    from bbopd.config_file import parse_config, read_yaml

    given: dict[str, Any] = read_yaml(args.config) if args.config else {}
    given.update({key: getattr(args, key) for key in ("model", "host", "port") if getattr(args, key) is not None})
    if "model" not in given and not any(text.startswith("model=") for text in args.overrides):
        raise ConfigError("nothing to serve: give a teacher.yaml, or --model with a hub id, a folder or a GGUF file")
    return parse_config(given, args.overrides, ServeConfig, args.config or "bbopd serve")


def _follow_parent(pid: int) -> None:
    """End as SIGTERM does once the parent is gone. Polled: Linux's own notice is sent when the parent's *thread* ends."""
    while os.getppid() == pid:
        time.sleep(1.0)
    os.kill(os.getpid(), signal.SIGTERM)
