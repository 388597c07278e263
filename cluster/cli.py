"""`baton`: one command per process. Knows where each lives, imports none before it is asked for."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence

from cluster.errors import StartError
from cluster.process import EXIT_START, tell_start_error

COMMANDS = {
    "serve": ("deploy.launcher", "a gateway and its workers on this machine"),
    "gateway": ("gateway.main", "the HTTP and gRPC front"),
    "worker": ("deploy.worker", "one prefill, decode or undivided worker"),
    "chat": ("deploy.chat", "talk to a running cluster in the terminal"),
    "status": ("deploy.status", "pools, peers, load and free blocks of a running cluster"),
    "keys cluster": ("deploy.keys", "make the keys that gateways and workers need off loopback"),
    "keys api": ("deploy.api_keys", "make an API key and its entry for --api-key-file"),
    "digest": ("deploy.digest", "record what a model's files are, or check it"),
    "chaos": ("bench.chaos.main", "strike a cluster of its own and compare every answer"),
    "bench serve": ("bench.serve", "load any OpenAI-compatible server and measure it"),
    "bench transfer": ("bench.transfer", "KV between workers: GB/s, checks, exposed time"),
    "bench gateway": ("bench.gateway", "what streaming costs the gateway, beside bare uvicorn"),
    "bench cpu": ("bench.cpu", "prefill and decode on the CPU beside other engines"),
    "bench accuracy": ("bench.accuracy", "logits and perplexity of each precision"),
    "bench attention": ("bench.attention_cpu", "attention on the CPU beside torch and the limits"),
    "bench linear": ("bench.linear", "matrix products on the CPU beside torch and the limits"),
    "bench overload": ("bench.overload", "four times too much: who is let in, who is refused, how"),
    "bench compare": ("bench.compare", "divided against undivided on the same cores"),
}

USAGE = "usage: baton COMMAND [MODEL] [--flag value ...]\n\n" + "\n".join(
    f"  {name:<16}{about}" for name, (_, about) in COMMANDS.items()
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # what its core prints comes as exceptions too
    if not words or words[0] in ("-h", "--help", "help"):
        print(USAGE)
        return 0
    length = 2 if words[0] in ("bench", "keys") else 1
    name = " ".join(words[:length])
    if name not in COMMANDS:
        print(f"baton: unknown command {name!r}\n\n{USAGE}", file=sys.stderr)
        return EXIT_START
    try:
        status: int = importlib.import_module(COMMANDS[name][0]).main(words[length:])
    except StartError as error:
        tell_start_error(error)
        return EXIT_START
    except KeyboardInterrupt:
        return 130
    return status


if __name__ == "__main__":
    sys.exit(main())
