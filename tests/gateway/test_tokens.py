from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from cluster.errors import BadModel, BadRequest
from gateway import template
from gateway.tokens import Tokenizer
from tests.gateway import vocabularies as v

CHAT: dict[str, tuple[Callable[[], tokenizers.Tokenizer], str, dict[str, str]]] = {
    "llama-3": (
        v.llama_3,
        v.LLAMA_3_TEMPLATE,
        {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
    ),
    "chatml": (v.chatml, v.CHATML_TEMPLATE, {"eos_token": "<|im_end|>"}),
    "llama-2": (
        v.llama_2,
        v.MISTRAL_TEMPLATE,
        {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
    ),
    "mistral": (
        v.mistral,
        v.MISTRAL_TEMPLATE,
        {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
    ),
}
KINDS = {
    **{name: Tokenizer(make(), named) for name, (make, _, named) in CHAT.items()},
    "metaspace": Tokenizer(v.metaspace(), {"unk_token": "<unk>"}),
    "words": Tokenizer(v.words(), {"unk_token": "<unk>"}),
}
PLAIN = {
    **{name: make() for name, (make, _, _) in CHAT.items()},
    "metaspace": v.metaspace(),
    "words": v.words(),
}

CONVERSATIONS = [
    [{"role": "user", "content": "Who reads the prompts?"}],
    [
        {"role": "user", "content": "  hello \n"},
        {"role": "assistant", "content": " 你好世界 👋🏽 "},
        {"role": "user", "content": "{{ 7 * 7 }} {% raw %} <think> & <b>"},
    ],
    [{"role": "user", "content": ""}],
]


def ours(name: str) -> Tokenizer:
    make, source, named = CHAT[name]
    return Tokenizer(make(), named, source)


def theirs(name: str) -> PreTrainedTokenizerFast:
    make, source, named = CHAT[name]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=make(), **named)
    tokenizer.chat_template = source
    return tokenizer


@pytest.mark.parametrize("name", CHAT)
@pytest.mark.parametrize("messages", CONVERSATIONS)
@pytest.mark.parametrize("opening", [True, False])
def test_chats_are_those_of_transformers(
    name: str, messages: list[dict[str, str]], opening: bool
) -> None:
    tokenizer, reference = ours(name), theirs(name)
    text = reference.apply_chat_template(messages, tokenize=False, add_generation_prompt=opening)
    ids = reference.apply_chat_template(messages, add_generation_prompt=opening)["input_ids"]
    assert tokenizer.render(messages, opening) == text
    assert tokenizer.chat(messages, opening) == ids
    assert not tokenizer.special_ids.isdisjoint(ids)


@pytest.mark.parametrize("name", CHAT)
@pytest.mark.parametrize("said", ["The decode", "The decode ", "a\n ", "  x"])
def test_continued_messages_are_those_of_transformers(name: str, said: str) -> None:
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": said}]
    tokenizer, reference = ours(name), theirs(name)
    ids = reference.apply_chat_template(messages, continue_final_message=True)["input_ids"]
    assert tokenizer.chat(messages, False, continue_final_message=True) == ids


@pytest.mark.parametrize("name", CHAT)
@pytest.mark.parametrize("text", [*v.TEXT, "a b", " a", "", "<think>x"])
def test_texts_are_those_of_transformers(name: str, text: str) -> None:
    tokenizer, reference = KINDS[name], theirs(name)
    for special in (True, False):
        expected = reference(text, add_special_tokens=special)["input_ids"]
        assert tokenizer.encode(text, special) == expected


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("text", [" " * 9000, "  \n" * 3000, "x" * 9000, "\u20ac \u00fc" * 3000])
def test_what_fits_is_never_refused_for_its_characters(name: str, text: str) -> None:
    tokenizer = KINDS[name]
    ids = tokenizer.encode(text, False)
    assert tokenizer.encode(text, False, most=max(1, len(ids))) == ids


def test_a_text_of_several_times_as_many_tokens_is_refused() -> None:
    tokenizer, text = KINDS["llama-3"], "one two " * 5000
    with pytest.raises(BadRequest) as refused:
        tokenizer.encode(text, False, most=len(tokenizer.encode(text, False)) // 40)
    assert (refused.value.code, refused.value.param) == ("context_length_exceeded", "prompt")


@pytest.mark.parametrize("name", CHAT)
def test_special_tokens_in_a_clients_text_are_text(name: str) -> None:
    tokenizer = ours(name)
    special = [PLAIN[name].id_to_token(number) for number in sorted(tokenizer.special_ids)]
    for text in (*special, "".join(special), f"a {special[1]}b{special[2]} c", special[0] * 3):
        ids = tokenizer.encode(text, special=False)
        assert tokenizer.special_ids.isdisjoint(ids)
        assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("name", CHAT)
def test_special_tokens_in_a_message_are_text_and_the_templates_are_not(name: str) -> None:
    tokenizer = ours(name)
    special = [PLAIN[name].id_to_token(number) for number in sorted(tokenizer.special_ids)]
    harmless = [{"role": "user", "content": "x"}]
    controls = [i for i in tokenizer.chat(harmless) if i in tokenizer.special_ids]
    said = f" {special[1]}system {special[2]} " + "".join(special)
    ids = tokenizer.chat([{"role": "user", "content": said}])
    assert [i for i in ids if i in tokenizer.special_ids] == controls
    assert said.strip() in tokenizer.decode(ids)


def test_a_masked_message_is_tokenised_in_its_place() -> None:
    """The ids are those of the same text where no token is special."""
    tokenizer = ours("chatml")
    ids = tokenizer.chat([{"role": "user", "content": "so: <|im_end|> it is"}])
    expected = KINDS["chatml"].encode("user\nso: <|im_end|> it is", special=False)
    joined = ",".join(map(str, ids))
    assert ",".join(map(str, expected)) in joined


def test_special_tokens_that_swallow_spaces_do_so_in_chats() -> None:
    def backend() -> tokenizers.Tokenizer:
        made = v.chatml()
        made.add_special_tokens(
            [
                tokenizers.AddedToken("<|l|>", lstrip=True, special=True, normalized=False),
                tokenizers.AddedToken("<|r|>", rstrip=True, special=True, normalized=False),
            ]
        )
        return made

    source = "a  <|l|>  b  <|r|>  {{ messages[0].content }}"
    expected = backend().encode("a  <|l|>  b  <|r|>  c").ids
    assert Tokenizer(backend(), {}, source).chat([{"role": "user", "content": "c"}]) == expected
    assert expected != v.chatml().encode("a  <|l|>  b  <|r|>  c").ids


def test_templates_see_what_a_message_says() -> None:
    """Trimming works around a special token's string, and names are text as well."""
    source = "{{ messages[0].name }}:{{ messages[0].content | trim }}<|im_end|>"
    tokenizer = Tokenizer(v.chatml(), {"eos_token": "<|im_end|>"}, source)
    ids = tokenizer.chat([{"role": "user", "name": "<|im_start|>", "content": "  a <|im_end|>  "}])
    assert tokenizer.decode(ids, skip_special=False) == "<|im_start|>:a <|im_end|><|im_end|>"
    assert [i for i in ids if i in tokenizer.special_ids] == [v.chatml().token_to_id("<|im_end|>")]


def test_a_named_token_is_special_even_if_the_file_forgot() -> None:
    backend = v.chatml()
    backend.add_tokens(["<|stop|>"])
    tokenizer = Tokenizer(backend, {"eos_token": "<|stop|>"}, "{{ messages[0].content }}<|stop|>")
    stop = backend.token_to_id("<|stop|>")
    assert stop not in tokenizer.encode("a <|stop|>", special=True)
    assert tokenizer.chat([{"role": "user", "content": "<|stop|>"}]).count(stop) == 1
    assert tokenizer.decode([stop]) == ""


def test_a_vocabulary_that_spells_control_tokens_is_no_way_in() -> None:
    with pytest.raises(BadRequest) as raised:
        KINDS["words"].encode("hello <s> world", special=True)
    assert raised.value.code == "unsupported_content"
    assert KINDS["words"].encode("hello nobody", special=True) == [2, 0]


@pytest.mark.parametrize("name", KINDS)
@settings(deadline=None)
@given(data=st.data())
def test_decode_is_that_of_the_library_for_all_that_is_text(name: str, data: st.DataObject) -> None:
    text = data.draw(st.text(max_size=30) | st.sampled_from(v.TEXT))
    ids = PLAIN[name].encode(text, add_special_tokens=False).ids
    for skip in (True, False):
        expected = PLAIN[name].decode(ids, skip_special_tokens=skip)
        assert KINDS[name].decode(ids, skip_special=skip) == expected


@pytest.mark.parametrize("name", ["llama-3", "chatml", "metaspace", "words"])
@settings(deadline=None)
@given(data=st.data())
def test_decode_is_that_of_the_library_for_any_tokens(name: str, data: st.DataObject) -> None:
    """But for byte fallback, where one bad byte costs `tokenizers` the good ones beside it."""
    size = PLAIN[name].get_vocab_size()
    ids = data.draw(st.lists(st.integers(0, size + 5), max_size=20))
    for skip in (True, False):
        expected = PLAIN[name].decode(ids, skip_special_tokens=skip)
        assert KINDS[name].decode(ids, skip_special=skip) == expected


def test_bytes_that_are_no_character() -> None:
    tokenizer = KINDS["mistral"]
    ids = [PLAIN["mistral"].token_to_id(f"<0x{b:02X}>") for b in b"\xe4\xbd\xa0\xff\xe4\xbd"]
    assert tokenizer.decode(ids) == "你��"
    assert tokenizer.token_bytes(ids[0]) == b"\xe4"
    assert tokenizer.token_text(ids[0]) == "�"


@pytest.mark.parametrize("name", KINDS)
def test_ids_that_do_not_exist_spell_nothing(name: str) -> None:
    """Checkpoints pad their vocabulary: a model can sample ids that no tokenizer knows."""
    tokenizer = KINDS[name]
    assert tokenizer.vocab_size == PLAIN[name].get_vocab_size()
    for number in range(tokenizer.vocab_size, tokenizer.vocab_size + 40):
        assert tokenizer.token_bytes(number) == b""
        assert tokenizer.decode([number], skip_special=False) == ""
    assert tokenizer.decode([-1, 2**40]) == ""


@pytest.mark.parametrize("name", KINDS)
def test_a_text_is_its_tokens_bytes(name: str) -> None:
    tokenizer, text = KINDS[name], "hello there world"
    ids = tokenizer.encode(text, special=False)
    assert b"".join(map(tokenizer.token_bytes, ids)).decode().strip() == text
    assert "".join(map(tokenizer.token_text, ids)).strip() == text


def test_no_template() -> None:
    with pytest.raises(BadRequest) as raised:
        KINDS["chatml"].chat(CONVERSATIONS[0])
    assert raised.value.code == "unsupported"
    assert "no chat template" in raised.value.message


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("{{ raise_exception('no such role') }}", "no such role"),
        ("{{ messages[5].content.x.y }}", "failed"),
        ("{{ 1 / 0 }}", "failed"),
        ("{{ messages.append(1) }}", "failed"),
        ("{{ ''.__class__.__mro__ }}{{ ''.__class__.__mro__[1] }}", "failed"),
        ("{% for i in range(10 ** 9) %}x{% endfor %}", "failed"),
        ("{% for i in range(9999) %}{{ 'x' * 99 }}{% endfor %}", "long"),
    ],
)
def test_templates_that_fail(source: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template, "MAX_RENDERED_CHARS", 100_000)
    tokenizer = Tokenizer(v.chatml(), {}, source)
    with pytest.raises(BadRequest) as raised:
        tokenizer.chat(CONVERSATIONS[0])
    assert (raised.value.code, raised.value.param) == ("invalid_messages", "messages")
    assert said in raised.value.message


def test_a_refusal_of_a_template_is_bounded() -> None:
    tokenizer = Tokenizer(v.chatml(), {}, "{{ raise_exception(messages[0].content) }}")
    with pytest.raises(BadRequest) as raised:
        tokenizer.chat([{"role": "user", "content": "x" * 10**6}])
    assert len(raised.value.message) < 300


def test_a_message_that_the_template_leaves_out_cannot_be_continued() -> None:
    tokenizer = Tokenizer(v.chatml(), {}, "{{ messages[0].content }}")
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    with pytest.raises(BadRequest) as raised:
        tokenizer.chat(messages, False, continue_final_message=True)
    assert raised.value.code == "invalid_messages"


def test_what_templates_can_call() -> None:
    source = "{{ {'b': '<é>', 'a': none} | tojson }}{{ strftime_now('%%') }}{{ tools is none }}"
    assert Tokenizer(v.chatml(), {}, source).render(CONVERSATIONS[0]) == (
        '{"b": "<é>", "a": null}%True'
    )


def write(directory: Path, config: Any = None, **files: str) -> Path:
    v.chatml().save(str(directory / "tokenizer.json"))
    if config is not None:
        (directory / "tokenizer_config.json").write_text(json.dumps(config))
    for name, text in files.items():
        (directory / name.replace("__", ".")).write_text(text)
    return directory


@pytest.mark.parametrize(
    ("config", "files", "rendered"),
    [
        ({"chat_template": "A{{ eos_token }}"}, {}, "A<|im_end|>"),
        (
            {
                "chat_template": [
                    {"name": "tool_use", "template": "B"},
                    {"name": "default", "template": "C"},
                ]
            },
            {},
            "C",
        ),
        ({"chat_template": "A"}, {"chat_template__jinja": "D{{ bos_token }}"}, "D"),
    ],
)
def test_from_dir(tmp_path: Path, config: Any, files: dict[str, str], rendered: str) -> None:
    config = {"eos_token": {"content": "<|im_end|>"}, "bos_token": None, **config}
    tokenizer = Tokenizer.from_dir(write(tmp_path, config, **files))
    assert tokenizer.render(CONVERSATIONS[0]) == rendered


def test_from_dir_with_the_tokenizer_alone(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_dir(write(tmp_path))
    assert tokenizer.encode("hi", special=True) == v.chatml().encode("hi").ids


def test_truncation_and_padding_of_the_file_are_off(tmp_path: Path) -> None:
    backend = v.chatml()
    backend.enable_truncation(4)
    backend.enable_padding(length=8)
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.from_dir(tmp_path)
    assert tokenizer.decode(tokenizer.encode(v.TEXT[0], special=True)) == v.TEXT[0]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("tokenizer.json", None, "tokenizer.json"),
        ("tokenizer.json", "{", "tokenizer.json"),
        ("tokenizer_config.json", "{", "tokenizer_config.json"),
        ("tokenizer_config.json", "[]", "not a JSON object"),
        ("tokenizer_config.json", '{"chat_template": 5}', "chat_template"),
        ("chat_template.jinja", "{% for %}", "line 1"),
    ],
)
def test_directories_that_cannot_be_served(
    tmp_path: Path, name: str, content: str | None, said: str
) -> None:
    write(tmp_path)
    if content is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_text(content)
    with pytest.raises(BadModel, match=said):
        Tokenizer.from_dir(tmp_path)


def test_an_unknown_decoder_is_refused(tmp_path: Path) -> None:
    backend = v.words()
    backend.decoder = tokenizers.decoders.WordPiece()
    backend.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(BadModel, match="decoder WordPiece is not supported"):
        Tokenizer.from_dir(tmp_path)
