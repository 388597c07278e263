from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from random import Random
from typing import Any

import pytest
from tokenizers import Tokenizer

from bench import cpu, cpu_http, cpu_limits
from bench.client import open_session
from bench.cpu_flags import CpuOptions, parse_options
from bench.cpu_limits import Limits, merged
from bench.cpu_peers import MODULES, OURS, PRECISIONS, Peer, PeerFailed, launcher, pythons
from bench.cpu_report import (
    Agreement,
    CpuResult,
    Figure,
    Run,
    compare,
    decode_flops,
    kv_bytes,
    matrix_weights,
    prefill_flops,
)
from bench.peers import convert, protocol
from bench.peers.make_model import SIZES, Size, vocabulary, write_model
from bench.peers.protocol import Answer, Load, Memory
from bench.server import Server, running
from cluster.errors import StartError
from cluster.model import load_config
from tests.bench.conftest import whole

TINY = Size(32, 2, 4, 2, 48, 600, 512)
CORE = min(os.sched_getaffinity(0))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models") / "little"
    write_model(TINY, directory / "hf")
    return directory


class TestMakeModel:
    def test_every_beginning_of_a_word_is_a_token(self) -> None:
        ids, merges = vocabulary(2000)
        assert sorted(ids.values()) == list(range(2000))
        assert len(merges) == 2000 - 257
        assert all(left in ids and right in ids and left + right in ids for left, right in merges)

    def test_text_and_tokens_tell_each_other(self, models: Path) -> None:
        tokenizer = Tokenizer.from_file(str(models / "hf" / "tokenizer.json"))
        ids = [599, 257, 300, 283, 284, 400]
        assert tokenizer.encode(tokenizer.decode(ids)).ids == ids

    def test_our_reader_takes_it(self, models: Path) -> None:
        shape = load_config(models / "hf")
        assert shape.qkv_bias and shape.tied and shape.vocab_size == 600

    def test_half_is_the_shape_that_it_says(self, models: Path) -> None:
        half = SIZES["half"]
        parts = half.hidden * (half.heads + 2 * half.kv_heads) * 64 + half.hidden**2
        body = half.layers * (parts + 3 * half.hidden * half.inner)
        assert round(body / 1e6) == 358
        assert round((body + half.vocabulary * half.hidden) * 4 / 1e9, 2) == 1.98


class TestFlags:
    def test_defaults(self, models: Path) -> None:
        options = parse_options([str(models)])
        assert options.prompts == (128, 512, 2048) and options.batches == (1, 8, 32)
        assert options.rounds == 5 and options.peers == {} and options.suffix == ""

    def test_peers_are_those_named(self, models: Path) -> None:
        flags = ["--openvino", "py", "--llama-bench", "b/bin", "--vllm", "v/python"]
        options = parse_options([str(models), *flags])
        assert options.peers == {"openvino": "py", "llama.cpp": "b/bin", "vllm": "v/python"}
        assert pythons(options.peers) == {
            OURS: sys.executable,
            "openvino": "py",
            "llama.cpp": sys.executable,
            "vllm": "v/python",
        }

    def test_the_exact_precision_comes_first(self, models: Path) -> None:
        options = parse_options([str(models), "--precisions", "int8", "fp32"])
        assert options.precisions == ("fp32", "int8")

    def test_quick_is_smaller_and_says_so(self, models: Path) -> None:
        options = parse_options([str(models), "--quick", "--rounds", "3"])
        assert options.rounds == 3 and options.prompts == (128,) and options.suffix == "-quick"

    def test_what_is_held_counts_what_goes_on_meanwhile(self, models: Path) -> None:
        options = CpuOptions(models=models, cores=(CORE,), prompts=(128,), context=512)
        assert options.held >= 512 + 6 * options.steps + max(options.batches)

    @pytest.mark.parametrize(
        ("argv", "says"),
        [
            (["--cores", "99999"], r"--cores: \[99999\]"),
            (["--rounds", "0"], "--rounds"),
            (["--batches", "8", "1"], "--batches: .* rising"),
            (["--prompts", "0"], "--prompts"),
            (["--near-tie", "-1"], "--near-tie"),
        ],
    )
    def test_what_cannot_work_is_refused(self, models: Path, argv: list[str], says: str) -> None:
        with pytest.raises(StartError, match=says):
            parse_options([str(models), *argv])

    def test_without_a_model_it_says_how_to_make_one(self, tmp_path: Path) -> None:
        with pytest.raises(StartError, match="make_model half"):
            parse_options([str(tmp_path)])

    def test_more_tokens_than_the_model_takes(self, models: Path) -> None:
        options = CpuOptions(models=models, cores=(CORE,))
        with pytest.raises(StartError, match="ends at 512"):
            cpu.require_room(options, 512)


