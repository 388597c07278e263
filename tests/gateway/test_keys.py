"""Keys: who is let in, what tenants may do, and that no key is kept to tell them apart."""

from __future__ import annotations

import asyncio
import hmac
import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from cluster.errors import StartError, Unauthorized
from gateway import keys as keys_module
from gateway.ask import Limits
from gateway.keys import ANYONE, Keys, Tenant, read
from tests.gateway.transport import entry

ENTRY = entry("right", "a")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "keys.yaml"


def bearer(keys: Keys, key: str) -> Tenant:
    return keys.tenant([f"Bearer {key}".encode()])


def test_without_keys_everybody_is_one_tenant() -> None:
    assert Keys().tenant([]) is ANYONE
    assert Keys().tenant([b"Bearer whatever"]) is ANYONE
    assert not Keys().required


@pytest.mark.parametrize("value", [b"Bearer right", b"bearer right", b"BEARER right"])
def test_a_known_key_is_let_in(value: bytes) -> None:
    assert Keys(["other", "right"]).tenant([value]) == Keys(["right"]).tenant([b"Bearer right"])


def refusal(*values: bytes) -> Unauthorized:
    with pytest.raises(Unauthorized) as caught:
        Keys(["right"]).tenant(values)
    return caught.value


@pytest.mark.parametrize(
    "values", [[], [b""], [b"Basic right"], [b"Bearer"], [b"Bearer "], [b"right"]]
)
def test_no_key_at_all(values: list[bytes]) -> None:
    """Whatever is missing, the answer is the same."""
    assert refusal(*values).body() == refusal().body()
    assert refusal(*values).code == "missing_api_key"


@pytest.mark.parametrize(
    "values",
    [
        [b"Bearer wrong"],
        [b"Bearer right "],
        [b"Bearer  right"],
        [b"Bearer " + b"k" * 65536],
        ["Bearer r\u00edght".encode("latin-1")],
        [b"Bearer right", b"Bearer right"],
    ],
)
def test_a_key_that_is_not_ours(values: list[bytes]) -> None:
    """However near it is, the answer is the same."""
    assert refusal(*values).body() == refusal(b"Bearer nothing like it").body()
    assert refusal(*values).code == "invalid_api_key"


