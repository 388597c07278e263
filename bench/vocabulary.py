"""Vocabulary: which token ids a random prompt may hold, and what text they are."""

from __future__ import annotations

import string
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import aiohttp

from cluster.errors import StartError

_TEXT = """
time year people way day man thing woman life child world school state family student group
country problem hand part place case week company system program question work government
number night point home water room mother area money story fact month lot right study book
eye job word business issue side kind head house service friend father power hour game line
end member law car city community name president team minute idea body information back
"""
_WORDS = _TEXT.split()
_PROBE = " ".join([*_WORDS, string.ascii_letters, string.digits, string.punctuation])


class Vocabulary(Protocol):
    """Text to token ids and back."""

    @property
    def ids(self) -> Sequence[int]:
        """Ids that may stand in any prompt; special tokens are not among them."""

    async def encode(self, text: str) -> list[int]: ...

    async def decode(self, ids: Sequence[int]) -> str: ...


class WordVocabulary:
    """Stands in where no tokenizer can be reached: one word counts as one token.

    Its ids are the plain byte tokens that every byte-level BPE and SentencePiece vocabulary has
    at its low end, so they are valid anywhere; the words are only a guess at a prompt's length.
    """

    ids: Sequence[int] = range(32, 256)

    async def encode(self, text: str) -> list[int]:
        return [self.ids[len(word) % len(self.ids)] for word in text.split()]

    async def decode(self, ids: Sequence[int]) -> str:
        return " ".join(_WORDS[token % len(_WORDS)] for token in ids)


class LocalVocabulary:
    """A tokenizer.json on this machine."""

    def __init__(self, directory: Path) -> None:
        # Imported here: every other run does without it.
        from tokenizers import Tokenizer

        try:
            self._tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
        except Exception as error:  # the library raises bare Exception for any bad file
            raise StartError(f"--tokenizer {directory}: {error}") from None
        added = self._tokenizer.get_added_tokens_decoder()
        vocab = self._tokenizer.get_vocab(with_added_tokens=False)
        self.ids: Sequence[int] = sorted(set(vocab.values()) - set(added))

    async def encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    async def decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids)))


class ServerVocabulary:
    """The server's own /tokenize and /detokenize; its ids are those of a sample of English."""

    def __init__(
        self, session: aiohttp.ClientSession, base_url: str, model: str, ids: Sequence[int] = ()
    ) -> None:
        self._session = session
        self._base_url = base_url.rstrip("/")
        self._model = model
        self.ids = ids

    async def encode(self, text: str) -> list[int]:
        body = {"model": self._model, "prompt": text, "add_special_tokens": False}
        tokens = (await self._post("/tokenize", body)).get("tokens")
        if not isinstance(tokens, list) or not all(type(token) is int for token in tokens):
            raise StartError("the server's /tokenize answered without a list of `tokens`")
        return tokens

    async def decode(self, ids: Sequence[int]) -> str:
        text = (await self._post("/detokenize", {"model": self._model, "tokens": list(ids)})).get(
            "prompt"
        )
        if not isinstance(text, str):
            raise StartError("the server's /detokenize answered without a `prompt`")
        return text

    async def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        timeout = aiohttp.ClientTimeout(total=30)
        try:
            async with self._session.post(
                self._base_url + path, json=body, timeout=timeout
            ) as response:
                response.raise_for_status()
                answer = await response.json(content_type=None)
        except (aiohttp.ClientError, TimeoutError, ValueError) as error:
            raise StartError(f"the server's {path} failed: {error or 'timed out'}") from None
        return answer if isinstance(answer, dict) else {}


def _open_local(tokenizer: str | None) -> LocalVocabulary | None:
    """The tokenizer in that directory; None for a name that is no directory."""
    if tokenizer is None or not Path(tokenizer).is_dir():
        return None
    return LocalVocabulary(Path(tokenizer))


async def find_vocabulary(
    session: aiohttp.ClientSession, base_url: str, model: str, tokenizer: str | None
) -> tuple[Vocabulary, str]:
    """Take the best there is; the second value says which.

    A `tokenizer` that is no local directory (a hub name, as vLLM users give) is passed over: the
    benchmark downloads nothing. Raises StartError for a directory without a usable tokenizer.
    """
    local = _open_local(tokenizer)
    if local is not None:
        return local, str(tokenizer)
    server = ServerVocabulary(session, base_url, model)
    try:
        ids = sorted(set(await server.encode(_PROBE)))
        await server.decode(ids[:1])
    except StartError:
        return WordVocabulary(), "none (one word counted as one token)"
    if len(ids) < 2:
        return WordVocabulary(), "none (one word counted as one token)"
    return ServerVocabulary(session, base_url, model, ids), "the server's /tokenize"