class Counting:
    """An engine whose times are its sizes."""

    def __init__(self, load: Load) -> None:
        if load.model == "broken":
            raise ValueError("no such model")
        self._load = load

    def describe(self) -> dict[str, str]:
        return {"name": "counting", "version": "1", "settings": f"{self._load.threads} threads"}

    def prefill(self, ids: Sequence[int]) -> float:
        return float(len(ids))

    def hold(self, prompts: Sequence[Sequence[int]]) -> None:
        print("words that are no reply", flush=True)

    def decode(self, steps: int) -> float:
        if steps > 9:
            raise RuntimeError("too many")
        return float(steps)

    def drop(self) -> None: ...

    def answer(self, ids: Sequence[int], count: int) -> Answer:
        return Answer(list(ids[:count]))

    def memory(self) -> Memory:
        return protocol.own_memory()


SERVE = "from tests.bench.test_cpu import Counting; from bench.peers.protocol import serve; "
COUNTING = [sys.executable, "-c", SERVE + "serve(Counting)"]


def load(model: str = "m") -> Load:
    return Load(model, "fp32", (CORE,), sequences=2, context=64, prompt=16)


class TestPeer:
    """The protocol over real pipes."""

    def test_it_does_what_it_is_asked(self) -> None:
        with Peer("counting", COUNTING, os.environ) as peer:
            peer.load(load())
            assert peer.name == "counting" and peer.about["settings"] == "1 threads"
            assert peer.prefill([1, 2, 3]) == 3.0
            peer.hold([[1], [2]])
            assert peer.decode(4) == 4.0
            peer.drop()
            assert peer.answer([5, 6, 7], 2) == Answer([5, 6])
            memory = peer.memory()
            assert 1 << 20 < memory.resident <= memory.peak

    def test_a_failure_is_told_and_survived(self) -> None:
        with Peer("counting", COUNTING, os.environ) as peer:
            peer.load(load())
            with pytest.raises(PeerFailed, match="RuntimeError: too many"):
                peer.decode(10)
            assert peer.decode(1) == 1.0

    def test_what_cannot_load_says_why(self) -> None:
        with (
            Peer("counting", COUNTING, os.environ) as peer,
            pytest.raises(PeerFailed, match="no such model"),
        ):
            peer.load(load("broken"))

    def test_a_death_is_told(self) -> None:
        dead = [sys.executable, "-c", "raise SystemExit(3)"]
        with (
            Peer("dead", dead, os.environ) as peer,
            pytest.raises(PeerFailed, match="ended with 3"),
        ):
            peer.load(load())

    def test_a_peer_is_shown_our_bench_and_nothing_else(self) -> None:
        with launcher() as starts:
            assert os.listdir(starts.directory) == ["bench"]
            assert (Path(starts.directory) / "bench" / "peers" / "protocol.py").is_file()
        assert not Path(starts.directory).exists()

    def test_its_side_of_the_pipe_needs_the_standard_library_alone(self) -> None:
        code = "import bench.peers.protocol, sys; print(*sys.modules)"
        with launcher() as starts:
            done = subprocess.run(
                [sys.executable, "-S", "-c", code],
                env={"PYTHONPATH": starts.directory},
                capture_output=True,
                text=True,
                check=True,
            )
        names = {name.partition(".")[0] for name in done.stdout.split()}
        assert names <= {*sys.stdlib_module_names, "bench", "__main__", "sitecustomize"}

    def test_every_engine_has_a_file_and_precisions(self) -> None:
        assert MODULES.keys() == PRECISIONS.keys()
        for module in MODULES.values():
            assert (Path(cpu.__file__).parents[1] / f"{module.replace('.', '/')}.py").is_file()

    def test_a_python_that_is_not_there(self) -> None:
        with launcher() as starts, pytest.raises(StartError, match="openvino: cannot run"):
            starts.start("openvino", "/no/such/python", 1)


