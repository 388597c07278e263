"""compile_ahead: what a Triton kernel costs on a chip that is not in this machine.

The compiler needs no GPU; what it made tells, before anything runs, whether a configuration spills
registers to memory or asks for more shared memory than a block gets.

Source  CUDA C++ Programming Guide, table of compute capabilities (shared memory for a block).
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

SHARED_BYTES: Final[dict[int, int]] = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}
"""The most shared memory that one block can have, by compute capability (10 x major + minor)."""

_CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


@dataclass(frozen=True)
class Compiled:
    """A kernel as machine code for one chip, and what a block of it takes."""

    registers: int
    """Per thread."""
    local_bytes: int
    """Per thread, in device memory: anything but 0 is spilled registers or an indexed array."""
    shared_bytes: int
    """Per block."""
    threads: int
    """Per block. Warp-specialised kernels have more than the 32 * num_warps asked for."""
    ptx: str
    cubin: bytes

    def sass(self) -> str:
        """The machine code as text."""
        return _cuobjdump(self.cubin, "-sass")


def compile_ahead(
    fn: triton.JITFunction,
    signature: Mapping[str, str],
    constexprs: Mapping[str, Any],
    arch: int,
    num_warps: int = 4,
    num_stages: int = 3,
    aligned: Collection[str] = (),
    maxnreg: int | None = None,
    enable_fp_fusion: bool = True,  # said by every launcher: Triton is changing its default
) -> Compiled:
    """Compile `fn` for compute capability `arch` (80, 90, 100) as a launch would.

    `signature` names the type of each run-time argument ("*bf16", "i32", "fp32"), `constexprs` the
    value of every other one. Pointers are taken to be aligned to 16 bytes, and the integers in
    `aligned` to be multiples of 16, as the launch finds for itself. Needs no GPU; takes 1 to 10 s,
    less when Triton's own cache has it.

    Raises RuntimeError under TRITON_INTERPRET, under which there are no kernels to compile.
    """
    if not isinstance(fn, triton.JITFunction):
        raise RuntimeError("set TRITON_INTERPRET=0: an interpreted kernel cannot be compiled")
    missing = [name for name in fn.arg_names if name not in signature and name not in constexprs]
    if missing:
        raise ValueError(f"{fn.__name__}: no type and no value for {', '.join(missing)}")
    types = {name: signature.get(name, "constexpr") for name in fn.arg_names}
    attrs = {
        (at,): [["tt.divisibility", 16]]
        for at, name in enumerate(fn.arg_names)
        if types[name].startswith("*") or name in aligned
    }
    made = triton.compile(
        ASTSource(fn=fn, signature=types, constexprs=dict(constexprs), attrs=attrs),
        target=GPUTarget("cuda", arch, 32),
        options={
            "num_warps": num_warps,
            "num_stages": num_stages,
            "maxnreg": maxnreg,
            "enable_fp_fusion": enable_fp_fusion,
        },
    )
    ptx, cubin = made.asm["ptx"], made.asm["cubin"]
    used = _cuobjdump(cubin, "-res-usage")
    return Compiled(
        registers=_number(r"\bREG:(\d+)", used),
        # Spills are part of the stack frame; LOCAL counts what is declared in local memory.
        local_bytes=_number(r"\bSTACK:(\d+)", used) + _number(r"\bLOCAL:(\d+)", used),
        shared_bytes=made.metadata.shared,
        threads=_number(r"\.(?:reqntid|maxntid) (\d+)", ptx),
        ptx=ptx,
        cubin=cubin,
    )


def _cuobjdump(cubin: bytes, flag: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run(
            [_CUOBJDUMP, flag, file.name], capture_output=True, check=True, text=True
        ).stdout


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    assert found, f"no {pattern} in {text[:500]!r}"
    return int(found[1])
