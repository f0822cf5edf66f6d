"""``bbopd sample-server`` with the options that a cluster gives it, where vLLM is not: its engine is `tests.fake_engine`."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from bbopd.cli.main import build_parser
from bbopd.config import SampleServerConfig
from bbopd.config_file import parse_config
from bbopd.rollouts.vllm_process import EngineProcess
from bbopd.rollouts.vllm_server import SampleServer
from bbopd.rpc.run_server import write_whole
from bbopd.rpc.security import ServerAccess


async def start_fake(environment: Mapping[str, str], log: Path, shared_files: Sequence[int]) -> EngineProcess:
    return await EngineProcess.start(os.environ, log, shared_files=shared_files, module="tests.fake_engine")


async def serve(words: list[str]) -> None:
    args = build_parser().parse_args(words)
    config = parse_config({"host": args.host, "port": args.port}, args.overrides, SampleServerConfig, "the test")
    place = {"host": config.host, "port": config.port, "device": torch.device("cpu"), "access": ServerAccess.from_config(config)}
    server = await SampleServer.start(start_process=start_fake, **place)
    stopping = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopping.set)
    write_whole(args.ready_file, server.target)
    await stopping.wait()
    await server.stop()


if __name__ == "__main__":
    asyncio.run(serve(sys.argv[1:]))
