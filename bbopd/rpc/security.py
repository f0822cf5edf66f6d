"""Who may talk to a teacher: TLS, bearer tokens, and the rule that nothing leaves this machine without both.

A token comes from a file or an environment variable, is compared in constant time, and is shown by nothing: no repr, no message, no log.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import os
import re
import ssl
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import grpc

from bbopd.config import ClientTlsConfig, SampleServerConfig, ServeConfig, TeacherConfig
from bbopd.errors import ConfigError

__all__ = ["ClientAccess", "LiveAccess", "ServerAccess", "Token", "TokenCheck", "is_loopback", "read_tokens"]

_SHORTEST_TOKEN = 16
_OPEN_METHODS = ("/grpc.health.v1.Health/",)  # probes carry no token, and learn only whether the service is up


def is_loopback(host: str) -> bool:
    """Whether ``host`` reaches no further than this machine."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class Token:
    """A bearer token, kept as what is compared: shown by nothing."""

    __slots__ = ("_digest", "_text")

    def __init__(self, text: str) -> None:
        self._text = text
        self._digest = hashlib.sha256(text.encode()).digest()

    def __repr__(self) -> str:
        return "Token(hidden)"

    @property
    def name(self) -> str:
        """What its holder is counted under: the same after a restart and in any order of tokens, and of no use as a token."""
        return hashlib.sha256(b"name of " + self._digest).hexdigest()[:16]

    def matches(self, other: Token) -> bool:
        """Whether both are the same, in a time that does not tell how much of them is."""
        return hmac.compare_digest(self._digest, other._digest)

    def header(self) -> str:
        """What an HTTP request brings as ``Authorization``."""
        return f"Bearer {self._text}"

    def hidden_in(self, text: str) -> str:
        """``text`` without the token, which some servers repeat when they refuse it."""
        return text.replace(self._text, "[token]")

    def call_credentials(self) -> grpc.CallCredentials:
        return grpc.access_token_call_credentials(self._text)


_NO_TOKEN = Token("")


