"""Certificates for tests, made by the openssl command: an authority, a server and a client signed by it, and a stranger."""

from __future__ import annotations

import subprocess
from pathlib import Path


def make_certificates(folder: Path) -> Path:
    """``ca.pem`` signs ``server.pem`` (localhost, 127.0.0.1) and ``client.pem``; ``stranger.pem`` signs itself. Keys are ``*.key``."""
    _make(folder, "ca", "/CN=test authority", "basicConstraints=critical,CA:TRUE", "keyUsage=critical,keyCertSign,cRLSign")
    _make(folder, "server", "/CN=teacher", "subjectAltName=DNS:localhost,DNS:teacher.example,IP:127.0.0.1", signed=True)
    _make(folder, "client", "/CN=student", "subjectAltName=DNS:student.example", signed=True)
    _make(folder, "stranger", "/CN=stranger", "subjectAltName=DNS:localhost")
    return folder


def _make(folder: Path, name: str, subject: str, *extensions: str, signed: bool = False) -> None:
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]
    command += ["-subj", subject, "-keyout", f"{name}.key", "-out", f"{name}.pem"]
    for extension in extensions:
        command += ["-addext", extension]
    if signed:
        command += ["-CA", "ca.pem", "-CAkey", "ca.key"]
    subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=120)


def replace_file(path: Path, content: bytes) -> None:
    """Put other content there at once, as a tool that renews certificates does."""
    unfinished = path.with_suffix(".new")
    unfinished.write_bytes(content)
    unfinished.replace(path)