@pytest.mark.parametrize("key", ["first", "last", "unknown"])
def test_every_digest_is_compared_whatever_matches(
    key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The time tells nothing of where in the list a key is, nor whether it is there."""
    known = Keys(["first", "second", "third", "last"])
    compared: list[bytes] = []

    def counted(one: bytes, other: bytes) -> bool:
        compared.append(one)
        return hmac.compare_digest(one, other)

    monkeypatch.setattr(keys_module, "hmac", SimpleNamespace(compare_digest=counted))
    if key == "unknown":
        with pytest.raises(Unauthorized):
            bearer(known, key)
    else:
        bearer(known, key)
    assert len(set(compared)) == len(compared) == 4


def test_salts_divide_tenants_and_then_their_own_salts() -> None:
    keys = Keys(["one", "two"])
    one, two = bearer(keys, "one"), bearer(keys, "two")
    salts = {one.salt, two.salt, one.salted("a"), one.salted("b"), two.salted("a")}
    assert len(salts) == 5
    assert one.salted("") == one.salt
    assert ANYONE.salted("") == b"" != ANYONE.salted("a")


def test_nothing_kept_shows_the_key() -> None:
    tenant = bearer(Keys(["a-secret-key"]), "a-secret-key")
    assert "secret" not in repr(tenant)


# The key file.


def test_keys_one_a_line(file: Path) -> None:
    file.write_text("# ours\na\n\n  b\r\n#old\n  # c\nd#e\n")
    keys = Keys(["given"], file)
    assert len({bearer(keys, key).salt for key in ("a", "b", "d#e", "given")}) == 4
    for comment in ("#old", "#c", "#"):
        with pytest.raises(Unauthorized):
            bearer(keys, comment)
    assert bearer(keys, "a") == bearer(Keys(["a"]), "a")


@pytest.mark.parametrize("write", [yaml.safe_dump, json.dumps])
def test_a_list_of_digests(file: Path, write: Callable[[Any], str]) -> None:
    limits = {"requests_per_minute": 60, "tokens_per_minute": 1000, "weight": 2, "priority": -1}
    file.write_text(
        "# ours\n\n" + write([entry("k1", "a", models=["m"], **limits), ENTRY | {"tenant": "b"}])
    )
    keys = Keys(file=file)
    tenant = bearer(keys, "k1")
    assert tenant == Tenant("a", tenant.salt, ("m",), 60, 1000, 2.0, -1)
    assert bearer(keys, "right") == Tenant("b", bearer(keys, "right").salt)
    with pytest.raises(Unauthorized):
        bearer(keys, str(ENTRY["key_sha256"]))  # a digest opens nothing


@pytest.mark.parametrize("head", ["---\n", "--- # ours\n\n", "\n  \n #\n---\n", "\n" * 10_000])
def test_what_may_stand_before_a_list(file: Path, head: str) -> None:
    file.write_text(head + yaml.safe_dump([ENTRY]))
    assert bearer(Keys(file=file), "right").name == "a"


def test_ten_thousand_blank_lines_take_no_time(file: Path) -> None:
    file.write_text("\n" * 10_000 + "key")
    bearer(Keys(file=file), "key")


def test_keys_of_one_tenant_share_its_salt_and_limits(file: Path) -> None:
    shared = {"requests_per_minute": 5}
    entries = [
        entry("k1", "a", models=["m"], **shared),
        entry("k2", "a", **shared),
        entry("k3", "b"),
    ]
    file.write_text(yaml.safe_dump(entries))
    keys = Keys(file=file)
    one, two, other = (bearer(keys, key) for key in ("k1", "k2", "k3"))
    assert one.salt == two.salt != other.salt
    assert (one.name, one.requests_per_minute) == (two.name, two.requests_per_minute)
    assert (one.models, two.models) == (("m",), ())
    alone = file.with_name("alone.yaml")
    alone.write_text(yaml.safe_dump([entry("else", "a")]))
    assert bearer(Keys(file=alone), "else").salt != one.salt, "a name alone must not give the salt"


LIMITS = Limits(("m", "m2"), 10, 10, 9)


@pytest.mark.parametrize(
    ("models", "usable"),
    [((), ("m", "m2")), (("m2",), ("m2",)), (("m2", "m", "x"), ("m", "m2")), (("x",), ())],
)
def test_models_of_a_key(models: tuple[str, ...], usable: tuple[str, ...]) -> None:
    assert Tenant("a", b"", models).limits(LIMITS).usable_names() == usable


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "No such file"),
        ("", "holds no keys"),
        ("\n\n", "holds no keys"),
        ("[]", "holds no keys"),
        ("# old", "holds no keys"),
        ("---", "not a list"),
        ("---\ntenant: a", "not a list"),
        ("ok\na b", "line 2"),
        ("schlüssel", "line 1"),
        ("same\nsame", "holds a key twice"),
        ("- key_sha256: [", "line 1: not YAML"),
        ("- secret", "entry 1: what is meant to be one"),
        (json.dumps([{"tenant": "a"}]), "entry 1: key_sha256: Field required"),
        (json.dumps([ENTRY, {**ENTRY, "key_sha256": "secret"}]), "entry 2: key_sha256"),
        (json.dumps([ENTRY, ENTRY]), "holds a key twice"),
        (json.dumps([{**ENTRY, "weight": 0}]), "entry 1: weight"),
        (json.dumps([{**ENTRY, "weight": "2"}]), "entry 1: weight"),
        (json.dumps([{**ENTRY, "models": "m"}]), "entry 1: models"),
        (json.dumps([{**ENTRY, "models": ["m", 5]}]), "entry 1: models.1"),
        (json.dumps([{**ENTRY, "tokens_per_minute": -1}]), "entry 1: tokens_per_minute"),
        (json.dumps([{**ENTRY, "limit": 1}]), "entry 1: limit"),
        (json.dumps([{**ENTRY, "tenant": "a b"}]), "entry 1: tenant"),
        (json.dumps([ENTRY, entry("k2", "a", weight=2)]), "entry 2: weight: another key of a"),
    ],
)
def test_a_file_that_is_wrong_is_refused_and_not_repeated(
    file: Path, text: str | None, said: str
) -> None:
    """Above all it must not leave the gateway open to everybody."""
    if text is not None:
        file.write_text(text, encoding="utf-8")
    with pytest.raises(StartError) as caught:
        Keys(file=file)
    assert caught.value.message.startswith(f"--api-key-file {file}: ")
    assert said in caught.value.message
    assert "secret" not in caught.value.message


def test_no_keys_are_read_from_other_encodings(file: Path) -> None:
    file.write_bytes("a".encode("utf-16"))
    with pytest.raises(StartError, match="UTF-8"):
        read(file)


def test_a_file_that_changes_is_read_again(file: Path) -> None:
    file.write_text("old\n")
    keys = Keys(["given"], file)

    def after(text: str | None) -> Keys:
        file.unlink() if text is None else file.write_text(text)
        keys.refresh()
        return keys

    bearer(after("newer\n"), "newer")
    for broken in ("", "two words\n", None):
        bearer(after(broken), "newer")  # a slip of the pen locks nobody out
    other = file.with_name("other")
    other.write_text("newest\n")
    os.replace(other, file)
    keys.refresh()
    bearer(keys, "newest")
    bearer(keys, "given")
    for gone in ("old", "newer"):
        with pytest.raises(Unauthorized):
            bearer(keys, gone)


async def test_it_is_looked_at_now_and_then_and_no_stream_waits_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loop, looks = asyncio.get_running_loop(), asyncio.Queue[threading.Thread]()

    def look(keys: Keys) -> None:
        loop.call_soon_threadsafe(looks.put_nowait, threading.current_thread())

    monkeypatch.setattr(keys_module, "REFRESH_S", 0.0)
    monkeypatch.setattr(Keys, "refresh", look)
    following = asyncio.create_task(Keys(["given"]).follow())
    for _ in range(3):
        assert await looks.get() is not threading.main_thread()
    following.cancel()
