from __future__ import annotations

import importlib
import json
import math
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from bench.gpu import main, parts, shapes
from bench.gpu.options import GpuOptions, parse_options
from bench.gpu.paged import Shape, attended, error_of, paged
from bench.gpu.part import Found, Later, Part, Running
from bench.gpu.report import table
from bench.gpu.setting import SMALL, Rows, Setting, checked, timed
from cluster.errors import StartError
from cluster.model import load_config

SETTING = Setting("cpu", 1, SMALL)
PATIENCE_S = 100.0


def sound(setting: Setting) -> Rows:
    yield checked("two", 0.5, 1.0, seed=setting.seed)
    yield timed("three", 2e-6, 1e-6, aim=0.9)


def wrong(setting: Setting) -> Rows:
    yield checked("four", 2.0, 1.0)


def broken(setting: Setting) -> Rows:
    yield checked("before", 0.0, 0.0)
    raise ValueError("no such kernel")


def dead(setting: Setting) -> Rows:
    yield checked("before", math.nan, 1.0)
    os.kill(os.getpid(), signal.SIGKILL)


def hanging(setting: Setting) -> Rows:
    signal.pause()
    yield {}


def found(work: object, limit_s: float = PATIENCE_S) -> Found:
    return Running(Part("check.one", work), SETTING, limit_s).wait()  # type: ignore[arg-type]


def test_a_part_tells_what_it_found() -> None:
    one = found(sound)
    assert one.sound and not one.error
    assert [row["what"] for row in one.rows] == ["two", "three"]
    assert one.rows[0]["seed"] == 1


def test_a_check_that_is_off_fails_the_part() -> None:
    assert not found(wrong).sound


def test_what_a_part_found_before_it_broke_is_kept() -> None:
    one = found(broken)
    assert not one.sound and [row["what"] for row in one.rows] == ["before"]
    assert "ValueError: no such kernel" in one.error


def test_a_part_that_cannot_be_imported_fails_alone() -> None:
    one = found(Later("nowhere", "work"))
    assert "No module named 'bench.gpu.nowhere'" in one.error


def test_every_part_has_its_work() -> None:
    for part in parts.all_parts(on_gpu=True):
        assert isinstance(part.work, Later)
        module = importlib.import_module(f"bench.gpu.{part.work.module}")
        assert callable(getattr(module, part.work.name))


def test_a_part_that_dies_takes_nothing_with_it() -> None:
    one = found(dead)
    assert one.error == "ended with -9"
    assert one.rows[0]["error"] == "nan" and one.rows[0]["ok"] is False


def test_a_part_that_hangs_is_ended() -> None:
    one = found(hanging, 0.5)
    assert "not done within" in one.error


def test_a_run_keeps_what_it_has_and_says_what_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    some = [
        Part("check.good", sound, alone=False),
        Part("check.off", wrong, alone=False),
        Part("speed.bad", broken),
    ]
    monkeypatch.setattr(main, "chosen", lambda options: some)
    out = tmp_path / "made" / "gpu.json"
    assert main.main(["--device", "cpu", "--small", "--out", str(out), "--seed", "5"]) == 1
    kept = json.loads(out.read_text())
    assert (kept["seed"], kept["small"]) == (5, True)
    assert {part["part"]: part["ok"] for part in kept["parts"]} == {
        "check.good": True,
        "check.off": False,
        "speed.bad": False,
    }
    said = capsys.readouterr().out
    assert "check.off: four: 2, allowed 1" in said
    assert "ValueError: no such kernel" in said
    assert "three: 0.50 of 0.90" in said


def test_nothing_is_begun_after_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(main, "chosen", lambda options: [Part("check.good", sound)])
    out = tmp_path / "gpu.json"
    assert main.main(["--device", "cpu", "--minutes", "0.01", "--out", str(out)]) == 1
    [part] = json.loads(out.read_text())["parts"]
    assert part["error"] == "not begun: --minutes 0.01 are over"


def names(*words: str) -> set[str]:
    options, _ = parse_options(words)
    return {part.name for part in parts.chosen(options)}


