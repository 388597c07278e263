from __future__ import annotations

import json
import math
import statistics
from collections import Counter
from pathlib import Path

import pytest

from bench.load import (
    Sample,
    arrival_times,
    draw,
    is_usual_length,
    prefix_repetition_samples,
    random_samples,
    read_custom,
    read_sharegpt,
)


class TestArrivals:
    def test_infinite_rate_is_all_at_once(self) -> None:
        assert arrival_times(3, math.inf, 1.0, 0) == [0.0, 0.0, 0.0]

    @pytest.mark.parametrize("burstiness", [0.2, 1.0, 5.0])
    def test_last_arrival_is_at_count_over_rate(self, burstiness: float) -> None:
        times = arrival_times(200, 4.0, burstiness, 7)
        assert len(times) == 200
        assert times == sorted(times)
        assert times[-1] == pytest.approx(50.0)

    def test_same_seed_same_times(self) -> None:
        assert arrival_times(50, 2.0, 1.0, 3) == arrival_times(50, 2.0, 1.0, 3)
        assert arrival_times(50, 2.0, 1.0, 3) != arrival_times(50, 2.0, 1.0, 4)

    def test_infinite_burstiness_is_a_metronome(self) -> None:
        assert arrival_times(3, 2.0, math.inf, 0) == [0.5, 1.0, 1.5]

    @pytest.mark.parametrize("burstiness", [0.5, 1.0, 4.0])
    def test_spread_of_gaps_is_the_gamma_distribution(self, burstiness: float) -> None:
        times = arrival_times(20_000, 10.0, burstiness, 1)
        gaps = [b - a for a, b in zip([0.0, *times], times, strict=False)]
        variation = statistics.pstdev(gaps) / statistics.fmean(gaps)
        assert variation == pytest.approx(1 / math.sqrt(burstiness), rel=0.05)

    def test_no_requests(self) -> None:
        assert arrival_times(0, 1.0, 1.0, 0) == []


def random_of(count: int = 50, **changes: float) -> list[Sample]:
    settings = {
        "input_len": 20,
        "output_len": 10,
        "range_ratio": 0.0,
        "prefix_len": 0,
        "seed": 0,
    } | changes
    return random_samples(count, range(100, 200), **settings)  # type: ignore[arg-type]


class TestRandom:
    def test_exact_lengths_and_allowed_ids(self) -> None:
        for sample in random_of():
            assert len(sample.prompt) == sample.prompt_tokens == 20
            assert sample.output_tokens == 10
            assert set(sample.prompt) <= set(range(100, 200))

    def test_prefix_is_shared_and_on_top(self) -> None:
        samples = random_of(prefix_len=5)
        assert {len(sample.prompt) for sample in samples} == {25}
        assert len({tuple(sample.prompt[:5]) for sample in samples}) == 1
        assert len({tuple(sample.prompt[5:]) for sample in samples}) == 50

    def test_range_ratio_covers_its_whole_range(self) -> None:
        samples = random_of(2000, range_ratio=0.25)
        assert {len(sample.prompt) for sample in samples} == set(range(15, 26))
        assert {sample.output_tokens for sample in samples} == set(range(7, 14))

    def test_seed_decides(self) -> None:
        assert random_of(seed=1) == random_of(seed=1) != random_of(seed=2)

    def test_output_is_never_empty(self) -> None:
        samples = random_of(200, output_len=1, range_ratio=0.5)
        assert {sample.output_tokens for sample in samples} == {1, 2}

    def test_empty_prompts_are_refused(self) -> None:
        with pytest.raises(ValueError, match="without tokens"):
            random_of(input_len=0)


def test_prefix_repetition_shares_evenly() -> None:
    samples = prefix_repetition_samples(
        10, range(50), prefix_len=8, suffix_len=4, num_prefixes=3, output_len=6, seed=0
    )
    shares = Counter(tuple(sample.prompt[:8]) for sample in samples)
    assert sorted(shares.values()) == [3, 3, 4]
    assert len({tuple(sample.prompt) for sample in samples}) == 10
    assert all(sample.prompt_tokens == 12 and sample.output_tokens == 6 for sample in samples)


