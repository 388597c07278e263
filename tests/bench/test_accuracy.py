from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from bench import accuracy
from bench.accuracy import AccuracyOptions, Result, cut, parse_choice, parse_options, shortened
from bench.accuracy_measures import Measures
from bench.cpu_engine import Choice
from cluster.errors import StartError
from engine import native
from tests.checkpoints import build

BF16 = Choice("bfloat16", "torch")


class TestMeasures:
    def test_the_same_logits_are_no_error(self) -> None:
        logits = torch.randn(5, 20)
        measures = Measures()
        measures.add(logits, logits + 3.0, torch.tensor([1, 2, 3, 4, -1]))
        assert measures.error_max < 1e-6 and abs(measures.kl_max) < 1e-9
        assert measures.top1 == 1.0 and measures.rows == 5 and measures.targets == 4
        assert measures.perplexity_ratio == pytest.approx(1.0)

    def test_numbers_of_a_case_done_by_hand(self) -> None:
        ours, truth = torch.tensor([[0.0, 0.0]]), torch.tensor([[math.log(3.0), 0.0]])
        measures = Measures()
        measures.add(ours, truth, torch.tensor([0]))
        assert measures.kl_mean == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5))
        assert measures.perplexity == pytest.approx(2.0)
        assert measures.reference_perplexity == pytest.approx(4 / 3)
        assert measures.error_mean == pytest.approx(1.0)
        assert measures.same_top == 1  # the lower of two equal ones

    def test_sums_over_several_adds(self) -> None:
        torch.manual_seed(0)
        ours, truth = torch.randn(6, 9), torch.randn(6, 9)
        targets = torch.arange(6)
        whole, parts = Measures(), Measures()
        whole.add(ours, truth, targets)
        for rows in (slice(0, 1), slice(1, 6)):
            parts.add(ours[rows], truth[rows], targets[rows])
        assert parts.to_json() == pytest.approx(whole.to_json())

    def test_without_targets_there_is_no_perplexity(self) -> None:
        measures = Measures()
        measures.add(torch.randn(1, 4), torch.randn(1, 4), torch.tensor([-1]))
        assert math.isnan(measures.perplexity)


class TestWindows:
    def test_pieces_of_at_most_a_window(self) -> None:
        assert cut([range(7), range(3)], 4, 100) == [[0, 1, 2, 3], [4, 5, 6], [0, 1, 2]]

    def test_no_more_than_asked_for_and_none_of_one_token(self) -> None:
        assert cut([range(9)], 4, 6) == [[0, 1, 2, 3], [4, 5]]
        assert cut([range(5)], 4, 100) == [[0, 1, 2, 3]]

    def test_the_first_tokens(self) -> None:
        assert shortened([[1, 2, 3], [4, 5, 6]], 4) == [[1, 2, 3], [4]]
        assert shortened([[1, 2]], 9) == [[1, 2]]

    def test_baton_tiny_reads_its_own(self) -> None:
        windows = accuracy.read_windows(AccuracyOptions(tokens=300))
        assert sum(map(len, windows)) == 300 and len(windows) > 2

    def test_another_model_reads_a_file_or_random_tokens(self, tmp_path: Path) -> None:
        model = build("llama", tmp_path / "m")
        options = AccuracyOptions(model=str(model), tokens=50, window=20)
        assert [len(ids) for ids in accuracy.read_windows(options)] == [20, 20, 10]
        text = tmp_path / "text"
        text.write_text("some words and more words", encoding="utf-8")
        options = AccuracyOptions(model=str(model), text=text, tokens=500, window=20)
        assert accuracy.read_windows(options) == accuracy.read_windows(options)

    def test_what_cannot_be_read(self, tmp_path: Path) -> None:
        with pytest.raises(StartError, match="--text"):
            accuracy.read_windows(AccuracyOptions(text=tmp_path / "none"))
        with pytest.raises(StartError, match="--window"):
            accuracy.read_windows(AccuracyOptions(window=1 << 20))


class TestFlags:
    def test_choices(self) -> None:
        assert parse_choice("native-int8") == Choice("float32", "native", "int8")
        assert parse_choice("torch-bfloat16") == BF16
        for word in ("native", "triton-float32", "torch-int4", ""):
            with pytest.raises(StartError, match="--choices"):
                parse_choice(word)

    def test_defaults_are_all_that_there_are(self) -> None:
        choices = parse_options([]).choices
        assert BF16 in choices
        assert (Choice("float32", "native", "int8") in choices) is native.available()

    @pytest.mark.parametrize("argv", [["--tokens", "1"], ["--window", "1"], ["--threads", "0"]])
    def test_what_cannot_work_is_refused(self, argv: list[str]) -> None:
        with pytest.raises(StartError, match=argv[0]):
            parse_options(argv)

    def test_limits(self) -> None:
        measures = Measures()
        measures.add(torch.zeros(2, 3), torch.eye(3)[:2] * 5, torch.tensor([0, 1]))
        result = Result(BF16, "torch", "chunks", measures)
        assert result.beyond(AccuracyOptions()) == []
        strict = AccuracyOptions(max_kl=1e-3, min_top1=0.9, max_perplexity_ratio=1.1)
        assert [limit.split()[0] for limit in result.beyond(strict)] == [
            "KL",
            "top-1",
            "perplexity",
        ]
        assert result.beyond(AccuracyOptions(max_kl=9, min_top1=0.5, max_perplexity_ratio=9)) == []


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(build("qwen3", tmp_path_factory.mktemp("accuracy") / "m"))


class TestRun:
    """Through the stage, with a small checkpoint."""

    def test_the_reference_against_itself(self, model: str) -> None:
        options = AccuracyOptions(
            model=model, choices=(accuracy.TRUTH,), tokens=60, window=25, single=30
        )
        chunks, single = accuracy.measure(options)
        assert (chunks.way, chunks.measures.rows) == ("chunks", 60)
        assert (single.way, single.measures.rows) == ("single", 30)
        for result in (chunks, single):
            assert result.measures.error_max < 1e-5 and result.measures.top1 == 1.0
        assert chunks.measures.targets == 60 - 3  # the last of each window has none

    def test_half_precision_shows_and_a_limit_fails_the_run(
        self, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        file = tmp_path / "out.json"
        argv = [model, "--choices", "torch-bfloat16", "--tokens", "40", "--single", "0"]
        argv += ["--window", "20", "--threads", "1", "--output", str(file)]
        assert accuracy.main(argv) == 0
        assert accuracy.main([*argv, "--max-kl", "1e-12"]) == 1
        told = capsys.readouterr()
        assert "torch bfloat16" in told.out and "KL" in told.err
        [result] = json.loads(file.read_text())["results"]
        assert 1e-4 < result["error_mean"] < 0.2 and result["kernels"] == "torch"

    @pytest.mark.skipif(not native.available(), reason="no native kernels here")
    def test_native_float32_is_the_same_but_for_rounding(self, tmp_path: Path) -> None:
        options = AccuracyOptions(choices=(Choice("float32", "native"),), tokens=60, single=20)
        for result in accuracy.measure(options):
            assert result.kernels == "native"
            assert result.measures.error_max < 1e-4 and result.measures.top1 == 1.0