def test_which_parts_run() -> None:
    usual = names()
    assert "machine" in usual and not any(name.startswith("tune") for name in usual)
    assert any(name.startswith("tune.decode") for name in names("--tune"))
    assert names("--only", "speed.decode") == {"speed.decode.d128", "speed.decode.d64"}
    assert names("--only", "tune.decode.d64") == {"tune.decode.d64"}
    assert names("--skip", "check", "model", "cluster", "speed") == {"machine"}
    assert len(usual) == len(list(name for name in parts.chosen(GpuOptions())))


@pytest.mark.parametrize(
    "words", [["--only", "everything"], ["--minutes", "0"], ["--jobs", "0"], ["--skip", "x.y"]]
)
def test_flags_that_cannot_be_meant(words: list[str]) -> None:
    with pytest.raises(StartError):
        parse_options(words)
    assert main.main(words) == 2


def test_the_parts_can_be_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["--list", "--tune"]) == 0
    assert "tune.prefill.d128.b16 (when asked for)" in capsys.readouterr().out.splitlines()


def test_the_seed_is_another_one_each_time() -> None:
    assert len({parse_options([])[0].seed for _ in range(8)}) > 1


def test_one_wrong_vector_among_many_shows() -> None:
    wanted = torch.randn(1000, 8, generator=torch.Generator().manual_seed(0))
    out = wanted.clone()
    assert error_of(out, wanted) == 0
    out[500] *= 1.5
    assert error_of(out, wanted) == pytest.approx(0.5)
    out[3, 3] = math.nan
    assert not checked("", error_of(out, wanted), 10.0)["ok"]
    assert error_of(torch.ones(1, 4), torch.zeros(1, 4)) == 2  # where nothing should be


@pytest.mark.parametrize("window", [0, 5])
def test_the_reference_is_attention(window: int) -> None:
    shape = Shape(4, 2, 16, torch.float64, 16, window)
    inputs = paged(SETTING, shape, [7, 3], [7, 40])
    assert not attended(inputs, 0).isnan().any()
    slots = inputs.tokens_of(1)
    q = inputs.q[7:].transpose(0, 1)
    keys, values = (
        page[slots].repeat_interleave(2, dim=1).transpose(0, 1)
        for page in (inputs.keys, inputs.values)
    )
    row, token = torch.arange(37, 40)[:, None], torch.arange(40)
    seen = (token <= row) & ((token > row - window) | (window == 0))
    wanted = scaled_dot_product_attention(q, keys, values, attn_mask=seen).transpose(0, 1)
    assert torch.allclose(attended(inputs, 1), wanted)
    assert torch.equal(attended(inputs, 1, slice(1, 2)), attended(inputs, 1)[1:2])


def test_what_may_not_be_read_is_poison() -> None:
    inputs = paged(SETTING, Shape(2, 1, 16, torch.float32), [1, 2], [17, 0], blocks=9)
    unread = torch.ones(len(inputs.keys), dtype=torch.bool)
    unread[inputs.tokens_of(0)] = False
    assert inputs.keys[unread].isnan().all() and not inputs.keys[~unread].isnan().any()
    assert int(unread.sum()) == 9 * 16 - 17
    assert (inputs.block_table[1] > 1 << 20).all()
    assert inputs.slots.tolist()[1:] == [-1, -1]


@pytest.mark.parametrize("name", shapes.CONFIGS)
def test_shapes_are_models(name: str, tmp_path: Path) -> None:
    config = load_config(shapes.write_config(tmp_path, name))
    assert config.vocab_size == shapes.CONFIGS[name]["vocab_size"]
    assert config.tied == shapes.CONFIGS[name]["tie_word_embeddings"]


def test_the_table_names_peers_and_aims() -> None:
    part = Part("speed.one", sound)
    row = timed("a prompt", 2e-3, 1e-3, peers={"flash": 1e-3, "cudnn": 3e-3}, aim=0.9, tflops=4.0)
    assert row["of_best_peer"] == pytest.approx(0.5) and row["reached"] is False
    said = table([Found(part, [row], 1.0), Found(replace(part, name="speed.two"), [], 0.0, "why")])
    assert "limit 1.00 ms = 0.50" in said and "flash 1.00 ms" in said and "MISSED" in said
    assert "a prompt: 0.50 of 0.90" in said
    assert "    why" in said
