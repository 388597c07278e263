"""Tokenizer: text and conversations to token ids and back, without transformers.

A client's text can never become a control token. The backend is told to read special tokens as
plain text; those that the template itself writes go in under aliases, which are made up anew in
each process, and come out as the ids they stand for. A special token's string inside of a message
is hidden from that step, so it is tokenised in its place like any other text. For messages without
one, the ids are those of transformers' `apply_chat_template`.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from cluster.errors import BadModel, BadRequest
from gateway.spelling import Decoding, Spelling
from gateway.template import ChatTemplate

LIKELY_CHARS = 16
"""Characters a token that few texts have. One with more is looked at from its beginning, twice as
much each time."""

CERTAINLY = 2
"""A beginning of a text may have more tokens than the text: where it is cut, its last word is."""

NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token")


class Tokenizer:
    """One model's tokenizer. All of it may be used from several threads."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        named_tokens: Mapping[str, str] | None = None,
        chat_template: str | None = None,
    ) -> None:
        """Takes `backend` over. `named_tokens`: bos_token, eos_token, ... as templates know them.

        Raises ValueError for a decoder or template that cannot be used.
        """
        named = dict(named_tokens or {})
        self._backend = backend
        backend.no_truncation()
        backend.no_padding()
        self.vocab_size: int = backend.get_vocab_size(with_added_tokens=True)
        special = _special_tokens(backend, named.values())
        self.special_ids = frozenset(special)
        self._head, self._tail = _frame(backend)
        # An unknown token is what odd text becomes, so it is no sign of a control token.
        self._forbidden = self.special_ids - {self._id_of(named.get("unk_token"))}

        nonce = secrets.token_hex(8)
        self._mask = f"\ue000{nonce}m{{}}\ue001"
        self._masked = re.compile(f"\ue000{nonce}m([0-9]+)\ue001")
        self._find_special = re.compile("|".join(map(re.escape, _longest_first(special.values()))))
        self._aliases = {
            token.content: f"\ue000{nonce}a{number}\ue001" for number, token in special.items()
        }
        self._alias_ids = _add_aliases(backend, special, self._aliases)
        backend.encode_special_tokens = True

        self._spelling = Spelling(backend, hidden=frozenset(self._alias_ids))
        self._template = (
            ChatTemplate(chat_template, named, end_mark=f"\ue000{nonce}e\ue001")
            if chat_template is not None
            else None
        )

    @classmethod
    def from_dir(cls, directory: Path) -> Tokenizer:
        """The tokenizer of a Hugging Face model directory. Raises BadModel."""
        path = directory / "tokenizer.json"
        if not path.is_file():
            raise BadModel(f"{path}: the model has no such file; a fast tokenizer is needed")
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises nothing more precise
            raise BadModel(f"{path}: {error}") from None
        config = _read_config(directory / "special_tokens_map.json")
        config |= _read_config(directory / "tokenizer_config.json")
        try:
            return cls(backend, _named_tokens(config), _chat_template(directory, config))
        except ValueError as error:
            raise BadModel(f"{directory}: tokenizer or chat template: {error}") from None

    def encode(self, text: str, special: bool, most: int = 0, param: str = "prompt") -> list[int]:
        """A client's text. `special` adds what the tokenizer puts around a text, such as BOS.

        Raises BadRequest. With `most` for a text of several times as many tokens too, without the
        time that it would take to make them all: what fits is for the caller to say.
        """
        size = LIKELY_CHARS * most
        while 0 < size < len(text):
            if len(self._encode(text[:size])) > CERTAINLY * most:
                raise BadRequest(
                    f"This model's maximum context length is {most} tokens. The prompt has more "
                    f"than {CERTAINLY * most} and leaves no room for an answer.",
                    code="context_length_exceeded",
                    param=param,
                )
            size *= 2
        ids = self._encode(text)
        return [*self._head, *ids, *self._tail] if special else ids

    def render(
        self,
        messages: Sequence[Mapping[str, str]],
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
    ) -> str:
        """A conversation as the model's chat template writes it.

        Raises BadRequest: unsupported if the model has no template, or invalid_messages.
        """
        if self._template is None:
            raise BadRequest(
                "This model has no chat template: use /v1/completions.",
                code="unsupported",
                param="messages",
            )
        return self._template.render(
            messages,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
        )

    def chat(
        self,
        messages: Sequence[Mapping[str, str]],
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        special: bool = False,
        most: int = 0,
    ) -> list[int]:
        """A conversation as token ids. Raises BadRequest as `render` and `encode` do."""
        hidden: list[str] = []
        masked = [self._mask_message(message, hidden) for message in messages]
        text = self.render(masked, add_generation_prompt, continue_final_message)
        if self._aliases:
            text = self._find_special.sub(lambda found: self._aliases[found[0]], text)
        if hidden:
            text = self._masked.sub(lambda found: hidden[int(found[1])], text)
        return self.encode(text, special, most, "messages")

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """The text of ids that begin it. Ids that do not exist spell nothing."""
        decoding = self.decoding(skip_special, first=True)
        return "".join(map(decoding.push, ids)) + decoding.finish()

    def decoding(self, skip_special: bool, *, first: bool) -> Decoding:
        """`decode`, token by token; `first`: the text begins here."""
        skipped = self.special_ids if skip_special else frozenset()
        return Decoding(self._spelling, skipped, first=first)

    def token_text(self, token: int) -> str:
        """One token within a text; U+FFFD stands for bytes that are no character by themselves."""
        return self.token_bytes(token).decode(errors="replace")

    def token_bytes(self, token: int) -> bytes:
        """One token within a text, as UTF-8 or a part of it."""
        return self._spelling.of(token) or b""

    def _encode(self, text: str) -> list[int]:
        # The batch call is the one that lets other threads run meanwhile.
        ids: list[int] = self._backend.encode_batch_fast([text], add_special_tokens=False)[0].ids
        if not self._forbidden.isdisjoint(ids):
            # Not a matched special token but the vocabulary's own doing, as in unigram models.
            raise BadRequest(
                "The text spells a control token, which this tokenizer cannot write as text.",
                code="unsupported_content",
            )
        aliases = self._alias_ids
        return ids if aliases.keys().isdisjoint(ids) else [aliases.get(id_, id_) for id_ in ids]

    def _mask_message(self, message: Mapping[str, str], hidden: list[str]) -> dict[str, str]:
        """The message without any special token's string; those found are added to `hidden`."""

        def mask(found: re.Match[str]) -> str:
            hidden.append(found[0])
            return self._mask.format(len(hidden) - 1)

        if not self._aliases:
            return dict(message)
        return {
            name: value if name == "role" else self._find_special.sub(mask, value)
            for name, value in message.items()
        }

    def _id_of(self, token: str | None) -> int | None:
        if token is None:
            return None
        number: int | None = self._backend.token_to_id(token)
        return number


