from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from concurrent.futures import Executor, Future
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.errors import BadRequest
from cluster.messages import Sampling
from gateway.ask import Ask
from gateway.text import StopFinder, TextPool, TextStream
from gateway.tokens import Tokenizer
from tests.gateway import vocabularies as v

KINDS = {
    "llama-3": Tokenizer(v.llama_3()),
    "chatml": Tokenizer(v.chatml()),
    "llama-2": Tokenizer(v.llama_2(), {"unk_token": "<unk>"}),
    "mistral": Tokenizer(v.mistral(), {"unk_token": "<unk>"}),
    "metaspace": Tokenizer(v.metaspace(), {"unk_token": "<unk>"}),
    "words": Tokenizer(v.words(), {"unk_token": "<unk>"}),
}
CHATML = KINDS["chatml"]
every_kind = pytest.mark.parametrize("name", KINDS)
quick = settings(deadline=None, max_examples=60)


def ids_of(text: str, name: str = "chatml") -> list[int]:
    return KINDS[name].encode(text, special=False)


def read(stream: TextStream, tokens: Sequence[int]) -> tuple[str, str | None, list[str]]:
    """All text, the stop string and the single pieces, up to the stop."""
    pieces = []
    for token in tokens:
        pieces.append(stream.push(token))
        if pieces[-1].stopped is not None:
            break
    pieces.append(stream.finish("length"))
    return (
        "".join(piece.text for piece in pieces),
        pieces[-1].stopped,
        [piece.text for piece in pieces],
    )


def first_stop(text: str, stops: Sequence[str]) -> tuple[int, str] | None:
    """The definition: (end, stop) of the one that is complete first, the longer of two."""
    ends = [(text.find(s) + len(s), -len(s), s) for s in stops if s in text]
    return (min(ends)[0], min(ends)[2]) if ends else None


def tokens_of(name: str) -> st.SearchStrategy[list[int]]:
    """Any ids, most of them from real text, some outside of the vocabulary."""
    real = sorted({token for text in v.TEXT for token in ids_of(text, name)})
    ids = st.sampled_from(real) | st.integers(0, KINDS[name].vocab_size + 3)
    return st.lists(ids, max_size=30)


@every_kind
@quick
@given(data=st.data(), skip=st.booleans())
def test_pieces_of_any_tokens_make_the_whole(name: str, data: st.DataObject, skip: bool) -> None:
    tokens = data.draw(tokens_of(name))
    text, stopped, _ = read(TextStream(KINDS[name], skip_special=skip), tokens)
    assert text == KINDS[name].decode(tokens, skip)
    assert stopped is None


@every_kind
@quick
@given(text=st.text(max_size=40) | st.sampled_from(v.TEXT))
def test_pieces_of_a_text_are_whole_characters(name: str, text: str) -> None:
    tokens = ids_of(text, name)
    whole, _, pieces = read(TextStream(KINDS[name]), tokens)
    assert whole == KINDS[name].decode(tokens)
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


@every_kind
@quick
@given(data=st.data())
def test_an_answer_continues_its_prompt(name: str, data: st.DataObject) -> None:
    prompt = ids_of(data.draw(st.sampled_from(v.TEXT)), name)
    tokens = data.draw(tokens_of(name))
    text, _, _ = read(TextStream(KINDS[name], prompt[-16:]), tokens)
    assert KINDS[name].decode(prompt) + text == KINDS[name].decode([*prompt, *tokens])


def test_spaces_at_the_beginning_of_an_answer() -> None:
    tokens = ids_of("hello there", "mistral")
    prompt = ids_of("He said:", "mistral")
    begin = [*prompt, v.mistral().token_to_id("[/INST]")]
    assert read(TextStream(KINDS["mistral"], prompt), tokens)[0] == " hello there"
    assert read(TextStream(KINDS["mistral"], begin), tokens)[0] == "hello there"
    assert read(TextStream(KINDS["mistral"]), tokens)[0] == "hello there"


def test_a_character_that_the_prompt_began_comes_whole() -> None:
    tokens = ids_of("👋")
    assert len(tokens) > 1
    text, _, _ = read(TextStream(CHATML, tokens[:1]), tokens[1:])
    assert text == "👋"