class TestBench:
    """Engines that are objects; what is asked of them, in which order."""

    class Peer:
        def __init__(self, key: str, log: list[tuple[str, str, Any]], fails: str = "") -> None:
            self.key, self.name, self.about = key, key, {"name": key}
            self._log, self._fails = log, fails

        def __getattr__(self, verb: str) -> Any:
            def asked(*what: Any) -> Any:
                if verb == self._fails:
                    raise PeerFailed("lost")
                self._log.append((self.key, verb, what))
                replies = {"stray_seconds": 0.0, "memory": Memory(1, 2)}
                return replies.get(verb, 2.0)

            return asked

    @pytest.fixture
    def options(self, models: Path) -> CpuOptions:
        return CpuOptions(
            models=models, cores=(CORE,), prompts=(8,), batches=(1, 3), rounds=3, steps=4,
            context=5, tokens=2,
        )  # fmt: skip

    def bench(self, options: CpuOptions, *peers: Any) -> cpu.Bench:
        bench = cpu.Bench(options, "fp32", 100)
        bench._peers = list(peers)
        bench._run.about = {peer.key: {"name": peer.key} for peer in peers}
        return bench

    def test_they_take_turns_with_the_same_prompts(self, options: CpuOptions) -> None:
        log: list[tuple[str, str, Any]] = []
        bench = self.bench(options, self.Peer("a", log), self.Peer("b", log))
        bench.prefill()
        assert [key for key, _, _ in log] == ["a", "b", "b", "a", "a", "b"]
        prompts = [what[0] for _, _, what in log]
        assert prompts[0] == prompts[1] != prompts[2] == prompts[3]
        assert bench.finish().samples[Figure("prefill", 8)] == {"a": [4.0] * 3, "b": [4.0] * 3}

    def test_each_size_holds_new_sequences(self, options: CpuOptions) -> None:
        log: list[tuple[str, str, Any]] = []
        bench = self.bench(options, self.Peer("a", log))
        bench.decode()
        held = [what[0] for _, verb, what in log if verb == "hold"]
        assert [len(prompts) for prompts in held] == [1, 3]
        assert {len(prompt) for prompts in held for prompt in prompts} == {5}
        assert [verb for _, verb, _ in log][:3] == ["drop", "hold", "decode"]
        assert bench.finish().samples[Figure("decode", 3)] == {"a": [3 * 4 / 2.0] * 3}

    def test_who_fails_is_left_out_and_named(self, options: CpuOptions) -> None:
        log: list[tuple[str, str, Any]] = []
        bench = self.bench(options, self.Peer("a", log, fails="prefill"), self.Peer("b", log))
        bench.prefill()
        run = bench.finish()
        assert run.failed == {"a": "lost"}
        assert run.samples[Figure("prefill", 8)] == {"a": [], "b": [4.0] * 3}

    def test_without_our_engine_there_is_nothing_to_compare(self, options: CpuOptions) -> None:
        bench = self.bench(options)
        bench._run.failed[OURS] = "no memory"
        with pytest.raises(StartError, match="no memory"):
            bench.ours()


