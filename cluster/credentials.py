"""Credentials: what a process shows to the others of its cluster, and knows them by.

`baton keys cluster DIR` makes them (deploy/keys.py), `--keys DIR` reads what the process needs:

    ca.pem                     everybody: the authority that signed both certificates
    gateway.pem  gateway.key   gateways
    worker.pem   worker.key    workers
    kv-sender.key              workers: what a prefill worker shows to a decode worker
    kv-receiver.key            workers: what a decode worker shows to a prefill worker

A certificate names a role and no host: workers come and go under addresses that nobody knows
beforehand, and what is stolen from a worker opens no gateway's place.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from cluster.errors import StartError

GATEWAY: Final = "gateway"
WORKER: Final = "worker"

AUTHORITY: Final = "ca.pem"
KV_SENDER: Final = "kv-sender.key"
KV_RECEIVER: Final = "kv-receiver.key"

_DOMAIN: Final = "baton.internal"  # .internal is nobody's, so no host has such a name
_Z85 = re.compile(rb"[0-9a-zA-Z.\-:+=^!/*?&<>()\[\]{}@%$#]{40}")


@dataclass(frozen=True, slots=True)
class Credentials:
    """Of one process. Never shown: not in a log, not in an error."""

    role: str
    authority: bytes  # PEM, as are the next two
    certificate: bytes
    key: bytes
    kv_sender: bytes = b""  # CURVE secrets in Z85, of workers only
    kv_receiver: bytes = b""

    def __repr__(self) -> str:
        return f"Credentials({self.role!r})"

    @property
    def peer(self) -> str:
        """The name in the certificates of all that this process has to do with over gRPC."""
        return name_of(WORKER if self.role == GATEWAY else GATEWAY)


def name_of(role: str) -> str:
    """What the certificates of a role are made out to."""
    return f"{role}.{_DOMAIN}"


def credentials_for(role: str, directory: str) -> Credentials | None:
    """What a process of this role needs of the directory that `--keys` names; None if of none.

    Raises StartError that names the file: an error of TLS would only say that it failed.
    """
    if not directory:
        return None
    path = Path(directory)
    certificate, key = _read(path, f"{role}.pem"), _read(path, f"{role}.key")
    authority = _read(path, AUTHORITY)
    _check(path, role, authority, certificate, key)
    secrets = []
    for name in (KV_SENDER, KV_RECEIVER) if role == WORKER else ():
        secret = _read(path, name).strip()
        if not _Z85.fullmatch(secret):
            raise StartError(f"--keys {path / name}: is not a CURVE key")
        secrets.append(secret)
    return Credentials(role, authority, certificate, key, *secrets)


def _read(directory: Path, name: str) -> bytes:
    try:
        return (directory / name).read_bytes()
    except OSError as error:
        raise StartError(
            f"--keys {directory / name}: {error.strerror}; `baton keys cluster` makes it"
        ) from None


def _check(directory: Path, role: str, authority: bytes, certificate: bytes, key: bytes) -> None:
    """That these three belong together and are still good."""
    shown = f"--keys {directory / role}"
    try:
        signed = x509.load_pem_x509_certificate(certificate)
        signer = x509.load_pem_x509_certificate(authority)
        private = load_pem_private_key(key, password=None)
    except (ValueError, TypeError) as error:
        raise StartError(f"{shown}.pem, {role}.key, {AUTHORITY}: cannot be read: {error}") from None
    if private.public_key() != signed.public_key():
        raise StartError(f"{shown}.key is not the key of {role}.pem")
    try:
        signed.verify_directly_issued_by(signer)
    except (ValueError, TypeError, InvalidSignature):
        raise StartError(f"{shown}.pem was not signed by {AUTHORITY}") from None
    end = min(signed.not_valid_after_utc, signer.not_valid_after_utc)
    if end < datetime.now(UTC):
        raise StartError(f"{shown}.pem was good until {end:%Y-%m-%d}: make new keys")
