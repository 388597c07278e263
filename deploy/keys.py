"""`baton keys cluster DIR`: what gateways and workers need to trust each other, and nobody else.

The authority's own key is used for the two certificates and then forgotten: nobody can steal it,
and whoever wants other keys makes a new set. What the files are: cluster/credentials.py.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Final

import zmq
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ec import (
    SECP256R1,
    EllipticCurvePrivateKey,
    EllipticCurvePublicKey,
    generate_private_key,
)
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from cluster.credentials import AUTHORITY, GATEWAY, KV_RECEIVER, KV_SENDER, WORKER, name_of
from cluster.errors import StartError
from deploy.parser import Parser

DAYS: Final = 3650
HERE: Final = ("localhost", "127.0.0.1", "::1")

_TOLD = """\
Keys in {directory}, good for {days} days. Give them to processes with --keys DIR:
  gateways   {authority} gateway.pem gateway.key
  workers    {authority} worker.pem worker.key {sender} {receiver}
`baton serve --keys {directory}` takes them all. Copy no more than that to where it is not needed.
To change keys make a new directory and restart every process with it."""


def main(argv: Sequence[str]) -> int:
    """Raises StartError."""
    parser = Parser(
        "baton keys cluster",
        "Make the keys of a cluster's internal planes: TLS for gRPC, CURVE for KV.",
    )
    parser.add_argument("directory", type=Path, metavar="DIR", help="made, or empty")
    parser.add_argument(
        "--host",
        nargs="+",
        default=[],
        metavar="NAME",
        help="names and addresses of gateways, for outsiders who check them; workers do not",
    )
    options = parser.parse_args(list(argv))
    try:
        make(options.directory, options.host)
    except OSError as error:
        raise StartError(f"{error.filename or options.directory}: {error.strerror}") from None
    print(
        _TOLD.format(
            directory=options.directory,
            days=DAYS,
            authority=AUTHORITY,
            sender=KV_SENDER,
            receiver=KV_RECEIVER,
        )
    )
    return 0


def make(directory: Path, hosts: Iterable[str] = ()) -> None:
    """Everything into a directory of its owner's only. Raises OSError, StartError if it is not
    empty: overwritten keys would cut a running cluster in two at its next restart."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    directory.chmod(0o700)
    if any(directory.iterdir()):
        raise StartError(f"{directory} is not empty: keys are never overwritten")
    authority = _Authority()
    _write(directory / AUTHORITY, authority.certificate.public_bytes(Encoding.PEM))
    for role, names in ((GATEWAY, (*HERE, *hosts)), (WORKER, HERE)):
        key = generate_private_key(SECP256R1())
        signed = authority.sign(name_of(role), names, key.public_key())
        _write(directory / f"{role}.pem", signed.public_bytes(Encoding.PEM))
        private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        _write(directory / f"{role}.key", private)
    for name in (KV_SENDER, KV_RECEIVER):
        _, secret = zmq.curve_keypair()
        _write(directory / name, secret + b"\n")


class _Authority:
    """Signs certificates for as long as it lives, which is not beyond `make`."""

    def __init__(self) -> None:
        self._key: EllipticCurvePrivateKey = generate_private_key(SECP256R1())
        own = _name(f"Baton cluster of {datetime.now(UTC):%Y-%m-%d %H:%M}")
        self.certificate = (
            _builder(own, own, self._key.public_key())
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .sign(self._key, SHA256())
        )

    def sign(
        self, name: str, others: Iterable[str], key: EllipticCurvePublicKey
    ) -> x509.Certificate:
        """Either side of a connection may show it: gateways and workers call each other."""
        both = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
        return (
            _builder(_name(name), self.certificate.subject, key)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(x509.SubjectAlternativeName(list(map(_general, (name, *others)))), False)
            .add_extension(x509.ExtendedKeyUsage(both), critical=False)
            .sign(self._key, SHA256())
        )


def _builder(
    subject: x509.Name, issuer: x509.Name, key: EllipticCurvePublicKey
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))  # clocks differ
        .not_valid_after(now + timedelta(days=DAYS))
    )


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])


def _general(name: str) -> x509.GeneralName:
    """Raises StartError for what no certificate can name."""
    try:
        return x509.IPAddress(ip_address(name))
    except ValueError:
        pass
    try:
        return x509.DNSName(name)
    except ValueError:
        raise StartError(f"--host {name!r}: is no host's name") from None


def _write(path: Path, content: bytes) -> None:
    """For the owner alone from its first byte."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
    with open(os.open(path, flags, 0o600), "wb") as file:
        file.write(content)