class TestCustom:
    def test_text_ids_and_messages(self, tmp_path: Path) -> None:
        messages = [{"role": "user", "content": "hi"}]
        path = tmp_path / "data.jsonl"
        rows = [{"prompt": "a\u2028b"}, {"prompt": [1, 2, 3]}, {"messages": messages}]
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        path.write_text("\n\n".join(lines), encoding="utf-8")
        text, ids, chat = read_custom(path, 9)
        assert (text.prompt, text.output_tokens, text.prompt_tokens) == ("a\u2028b", 9, 0)
        assert (ids.prompt, ids.prompt_tokens) == ([1, 2, 3], 3)
        assert chat.prompt == messages and chat.is_chat and not ids.is_chat

    def test_output_tokens_of_each_line(self, tmp_path: Path) -> None:
        path = tmp_path / "data.jsonl"
        path.write_text('{"prompt": "a", "output_tokens": 4}\n{"prompt": "b"}\n')
        with pytest.raises(ValueError, match="line 2: `output_tokens` must be"):
            read_custom(path, -1)
        assert [sample.output_tokens for sample in read_custom(path, 2)] == [2, 2]

    @pytest.mark.parametrize(
        "line", ["{oops", "[]", "{}", '{"prompt": ""}', '{"prompt": []}', '{"prompt": [1, "a"]}']
    )
    def test_bad_lines_are_named(self, tmp_path: Path, line: str) -> None:
        path = tmp_path / "data.jsonl"
        path.write_text('{"prompt": "fine"}\n' + line + "\n")
        with pytest.raises(ValueError, match="line 2"):
            read_custom(path, 4)

    def test_empty_file(self, tmp_path: Path) -> None:
        path = tmp_path / "data.jsonl"
        path.write_text("\n")
        with pytest.raises(ValueError, match="no prompts"):
            read_custom(path, 4)


class TestShareGPT:
    ROWS = (
        {"conversations": [{"from": "human", "value": "q1"}, {"from": "gpt", "value": "a1"}]},
        {"conversations": [{"from": "human", "value": "alone"}]},
        {"conversations": [{"from": "human", "value": ""}, {"from": "gpt", "value": "a3"}]},
    )

    def test_json_and_jsonl_read_alike(self, tmp_path: Path) -> None:
        whole, lines = tmp_path / "whole.json", tmp_path / "lines.jsonl"
        whole.write_text(json.dumps(self.ROWS))
        lines.write_text("".join(json.dumps(row) + "\n" for row in self.ROWS))
        assert read_sharegpt(whole, None) == [Sample("q1", None, answer="a1")]
        assert read_sharegpt(lines, 5) == [Sample("q1", 5, answer="a1")]

    def test_other_shapes_are_refused(self, tmp_path: Path) -> None:
        path = tmp_path / "data.json"
        path.write_text('[{"prompt": "x"}]')
        with pytest.raises(ValueError, match="conversations"):
            read_sharegpt(path, None)
        path.write_text(json.dumps([self.ROWS[1]]))
        with pytest.raises(ValueError, match="two turns"):
            read_sharegpt(path, None)

    @pytest.mark.parametrize(
        ("prompt", "output", "usual"),
        [(4, 4, True), (3, 4, False), (4, 3, False), (1025, 4, False), (1024, 1025, False)],
    )
    def test_usual_lengths(self, prompt: int, output: int, usual: bool) -> None:
        assert is_usual_length(Sample("x", output, prompt_tokens=prompt)) is usual


class TestDraw:
    SAMPLES = tuple(Sample(name, 1) for name in "abcdef")

    def test_order_is_kept_without_shuffle(self) -> None:
        assert draw(self.SAMPLES, 3, 0, shuffle=False) == list(self.SAMPLES[:3])

    def test_shuffle_is_a_permutation_by_seed(self) -> None:
        drawn = draw(self.SAMPLES, 6, 1, shuffle=True)
        assert drawn != list(self.SAMPLES)
        assert sorted(str(sample.prompt) for sample in drawn) == list("abcdef")
        assert drawn == draw(self.SAMPLES, 6, 1, shuffle=True)

    def test_short_file_repeats(self) -> None:
        drawn = draw(self.SAMPLES[:2], 5, 0, shuffle=False)
        assert drawn[:2] == list(self.SAMPLES[:2])
        assert len(drawn) == 5 and set(drawn[2:]) <= set(self.SAMPLES[:2])
