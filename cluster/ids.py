"""Ids are random and made by us, so that a client can never name anything of ours (R7)."""

from __future__ import annotations

import secrets


def new_id() -> str:
    """A request or landing id: 128 random bits as 32 hex digits."""
    return secrets.token_hex(16)


def new_incarnation() -> int:
    """Tells one start of a process from the next under the same name: 63 random bits, never 0."""
    return secrets.randbits(63) | 1
