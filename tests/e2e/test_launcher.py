"""`baton serve` from its first line to its last, and every way to start it wrong."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.e2e.client import DONE, get, stream, tokens
from tests.e2e.cluster import Process, alive, children_of, free_ports, wait_until
from tests.e2e.conftest import Checkpoint
from tests.e2e.test_cancel import COMPLETIONS, LONG_ANSWER

STOP_S = 5.0
BAD_START_S = 5.0
REFUSAL_S = 20.0
"""Not a promise: it has loaded its model by then, on a machine that runs a cluster already."""

QUIET = ["--log-level", "warning"]

Start = Callable[..., Process]


@pytest.fixture
def ports() -> list[str]:
    http, grpc = free_ports(2)
    return ["--port", str(http), "--grpc-port", str(grpc)]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """start("serve", ...) runs `baton serve ...`; whatever is left at the end is killed, children
    that a broken launcher left behind too."""
    started: list[Process] = []

    def run(*words: str) -> Process:
        started.append(Process(f"process-{len(started)}", list(words), tmp_path))
        return started[-1]

    yield run
    for process in started:
        process.kill()
        for pid in filter(alive, process.children):
            os.kill(pid, signal.SIGKILL)


def ready(launcher: Process) -> list[int]:
    """Waits for the ready line; the children's pids."""
    wait_until(lambda: "ready" in launcher.stdout or not launcher.running, "ready, or ended", 60)
    assert launcher.running, launcher.stderr
    pids = launcher.children = children_of(launcher.pid)
    assert len(pids) == 3, "a gateway and two workers"
    return pids


def asked_to_end(pid: int) -> bool:
    """Whether a SIGTERM waits for this stopped process."""
    status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    pending = next(line for line in status.splitlines() if line.startswith("ShdPnd"))
    return bool(int(pending.split()[1], 16) >> (signal.SIGTERM - 1) & 1)


def all_dead(pids: list[int]) -> bool:
    return not any(map(alive, pids))


def test_start_ask_interrupt(start: Start, ports: list[str]) -> None:
    """One line when ready, one that says how to ask; Ctrl-C ends all, a running answer too."""
    launcher = start("serve", *ports)
    pids = ready(launcher)
    url = f"http://127.0.0.1:{ports[1]}"
    first, second = launcher.stdout.splitlines()
    assert url in first and "1 prefill + 1 decode" in first and "baton-tiny" in first
    assert f"baton chat --url {url}" in second
    assert len(tokens(url, "baton-tiny", "Hello", max_tokens=3, ignore_eos=True)) == 3
    with stream(url, COMPLETIONS, LONG_ANSWER) as events:
        next(events)
        since = time.monotonic()
        launcher.signal(signal.SIGINT)
        assert launcher.wait(STOP_S) == 0
    assert time.monotonic() - since < STOP_S
    assert all_dead(pids)
    assert launcher.stderr == ""


def test_a_sigterm_lets_answers_finish(start: Start, ports: list[str]) -> None:
    launcher = start("serve", *ports)
    pids = ready(launcher)
    url = f"http://127.0.0.1:{ports[1]}"
    with stream(url, COMPLETIONS, {**LONG_ANSWER, "max_tokens": 1500}) as events:
        next(events)
        launcher.signal(signal.SIGTERM)
        *chunks, end = events
    assert end == DONE and chunks[-1]["choices"][0]["finish_reason"] == "length"
    assert launcher.wait() == 0 and all_dead(pids) and launcher.stderr == ""


def test_a_second_interrupt_forces(start: Start, ports: list[str]) -> None:
    """Even when a child would not end by itself."""
    launcher = start("serve", *ports)
    pids = ready(launcher)
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    launcher.signal(signal.SIGINT)
    # One will do: a thread that was just stopping may have taken its signal off the list already.
    wait_until(lambda: any(map(asked_to_end, pids)), "the first one to be passed on")
    launcher.signal(signal.SIGINT)
    launcher.wait(2)
    wait_until(lambda: all_dead(pids), "no child left", 2)


def test_nothing_outlives_a_killed_launcher(start: Start, ports: list[str]) -> None:
    launcher = start("serve", *ports)
    pids = ready(launcher)
    launcher.signal(signal.SIGKILL)
    launcher.wait(2)
    wait_until(lambda: all_dead(pids), "no child left", 2)


def test_a_dead_worker_is_started_again(start: Start, ports: list[str]) -> None:
    launcher = start("serve", *ports)
    ready(launcher)
    url = f"http://127.0.0.1:{ports[1]}"

    def incarnation() -> str:
        workers = get(url, "/status").body["workers"]
        return next((w["incarnation"] for w in workers if w["name"] == "decode-0"), "")

    first = incarnation()
    for pid in children_of(launcher.pid):
        command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        if b"--name=decode-0" in command:
            os.kill(pid, signal.SIGKILL)
    wait_until(lambda: incarnation() not in ("", first), "another incarnation")
    assert "decode-0 ended with status -9" in launcher.stderr
    assert len(tokens(url, "baton-tiny", "Hello", max_tokens=3, ignore_eos=True)) == 3


def bad_start(process: Process, seconds: float = BAD_START_S) -> str:
    """Ends soon, non-zero, without a child left; returns the one line that says why."""
    children: set[int] = set()
    deadline = time.monotonic() + seconds
    while process.running and time.monotonic() < deadline:
        children.update(children_of(process.pid))
        time.sleep(0.01)
    assert not process.running, f"still running after {seconds} s"
    assert process.wait() not in (0, 1)
    assert all_dead(list(children))
    assert process.stdout == ""
    why = process.stderr.rstrip("\n")
    assert "\n" not in why, why
    assert why.startswith("baton: ")
    return why


