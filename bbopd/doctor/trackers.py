"""Whether the trackers of a run (``track``) can be told of it: the package, a key where one is needed, a place that can be written."""

from __future__ import annotations

import asyncio
import netrc
import os
from collections.abc import Callable
from pathlib import Path
from urllib.parse import unquote, urlsplit

from bbopd.doctor.findings import SetUp, Verdict, passed, warned
from bbopd.errors import ConfigError
from bbopd.pipeline.trackers import require_trackers

__all__ = ["check_trackers"]

_PORTS = {"http": 80, "https": 443}
_CONNECT_SECONDS = 10.0


async def check_trackers(setup: SetUp) -> Verdict:
    """Each is looked at as its own library is set up, by environment variables; nothing is sent and no run is begun there."""
    names = setup.config.track
    if not names:
        return passed("TensorBoard's files in the run's folder alone")
    require_trackers(names)
    said, doubts = [], []
    for name in names:
        if name not in _LOOKS:
            said.append(f"{name}: a plug-in, which is not looked into")
            continue
        where, address = _LOOKS[name]()
        said.append(f"{name}: {where}")
        if address is not None and (doubt := await _unreachable(name, address)):
            doubts.append(doubt)
    if doubts:
        return warned(
            f"{'; '.join([*said, *doubts])}: unless a proxy leads there, the run would not begin; leave it out of track: the run's folder "
            "has all figures"
        )
    return passed("; ".join(said))


def _wandb() -> tuple[str, str | None]:
    """Where its figures go, and the address that must answer for that. Raises `ConfigError` without a key."""
    mode = os.environ.get("WANDB_MODE", "online").lower()
    if mode in ("offline", "dryrun"):
        return "offline, in the run's folder until `wandb sync`", None
    if mode == "disabled":
        return "disabled by WANDB_MODE: it gets nothing", None
    address = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")
    if not os.environ.get("WANDB_API_KEY") and not _has_netrc_entry(urlsplit(address).hostname or ""):
        raise ConfigError(
            f"track: wandb has no key for {address}: set WANDB_API_KEY or run `wandb login`, or set WANDB_MODE=offline, which keeps its "
            "figures in the run's folder"
        )
    return f"to {address}, with a key", address


def _mlflow() -> tuple[str, str | None]:
    given = os.environ.get("MLFLOW_TRACKING_URI", "")
    parts = urlsplit(given)
    if parts.scheme in _PORTS:
        return f"to {given}", given
    if parts.scheme in ("", "file", "sqlite"):
        path = unquote(parts.path)
        _require_writable("mlflow", Path(path[1:] if parts.scheme == "sqlite" else path), "MLFLOW_TRACKING_URI")
        return f"in {given or 'the working directory'}", None
    return f"in {parts.scheme}://{parts.hostname or ''}, which is not looked at", None


def _trackio() -> tuple[str, str | None]:
    server = os.environ.get("TRACKIO_SERVER_URL", "")
    if server:
        return f"to {server.partition('?')[0]}", server
    folder = Path(os.environ.get("TRACKIO_DIR") or Path.home() / ".cache" / "huggingface" / "trackio")
    _require_writable("trackio", folder, "TRACKIO_DIR")
    return f"in {folder}", None


_LOOKS: dict[str, Callable[[], tuple[str, str | None]]] = {"wandb": _wandb, "mlflow": _mlflow, "trackio": _trackio}


def _has_netrc_entry(host: str) -> bool:
    path = Path(os.environ.get("NETRC") or Path.home() / ".netrc")
    try:
        return netrc.netrc(path).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _require_writable(name: str, path: Path, setting: str) -> None:
    """Raises `ConfigError` where the nearest that there is of ``path`` and the folders above it cannot be written into."""
    path = path.absolute()
    there = next(place for place in (path, *path.parents) if place.exists())
    wrong = "cannot be written" if not os.access(there, os.W_OK) else "is no folder" if there != path and not there.is_dir() else ""
    if wrong:
        raise ConfigError(f"track: {name} keeps its figures in {path}, and {there} {wrong}: set {setting} to another place")


async def _unreachable(name: str, address: str) -> str:
    """What is wrong where nothing answers at ``address``, or nothing."""
    parts = urlsplit(address)
    port = parts.port or _PORTS.get(parts.scheme, 443)
    try:
        async with asyncio.timeout(_CONNECT_SECONDS):
            _, writer = await asyncio.open_connection(parts.hostname, port)
    except (OSError, TimeoutError) as error:
        return f"{name} is not reached at {parts.hostname}:{port} ({type(error).__name__}: {error})"
    writer.close()
    return ""