def read_tokens(file: str | None, variable: str | None, where: str) -> tuple[Token, ...]:
    """The tokens that a configuration points at: one a line, ``#`` starts a comment. None where it points at nothing.

    Raises
    ------
    ConfigError : both are given, there is nothing there, or a line is no token. It never shows what it read.
    """
    if file is None and variable is None:
        return ()
    if file is not None and variable is not None:
        raise ConfigError(f"{where}token_file and {where}token_env are both set: keep one")
    if file is not None:
        source, text = f"{where}token_file {file}", _read(file, f"{where}token_file").decode(errors="replace")
    else:
        source, text = f"{where}token_env {variable}", os.environ.get(variable or "", "")
    tokens = [line.strip() for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    if not tokens:
        raise ConfigError(f"{source} holds no token: put one there, such as the output of `openssl rand -hex 32`")
    for number, token in enumerate(tokens, 1):
        if len(token) < _SHORTEST_TOKEN or not re.fullmatch("[!-~]+", token):
            raise ConfigError(
                f"{source}: token {number} has {len(token)} characters; a token is at least {_SHORTEST_TOKEN} printable ASCII characters "
                "without spaces, such as the output of `openssl rand -hex 32`"
            )
    return tuple(Token(token) for token in tokens)


# ---------------------------------------------------------------- the server's side


@dataclass(frozen=True, slots=True)
class ServerAccess:
    """What a server asks of its clients. Without anything, it answers on loopback alone.

    Parameters
    ----------
    certificate, key : PEM, the chain and its private key; both or neither.
    client_ca : PEM; where given, a client must show a certificate signed by it (mTLS).
    tokens : any one of them lets a call in; each is a client of its own where limits and turns are counted.
    """

    certificate: bytes | None = None
    key: bytes | None = field(default=None, repr=False)
    client_ca: bytes | None = None
    tokens: tuple[Token, ...] = ()

    @classmethod
    def from_config(cls, config: ServeConfig | SampleServerConfig) -> ServerAccess:
        """Read the files that a configuration names, and check them. Raises `ConfigError` naming the one that cannot be used."""
        tokens = read_tokens(config.token_file, config.token_env, "")
        if config.tls is None:
            access = cls(tokens=tokens)
        else:
            tls = config.tls
            _check_pair(tls.certificate, tls.key, "tls.")
            access = cls(
                _read(tls.certificate, "tls.certificate"),
                _read(tls.key, "tls.key"),
                None if tls.client_ca is None else _read_ca(tls.client_ca, "tls.client_ca"),
                tokens,
            )
        access.require_safe(config.host)
        return access

    def require_safe(self, host: str) -> None:
        """Raises `ConfigError` for an address that other machines can reach, unless there are TLS and a token."""
        missing = []
        if self.certificate is None:
            missing.append("tls.certificate and tls.key (PEM files)")
        if not self.tokens:
            missing.append("token_file or token_env")
        if missing and not is_loopback(host):
            raise ConfigError(
                f"host {host!r} can be reached from other machines, which needs TLS and a token: set {' and '.join(missing)}; or serve "
                "on 127.0.0.1 and reach it through a tunnel (ssh -L)"
            )

    def certificate_configuration(self) -> grpc.ServerCertificateConfiguration:
        """What a new connection is shown, and by whom the client's certificate must be signed."""
        return grpc.ssl_server_certificate_configuration([(self.key, self.certificate)], root_certificates=self.client_ca)

    def token_of(self, metadata: Iterable[tuple[str, str | bytes]]) -> Token | None:
        """Which token a call brings; None where it brings none that is known. Without tokens, everyone has the same."""
        if not self.tokens:
            return _NO_TOKEN
        given = [value for key, value in metadata if key == "authorization"]
        if len(given) != 1 or not isinstance(given[0], str) or not given[0].startswith("Bearer "):
            return None
        token, found = Token(given[0].removeprefix("Bearer ")), None
        for known in self.tokens:  # all of them, always: how long it takes tells nothing
            if token.matches(known):
                found = known
        return found


class LiveAccess:
    """A server's access as it is now: a renewed one holds for every call and connection from then on."""

    def __init__(self, access: ServerAccess) -> None:
        self._access = access

    @property
    def now(self) -> ServerAccess:
        return self._access

    def renew(self, access: ServerAccess) -> None:
        """Raises `ConfigError` for a change that a running server cannot make: with or without TLS, tokens, or clients' certificates."""
        for name, what in (("certificate", "tls"), ("client_ca", "tls.client_ca"), ("tokens", "tokens")):
            if bool(getattr(access, name)) != bool(getattr(self._access, name)):
                raise ConfigError(f"{what}: what a server wants of its clients changes at a restart only; its files may change at any time")
        self._access = access

    def credentials(self) -> grpc.ServerCredentials | None:
        """TLS as gRPC wants it, asking here with every new connection; None for plain text."""
        first = self._access
        if first.certificate is None:
            return None
        return grpc.dynamic_ssl_server_credentials(
            first.certificate_configuration(),
            lambda: self._access.certificate_configuration(),
            require_client_authentication=first.client_ca is not None,
        )

    def client_name(self, context: grpc.aio.ServicerContext) -> str:
        """Whom a call counts for: its owner, on the host it comes from."""
        return f"{self.owner_name(context)} at {peer_host(context.peer())}"

    def owner_name(self, context: grpc.aio.ServicerContext) -> str:
        """Whose answers a call may ask for again: the holders of its token and certificate, wherever they are."""
        token = self._access.token_of(context.invocation_metadata() or ())
        certificate = b",".join(context.auth_context().get("x509_common_name", ())).decode(errors="replace")
        return f"token {token.name if token else None} certificate {certificate or '-'}"


def peer_host(peer: str) -> str:
    """The host in gRPC's ``ipv4:1.2.3.4:567`` or ``ipv6:[::1]:567``: the port changes with every connection."""
    return unquote(peer).partition(":")[2].rpartition(":")[0]


class TokenCheck(grpc.aio.ServerInterceptor):
    """Turns away, before a single message is read, whoever brings no token that is known; only health may be asked without."""

    def __init__(self, access: LiveAccess, on_refused: Callable[[grpc.aio.ServicerContext], None]) -> None:
        self._access = access
        self._on_refused = on_refused

    async def intercept_service(self, continuation: Callable[[Any], Awaitable[Any]], details: grpc.HandlerCallDetails) -> Any:
        if details.method.startswith(_OPEN_METHODS) or self._access.now.token_of(details.invocation_metadata or ()) is not None:
            return await continuation(details)
        return grpc.stream_stream_rpc_method_handler(self._refuse)

    async def _refuse(self, requests: Any, context: grpc.aio.ServicerContext) -> None:
        self._on_refused(context)
        await context.abort(grpc.StatusCode.UNAUTHENTICATED, "this server needs a valid token (authorization: Bearer …)")


# ---------------------------------------------------------------- the client's side


@dataclass(frozen=True, slots=True)
class ClientAccess:
    """How a client reaches a teacher: in plain text on this machine, or over TLS, with a token where the teacher wants one.

    ``tls`` is None for plain text. ``ca``, ``certificate`` and ``key`` are PEM; without ``ca``, the public authorities are trusted.
    """

    tls: ClientTlsConfig | None = None
    ca: bytes | None = None
    certificate: bytes | None = None
    key: bytes | None = field(default=None, repr=False)
    token: Token | None = None

    @classmethod
    def from_config(cls, config: TeacherConfig) -> ClientAccess:
        """Read the files of ``teacher.tls`` and the token. Raises `ConfigError` naming what cannot be used."""
        return cls.read(config.tls, config.token_file, config.token_env, "teacher.")

    @classmethod
    def read(cls, tls: ClientTlsConfig | None, token_file: str | None, token_env: str | None, where: str) -> ClientAccess:
        tokens = read_tokens(token_file, token_env, where)
        if len(tokens) > 1:
            raise ConfigError(f"{where}token_file holds {len(tokens)} tokens: a client has one")
        if tls is None:
            if tokens:
                raise ConfigError(f"{where}token_file or token_env is set without {where}tls: a token never travels in plain text")
            return cls()
        if tls.certificate is not None and tls.key is not None:
            _check_pair(tls.certificate, tls.key, f"{where}tls.")
        return cls(
            tls,
            None if tls.ca is None else _read_ca(tls.ca, f"{where}tls.ca"),
            None if tls.certificate is None else _read(tls.certificate, f"{where}tls.certificate"),
            None if tls.key is None else _read(tls.key, f"{where}tls.key"),
            tokens[0] if tokens else None,
        )

    def channel(self, address: str, options: list[tuple[str, Any]]) -> grpc.aio.Channel:
        if self.tls is None:
            return grpc.aio.insecure_channel(address, options=options)
        if self.tls.server_name is not None:
            options = [*options, ("grpc.ssl_target_name_override", self.tls.server_name)]
        credentials = grpc.ssl_channel_credentials(self.ca, self.key, self.certificate)
        if self.token is not None:
            credentials = grpc.composite_channel_credentials(credentials, self.token.call_credentials())
        return grpc.aio.secure_channel(address, credentials, options=options)


# ---------------------------------------------------------------- files


def _read(path: str, key: str) -> bytes:
    try:
        return Path(path).expanduser().read_bytes()
    except OSError as error:
        raise ConfigError(f"{key} {path}: {error.strerror or error}") from error


def _read_ca(path: str, key: str) -> bytes:
    content = _read(path, key)
    try:
        ssl.create_default_context(cadata=content.decode())
    except (ssl.SSLError, ValueError) as error:
        raise ConfigError(f"{key} {path} holds no PEM certificate of an authority: {error}") from error
    return content


def _check_pair(certificate: str, key: str, where: str) -> None:
    """Raises `ConfigError` unless a private key, unencrypted, belongs to a certificate: gRPC would only say that it cannot listen."""
    for path, name in ((certificate, "certificate"), (key, "key")):
        _read(path, f"{where}{name}")

    def no_password() -> str:
        raise ConfigError(f"{where}key {key} is encrypted: give it without a password, readable by this user alone")

    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(Path(certificate).expanduser(), Path(key).expanduser(), no_password)
    except (ssl.SSLError, ValueError) as error:
        raise ConfigError(f"{where}certificate {certificate} and {where}key {key} are no pair of PEM files: {error}") from error
