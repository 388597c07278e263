"""An answer's text as its tokens come in, and the threads for what takes longer.

TextStream is one choice's state, pure, with constant work per token. TextPool keeps
tokenising, templates and the decoding of whole texts off the event loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextvars import copy_context
from functools import partial
from typing import NamedTuple, ParamSpec, TypeVar

from gateway.ask import Ask
from gateway.tokens import Tokenizer

P = ParamSpec("P")
T = TypeVar("T")


class Piece(NamedTuple):
    """What a token added to an answer's text; `stopped` is the stop string that ended it."""

    text: str
    stopped: str | None = None


class StopFinder:
    """Looks for one string in a text that comes in character by character.

    Source: Knuth, Morris and Pratt 1977: constant time per character, however the string repeats.
    """

    def __init__(self, stop: str) -> None:
        self.stop = stop
        self.matched = 0  # how many characters of `stop` the text ends with now
        self._fallback = [0] * (len(stop) + 1)
        for end in range(1, len(stop)):
            self._fallback[end + 1] = self._advance(self._fallback[end], stop[end])

    def push(self, character: str) -> bool:
        """Whether the text now ends with the string."""
        self.matched = self._advance(self.matched, character)
        return self.matched == len(self.stop)

    def _advance(self, matched: int, character: str) -> int:
        while matched == len(self.stop) or self.stop[matched] != character:
            if matched == 0:
                return 0
            matched = self._fallback[matched]
        return matched + 1


class TextStream:
    """One choice's text: whole characters, cut at the first stop string, no part of one shown.

    The first stop string is the one that is complete first; of two that end together, the longer.
    The pieces together are the same whatever the tokens' borders.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_tail: Sequence[int] = (),
        stop: Sequence[str] = (),
        include_stop: bool = False,
        skip_special: bool = True,
        min_tokens: int = 0,
    ) -> None:
        """`prompt_tail`: the prompt's last tokens, which the answer continues.

        A special token there ends what came before, so that the answer begins a text of its own.
        Stop strings that are complete within the first `min_tokens` tokens do not count.
        """
        begins = not prompt_tail or prompt_tail[-1] in tokenizer.special_ids
        self._decoding = tokenizer.decoding(skip_special, first=False)
        for token in prompt_tail:
            self._decoding.push(token)  # leaves only an unfinished character behind
        self._decoding.first = begins
        self._begun = self._decoding.unfinished  # by the prompt
        self._finders = [StopFinder(text) for text in stop]
        self._include_stop = include_stop
        self._min_tokens = min_tokens
        self._count = 0
        self._held = ""  # the end of the text, while it may be the beginning of a stop string
        self._stopped: str | None = None

    def push(self, token: int) -> Piece:
        """What this token lets be shown. After a stop string nothing comes any more."""
        if self._stopped is not None:
            return Piece("", self._stopped)
        self._count += 1
        text = self._decoding.push(token)
        if self._begun and text:
            text = self._own(text)
        return self._show(text) if self._finders else Piece(text)

    def finish(self, token_finish: str) -> Piece:
        """What was held back, once the tokens have ended: `token_finish` is the last one's.

        While it is empty the answer goes on, and nothing is flushed.
        """
        if self._stopped is not None or not token_finish:
            return Piece("", self._stopped)
        piece = self._show(self._own(self._decoding.finish()))
        if piece.stopped is not None:
            return piece
        held, self._held = self._held, ""
        return Piece(piece.text + held)

    def _own(self, text: str) -> str:
        """Without what is left of a character that the prompt began and the answer does not end."""
        begun, self._begun = self._begun, False
        return text.removeprefix("\N{REPLACEMENT CHARACTER}") if begun else text

    def _show(self, new: str) -> Piece:
        if not self._finders:
            return Piece(new)
        text = self._held + new
        counts = self._count > self._min_tokens
        for end, character in enumerate(new, start=len(self._held) + 1):
            found = [finder.stop for finder in self._finders if finder.push(character)]
            if found and counts:
                self._stopped = max(found, key=len)
                cut = end if self._include_stop else end - len(self._stopped)
                self._held = ""
                return Piece(text[:cut], self._stopped)
        safe = len(text) - max(finder.matched for finder in self._finders)
        self._held = text[safe:]
        return Piece(text[:safe])


class TextPool:
    """Threads for text, used from one event loop.

    Encoding a long prompt takes long, so that no stream may wait for it. Text that comes token by
    token does not come here: a TextStream takes less time than the way to a thread and back.
    """

    def __init__(self, tokenizer: Tokenizer, executor: Executor | None = None) -> None:
        """An executor that is passed in is taken over."""
        self._tokenizer = tokenizer
        self._executor = executor

    def start(self) -> None:
        """To be called before anything else."""
        self._executor = self._executor or ThreadPoolExecutor(2, "text")

    def stop(self) -> None:
        """Ends the threads after the jobs they are in. Whoever still waits is cancelled."""
        if self._executor is not None:
            self._executor.shutdown(wait=True, cancel_futures=True)
        self._executor = None

    async def encode(self, ask: Ask, most: int = 0) -> list[tuple[int, ...]]:
        """Every prompt's token ids. Raises BadRequest, also for far more than `most`, if given."""
        return await self.run(encode, self._tokenizer, ask, most)

    async def decode(self, ids: Sequence[int]) -> str:
        """A whole text at once."""
        return await self.run(self._tokenizer.decode, ids)

    async def run(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Any other work of the kind. Raises what it raises."""
        assert self._executor is not None, "the text pool is not running"
        loop = asyncio.get_running_loop()
        within = copy_context().run  # what it logs belongs to the request
        return await loop.run_in_executor(self._executor, partial(within, work, *args, **kwargs))


def encode(tokenizer: Tokenizer, ask: Ask, most: int = 0) -> list[tuple[int, ...]]:
    """Every prompt of a call as token ids; a chat is one prompt. Raises BadRequest."""
    if ask.kind == "chat":
        ids = tokenizer.chat(
            ask.messages,
            ask.add_generation_prompt,
            ask.continue_final_message,
            ask.add_special_tokens,
            most,
        )
        return [tuple(ids)]
    return [
        tuple(tokenizer.encode(prompt, ask.add_special_tokens, most))
        if isinstance(prompt, str)
        else prompt
        for prompt in ask.prompts
    ]