def _special_tokens(
    backend: tokenizers.Tokenizer, named: Iterable[str]
) -> dict[int, tokenizers.AddedToken]:
    """All special tokens by id. The named ones are special even where the file forgot to say so."""
    added = backend.get_added_tokens_decoder()
    special = {number: token for number, token in added.items() if token.special and token.content}
    for content in named:
        number = backend.token_to_id(content)
        if number is not None and number not in special:
            special[number] = tokenizers.AddedToken(content, special=True, normalized=False)
            backend.add_special_tokens([special[number]])
    return special


def _add_aliases(
    backend: tokenizers.Tokenizer,
    special: Mapping[int, tokenizers.AddedToken],
    aliases: Mapping[str, str],
) -> dict[int, int]:
    """Make the aliases tokens that split a text just as their originals do: {alias id: id}."""
    backend.add_tokens(
        [
            tokenizers.AddedToken(
                aliases[token.content],
                single_word=False,
                lstrip=token.lstrip,
                rstrip=token.rstrip,
                normalized=token.normalized,
                special=False,
            )
            for token in special.values()
        ]
    )
    ids: dict[int, int] = {}
    for number, token in special.items():
        alias = backend.token_to_id(aliases[token.content])
        assert alias is not None, "the backend did not take an alias"
        ids[alias] = number
    return ids


def _frame(backend: tokenizers.Tokenizer) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What the tokenizer puts before and after every text."""
    bare = backend.encode("a", add_special_tokens=False).ids
    framed = backend.encode("a", add_special_tokens=True).ids
    for start in range(len(framed) - len(bare) + 1):
        if framed[start : start + len(bare)] == bare:
            return tuple(framed[:start]), tuple(framed[start + len(bare) :])
    raise ValueError("the post-processor changes the text's own tokens")


def _longest_first(tokens: Iterable[tokenizers.AddedToken]) -> list[str]:
    """So that of two tokens that begin alike the longer one is found, as in the backend."""
    return sorted((token.content for token in tokens), key=len, reverse=True)


def _read_config(path: Path) -> dict[str, Any]:
    """A JSON object, empty if there is no such file. Raises BadModel."""
    try:
        config = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise BadModel(f"{path}: {error}") from None
    if not isinstance(config, dict):
        raise BadModel(f"{path}: not a JSON object")
    return config


def _named_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """bos_token and its kin, which are strings or objects with `content`."""
    named = {}
    for name in NAMED_TOKENS:
        value = config.get(name)
        if isinstance(value, dict):
            value = value.get("content")
        if isinstance(value, str) and value:
            named[name] = value
    return named


def _chat_template(directory: Path, config: Mapping[str, Any]) -> str | None:
    """The file chat_template.jinja, else tokenizer_config's template or the one named default."""
    try:
        return (directory / "chat_template.jinja").read_text("utf-8")
    except FileNotFoundError:
        template = config.get("chat_template")
    if isinstance(template, list):
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    if template is not None and not isinstance(template, str):
        raise ValueError("chat_template in tokenizer_config.json is neither text nor a list")
    return template