def test_what_is_left_of_a_character_that_the_prompt_began_is_the_prompts() -> None:
    began, more = ids_of("👋")[:1], ids_of("hi")
    assert read(TextStream(CHATML, began), more)[0] == "hi"
    assert read(TextStream(CHATML, began, ("h",)), more)[0] == ""
    assert read(TextStream(CHATML, began), [])[0] == ""
    assert read(TextStream(CHATML, began), [*began, *more])[0] == "\N{REPLACEMENT CHARACTER}hi"


def test_invalid_bytes_hold_nothing_up() -> None:
    backend = v.mistral()
    bad, good = backend.token_to_id("<0xFF>"), backend.token_to_id("<0x41>")
    stream = TextStream(KINDS["mistral"])
    assert [stream.push(token).text for token in (bad, bad, good)] == ["�", "�", "A"]


def test_a_character_cut_off_by_the_end() -> None:
    stream = TextStream(KINDS["mistral"])
    assert stream.push(v.mistral().token_to_id("<0xE4>")).text == ""
    assert stream.finish("").text == ""
    assert stream.finish("length").text == "�"
    assert stream.finish("length").text == ""


stop_sets = st.lists(st.text("abc ", min_size=1, max_size=4), min_size=1, max_size=4, unique=True)


@quick
@given(text=st.text("abc ", max_size=30), stops=stop_sets, include=st.booleans(), data=st.data())
def test_text_is_cut_at_the_first_stop_string(
    text: str, stops: list[str], include: bool, data: st.DataObject
) -> None:
    tokens = [token for part in data.draw(partitions(text)) for token in ids_of(part)]
    shown, stopped, _ = read(TextStream(CHATML, (), stops, include), tokens)
    found = first_stop(text, stops)
    if found is None:
        assert (shown, stopped) == (text, None)
    else:
        end, stop = found
        assert stopped == stop
        assert shown == text[: end if include else end - len(stop)]


def partitions(text: str) -> st.SearchStrategy[list[str]]:
    """Ways to cut a text in pieces, so that token borders fall anywhere."""
    cuts = st.lists(st.integers(0, len(text)), max_size=8).map(sorted)
    return cuts.map(lambda at: [text[a:b] for a, b in zip([0, *at], [*at, len(text)], strict=True)])


@quick
@given(text=st.text("ab", max_size=40), stops=stop_sets)
def test_no_part_of_a_stop_string_is_shown_and_nothing_else_is_held(
    text: str, stops: list[str]
) -> None:
    stream, shown = TextStream(CHATML, (), stops), ""
    for count, character in enumerate(text, start=1):
        (token,) = ids_of(character)
        piece = stream.push(token)
        shown += piece.text
        if piece.stopped is not None:
            return
        held = max(
            length
            for stop in stops
            for length in range(len(stop))
            if text[:count].endswith(stop[:length])
        )
        assert shown == text[: count - held]


@given(text=st.text("ab", max_size=60), stop=st.text("ab", min_size=1, max_size=6))
def test_stop_finder_is_a_search(text: str, stop: str) -> None:
    finder = StopFinder(stop)
    found = [end for end, character in enumerate(text, start=1) if finder.push(character)]
    assert found == [e for e in range(len(stop), len(text) + 1) if text[:e].endswith(stop)]


def test_stop_strings_do_not_count_within_min_tokens() -> None:
    tokens = [ids_of(character)[0] for character in "abcabc"]
    for min_tokens, shown in ((0, "ab"), (2, "ab"), (3, "abcab"), (5, "abcab"), (6, "abcabc")):
        text, _, _ = read(TextStream(CHATML, (), ("c",), min_tokens=min_tokens), tokens)
        assert text == shown


@pytest.mark.parametrize("stops", [("bc", "abc"), ("abc", "bc")])
def test_of_stop_strings_that_end_together_the_longer_counts(stops: tuple[str, ...]) -> None:
    tokens = [ids_of(character)[0] for character in "xabcx"]
    text, stopped, _ = read(TextStream(CHATML, (), stops), tokens)
    assert (text, stopped) == ("x", "abc")


