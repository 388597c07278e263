"""convert: DIR/hf, a Hugging Face directory, into what each peer reads, beside it in DIR.

    python -m bench.peers.convert DIR --openvino PYTHON --ctranslate2 PYTHON
        --llama-source TREE --llama-bench BINARY

    OpenVINO     openvino-fp32/  openvino-int8/   8-bit weights, a scale for each channel
    CTranslate2  ctranslate2/                     quantised while it loads
    llama.cpp    f32.gguf  q8_0.gguf

Each peer's own converter does it, in the peer's own Python.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

# llama.cpp knows tokenizers by a digest of what they make of a text, and ours is not on its list.
_GGUF: Final = """
import sys
sys.path.insert(0, sys.argv.pop(1))
import convert_hf_to_gguf
from conversion.base import TextModel
TextModel.get_vocab_base_pre = lambda self, tokenizer: "qwen2"
convert_hf_to_gguf.main()
"""


@dataclass(frozen=True)
class Job:
    """One command, run in DIR."""

    what: str
    command: tuple[str, ...]


def main(argv: Sequence[str]) -> int:
    """Run every conversion that is asked for; the first that fails ends it with its status."""
    parser = build_parser()
    given = parser.parse_args(list(argv))
    if not (given.directory / "hf" / "config.json").is_file():
        parser.error(f"{given.directory}: no hf/config.json in it")
    if given.llama_source and not given.llama_bench:
        parser.error("--llama-source needs --llama-bench: the quantiser lies beside it")
    for job in jobs(given):
        print(f"making {job.what}", file=sys.stderr, flush=True)
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(job.command, cwd=given.directory, env=environment, check=False)
        if done.returncode:
            return done.returncode
    return 0


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.peers.convert",
        description="Make of DIR/hf what each peer reads.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("directory", type=Path, metavar="DIR")
    add("--openvino", metavar="PYTHON", help="with optimum-intel and nncf")
    add("--ctranslate2", metavar="PYTHON", help="with ctranslate2, transformers and torch")
    add("--llama-source", type=Path, metavar="TREE", help="where convert_hf_to_gguf.py lies")
    add("--llama-bench", type=Path, metavar="BINARY", help="llama-quantize lies beside it")
    add(
        "--llama-python",
        metavar="PYTHON",
        default=sys.executable,
        help="with transformers, torch and sentencepiece (default: this one)",
    )
    return parser


def jobs(given: argparse.Namespace) -> list[Job]:
    """Absolute programs: each job runs in DIR."""
    plan: list[Job] = []
    if given.openvino:
        tool = Path(given.openvino).absolute().parent / "optimum-cli"
        export: tuple[str, ...] = (str(tool), "export", "openvino", "--model", "hf")
        export += ("--task", "text-generation-with-past", "--weight-format")
        for kind in ("fp32", "int8"):
            name = f"openvino-{kind}"
            plan.append(Job(name, (*export, kind, name)))
    if given.ctranslate2:
        tool = Path(given.ctranslate2).absolute().parent / "ct2-transformers-converter"
        name = "ctranslate2"
        plan.append(Job(name, (str(tool), "--model", "hf", "--output_dir", name, "--force")))
    if given.llama_source:
        python, tree = str(Path(given.llama_python).absolute()), str(given.llama_source.absolute())
        out = ("--outtype", "f32", "--outfile", "f32.gguf")
        plan.append(Job("f32.gguf", (python, "-c", _GGUF, tree, "hf", *out)))
        quantize = str(given.llama_bench.absolute().parent / "llama-quantize")
        plan.append(Job("q8_0.gguf", (quantize, "f32.gguf", "q8_0.gguf", "Q8_0")))
    return plan


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
