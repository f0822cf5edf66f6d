"""Where an OpenAI-compatible endpoint is, and how it is reached: in plain text on this machine alone, over TLS anywhere."""

from __future__ import annotations

import ssl
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import httpx2

from bbopd.config import ClientTlsConfig, TeacherConfig
from bbopd.errors import ConfigError
from bbopd.rpc.security import ClientAccess, Token, is_loopback, read_tokens

__all__ = ["ApiAddress"]


@dataclass(frozen=True, slots=True)
class ApiAddress:
    """An endpoint. ``url`` ends before ``/completions``; ``root`` is where its server keeps what is not OpenAI's."""

    target: str
    url: str
    root: str
    access: ClientAccess
    token: Token | None = field(default=None, repr=False)

    @classmethod
    def from_config(cls, config: TeacherConfig) -> ApiAddress:
        """Read ``teacher.target``, its TLS and its key. Raises `ConfigError` naming what cannot be used."""
        (target,) = config.targets
        parts = urlsplit(target)
        if not parts.hostname or parts.query or parts.fragment or parts.username or parts.password:
            raise ConfigError(f"teacher.target {target!r} must be openai://host:port/v1 or https://host/v1, a key in teacher.token_env")
        is_tls = parts.scheme == "https"
        if not is_tls and not is_loopback(parts.hostname):
            raise ConfigError(f"teacher.target {target!r} leaves this machine, which needs TLS: use https://, or a tunnel (ssh -L)")
        if not is_tls and config.tls is not None:
            raise ConfigError(f"teacher.target {target!r} is plain text, teacher.tls is set: use https://, or leave teacher.tls out")
        url = f"{'https' if is_tls else 'http'}://{parts.netloc}{parts.path.rstrip('/')}"
        if is_tls:
            access = ClientAccess.read(config.tls or ClientTlsConfig(), config.token_file, config.token_env, "teacher.")
            token = access.token
        else:
            access, tokens = ClientAccess(), read_tokens(config.token_file, config.token_env, "teacher.")
            if len(tokens) > 1:
                raise ConfigError(f"teacher.token_file holds {len(tokens)} tokens: a client has one")
            token = tokens[0] if tokens else None
        return cls(target, url, url.removesuffix("/v1"), access, token)

    def open(self, connect_timeout: float) -> httpx2.AsyncClient:
        """A client with as many connections as are needed; times beyond connecting are limited by whoever uses it."""
        headers = {"Authorization": self.token.header()} if self.token is not None else {}
        is_tls = self.url.startswith("https")
        return httpx2.AsyncClient(
            headers=headers,
            verify=self._tls_context() if is_tls else False,
            timeout=httpx2.Timeout(None, connect=connect_timeout),
            limits=httpx2.Limits(max_connections=None, max_keepalive_connections=64),
            trust_env=is_tls,  # a proxy from the environment is for what lies outside
        )

    @property
    def extensions(self) -> dict[str, str]:
        """What every request needs: the name in the server's certificate, where it is another than the host's."""
        tls = self.access.tls
        return {} if tls is None or tls.server_name is None else {"sni_hostname": tls.server_name}

    def _tls_context(self) -> ssl.SSLContext | bool:
        access = self.access
        tls = access.tls
        if tls is None or (access.ca is None and tls.certificate is None):
            return True
        context = ssl.create_default_context(cadata=None if access.ca is None else access.ca.decode())
        if tls.certificate is not None and tls.key is not None:
            context.load_cert_chain(Path(tls.certificate).expanduser(), Path(tls.key).expanduser())
        return context
