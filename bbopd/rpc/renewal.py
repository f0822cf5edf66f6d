"""Certificates and tokens of a running server, read again when their files change or on SIGHUP."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path

from bbopd.config import SampleServerConfig, ServeConfig
from bbopd.errors import ConfigError
from bbopd.rpc.security import ServerAccess

__all__ = ["AccessRenewal"]

_POLL = 2.0  # seconds
_log = logging.getLogger("bbopd.access")

Signature = tuple[tuple[int, int, int] | None, ...]


class AccessRenewal:
    """Reads the files that ``config`` names whenever they change, and hands what they hold to ``renew``.

    A certificate and its key are replaced one after the other: what cannot be used yet is said once, what was read before stays in
    force, and the next change is another try.

    Parameters
    ----------
    renew : takes what was read; may raise `ConfigError` where that is not possible in a running server.
    poll : seconds between two looks.
    """

    def __init__(self, config: ServeConfig | SampleServerConfig, renew: Callable[[ServerAccess], None], poll: float = _POLL) -> None:
        tls = config.tls
        names = (config.token_file, *((tls.certificate, tls.key, tls.client_ca) if tls is not None else ()))
        self.files = tuple(Path(name).expanduser() for name in names if name is not None)
        self._config = config
        self._renew = renew
        self._poll = poll
        self._seen = self._signature()

    async def run(self) -> None:
        """Look for changes until cancelled."""
        while True:
            await asyncio.sleep(self._poll)
            if self._signature() != self._seen:
                self.read()

    def read(self) -> bool:
        """Read the files now; whether what they hold is in force."""
        self._seen = self._signature()  # before they are read: what changes meanwhile is read once more
        try:
            self._renew(ServerAccess.from_config(self._config))
        except ConfigError as error:
            _log.warning("certificates and tokens stay as they were: %s", error)
            return False
        _log.info("certificates and tokens were read again")
        return True

    def _signature(self) -> Signature:
        return tuple(_stamp(path) for path in self.files)


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino
