"""accuracy: logits and perplexity of each way to compute, held against float32 in plain torch.

The tokens go through the stage and step loop of an undivided worker, twice: in whole chunks, as a
prompt does, and one by one, as a running answer does, because other kernels run then.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from bench.accuracy_measures import Measures
from bench.cpu_engine import Choice, EngineHere
from bench.options import require
from cluster.config import BUILT_IN
from cluster.errors import StartError
from cluster.model import DTYPES, load_config
from engine import native
from engine.batch import Attention, Batch
from engine.loop import Outcome
from engine.models.decoder import Decoder
from engine.sampler import Sampled

TRUTH: Final = Choice("float32", "torch")
WAYS: Final = ("chunks", "single")

Heard = Callable[[Tensor], None]
"""Is given the logits [rows, vocab] of each step."""


@dataclass(frozen=True, kw_only=True)
class AccuracyOptions:
    """One run. The limits hold for each choice and way; nan is no limit."""

    model: str = ""
    text: Path | None = None
    choices: tuple[Choice, ...] = ()
    tokens: int = 1024
    single: int = 128
    window: int = 512
    threads: int = 1
    seed: int = 0
    max_kl: float = math.nan
    min_top1: float = math.nan
    max_perplexity_ratio: float = math.nan
    output: str | None = None

    def __post_init__(self) -> None:
        for name, least in (("tokens", 2), ("single", 0), ("window", 2), ("threads", 1)):
            require(getattr(self, name) >= least, f"--{name} must be at least {least}")

    @property
    def directory(self) -> Path:
        return Path(self.model) if self.model else BUILT_IN

    @property
    def name(self) -> str:
        return self.directory.resolve().name if self.model else "baton-tiny"


@dataclass(frozen=True)
class Result:
    """One choice, one way."""

    choice: Choice
    kernels: str  # what "auto" came to
    way: str
    measures: Measures

    def beyond(self, options: AccuracyOptions) -> list[str]:
        """The limits that it breaks. A comparison with nan is false: no limit, none broken."""
        found = self.measures
        broken = []
        if not found.kl_mean <= options.max_kl and not math.isnan(options.max_kl):
            broken.append(f"KL {found.kl_mean:.2e} > {options.max_kl:g}")
        if found.top1 < options.min_top1:
            broken.append(f"top-1 {found.top1:.4f} < {options.min_top1:g}")
        if found.perplexity_ratio > options.max_perplexity_ratio:
            broken.append(
                f"perplexity x {found.perplexity_ratio:.4f} > {options.max_perplexity_ratio:g}"
            )
        return broken


def main(argv: Sequence[str]) -> int:
    """Run `baton bench accuracy`. Returns 1 where a limit is broken. Raises StartError."""
    options = parse_options(argv)
    results = measure(options)
    print(table(options, results))
    path = Path(options.output or f"bench/results/accuracy-{options.name}.json")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(to_json(options, results)) + "\n", encoding="utf-8")
    except OSError as error:
        raise StartError(f"--output {path}: {error.strerror}") from None
    print(f"Saved to {path}")
    broken = [(result, limit) for result in results for limit in result.beyond(options)]
    for result, limit in broken:
        print(f"{result.choice.name}, {result.way}: {limit}", file=sys.stderr)
    return 1 if broken else 0


def measure(options: AccuracyOptions) -> list[Result]:
    """The reference first; its logits stay in memory. Raises StartError, BadModel."""
    windows = read_windows(options)
    truth: list[Tensor] = []
    run(options, TRUTH, windows, truth.append, budget=options.window)
    results = []
    for choice in options.choices:
        for way in WAYS:
            measures = Measures()
            if way == "chunks":
                kernels = _compare(options, choice, windows, truth, measures, options.window)
            elif options.single:
                few = shortened(windows, options.single)
                kernels = _compare(options, choice, few, truth, measures, 1)
            if measures.rows:
                results.append(Result(choice, kernels, way, measures))
    return results


def _compare(
    options: AccuracyOptions,
    choice: Choice,
    windows: Sequence[Sequence[int]],
    truth: Sequence[Tensor],
    measures: Measures,
    budget: int,
) -> str:
    """Add up the measures of one choice; returns the kernels that it ran with."""
    expected = torch.cat([rows[: len(ids)] for rows, ids in zip(truth, windows, strict=False)])
    targets = torch.cat([torch.tensor([*ids[1:], -1]) for ids in windows])
    done = 0

    def heard(logits: Tensor) -> None:
        nonlocal done
        rows = slice(done, done + len(logits))
        measures.add(logits, expected[rows], targets[rows])
        done += len(logits)

    return run(options, choice, windows, heard, budget)


def run(
    options: AccuracyOptions,
    choice: Choice,
    windows: Iterable[Sequence[int]],
    heard: Heard,
    budget: int,
) -> str:
    """Compute all windows, one after another, `budget` tokens a step; returns the kernels."""
    engine = EngineHere(
        options.directory,
        choice,
        threads=options.threads,
        sequences=1,
        tokens=options.window + 1,
        budget=budget,
        make_runner=lambda model, cache: Listener(model, heard),
    )
    for ids in windows:
        engine.generate(ids, 1)
        while not engine.step():
            pass
    return engine.kernels


class Listener:
    """A Runner that tells the logits of all rows, and answers with any token."""

    ahead = False

    def __init__(self, model: Decoder, heard: Heard) -> None:
        self._model = model
        self._heard = heard

    @torch.inference_mode()
    def launch(self, batch: Batch, attention: Attention) -> Outcome:
        hidden = self._model.forward(batch.tokens, batch.positions, attention(batch))
        self._heard(self._model.logits(hidden))
        return lambda: [Sampled(0) for _ in batch.samples]


def read_windows(options: AccuracyOptions) -> list[list[int]]:
    """What the model is to read, `tokens` in all. Raises StartError."""
    shape = load_config(options.directory)
    require(
        options.window < shape.max_model_len,
        f"--window: the model ends at {shape.max_model_len} tokens",
    )
    if options.text is None and options.model:
        draw = random.Random(options.seed)
        ids = [draw.randrange(shape.vocab_size) for _ in range(options.tokens)]
        return cut([ids], options.window, options.tokens)
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(options.directory / "tokenizer.json"))
    except Exception as error:  # the library raises bare Exception for any bad file
        raise StartError(f"{options.directory}: {error}") from None
    if options.text is None:
        return cut(_corpus(tokenizer), options.window, options.tokens)
    try:
        text = options.text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise StartError(f"--text {options.text}: {error}") from None
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    require(len(ids) > 1, f"--text {options.text} holds less than two tokens")
    return cut([ids], options.window, options.tokens)


def _corpus(tokenizer: Any) -> Iterable[list[int]]:
    """What baton-tiny knows by heart, one conversation after another."""
    from engine.tiny import questions
    from engine.tiny.corpus import Lesson
    from engine.tiny.tokenizer import encode

    return (encode(tokenizer, Lesson(talk.turns))[0] for talk in questions())


def cut(texts: Iterable[Sequence[int]], window: int, tokens: int) -> list[list[int]]:
    """Pieces of at most `window` tokens, `tokens` in all. A piece starts anew, knowing nothing."""
    windows: list[list[int]] = []
    for ids in texts:
        for start in range(0, len(ids), window):
            piece = list(ids[start : min(start + window, len(ids))])[:tokens]
            if len(piece) > 1:
                windows.append(piece)
                tokens -= len(piece)
    return windows


def shortened(windows: Sequence[Sequence[int]], tokens: int) -> list[list[int]]:
    """The first of them, whole but for the last, `tokens` in all."""
    few: list[list[int]] = []
    for ids in windows:
        if tokens < 1:
            break
        few.append(list(ids[:tokens]))
        tokens -= len(few[-1])
    return few


def default_choices() -> tuple[Choice, ...]:
    """Every way that this machine has, but float16: emulated on a CPU, and very slowly."""
    ways = [Choice("bfloat16", "torch")]
    if native.available():
        ways += [Choice("float32", "native"), Choice("bfloat16", "native")]
        ways += [Choice("float32", "native", "int8")]
    return tuple(ways)


def parse_choice(word: str) -> Choice:
    """`native-int8`, `torch-bfloat16`. Raises StartError."""
    kernels, _, weights = word.partition("-")
    known = (*DTYPES, "int8")
    require(
        kernels in ("torch", "native") and weights in known,
        f"--choices: {word!r} is not torch- or native- and one of {', '.join(known)}",
    )
    if weights == "int8":
        return Choice("float32", kernels, "int8")
    return Choice(weights, kernels)


def parse_options(argv: Sequence[str]) -> AccuracyOptions:
    """Raises StartError; SystemExit for --help and unknown flags."""
    parser = argparse.ArgumentParser(
        prog="baton bench accuracy",
        description="Logits and perplexity of each way to compute, against float32 in plain torch.",
        allow_abbrev=False,
    )
    default = AccuracyOptions
    add = parser.add_argument
    add("model", nargs="?", default="", help="checkpoint directory (default: baton-tiny)")
    add("--text", type=Path, help="what to read (default: baton-tiny's own, else random tokens)")
    add("--choices", nargs="+", metavar="KERNELS-WEIGHTS", help="default: all that there are")
    for name, text in (
        ("tokens", "tokens to read; all their logits of the reference are kept in memory"),
        ("single", "of them, how many are read one by one too"),
        ("window", "tokens after which the model forgets all"),
        ("seed", "of random tokens"),
    ):
        value = getattr(default, name)
        add(f"--{name}", type=int, default=value, metavar="N", help=f"{text} (default: {value})")
    threads = len(os.sched_getaffinity(0))
    add("--threads", type=int, default=threads, help=f"default: {threads}")
    for name, text in (
        ("max-kl", "mean nats a token"),
        ("min-top1", "share of tokens whose likeliest successor is the same"),
        ("max-perplexity-ratio", "perplexity over the reference's"),
    ):
        add(f"--{name}", type=float, default=math.nan, metavar="X", help=f"fail beyond it: {text}")
    add("--output", help="JSON file (default: bench/results/accuracy-MODEL.json)")
    given = vars(parser.parse_args(list(argv)))
    words = given.pop("choices")
    choices = tuple(map(parse_choice, words)) if words else default_choices()
    return AccuracyOptions(choices=choices, **given)


def table(options: AccuracyOptions, results: Sequence[Result]) -> str:
    head = ("", "way", "error", "max", "KL", "max", "top-1", "perplexity")
    lines = [f"{head[0]:<18}{head[1]:<8}" + "".join(f"{word:>11}" for word in head[2:])]
    for result in results:
        found = result.measures
        numbers = (
            *(f"{value:.2e}" for value in (found.error_mean, found.error_max)),
            *(f"{value:.2e}" for value in (found.kl_mean, found.kl_max)),
            f"{found.top1:.4f}",
            f"{found.perplexity:.4f}",
        )
        name = f"{result.kernels} {result.choice.name.split()[1]}"
        lines.append(f"{name:<18}{result.way:<8}" + "".join(f"{word:>11}" for word in numbers))
    if results:
        truth = results[0].measures.reference_perplexity
        lines.append(f"{options.name}: perplexity {truth:.4f} in float32, {TRUTH.kernels}")
    return "\n".join(lines)


def to_json(options: AccuracyOptions, results: Sequence[Result]) -> dict[str, Any]:
    return {
        "model": options.name,
        "date": datetime.now().isoformat(timespec="seconds"),
        "torch": torch.__version__,
        "isa": native.isa() if native.available() else "",
        "text": options.text.name if options.text else "random" if options.model else "its own",
        "tokens": options.tokens,
        "window": options.window,
        "results": [
            {
                "choice": result.choice.name,
                "kernels": result.kernels,
                "way": result.way,
                **result.measures.to_json(),
            }
            for result in results
        ],
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
