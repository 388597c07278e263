"""`baton digest DIR`: write, or check, the digests of a checkpoint's files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cluster import digests
from cluster.errors import StartError
from deploy.parser import Parser


def main(argv: Sequence[str]) -> int:
    """Raises StartError, also for a file that is not what it should be."""
    parser = Parser(
        "baton digest",
        f"Write {digests.DIGESTS} into a model directory; from then on Baton serves it only as it "
        "is now.",
    )
    parser.add_argument("directory", type=Path, metavar="DIR", help="a model directory")
    parser.add_argument("--check", action="store_true", help="compare instead, all files")
    options = parser.parse_args(list(argv))
    directory = options.directory
    if not directory.is_dir():
        raise StartError(f"model {directory}: no such directory")
    if options.check:
        if not (directory / digests.DIGESTS).is_file():
            raise StartError(f"{directory} has no {digests.DIGESTS}: `baton digest` writes it")
        digests.verify(directory)
        print(f"{directory}: all files are those of {digests.DIGESTS}")
        return 0
    try:
        found = digests.write(directory)
    except OSError as error:
        raise StartError(f"{error.filename}: {error.strerror}") from None
    size = sum(entry["bytes"] for entry in found.values())
    print(f"{directory / digests.DIGESTS}: {len(found)} files, {size} bytes")
    return 0
