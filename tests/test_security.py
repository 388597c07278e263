"""What once broke servers like this one, class by class: each has a rule here, and a test.

The numbers are those of the project's list of security classes.
"""

from __future__ import annotations

import ast
import functools
import importlib
import re
import tomllib
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Final

import pytest
import zmq

from cluster.errors import BadRequest
from gateway.template import ChatTemplate

ROOT = Path(__file__).parents[1]
ROOMS = ("cluster", "engine", "kvtransfer", "prefill", "decode", "gateway", "deploy")
OURS = (*ROOMS, "bench", "tests", "setup.py")

SHOWN: Final = {
    1: "tests.chaos.test_pickle:test_no_port_loads_a_pickle",
    2: "tests.e2e.test_closed_house:test_every_socket_of_every_process_is_on_loopback",
    3: "tests.gateway.test_app:test_every_route_but_two_needs_the_key",
    4: "tests.gateway.test_door:test_every_row",
    5: "tests.gateway.test_keys:test_every_digest_is_compared_whatever_matches",
    6: "tests.e2e.test_door:test_tenants_share_no_cached_prefix",
    7: "tests.e2e.test_door:test_a_rate_is_a_keys_whoever_it_says_it_is",
    8: "tests.gateway.test_validate:test_catalogue",
    10: "tests.gateway.test_template:test_others_are_answered_meanwhile",
    11: "tests.gateway.test_app:test_a_large_body_is_a_threads_work",
    12: "tests.gateway.test_door:test_every_row",
    13: "tests.gateway.test_validate:test_catalogue",
    14: "tests.cluster.test_model:test_refusals_name_file_field_and_reason",
    15: "tests.engine.test_weights:test_other_weight_formats_are_refused_by_name",
    16: "tests.gateway.test_validate:test_any_value_in_any_field_is_served_or_refused",
    17: "tests.e2e.test_door:test_one_label_on_many_requests",
    18: "tests.gateway.test_tokens:test_special_tokens_in_a_clients_text_are_text",
    19: "tests.e2e.test_door:test_logs_name_the_request_and_never_the_prompt",
    20: "tests.e2e.test_door:test_serving_writes_no_file",
    21: "tests.test_security:test_no_library_is_older_than_its_known_holes",
    22: "tests.gateway.test_validate:test_what_names_internals_is_never_ignored",
}
NOT_HERE: Final = {9: "No grammar, pattern or schema of a client is ever compiled."}


def test_every_class_has_its_test() -> None:
    assert SHOWN.keys() | NOT_HERE.keys() == set(range(1, 23))
    for place in SHOWN.values():
        module, name = place.split(":")
        assert callable(getattr(importlib.import_module(module), name)), place


# 1, 14, 15: nothing turns data into code. Every file is read, the tests too.

