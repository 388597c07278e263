"""How token ids spell text: the bytes of each token, and runs of tokens as UTF-8.

The three ways the served models' tokenizers decode, each as bytes per token: byte-level BPE,
SentencePiece (Replace or Metaspace, byte fallback, Strip), and tokens joined by spaces. Bytes let a
stream be decoded token by token in constant time. The result is `tokenizers`' own, except that
after an invalid byte the valid characters around it stay, where `tokenizers` drops the whole run
of byte tokens: nothing that was streamed already could be taken back.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Collection
from contextlib import suppress
from typing import Any

import tokenizers

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>", re.ASCII)


class Spelling:
    """The bytes of each token of one tokenizer. Safe to share between threads."""

    def __init__(self, backend: tokenizers.Tokenizer, hidden: Collection[int] = ()) -> None:
        """`hidden` are ids that spell nothing. Raises ValueError for a decoder it does not know."""
        self._backend = backend
        self._hidden = hidden
        self._bytes: dict[int, bytes | None] = {}
        self.whole: dict[int, str] = {}
        """Of tokens that were asked for before: those that are whole characters within a text."""
        self._replaced: list[tuple[str, str]] = []
        self._byte_level = self._byte_fallback = self._strip = False
        self._metaspace = ""
        decoder = json.loads(backend.to_str())["decoder"]
        self._joined = decoder is None
        for step in _steps(decoder):
            self._read(step)

    def of(self, token: int, *, first: bool = False) -> bytes | None:
        """What a token adds to a text, at its beginning or within. None if there is no such id."""
        if first:
            return self._spell(token, first=True)
        try:
            return self._bytes[token]
        except KeyError:
            spelled = self._bytes[token] = self._spell(token, first=False)
            if spelled is not None:
                with suppress(UnicodeDecodeError):
                    self.whole[token] = spelled.decode()
            return spelled

    def _read(self, step: dict[str, Any]) -> None:
        match step:
            case {"type": "ByteLevel"}:
                self._byte_level = True
            case {"type": "ByteFallback"}:
                self._byte_fallback = True
            case {"type": "Fuse"}:
                pass
            case {"type": "Replace", "pattern": {"String": str(old)}, "content": str(new)}:
                self._replaced.append((old, new))
            case {"type": "Strip", "content": " ", "start": 1, "stop": 0}:
                self._strip = True
            case {"type": "Metaspace", "replacement": str(mark)}:
                self._replaced.append((mark, " "))
                if step.get("prepend_scheme", "always") != "never":
                    self._metaspace = mark
            case _:
                raise ValueError(f"decoder {str(step.get('type'))[:40]} is not supported")

    def _spell(self, token: int, *, first: bool) -> bytes | None:
        name = self._name(token)
        if name is None:
            return None
        if self._joined:
            return (name if first else " " + name).encode()
        if self._byte_level:
            try:
                return bytes(map(_BYTE_OF.__getitem__, name))
            except KeyError:
                return name.encode()  # an added token, written as it is
        # Some tokenizers put a space before every text; it is taken off again at the beginning.
        if first:
            name = name.replace(self._metaspace, "")
        for old, new in self._replaced:
            name = name.replace(old, new)
        if self._byte_fallback and (byte := _BYTE_TOKEN.fullmatch(name)):
            return bytes([int(byte[1], 16)])
        return name.removeprefix(" " if first and self._strip else "").encode()

    def _name(self, token: int) -> str | None:
        if token in self._hidden or not 0 <= token < 2**32:
            return None
        name: str | None = self._backend.id_to_token(token)
        return name


class Decoding:
    """One text on its way from tokens to characters. Never gives half a character."""

    def __init__(self, spelling: Spelling, skipped: Collection[int], *, first: bool) -> None:
        """`skipped` ids are left out; `first`: no text precedes."""
        self.first = first
        self._spelling = spelling
        self._skipped = skipped
        self._whole = spelling.whole
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self.unfinished = False  # within a character

    def push(self, token: int) -> str:
        """The characters that this token completes. What can be none becomes U+FFFD at once."""
        if token in self._skipped:
            return ""
        if token in self._whole and not (self.first or self.unfinished):
            return self._whole[token]
        spelled = self._spelling.of(token, first=self.first)
        if spelled is None:
            return ""
        self.first = False
        text = self._utf8.decode(spelled)
        self.unfinished = bool(self._utf8.getstate()[0])
        return text

    def finish(self) -> str:
        """What an unfinished character leaves: U+FFFD, or nothing."""
        return self._utf8.decode(b"", final=True)


def _steps(decoder: dict[str, Any] | None) -> list[dict[str, Any]]:
    """A decoder's steps in their order, nested sequences flattened."""
    if decoder is None:
        return []
    if decoder.get("type") == "Sequence":
        return [step for part in decoder["decoders"] for step in _steps(part)]
    return [decoder]


def _byte_alphabet() -> dict[str, int]:
    """Byte-level BPE's printable stand-ins: itself for a visible Latin-1 character, else 256 + n.

    Source: GPT-2's encoder, Radford et al. 2019.
    """
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {
        chr(256 + number): byte for number, byte in enumerate(others)
    }


_BYTE_OF = _byte_alphabet()
