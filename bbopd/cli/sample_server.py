"""``bbopd sample-server``: vLLM for runs on other machines, which push their weights into it."""

from __future__ import annotations

import argparse
import asyncio
import logging
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bbopd.config import SampleServerConfig

__all__ = ["add_arguments", "run"]

_log = logging.getLogger("bbopd.sample-server")

_SETTINGS = """settings, in sampler.yaml or by --set:
  host, port                           where; any host but loopback needs tls and a token:
  tls.certificate, tls.key             PEM files; tls.client_ca asks runs for a certificate too
  token_file, token_env                where the tokens are, one a line; never the token itself
  device                               auto, cpu, cuda or cuda:0
  trust_remote_code                    whether a run may have code loaded that its student's files name
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class, parser.epilog = argparse.RawDescriptionHelpFormatter, _SETTINGS
    parser.add_argument("config", nargs="?", metavar="sampler.yaml", help="its configuration; without one, it serves this machine alone")
    parser.add_argument("--host", help="address to serve on (127.0.0.1); any but loopback needs tls and a token in the configuration")
    parser.add_argument("--port", type=int, help="port to serve on (7071); 0 takes a free one")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides", help="change one setting; may be repeated"
    )
    parser.add_argument("--ready-file", type=Path, metavar="PATH", help="write the address here once it is served")


def run(args: argparse.Namespace) -> int:
    """Serve until SIGTERM or Ctrl-C; SIGHUP reads certificates and tokens again. Returns the exit code; raises `BbopdError`."""
    from bbopd.config import SampleServerConfig
    from bbopd.config_file import parse_config, read_yaml
    from bbopd.vllm_setup import require_vllm

    given: dict[str, Any] = read_yaml(args.config) if args.config else {}
    given.update({key: getattr(args, key) for key in ("host", "port") if getattr(args, key) is not None})
    config = parse_config(given, args.overrides, SampleServerConfig, args.config or "bbopd sample-server")
    require_vllm("bbopd sample-server needs vLLM")
    from bbopd.rpc.run_server import set_up_logs

    set_up_logs("text")
    asyncio.run(_serve(config, args.ready_file))
    return 0


async def _serve(config: SampleServerConfig, ready_file: Path | None) -> None:
    from bbopd.modeling import resolve_device
    from bbopd.rollouts.vllm_server import SampleServer
    from bbopd.rpc.renewal import AccessRenewal
    from bbopd.rpc.run_server import write_whole
    from bbopd.rpc.security import ServerAccess
    from bbopd.vllm_setup import engine_environment

    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    device, access = resolve_device(config.device), ServerAccess.from_config(config)
    for note in engine_environment(device.type).notes:
        _log.info("note: %s", note)
    server = await SampleServer.start(
        host=config.host, port=config.port, device=device, access=access, trust_remote_code=config.trust_remote_code
    )
    try:
        _log.info("vLLM for one run at a time at %s%s (Ctrl-C ends it)", server.target, ", with TLS" if access.certificate else "")
        renewal = AccessRenewal(config, server.renew_access)
        renewing = asyncio.create_task(renewal.run())
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, renewal.read)
        if ready_file is not None:
            write_whole(ready_file, server.target + "\n")
        await stopping.wait()
        renewing.cancel()
    finally:
        await server.stop()
        if ready_file is not None:
            ready_file.unlink(missing_ok=True)
