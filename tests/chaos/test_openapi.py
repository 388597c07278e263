"""Our OpenAPI document against our answers: to calls that keep to the schema, and to others."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from random import Random
from typing import Any

import pytest
import schemathesis
from fastapi import FastAPI
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis import Case, GenerationMode
from schemathesis.checks import (
    content_type_conformance,
    negative_data_rejection,
    not_a_server_error,
    response_schema_conformance,
    status_code_conformance,
)

from gateway.app import create_app
from tests.gateway.fakes import MODEL, FakeSequencer, make_gateway, says

pytestmark = pytest.mark.timeout(900)

KEY = {"Authorization": "Bearer k"}
OBEYED = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]
ROUTES = [
    "GET /health", "GET /version", "GET /load", "GET /status", "GET /metrics", "GET /v1/models",
    "GET /v1/models/{name}", "POST /v1/completions",
    "POST /v1/chat/completions", "POST /tokenize", "POST /detokenize",
]  # fmt: skip


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FastAPI]:
    gateway = make_gateway(
        tmp_path_factory.mktemp("model"), FakeSequencer(says("a word")), keys=["k"]
    )
    gateway.text.start()
    yield create_app(gateway)
    gateway.text.stop()


@pytest.fixture(scope="module")
def operations(app: FastAPI) -> dict[str, Any]:
    schema = schemathesis.openapi.from_asgi("/openapi.json", app, headers=KEY)
    found = [result.ok() for result in schema.get_all_operations()]
    return {f"{operation.method.upper()} {operation.path}": operation for operation in found}


def test_every_route_is_looked_at(operations: dict[str, Any]) -> None:
    """But the document's own, which schemathesis leaves out."""
    assert sorted(operations) == sorted(ROUTES)


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
@pytest.mark.parametrize("route", ROUTES)
def test_answers_are_as_documented(
    route: str, mode: GenerationMode, operations: dict[str, Any], chaos_full: bool
) -> None:
    if mode is GenerationMode.NEGATIVE and not route.startswith("POST"):
        pytest.skip("there is nothing to get wrong in it")
    random, statuses = Random(3), Counter[int]()
    examples = 1000 if chaos_full else 20

    def check(case: Case) -> None:
        if mode is GenerationMode.POSITIVE and "model" in (_fields(case) or {"": 0}):
            case.body["model"] = MODEL if random.random() < 0.9 else "another"
        response = case.call(headers=KEY)
        more = [negative_data_rejection] if mode is GenerationMode.NEGATIVE else []
        case.validate_response(response, checks=[*OBEYED, *more])
        statuses[response.status_code] += 1

    _run(check, operations[route].as_strategy(generation_mode=mode), examples, chaos_full)
    assert mode is GenerationMode.NEGATIVE or statuses.keys() & {200, 404}, statuses


@pytest.mark.parametrize("route", ROUTES)
def test_without_a_key_nothing_is_answered(route: str, operations: dict[str, Any]) -> None:
    def check(case: Case) -> None:
        response = case.call(headers={})
        assert response.status_code == 401
        case.validate_response(response, checks=OBEYED)

    _run(check, operations[route].as_strategy(), 2, False)


def _fields(case: Case) -> dict[str, Any] | None:
    return case.body if isinstance(case.body, dict) else None


def _run(check: Any, cases: st.SearchStrategy[Case], examples: int, new: bool) -> None:
    rules = settings(
        max_examples=examples,
        derandomize=not new,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    given(case=cases)(rules(check))()
