"""TLS and a token of this driver's own, for the servers that it starts on the nodes and the ranks that speak to them.

Nothing of a run crosses between machines in the clear or without a token; here both are made, as nobody else needs to know them. They are
no better guarded than Ray itself, through which they reach the nodes.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

SERVER_NAME = "bbopd.cluster"
"""The name in the certificate, whatever the node's is."""
TOKEN_VARIABLE = "BBOPD_CLUSTER_TOKEN"
_LIFE = timedelta(days=365)


@dataclass(frozen=True, slots=True)
class ClusterAccess:
    """PEM texts of a certificate that is its own authority, its key, and a token; made by `make`."""

    certificate: str
    key: str = field(repr=False)
    token: str = field(repr=False)

    @classmethod
    def make(cls) -> ClusterAccess:
        from cryptography import x509
        from cryptography.hazmat.primitives import hashes, serialization
        from cryptography.hazmat.primitives.asymmetric import ec
        from cryptography.x509.oid import NameOID

        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, SERVER_NAME)])
        now = datetime.now(UTC)
        certificate = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(hours=1))  # clocks of nodes differ
            .not_valid_after(now + _LIFE)
            .add_extension(x509.SubjectAlternativeName([x509.DNSName(SERVER_NAME)]), critical=False)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .sign(key, hashes.SHA256())
        )
        pem = serialization.Encoding.PEM
        private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        return cls(certificate.public_bytes(pem).decode(), private.decode(), secrets.token_hex(32))
