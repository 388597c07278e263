"""API keys: who may call, and which cached prefixes they share.

Only digests are kept. A key is found by comparing the digest of what was presented with all known
ones, so the time tells neither which key was near nor how long it is.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from cluster.errors import Unauthorized


@dataclass(frozen=True, slots=True)
class Tenant:
    """The owner of one API key. Different salts share no cached prefix.

    Of tenants that wait at the same time each gets tokens computed in proportion to its `weight`.
    """

    name: str
    salt: bytes
    models: tuple[str, ...] = ()  # that it may use; empty: all
    requests_per_minute: int = 0  # 0: no limit
    tokens_per_minute: int = 0  # prompt and answer together; 0: no limit
    weight: float = 1.0
    priority: int = 0  # the most urgent that its requests may ask for: lower comes first

    def salted(self, cache_salt: str) -> bytes:
        """The salt of one request: the tenant's own, and what the client adds to divide further."""
        if not cache_salt:
            return self.salt
        return hashlib.blake2b(cache_salt.encode(), key=self.salt, digest_size=16).digest()


ANYONE = Tenant("anyone", b"")


class Keys:
    """The accepted keys. Without any, everybody is let in as one tenant."""

    def __init__(self, keys: Iterable[str] = ()) -> None:
        self._tenants: list[tuple[bytes, Tenant]] = []
        for key in keys:
            digest = hashlib.sha256(key.encode()).digest()
            salt = hashlib.blake2b(digest, digest_size=16).digest()
            self._tenants.append((digest, Tenant(salt.hex()[:8], salt)))

    @property
    def required(self) -> bool:
        return bool(self._tenants)

    def tenant(self, authorization: Sequence[bytes]) -> Tenant:
        """Whose call this is, from all Authorization values it carried.

        Raises Unauthorized with code missing_api_key or invalid_api_key.
        """
        if not self.required:
            return ANYONE
        if len(authorization) > 1:
            raise Unauthorized("More than one Authorization header.")
        scheme, _, token = authorization[0].partition(b" ") if authorization else (b"", b"", b"")
        if scheme.lower() != b"bearer" or not token:
            raise Unauthorized(
                "An API key is needed: Authorization: Bearer KEY.", code="missing_api_key"
            )
        presented = hashlib.sha256(token).digest()
        found = None
        for digest, tenant in self._tenants:
            if hmac.compare_digest(digest, presented):
                found = tenant
        if found is None:
            raise Unauthorized("This API key is not known here.", code="invalid_api_key")
        return found