def test_nothing_comes_after_a_stop_string() -> None:
    stream = TextStream(CHATML, (), ("b",))
    tokens = [ids_of(character)[0] for character in "abc"]
    pieces = [stream.push(token) for token in tokens] + [stream.finish("length")]
    assert [piece.text for piece in pieces] == ["a", "", "", ""]
    assert [piece.stopped for piece in pieces] == [None, "b", "b", "b"]


def test_a_stop_string_can_be_complete_with_the_flush() -> None:
    stream = TextStream(KINDS["mistral"], (), ("a�",))
    tokens = [*ids_of("a", "mistral"), v.mistral().token_to_id("<0xE4>")]
    assert "".join(stream.push(token).text for token in tokens) == ""
    piece = stream.finish("length")
    assert (piece.text, piece.stopped) == ("", "a�")


def test_special_tokens_are_shown_if_asked() -> None:
    tokens = [*ids_of("a"), v.chatml().token_to_id("<|im_end|>")]
    assert read(TextStream(CHATML), tokens)[0] == "a"
    assert read(TextStream(CHATML, skip_special=False), tokens)[0] == "a<|im_end|>"


# The pool.


class Gate(Executor):
    """Begins no job."""

    def __init__(self) -> None:
        self.jobs: list[Future[Any]] = []

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        self.jobs.append(Future())
        return self.jobs[-1]

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        for job in self.jobs:
            job.cancel()


async def test_stop_ends_the_threads_and_whoever_waits() -> None:
    before = threading.active_count()
    pool = TextPool(CHATML)
    pool.start()
    await pool.decode(ids_of("a"))
    assert threading.active_count() > before
    pool.stop()
    assert threading.active_count() == before
    with pytest.raises(AssertionError, match="not running"):
        await pool.decode(ids_of("a"))
    busy = TextPool(CHATML, Gate())
    waiting = asyncio.create_task(busy.decode(ids_of("a")))
    await asyncio.sleep(0)
    busy.stop()
    await asyncio.wait((waiting,))
    assert waiting.cancelled()


async def test_any_work_of_the_kind() -> None:
    pool = TextPool(CHATML)
    pool.start()
    assert await pool.run(threading.get_ident) != threading.get_ident()
    with pytest.raises(ZeroDivisionError):
        await pool.run(lambda: 1 / 0)
    pool.stop()


async def test_encode_and_decode() -> None:
    pool = TextPool(KINDS["llama-3"])
    pool.start()
    bos = v.llama_3().token_to_id("<|begin_of_text|>")
    ask = Ask("completion", "m", Sampling(), prompts=("hello", (5, 6)))
    prompts = await pool.encode(ask)
    assert prompts == [(bos, *ids_of("hello", "llama-3")), (5, 6)]
    assert await pool.decode(prompts[0]) == "hello"
    with pytest.raises(BadRequest) as raised:
        await pool.encode(Ask("chat", "m", Sampling(), messages=({"role": "user", "content": ""},)))
    assert raised.value.code == "unsupported"
    pool.stop()


async def test_encode_a_chat_as_it_was_asked() -> None:
    bos = "<|begin_of_text|>"
    tokenizer = Tokenizer(v.llama_3(), {"bos_token": bos}, v.LLAMA_3_TEMPLATE)
    pool = TextPool(tokenizer)
    pool.start()
    messages = ({"role": "user", "content": "hi"},)
    asks = (
        Ask("chat", "m", Sampling(), messages=messages, add_special_tokens=False),
        Ask("chat", "m", Sampling(), messages=messages, add_special_tokens=True),
        Ask(
            "chat",
            "m",
            Sampling(),
            messages=messages,
            add_special_tokens=False,
            add_generation_prompt=False,
            continue_final_message=True,
        ),
    )
    plain, doubled, open_end = [(await pool.encode(ask))[0] for ask in asks]
    assert doubled == (plain[0], *plain)
    assert tokenizer.decode(plain).endswith("assistant\n\n")
    assert tokenizer.decode(open_end).endswith("hi")
    pool.stop()
