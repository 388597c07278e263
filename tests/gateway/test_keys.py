"""Keys: who is let in, and that tenants are told apart without keeping the key."""

from __future__ import annotations

import pytest

from cluster.errors import Unauthorized
from gateway.keys import ANYONE, Keys


def test_without_keys_everybody_is_one_tenant() -> None:
    assert Keys().tenant([]) is ANYONE
    assert Keys().tenant([b"Bearer whatever"]) is ANYONE
    assert not Keys().required


@pytest.mark.parametrize("value", [b"Bearer right", b"bearer right", b"BEARER right"])
def test_a_known_key_is_let_in(value: bytes) -> None:
    assert Keys(["other", "right"]).tenant([value]) == Keys(["right"]).tenant([b"Bearer right"])


@pytest.mark.parametrize(
    "values", [[], [b""], [b"Basic right"], [b"Bearer"], [b"Bearer "], [b"right"]]
)
def test_no_key_at_all(values: list[bytes]) -> None:
    with pytest.raises(Unauthorized) as caught:
        Keys(["right"]).tenant(values)
    assert caught.value.code == "missing_api_key"


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
    with pytest.raises(Unauthorized) as caught:
        Keys(["right"]).tenant(values)
    assert caught.value.code == "invalid_api_key"


def test_salts_divide_tenants_and_then_their_own_salts() -> None:
    keys = Keys(["one", "two"])
    one, two = keys.tenant([b"Bearer one"]), keys.tenant([b"Bearer two"])
    salts = {one.salt, two.salt, one.salted("a"), one.salted("b"), two.salted("a")}
    assert len(salts) == 5
    assert one.salted("") == one.salt
    assert ANYONE.salted("") == b"" != ANYONE.salted("a")


def test_nothing_kept_shows_the_key() -> None:
    tenant = Keys(["a-secret-key"]).tenant([b"Bearer a-secret-key"])
    assert "secret" not in repr(tenant)
