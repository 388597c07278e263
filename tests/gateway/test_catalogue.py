"""Every row of the catalogue of bad input has its answer, and a test that shows it."""

from __future__ import annotations

import importlib

import pytest

from gateway.ask import Limits
from tests.gateway.catalogue import cases
from tests.gateway.transport import exchanges

ROWS = {*map(str, range(1, 89)), *(f"G{number}" for number in range(1, 14)), "Z1", "Z2"}

SHOWN = {
    "70": "tests.e2e.test_door:test_a_rate_is_a_keys_whoever_it_says_it_is",
    "71": "tests.gateway.test_app:test_health_follows_the_pools",
    "80": "tests.gateway.test_app:test_an_http_1_0_client_gets_no_chunked_coding",
    "81": "tests.gateway.test_door:test_a_head_in_single_bytes",
    "82": "tests.gateway.test_app:test_a_body_that_does_not_come",
    "83": "tests.e2e.test_door:test_two_thousand_idle_connections",
    "84": "tests.gateway.test_door:test_pipelined_calls_are_answered_in_their_order",
    "87": "tests.gateway.test_app:test_a_failure_after_the_first_byte_is_an_event_and_no_done",
    "88": "tests.gateway.test_app:test_text_that_looks_like_an_event_is_text",
    "G1": "tests.gateway.test_inference:test_malformed_messages",
    "G2": "tests.gateway.test_grpc_door:test_a_message_beyond_the_limit",
    "G3": "tests.gateway.test_inference:test_malformed_messages",
    "G4": "tests.gateway.test_inference:test_unknown_model_and_method",
    "G5": "tests.gateway.test_grpc_door:"
    "test_every_field_has_over_grpc_the_rule_that_it_has_over_http",
    "G6": "tests.gateway.test_grpc_door:test_who_may_not",
    "G7": "tests.gateway.test_inference:test_a_deadline_that_has_passed_reaches_no_worker",
    "G8": "tests.gateway.test_inference:test_a_client_that_cancels_ends_the_work",
    "G9": "tests.gateway.test_grpc_door:test_when_to_come_back",
    "G10": "tests.gateway.test_grpc_door:test_odd_metadata",
    "G11": "tests.gateway.test_grpc_door:test_streams_that_are_opened_and_reset",
    "G12": "tests.test_unknown_orders:test_unknown_requests_grow_nothing",
    "G13": "tests.cluster.test_rpc:test_nobody_else_gets_as_far_as_a_call",
    "Z1": "tests.kvtransfer.test_receiver:test_fuzz_is_dropped_counted_and_cut_after_ten",
    "Z2": "tests.kvtransfer.test_receiver:test_memory_stays_flat_whoever_calls",
}
"""Rows that no table can hold, each with its test."""

OTHERWISE = {
    "58": "No structured output is offered, so a schema is refused before anybody reads it.",
    "59": "Likewise: no pattern is ever compiled.",
    "60": "Likewise: only the body's own size counts.",
    "61": "Likewise: there is no grammar that could break anything for the next.",
    "62": "No tools are offered: refused whole, whatever their schema.",
    "68": "A key of 64 KiB makes the head too large: 431 before anybody looks at it, as in row 78.",
    "73": "A NUL is in no header that HTTP allows: 400, as in row 75.",
    "G10": "No base64 in a -bin field: INTERNAL, by gRPC's core, before any code of ours.",
    "G12": "Orders share one stream, whose status is no single one's: each gets a Failed.",
    "G13": "At a port with keys TLS says no before there is a call: UNAVAILABLE at the intruder.",
}
"""Rows whose answer is, in whole or in part, another than the catalogue expects, and why. Their
bodies are tried all the same."""

LIMITS = Limits(("m",), vocab_size=1000, max_model_len=64, max_prompt_tokens=40)


def test_every_row_has_its_place() -> None:
    table = {str(case.row) for case in cases(LIMITS)}
    table |= {str(exchange.row) for exchange in exchanges("m")}
    assert not table & SHOWN.keys(), "said twice"
    assert table | SHOWN.keys() == ROWS
    assert OTHERWISE.keys() <= ROWS


@pytest.mark.parametrize("row", SHOWN)
def test_the_tests_are_where_the_table_says(row: str) -> None:
    module, name = SHOWN[row].split(":")
    assert callable(getattr(importlib.import_module(module), name))
