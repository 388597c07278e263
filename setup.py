"""Builds the native CPU kernels of engine/native; everything else stands in pyproject.toml.

One extension module per instruction set, from the same sources, and one that asks the CPU which
to import. They are not objects of one module, because the linker keeps a single copy of an inline
function: were it the AVX-512 one, a CPU without it would die in std::max. Each is optional:
without a compiler the install succeeds and `engine.native.why_not()` gives the reason.
"""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

NATIVE = Path("engine/native")
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"]
ISAS = {"avx2": AVX2, "avx512": AVX512, "avx512_vnni": [*AVX512, "-mavx512vnni"]}
FLAGS = ["-std=c++17", "-O3", "-g0", "-fvisibility=hidden", "-fno-math-errno", "-pthread"]
# A product and a sum round apart unless the source says fma: one result from every compiler.
FLAGS += ["-ffp-contract=off"]
# gcc 12 takes the undefined operand of its own AVX-512 intrinsics for a mistake of ours.
FLAGS += ["-Wno-maybe-uninitialized", "-Wno-uninitialized"]


class BuildNative(build_ext):
    """Builds the modules side by side and compiles only what changed since the last time."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.parallel = self.parallel or os.cpu_count()

    def build_extensions(self) -> None:
        compile_these = self.compiler.compile
        shared = max(path.stat().st_mtime for path in (Path(__file__), *NATIVE.glob("*.h")))

        def compile_changed(sources: list[str], **options: Any) -> list[str]:
            # Objects of the same source for another module must not meet in one folder.
            options["output_dir"] = str(Path(self.build_temp, dict(options["macros"])["MODULE"]))
            objects = self.compiler.object_filenames(sources, output_dir=options["output_dir"])
            for source, built in zip(sources, map(Path, objects), strict=True):
                changed = max(shared, Path(source).stat().st_mtime)
                if self.force or not built.exists() or built.stat().st_mtime < changed:
                    compile_these([source], **options)
            return list(objects)

        self.compiler.compile = compile_changed
        super().build_extensions()


def module(name: str, sources: list[Path], flags: list[str]) -> Extension:
    """engine.native._NAME; the sources read its name as MODULE."""
    return Extension(
        f"engine.native._{name}",
        sorted(map(str, sources)),
        depends=sorted(map(str, NATIVE.glob("*.h"))),
        define_macros=[("MODULE", f"_{name}")],
        extra_compile_args=[*FLAGS, *flags],
        extra_link_args=["-pthread"],
        language="c++",
        optional=True,
    )


def modules() -> list[Extension]:
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return []
    kernels = [path for path in NATIVE.glob("*.cpp") if path.name != "cpu.cpp"]
    return [
        module("cpu", [NATIVE / "cpu.cpp"], []),
        *(module(isa, kernels, flags) for isa, flags in ISAS.items()),
    ]


setup(ext_modules=modules(), cmdclass={"build_ext": BuildNative})
