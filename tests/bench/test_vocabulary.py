from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from tokenizers import Tokenizer, models, pre_tokenizers

from bench.client import open_session
from bench.vocabulary import WordVocabulary, find_vocabulary
from cluster.errors import StartError
from tests.bench.conftest import ScriptedServer


async def test_the_servers_own_tokenizer(serve_script: Any) -> None:
    server = await serve_script([], tokenizes=True)
    async with open_session() as session:
        vocabulary, source = await find_vocabulary(session, server.url, "m", "org/hub-name")
        assert source == "the server's /tokenize"
        assert {ord("a"), ord("Z"), ord("7")} <= set(vocabulary.ids)
        assert len(set(vocabulary.ids)) == len(vocabulary.ids)
        assert await vocabulary.encode("né") == [110, 233]
        assert await vocabulary.decode([110, 233]) == "né"


async def test_words_without_any_tokenizer(serve_script: Any) -> None:
    server = await serve_script([])
    async with open_session() as session:
        vocabulary, source = await find_vocabulary(session, server.url, "m", None)
    assert isinstance(vocabulary, WordVocabulary) and source.startswith("none")
    assert len((await vocabulary.decode([40, 41, 42])).split()) == 3
    assert len(await vocabulary.encode("one two  three")) == 3


async def test_nonsense_from_the_server_means_words(
    serve_script: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def nonsense(self: ScriptedServer, request: web.Request) -> web.Response:
        return web.json_response({"tokens": "none"})

    monkeypatch.setattr(ScriptedServer, "tokenize", nonsense)
    server = await serve_script([], tokenizes=True)
    async with open_session() as session:
        vocabulary, _ = await find_vocabulary(session, server.url, "m", None)
    assert isinstance(vocabulary, WordVocabulary)


async def test_a_local_directory(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.WordLevel({"<s>": 0, "one": 1, "two": 2}, unk_token="<s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["<s>", "<end>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    async with open_session() as session:
        vocabulary, source = await find_vocabulary(session, "http://unused", "m", str(tmp_path))
    assert source == str(tmp_path)
    assert vocabulary.ids == [1, 2]  # no special token can end up in a prompt
    assert await vocabulary.encode("two one") == [2, 1]
    assert await vocabulary.decode([1, 2]) == "one two"


async def test_a_directory_without_a_tokenizer(tmp_path: Path) -> None:
    async with open_session() as session:
        with pytest.raises(StartError, match="--tokenizer"):
            await find_vocabulary(session, "http://unused", "m", str(tmp_path))
