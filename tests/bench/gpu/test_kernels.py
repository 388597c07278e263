"""Every part that checks or times kernels, at small sizes under the interpreter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch

from bench.gpu import check_attention, check_ops, check_sampling, machine, parts
from bench.gpu.options import GpuOptions
from bench.gpu.part import Part
from bench.gpu.setting import SMALL, Rows, Setting
from engine.cuda import CudaRunner
from engine.kernels.backend import TritonOps
from engine.models import load as loading
from prefill.kernels.attention import attend_prompts
from tests.engine.kernels.interpreter import INTERPRETING

pytestmark = pytest.mark.interpreted

SETTING = Setting("cpu", 1, SMALL)

KERNELS = [
    part
    for part in parts.all_parts(on_gpu=False)
    if part.section in ("check", "speed", "tune") and not part.name.endswith(("d80", "d96", "d256"))
]


@pytest.mark.filterwarnings("ignore:overflow")  # numpy's, in the interpreter
@pytest.mark.parametrize("part", KERNELS, ids=lambda part: part.name)
def test_a_part_finds_the_kernels_right(part: Part) -> None:
    small = replace(SMALL, batches=(2,)) if part.name == "speed.choosing" else SMALL
    rows = list(part.work(replace(SETTING, sizes=small), *part.arguments))
    assert rows
    wrong = [row for row in rows if not row.get("ok", True)]
    assert not wrong
    assert all("ok" in row for row in rows) == (part.section == "check")


def off(result: torch.Tensor) -> torch.Tensor:
    """One entry of many."""
    spoilt = result.clone()
    spoilt.view(-1)[-1] += 1
    return spoilt


@pytest.mark.parametrize(
    ("module", "kernel", "work"),
    [
        (check_attention, "attend_prompts", partial(check_attention.prefill, half="fp32")),
        (check_attention, "attend_singles", partial(check_attention.decode, half="fp32")),
        (check_ops, "rms_norm", partial(check_ops.norms, half="fp32")),
        (check_ops, "add_rms_norm", partial(check_ops.norms, half="fp32")),
        (check_ops, "rope_write", partial(check_ops.rope, half="fp32")),
        (check_ops, "swiglu", partial(check_ops.activation, half="fp32")),
        (check_ops, "argmax", check_ops.greedy),
        (check_ops, "gather_kv", check_ops.moving),
        (check_sampling, "sample", check_sampling.drawing),
    ],
)
def test_one_entry_that_is_off_shows(
    module: object, kernel: str, work: Callable[..., Rows], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = getattr(module, kernel)
    monkeypatch.setattr(module, kernel, lambda *args, **more: off(right(*args, **more)))
    heads = {"head_dim": 64} if kernel.startswith(("attend", "rope")) else {}
    assert not all(row["ok"] for row in work(SETTING, **heads))


def test_a_slot_that_may_not_be_read_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    def too_far(*args: object, **more: object) -> torch.Tensor:
        q, keys, values, starts, contexts, *rest = args
        return attend_prompts(q, keys, values, starts, contexts + 1, *rest, **more)

    monkeypatch.setattr(check_attention, "attend_prompts", too_far)
    assert not any(row["ok"] for row in check_attention.prefill(SETTING, "fp32", 64))


def test_a_race_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0

    def moving(*args: object, **more: object) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return torch.full((2,), float(calls))

    monkeypatch.setattr(check_attention, "attend_singles", moving)
    assert not any(row["ok"] for row in check_attention.merging(SETTING, "fp32"))


def test_the_engine_recites_with_triton_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    from bench.gpu import engine, whole

    made = []

    class Recorded(CudaRunner):
        def warm_up(self, attention: object) -> None:
            made.append(self)
            super().warm_up(attention)  # type: ignore[arg-type]

    ops = TritonOps(torch.float32, torch.device("cpu"))
    monkeypatch.setattr(loading, "choose_ops", lambda *_: ops)
    monkeypatch.setattr(engine, "CudaRunner", Recorded)
    shortest = min(whole.questions(), key=lambda talk: len("".join(map("".join, talk.turns))))
    monkeypatch.setattr(whole, "questions", lambda: [shortest])
    [row] = whole.answers(SETTING, "fp32")
    assert row["ok"], row
    assert len(made) == 1


def test_what_the_machine_reaches() -> None:
    versions, *rates = machine.machine(SETTING)
    assert versions["torch"] == torch.__version__
    limits = machine.limits_of([versions, *rates])
    assert limits.copy == rates[0]["rate"] and limits.products == rates[-1]["rate"]
    assert machine.limits_of([]).copy == 4.3e12


def test_what_a_gpu_runs_beyond_these() -> None:
    assert INTERPRETING
    names = {part.name for part in parts.chosen(GpuOptions())}
    assert {"check.graph", "check.prefill.bf16.d128", "check.answers.fp16"} <= names