class TestReport:
    def result(self, models: Path, *runs: Run) -> CpuResult:
        return CpuResult(
            model="little",
            shape=load_config(models / "hf"),
            settings={"rounds": 3},
            hardware={"cpu": "a CPU", "cores_used": [0]},
            limits=[Limits(1, 10.0, 100.0, 400.0)],
            date=datetime(2026, 1, 1),
            context=16,
            near_tie=0.01,
            runs=runs,
        )

    def run_of(self, precision: str = "fp32") -> Run:
        run = Run(precision, about={k: {"name": k, "version": "1", "settings": "s"} for k in "ab"})
        run.about[OURS] = {"name": "Baton", "version": "1", "settings": "s"}
        run.samples[Figure("decode", 1)] = {"a": [1.0, 2.0, 9.0], OURS: [4.0, 4.0, 5.0], "b": []}
        run.memory[OURS] = Memory(5_000_000, 6_000_000)
        run.memory_held[OURS] = Memory(7_000_000, 8_000_000)
        return run

    def test_ours_comes_first_and_is_held_against_the_best(self, models: Path) -> None:
        run = self.run_of()
        assert run.engines == [OURS, "a", "b"]
        assert run.best_peer(Figure("decode", 1)) == 2.0
        text = self.result(models, run).table()
        [row] = [line for line in text.splitlines() if line.startswith("decode 1")]
        assert "4.0 (25 %)" in row and "2.0 (400 %)" in row and "  2.00  " in row
        sizes = [line.split()[3] for line in text.splitlines() if line.startswith("resident MB")]
        assert sizes == ["5", "7"]

    def test_tokens_agree_up_to_the_first_other_one(self) -> None:
        ours = Answer([1, 2, 3], [0.5, 0.004, 0.5])
        assert compare("x", Answer([1, 2, 3]), ours) == Agreement("x", 3, 3)
        parted = compare("x", Answer([1, 9, 3]), ours)
        assert parted == Agreement("x", 1, 3, 0.004)
        assert parted.sound(0.01) and not parted.sound(0.001)

    def test_a_wrong_token_in_fp32_fails_the_run_and_in_int8_does_not(self, models: Path) -> None:
        wrong = Agreement("a", 1, 3, 0.4)
        for precision, sound in (("fp32", False), ("int8", True)):
            run = self.run_of(precision)
            run.agreement.append(wrong)
            result = self.result(models, run)
            assert result.sound is sound
            assert ("WRONG" in result.table()) is not sound

    def test_an_engine_that_did_not_idle_is_named(self, models: Path) -> None:
        run = self.run_of()
        run.stray = {"a": 0.5, "b": 0.001}
        text = self.result(models, run).table()
        assert "a used 50 % of a core" in text and "b used" not in text

    def test_limits_count_bytes_and_products(self, models: Path) -> None:
        shape = load_config(models / "hf")
        body = 2 * ((2 * 4 + 2 * 2) * 8 * 32 + 3 * 32 * 48)
        assert matrix_weights(shape) == body + 600 * 32
        assert kv_bytes(shape) == 2 * 2 * 2 * 8 * 4
        assert prefill_flops(shape, 10) == 2 * body * 10 + 2 * 2 * 4 * 8 * 100 + 2 * 600 * 32
        assert decode_flops(shape, 3, 16) == (
            2 * 3 * (body + 600 * 32),
            4 * 2 * 4 * 8 * 16 * 3,
        )
        result = self.result(models)
        fp32 = result.limit(Run("fp32"), Figure("decode", 1))
        read = 4 * matrix_weights(shape) + 16 * kv_bytes(shape)
        assert fp32 == pytest.approx(1 / (read / 10e9))
        int8 = result.limit(Run("int8"), Figure("prefill", 10))
        assert int8 == pytest.approx(10 / (prefill_flops(shape, 10) / 400e9))

    def test_json_holds_every_sample(self, models: Path) -> None:
        data = json.loads(json.dumps(self.result(models, self.run_of()).to_json()))
        [figure] = data["runs"][0]["figures"]
        assert figure["tokens_per_s"]["a"] == [1.0, 2.0, 9.0]
        assert str(models) not in json.dumps(data)

    def test_limits_are_the_best_of_each_number_of_threads(self) -> None:
        found = merged([Limits(2, 5, 1, 9), Limits(1, 1, 1, 1), Limits(2, 4, 3, 2)])
        assert found == [Limits(1, 1, 1, 1), Limits(2, 5, 3, 9)]


def test_limits_of_a_core_that_is_not_there() -> None:
    with pytest.raises(StartError, match="limits failed"):
        cpu_limits.measure_limits([99999])


def test_our_engine_and_transformers_agree(models: Path, tmp_path: Path) -> None:
    """The whole run but the limits, small: two real engines in two processes."""
    options = CpuOptions(
        models=models, peers={"transformers": sys.executable}, cores=(CORE,), prompts=(16,),
        batches=(1, 2), context=20, rounds=2, steps=3, tokens=6, precisions=("fp32",),
        kernels="torch",
    )  # fmt: skip
    limits = Limits(1, 10.0, 100.0, 400.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "measure_limits", lambda cores: limits)
        patch.setattr(cpu, "_AGREE_PROMPTS", (1, 33))
        result = cpu.measure(options)
    [run] = result.runs
    assert run.failed == {}
    assert run.agreement == [Agreement(key, 6, 6) for key in (OURS, OURS, *["transformers"] * 2)]
    for figure in (Figure("prefill", 16), Figure("decode", 1), Figure("decode", 2)):
        assert {key: len(values) for key, values in run.samples[figure].items()} == {
            OURS: 2,
            "transformers": 2,
        }
    assert result.sound and "Baton" in result.table()