@pytest.mark.parametrize("taken", ["--port", "--grpc-port"])
@pytest.mark.parametrize("command", ["serve", "gateway"])
def test_port_taken(start: Start, ports: list[str], taken: str, command: str) -> None:
    where = ports.index(taken) + 1
    with socket.create_server(("127.0.0.1", int(ports[where]))):
        why = bad_start(start(command, *ports))
    assert ports[where] in why and taken in why


@pytest.mark.parametrize("shared", ["--port", "--grpc-port"])
def test_a_second_cluster_leaves_the_first_alone(
    start: Start, ports: list[str], shared: str
) -> None:
    """It must not take the first one's answers for its own, nor send it workers."""
    ready(start("serve", *ports))
    url = f"http://127.0.0.1:{ports[1]}"
    before = get(url, "/status").body["workers"]
    where = ports.index(shared) + 1
    others = list(ports)
    others[4 - where] = str(free_ports(1)[0])
    assert ports[where] in bad_start(start("serve", *others))
    after = get(url, "/status").body["workers"]
    assert {w["incarnation"] for w in after} == {w["incarnation"] for w in before}


def test_grpc_port_taken_by_another_gateway(start: Start, ports: list[str]) -> None:
    """gRPC would share a port with another process of ours, and each would get half the calls."""
    start("gateway", *ports, *QUIET)
    wait_until(lambda: listening(int(ports[3])), "the first gateway to listen")
    [other] = free_ports(1)
    why = bad_start(start("gateway", "--port", str(other), *ports[2:]))
    assert ports[3] in why


def listening(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.parametrize("command", ["serve", "gateway", "worker"])
def test_no_such_model(start: Start, command: str, tmp_path: Path) -> None:
    missing = str(tmp_path / "missing")
    why = bad_start(start(command, "--model", missing))
    assert missing in why and "no such directory" in why


def test_not_a_model(start: Start, ports: list[str], tmp_path: Path) -> None:
    directory = tmp_path / "letters"
    directory.mkdir()
    (directory / "letter.txt").write_text("Dear model")
    why = bad_start(start("serve", str(directory), *ports))
    assert "config.json" in why and str(directory) in why


@pytest.fixture
def copy(checkpoint: Checkpoint, tmp_path: Path) -> Path:
    return shutil.copytree(checkpoint("llama"), tmp_path / "copy")


def test_truncated_weights(start: Start, ports: list[str], copy: Path) -> None:
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    why = bad_start(start("serve", str(copy), *ports))
    assert "model.safetensors" in why and "truncated" in why


def test_unknown_architecture(start: Start, ports: list[str], copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"architectures": ["FrogForCausalLM"]}))
    why = bad_start(start("serve", str(copy), *ports))
    assert "config.json" in why and "FrogForCausalLM" in why


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["serve", "--prefil", "2"], "--prefill"),
        (["gateway", "--grpc-prot", "1"], "--grpc-port"),
        (["worker", "--max-num-seq", "1"], "--max-num-seqs"),
    ],
)
def test_unknown_flag(start: Start, words: list[str], hint: str) -> None:
    assert f"did you mean {hint}?" in bad_start(start(*words))


def test_unknown_key_in_yaml(start: Start, tmp_path: Path) -> None:
    file = tmp_path / "baton.yaml"
    file.write_text("prefill: 1\nblock-sise: 16\n")
    why = bad_start(start("serve", "--config", str(file)))
    assert "block-sise" in why and "did you mean block-size?" in why


def test_yaml_is_flags(start: Start, ports: list[str], tmp_path: Path) -> None:
    """The file counts, and a flag beats it."""
    file = tmp_path / "baton.yaml"
    file.write_text(
        f"port: {ports[1]}\ngrpc-port: {ports[3]}\nprefill: 0\ndecode: 0\nboth: 3\nnum-blocks: 77\n"
    )
    launcher = start("serve", "--config", str(file), "--both", "2")
    ready(launcher)
    workers = get(f"http://127.0.0.1:{ports[1]}", "/status").body["workers"]
    assert [(w["role"], w["blocks"]) for w in workers] == [("both", 77)] * 2


def test_worker_of_another_model_is_refused(
    start: Start, ports: list[str], checkpoint: Checkpoint
) -> None:
    """The line holds both configurations' digests, and the cluster goes on without it."""
    launcher = start("serve", *ports)
    ready(launcher)
    join = ["--role", "decode", "--name", "stranger", "--join", f"127.0.0.1:{ports[3]}", *QUIET]
    why = bad_start(start("worker", *join, "--model", str(checkpoint("llama"))), REFUSAL_S)
    assert "refuses this worker" in why and "model configuration" in why
    theirs, ours = why.split(" is ")[1].split(", the cluster has ")
    assert theirs != ours and min(len(theirs), len(ours)) >= 8
    names = [w["name"] for w in get(f"http://127.0.0.1:{ports[1]}", "/status").body["workers"]]
    assert names == ["decode-0", "prefill-0"]


def test_worker_of_other_weights_is_refused(
    start: Start, ports: list[str], checkpoint: Checkpoint
) -> None:
    """The same configuration with other numbers in it would write wrong KV."""
    launcher = start("serve", str(checkpoint("llama")), *ports)
    ready(launcher)
    join = ["--role", "decode", "--name", "stranger", "--join", f"127.0.0.1:{ports[3]}", *QUIET]
    why = bad_start(start("worker", *join, "--model", str(checkpoint("llama", seed=1))), REFUSAL_S)
    assert "weights" in why
