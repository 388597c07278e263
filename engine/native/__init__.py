"""Kernels in C++ for the CPU: found or not, for which instruction set, on how many threads.

`kernels` holds one function per KERNEL of the C++ sources, of the instruction set in use; the
launchers beside them check shapes and pass addresses. Without a built module `available()` is
false, `why_not()` says why, and the engine runs the same definitions in plain torch.
"""

from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import Any, Final

__all__ = [
    "available",
    "isa",
    "isas",
    "kernels",
    "set_threads",
    "tasks_done",
    "threads",
    "use",
    "why_not",
]

kernels: Final[Any] = SimpleNamespace()
"""The kernels in use. Read a kernel from here at each call: `use` replaces them."""

_modules: dict[str, Any] = {}  # those that are built and run here, best first
_isa = ""
_why_not = ""
_threads = 1


def available() -> bool:
    return bool(_modules)


def why_not() -> str:
    """Why there are no native kernels, as a sentence for the log; "" where there are."""
    return _why_not


def isa() -> str:
    """The instruction set in use: avx512_vnni, avx512, avx2, or "" without native kernels."""
    return _isa


def isas() -> tuple[str, ...]:
    """All that are built and run on this CPU, best first."""
    return tuple(_modules)


def use(isa: str) -> None:
    """Take the kernels of another of `isas()`; the best is in use from the start. For tests."""
    global _isa
    chosen = _modules[isa]
    if _isa:
        kernels.set_threads(1)
    vars(kernels).clear()
    vars(kernels).update(
        {name: value for name, value in vars(chosen).items() if not name.startswith("__")}
    )
    _isa = isa
    kernels.set_threads(_threads)


def set_threads(threads: int) -> None:
    """Run kernels on this many threads, the caller included. One until it is called.

    The threads inherit the caller's CPU affinity, so pin the process first.
    """
    global _threads
    if threads < 1:
        raise ValueError(f"kernels need at least 1 thread, not {threads}")
    _threads = threads
    if _modules:
        kernels.set_threads(threads)


def threads() -> int:
    return _threads


def tasks_done() -> int:
    """Grows every few milliseconds while kernels run, however long one takes."""
    return int(kernels.tasks_done()) if _modules else 0


def _find() -> str:
    """Import what is built and runs here. Returns why nothing was found."""
    try:
        supported = importlib.import_module("engine.native._cpu").isas()
    except ImportError:
        return "the native kernels are not built (no x86-64 CPU, or no C++ compiler at install)"
    if not supported:
        return "this CPU has no AVX2, FMA and F16C, which the native kernels need"
    for name in supported:
        try:
            _modules[name] = importlib.import_module(f"engine.native._{name}")
        except ImportError as error:
            reason = f"the native kernels for {name} cannot be loaded: {error}"
    return "" if _modules else reason


_why_not = _find()
if _modules:
    use(next(iter(_modules)))