class TestHttp:
    def test_ours_divided_and_undivided_and_theirs(self, models: Path) -> None:
        options = CpuOptions(
            models=models, cores=(CORE,), http=True,
            peers={"vllm": "v/python", "llama.cpp": "/x/llama-batched-bench"},
        )  # fmt: skip
        found = cpu_http.servers(options)
        assert [server.name for server in found] == [
            "Baton 1 + 1", "Baton undivided", "llama.cpp, 1 thread", "vLLM, 1 thread",
        ]  # fmt: skip
        assert "--both" in found[1].command and "--both" not in found[0].command
        assert found[2].command[0] == "/x/llama-server"
        assert {"v/python", "OMP_NUM_THREADS=1"} < set(found[3].command)
        assert all("{port}" in server.command for server in found)

    async def test_a_turn_counts_what_came(self, models: Path, serve_script: Any) -> None:
        def script(body: dict[str, Any]) -> list[bytes]:
            return whole(*["x"] * body["max_tokens"])

        server = await serve_script(script)
        options = CpuOptions(models=models, cores=(CORE,), answer=5, http=True)
        async with open_session() as session:
            caller = cpu_http.Caller(session, server.url, "m", options, 600)
            assert await caller.warm() == "xxxxx"
            turn = await caller.turn("s", 3, 0)
        assert turn.server == "s" and turn.at_once == 3 and turn.tokens_per_s > 0
        prompts = [body["prompt"] for body in server.bodies]
        assert {len(prompt) for prompt in prompts} == {cpu_http.PROMPT}
        assert len({tuple(prompt) for prompt in prompts}) == len(prompts) == 1 + 8 + 3

    async def test_half_of_a_figure_is_none(self, models: Path, serve_script: Any) -> None:
        server = await serve_script(whole("x", "y")[:1])
        options = CpuOptions(models=models, cores=(CORE,), http=True)
        async with open_session() as session:
            caller = cpu_http.Caller(session, server.url, "m", options, 600)
            with pytest.raises(StartError, match="an answer failed"):
                await caller.turn("s", 1, 0)

    async def test_a_server_that_ends_at_once(self) -> None:
        server = Server("brief", (sys.executable, "-c", "raise SystemExit(4)"), "/ready")
        async with open_session() as session:
            with pytest.raises(StartError, match="brief ended with 4"):
                async with running(server, session):
                    pass

    def test_table_and_json(self) -> None:
        servers = cpu_http.Servers("small", (0,), datetime(2026, 1, 1), {})
        servers.texts = {"a": "x", "b": "y"}
        servers.turns = [cpu_http.Turn("a", 1, rate, 2.0, 9.0) for rate in (10.0, 30.0, 20.0)]
        text = servers.table()
        assert "20" in text and "b: another greedy answer" in text
        assert servers.to_json()["other_answers"] == ["b"]


class TestConvert:
    def test_every_job_names_what_it_makes(self) -> None:
        given = convert.build_parser().parse_args(
            ["d", "--openvino", "o/bin/python", "--ctranslate2", "c/bin/python",
             "--llama-source", "tree", "--llama-bench", "b/llama-batched-bench"]
        )  # fmt: skip
        plan = convert.jobs(given)
        assert [job.what for job in plan] == [
            "openvino-fp32", "openvino-int8", "ctranslate2", "f32.gguf", "q8_0.gguf",
        ]  # fmt: skip
        assert all(Path(job.command[0]).is_absolute() for job in plan)
        assert all(job.what in job.command for job in plan)

    def test_nothing_asked_nothing_done(self, models: Path) -> None:
        assert convert.main([str(models)]) == 0

    def test_a_tool_that_fails_ends_it(self, models: Path, tmp_path: Path) -> None:
        tool = tmp_path / "optimum-cli"
        tool.write_text("#!/bin/sh\nexit 7\n")
        tool.chmod(0o755)
        assert convert.main([str(models), "--openvino", str(tmp_path / "python")]) == 7


def test_prompts_depend_on_the_seed(models: Path) -> None:
    one, two = (
        cpu.Bench(CpuOptions(models=models, cores=(CORE,), seed=seed), "fp32", 100)
        for seed in (1, 2)
    )
    assert one._ids("x", 0, 9) == one._ids("x", 0, 9) != two._ids("x", 0, 9)
    assert one._ids("x", 0, 9) != Random(0).choices(range(100), k=9)
