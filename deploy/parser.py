"""The command lines of the commands that serve nothing."""

from __future__ import annotations

import argparse
from typing import Any, NoReturn

from cluster.errors import StartError


class Parser(argparse.ArgumentParser):
    """A wrong flag is a StartError like any other bad start."""

    def __init__(self, prog: str, description: str, **settings: Any) -> None:
        super().__init__(prog=prog, description=description, allow_abbrev=False, **settings)

    def error(self, message: str) -> NoReturn:
        raise StartError(message)