MODULES: Final = {
    *("pickle", "_pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "jsonpickle"),
    *("code", "codeop", "torch.distributed", "torch.multiprocessing"),
}
CALLS: Final = {
    *("eval", "exec", "compile", "__import__", "execfile"),
    *("torch.load", "torch.jit.load", "torch.hub.load", "numpy.load", "pandas.read_pickle"),
    *("yaml.load", "yaml.load_all", "yaml.full_load", "yaml.unsafe_load"),
    *("os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput"),
    *("jinja2.Environment", "jinja2.Template", "jinja2.sandbox.SandboxedEnvironment"),
}
METHODS: Final = {"recv_pyobj", "send_pyobj", "recv_serialized", "TCPStore"}
FLAGS: Final = {"shell", "allow_pickle", "trust_remote_code"}

APART: Final = {"multiprocessing"}
"""Pickles what goes between processes: not for a room, where bench/ may start some of its own."""

ATTACKERS: Final = {"tests/chaos/test_pickle.py"}
"""They make what others would be taken in by."""


def faults(tree: ast.AST, strict: bool) -> Iterator[str]:
    """What is forbidden in a file; `strict` in a room."""
    names: dict[str, str] = {}  # local name -> where it is from
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported = [alias.name for alias in node.names]
            names |= {alias.asname: alias.name for alias in node.names if alias.asname}
        elif isinstance(node, ast.ImportFrom):
            imported = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
            names |= {
                alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names
            }
        else:
            continue
        for name in imported:
            heads = {name[:end] for end in [m.start() for m in re.finditer(r"\.", name)] + [None]}
            if heads & (MODULES | (APART if strict else set())):
                yield f"import {name}"
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        called = dotted(node.func)
        head, dot, rest = called.partition(".")
        whole = names.get(head, head) + dot + rest
        if whole in CALLS or called.rpartition(".")[2] in METHODS:
            yield whole
        for keyword in node.keywords:
            harmless = isinstance(keyword.value, ast.Constant) and keyword.value.value is False
            if keyword.arg in FLAGS and not harmless:
                yield f"{whole}({keyword.arg}=...)"


def dotted(node: ast.AST) -> str:
    """What is called: `a.b.c`, with nothing in place of what is no name."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


@functools.cache
def sources() -> dict[str, ast.Module]:
    """Every file of ours, from its path."""
    found = {}
    for name in OURS:
        path = ROOT / name
        for file in [path] if path.is_file() else sorted(path.rglob("*.py")):
            found[str(file.relative_to(ROOT))] = ast.parse(file.read_text(encoding="utf-8"))
    return found


def test_nothing_turns_data_into_code() -> None:
    found = {
        f"{path}: {fault}"
        for path, tree in sources().items()
        if path not in ATTACKERS
        for fault in faults(tree, strict=path.startswith(ROOMS))
    }
    assert found == set()


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "import pickle as p",
        "from pickle import loads",
        "import torch.distributed.rpc",
        "from torch import distributed",
        "import multiprocessing.connection",
        "from multiprocessing import Pipe",
        "eval(x)",
        "torch.load(path)",
        "import torch as t\nt.load(path)",
        "from torch import load\nload(path)",
        "from yaml import load as read\nread(x)",
        "import numpy as np\nnp.load(path)",
        "socket.recv_pyobj()",
        "f(x, allow_pickle=True)",
        "subprocess.run(x, shell=flag)",
        "dist.TCPStore('h', 1)",
        "jinja2.Environment()",
        "AutoConfig.from_pretrained(x, trust_remote_code=True)",
    ],
)
def test_the_lint_sees(line: str) -> None:
    assert list(faults(ast.parse(line), strict=True))


@pytest.mark.parametrize(
    "line",
    [
        "model.eval()",
        "re.compile('x')",
        "yaml.safe_load(x)",
        "self.load(x)",
        "run(x, shell=False)",
        "import torch",
        "ImmutableSandboxedEnvironment()",
    ],
)
def test_and_sees_no_ghosts(line: str) -> None:
    assert not list(faults(ast.parse(line), strict=True))


# 10: a model's chat template is a program in a sandbox.


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__class__.__init__.__globals__ }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ self._TemplateReference__context }}",
        "{{ lipsum.__globals__['os'] }}",
        "{{ raise_exception.__globals__ }}",
        "{% set _ = messages.append(1) %}{{ messages | length }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}{{ os }}",
        "{{ '%s' | format(''.__class__) }}",
        "{{ '{0.__class__.__mro__}'.format('') }}",
    ],
)
def test_a_template_reaches_nothing(source: str) -> None:
    """Refused, or nothing: never an object of ours."""
    try:
        template = ChatTemplate(source, {}, "end-mark")
        text = template.render(
            [{"role": "user", "content": "Q"}],
            add_generation_prompt=True,
            continue_final_message=False,
        )
    except (BadRequest, ValueError):
        return
    assert not re.search(r"class|root:|uid=|<|os\b|\b2\b", text), text


# 21: libraries.

FLOORS: Final = {
    "starlette": (1, 0, 1),  # CVE-2026-48710: a Host that moves the path
    "h11": (0, 16),  # CVE-2025-43859: chunk framing
    "pyzmq": (27,),  # carries libzmq 4.3.5
    "protobuf": (6, 31, 1),
    "jinja2": (3, 1, 6),  # CVE-2025-27516: out of the sandbox by |attr
}


def numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text)[:3])


def test_no_library_is_older_than_its_known_holes() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = {re.split(r"[<>=;\[ ]", line)[0].lower(): line for line in project["dependencies"]}
    for name, floor in FLOORS.items():
        bound = re.search(r">=([\d.]+)", asked[name])
        assert bound and numbers(bound[1]) >= floor, f"pyproject.toml lets an old {name} in"
        assert numbers(version(name)) >= floor
    assert zmq.zmq_version_info() >= (4, 3, 3)


def test_only_routers_and_dealers() -> None:
    """vLLM's cluster was open by an XPUB, and libzmq's worst holes were in subscriptions."""
    for path, tree in sources().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and dotted(node.value) == "zmq":
                assert node.attr not in {"PUB", "SUB", "XPUB", "XSUB", "PULL", "PUSH"}, path
