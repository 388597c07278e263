"""API keys: who may call, what each may use, and which cached prefixes they share.

Only digests are kept. A key is found by comparing the digest of what was presented with all known
ones, so the time tells neither which key was near nor how long it is. A digest is plain SHA-256,
which is enough for keys that nobody could guess; `baton keys api` makes such.

A key file holds keys, one a line, or a list of digests with what each may do; in both a line that
begins with # is a comment:

    - key_sha256: 5e88...           # the SHA-256 of the key, in hex
      tenant: search                # keys of one tenant share its limits and its cached prefixes
      models: [llama]               # empty or missing: all
      requests_per_minute: 600      # 0 or missing: no limit
      tokens_per_minute: 1000000
      weight: 2.0
      priority: 0
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Final

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cluster.config import KEY, NOT_YAML
from cluster.errors import StartError, Unauthorized
from gateway.ask import Limits

log = logging.getLogger(__name__)

REFRESH_S: Final = 2.0
"""How often the key file is looked at: a key is in force, or out of it, about that long after."""


@dataclass(frozen=True, slots=True)
class Tenant:
    """The owner of API keys. Different salts share no cached prefix.

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

    def limits(self, general: Limits) -> Limits:
        """What holds for this key's calls."""
        return replace(general, allowed_names=self.models) if self.models else general


ANYONE = Tenant("anyone", b"")

Known = list[tuple[bytes, Tenant]]  # digests and whose they are


class Keys:
    """The accepted keys. Without any, everybody is let in as one tenant."""

    def __init__(self, keys: Iterable[str] = (), file: Path | None = None) -> None:
        """`keys` are as clients present them. Raises StartError for a file that holds no keys."""
        self._given = [_plain(key) for key in keys]
        self._file = file
        self._seen = None if file is None else _stamp(file)
        self._known = self._given + ([] if file is None else read(file))

    @property
    def required(self) -> bool:
        return bool(self._known)

    def tenant(self, authorization: Sequence[bytes]) -> Tenant:
        """Whose call this is, from all Authorization values it carried.

        Raises Unauthorized with code missing_api_key or invalid_api_key.
        """
        if not self.required:
            return ANYONE
        scheme, _, token = authorization[0].partition(b" ") if authorization else (b"", b"", b"")
        if scheme.lower() != b"bearer" or not token:
            raise Unauthorized(
                "An API key is needed: Authorization: Bearer KEY.", code="missing_api_key"
            )
        presented = hashlib.sha256(token).digest()
        found = None
        for digest, tenant in self._known:
            if hmac.compare_digest(digest, presented):
                found = tenant
        if found is None or len(authorization) > 1:
            raise Unauthorized("This API key is not known here.", code="invalid_api_key")
        return found

    def refresh(self) -> None:
        """Look at the file again. One that cannot be read or holds no keys changes nothing."""
        if self._file is None:
            return
        try:
            seen = _stamp(self._file)
            if seen == self._seen:
                return
            self._seen = seen
            self._known = self._given + read(self._file)
        except StartError as error:
            log.warning("keys stay as they were", extra={"reason": error.message})
        else:
            log.warning("keys read again", extra={"keys": len(self._known)})

    async def follow(self) -> None:
        """Keep up with the file, for ever."""
        while True:
            await asyncio.sleep(REFRESH_S)
            await asyncio.to_thread(self.refresh)  # a thousand entries are half a second of YAML


def read(file: Path) -> Known:
    """The keys of a file; at least one. Raises StartError that names the line, or entry and field.

    No message repeats what stands there: it may be a key.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise _broken(file, str(getattr(error, "strerror", None) or "not UTF-8")) from None
    known = list(_entries(file, text) if _is_list(text) else _lines(file, text))
    if not known:
        raise _broken(file, "holds no keys")
    if len({digest for digest, _ in known}) < len(known):
        raise _broken(file, "holds a key twice")
    return known


def _is_list(text: str) -> bool:
    """By the first word that is no comment's: "-", "---" or one that begins with "["."""
    lines = (line.split() for line in text.splitlines())
    first = next((words[0] for words in lines if words and not words[0].startswith("#")), "")
    return first in ("-", "---") or first.startswith("[")


def _lines(file: Path, text: str) -> Iterator[tuple[bytes, Tenant]]:
    for number, line in enumerate(map(str.strip, text.splitlines()), 1):
        if not line or line.startswith("#"):
            continue
        if not KEY.fullmatch(line):
            raise _broken(
                file,
                f"line {number}: keys stand one a line, of visible ASCII characters without spaces",
            )
        yield _plain(line)


class Entry(BaseModel):
    """One of a key file's list."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    key_sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    tenant: Annotated[str, Field(pattern=r"^[\x21-\x7e]{1,64}$")]
    models: list[Annotated[str, Field(min_length=1)]] = []
    requests_per_minute: int = Field(0, ge=0, description="0: no limit")
    tokens_per_minute: int = Field(0, ge=0, description="of prompts and answers; 0: no limit")
    weight: float = Field(1.0, gt=0, le=1e6, description="share of the cluster beside others")
    priority: int = Field(
        0, ge=-(2**31), lt=2**31, description="the most urgent that it may ask for: lower is first"
    )


def checked(item: Any) -> Entry:
    """Raises StartError that names the field."""
    try:
        return Entry.model_validate(item)
    except ValidationError as error:
        [fault, *_] = error.errors(include_url=False, include_input=False, include_context=False)
        where = ".".join(map(str, fault["loc"])) or "what is meant to be one"
        raise StartError(f"{where}: {fault['msg']}") from None


_SHARED: Final = ("requests_per_minute", "tokens_per_minute", "weight", "priority")


def _entries(file: Path, text: str) -> Iterator[tuple[bytes, Tenant]]:
    try:
        items = yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise _broken(file, f"line {line}: not YAML") from None
    except NOT_YAML:
        raise _broken(file, "not YAML") from None
    if not isinstance(items, list):
        raise _broken(file, "not a list")
    tenants: dict[str, Tenant] = {}
    for number, item in enumerate(items, 1):
        try:
            entry = checked(item)
        except StartError as error:
            raise _broken(file, f"entry {number}: {error.message}") from None
        digest = bytes.fromhex(entry.key_sha256)
        stated = {name: getattr(entry, name) for name in _SHARED}
        tenant = tenants.setdefault(
            entry.tenant, Tenant(entry.tenant, _salt(digest, entry.tenant), **stated)
        )
        for name, value in stated.items():
            if value != getattr(tenant, name):
                raise _broken(
                    file, f"entry {number}: {name}: another key of {tenant.name} says otherwise"
                )
        yield digest, replace(tenant, models=tuple(entry.models))


def _plain(key: str) -> tuple[bytes, Tenant]:
    """A key that is its own tenant and may do everything."""
    digest = hashlib.sha256(key.encode()).digest()
    salt = _salt(digest)
    return digest, Tenant(salt.hex()[:8], salt)


def _salt(digest: bytes, tenant: str = "") -> bytes:
    """Known to nobody who knows only the tenant's name."""
    return hashlib.blake2b(tenant.encode(), key=digest, digest_size=16).digest()


def _stamp(file: Path) -> tuple[int, int, int]:
    """Differs when the file was written to or replaced. Raises StartError."""
    try:
        about = file.stat()
    except OSError as error:
        raise _broken(file, str(error.strerror)) from None
    return about.st_mtime_ns, about.st_size, about.st_ino


def _broken(file: Path, reason: str) -> StartError:
    return StartError(f"--api-key-file {file}: {reason}")
