"""The options with which a command reaches a teacher beyond this machine."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bbopd.rpc.security import ClientAccess

__all__ = ["add_access_arguments", "read_access"]


def add_access_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("access", "for a teacher beyond this machine")
    group.add_argument("--tls", action="store_true", help="use TLS, and trust the public authorities; the other options imply it")
    group.add_argument("--tls-ca", metavar="PEM", help="the authority that signed the teacher's certificate")
    group.add_argument("--tls-certificate", metavar="PEM", help="this client's own certificate, where the teacher wants one")
    group.add_argument("--tls-key", metavar="PEM", help="its private key")
    group.add_argument("--tls-server-name", metavar="NAME", help="the name in the teacher's certificate, where it is not the host")
    group.add_argument("--token-file", metavar="PATH", help="holds the token that the teacher wants")
    group.add_argument("--token-env", metavar="NAME", help="the environment variable that holds it")


def read_access(args: argparse.Namespace) -> ClientAccess:
    """What the options say. Raises `ConfigError` naming the file that cannot be used."""
    from bbopd.config import ClientTlsConfig
    from bbopd.config_file import parse_config
    from bbopd.rpc.security import ClientAccess

    fields = {"ca": args.tls_ca, "certificate": args.tls_certificate, "key": args.tls_key, "server_name": args.tls_server_name}
    given = {name: value for name, value in fields.items() if value is not None}
    uses_tls = bool(args.tls or given or args.token_file or args.token_env)
    tls = parse_config(given, [], ClientTlsConfig, "--tls") if uses_tls else None
    return ClientAccess.read(tls, args.token_file, args.token_env, "--")
