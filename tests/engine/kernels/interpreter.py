"""Run tests of kernels under Triton's interpreter, in a process of their own.

TRITON_INTERPRET must be set before Triton is imported and then holds for every kernel of the
process, so neither the rest of the suite nor the tests that compile may see it. To write a test:

    # tests/<package>/kernels/conftest.py
    from tests.engine.kernels.interpreter import *  # noqa: F403

    # tests/<package>/kernels/test_<kernel>.py
    pytestmark = pytest.mark.interpreted  # the whole file, or a decorator on some tests

Write the tests as any other, on CPU tensors. The first marked test of a file that runs sends all
chosen ones of that file to one child, `python -m tests.engine.kernels.interpreter`; each then
passes, fails or is skipped as it did there. A file whose child takes over a minute should be split.
Fixtures are set up in both processes: keep them cheap. To debug, run pytest itself with
TRITON_INTERPRET=1: then nothing is sent anywhere.

What the interpreter cannot show: bfloat16 arithmetic is silently wrong in it (test float32 and
float16), a masked load without `other` reads 0 (give `other` always: it is undefined on a GPU), and
a read out of bounds is silent (fill what must not be read with NaN). Launchers are called with CPU
tensors: one that insists on CUDA does so only if its kernel `isinstance(..., triton.JITFunction)`.

Tests that compile (engine.kernels.compile) go into a file without the mark, with
`pytestmark = compiled`, and run in the process of the suite itself.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import triton

__all__ = ["pytest_collection_modifyitems", "pytest_configure", "pytest_pyfunc_call"]

ROOT = Path(__file__).parents[3]
CHILD_SECONDS = 600

INTERPRETING: bool = triton.knobs.runtime.interpret

compiled = pytest.mark.skipif(INTERPRETING, reason="TRITON_INTERPRET is set: nothing is compiled")

_OUTCOMES = pytest.StashKey[dict[str, dict[str, tuple[str, str]]]]()


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "interpreted: runs under Triton's interpreter, in a child")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if not INTERPRETING and item.get_closest_marker("interpreted"):
            # The first one waits for all of its file; each has its usual limit in the child.
            item.add_marker(pytest.mark.timeout(CHILD_SECONDS + 10))


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    if INTERPRETING or not pyfuncitem.get_closest_marker("interpreted"):
        return None
    outcomes = pyfuncitem.config.stash.setdefault(_OUTCOMES, {})
    file = pyfuncitem.nodeid.partition("::")[0]
    if file not in outcomes:
        chosen = [
            item.nodeid
            for item in pyfuncitem.session.items
            if item.nodeid.startswith(f"{file}::") and item.get_closest_marker("interpreted")
        ]
        outcomes[file] = _run_in_child(chosen)
    outcome, text = outcomes[file].get(pyfuncitem.nodeid, ("failed", "it did not run"))
    if outcome == "skipped":
        pytest.skip(text)
    if outcome != "passed":
        pytest.fail(text, pytrace=False)
    return True


def _run_in_child(nodes: list[str]) -> dict[str, tuple[str, str]]:
    """{node id: (outcome, text)}; of a child that broke, what it said, for every test."""
    child = subprocess.run(
        [sys.executable, "-m", "tests.engine.kernels.interpreter"],
        input=json.dumps(nodes),
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=CHILD_SECONDS,
        check=False,
    )
    lines = child.stdout.splitlines()
    if not lines or not lines[-1].startswith("{"):
        return dict.fromkeys(nodes, ("failed", f"{child.stdout}\n{child.stderr}"))
    return {node: (outcome, text) for node, (outcome, text) in json.loads(lines[-1]).items()}


class _Recorder:
    """What became of each test: the worst of its setup, call and teardown."""

    def __init__(self) -> None:
        self.outcomes: dict[str, tuple[str, str]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        known, _ = self.outcomes.get(report.nodeid, ("passed", ""))
        if known == "passed":
            text = report.longreprtext
            if report.skipped and isinstance(report.longrepr, tuple):
                text = report.longrepr[2].removeprefix("Skipped: ")
            self.outcomes[report.nodeid] = (report.outcome, text)


def _main() -> None:
    recorder: Any = _Recorder()
    # Triton 3.6's own interpreter does it with every loop.
    numpy_warning = "ignore:Conversion of an array with ndim > 0:DeprecationWarning"
    options = ["-q", "-p", "no:cacheprovider", "-W", numpy_warning]
    pytest.main([*options, *json.load(sys.stdin)], plugins=[recorder])
    print(json.dumps(recorder.outcomes))


if __name__ == "__main__":
    _main()
