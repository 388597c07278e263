"""Fields: a JSON object from a model's directory, read field by field without trusting any.

Each accessor returns a value of the stated type and range or raises `BadModel` in the form
`file: field reason`, so that no checker need repeat file and field.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, Final

from cluster.errors import BadModel

_MAX_FILE_BYTES: Final = 64 << 20  # an index of a trillion-parameter model is about 10 MB
_MAX_INT: Final = 1 << 24  # above any real model's sizes; keeps their products far from overflow


class Fields:
    """One JSON object of a file, read field by field; each bad one raises with its name."""

    def __init__(self, file: str, values: dict[str, Any], prefix: str = "") -> None:
        self.file = file
        self.values = values
        self._prefix = prefix

    def bad(self, name: str, reason: str) -> BadModel:
        return BadModel(f"{self.file}: {self._prefix}{name} {reason}")

    def get(self, name: str) -> Any:
        """The value, or None where it is absent or null."""
        return self.values.get(name)

    def integer(
        self, name: str, default: int | None = None, low: int = 1, high: int = _MAX_INT
    ) -> int:
        value = self.get(name)
        if value is None:
            value = default
        if value is None:
            raise self.bad(name, "is missing")
        if type(value) is not int:
            raise self.bad(name, f"must be an integer, not {value!r:.80}")
        if not low <= value <= high:
            raise self.bad(name, f"must be between {low} and {high}, not {value!r:.80}")
        return value

    def number(
        self,
        name: str,
        default: float | None = None,
        low: float = 0.0,
        high: float = math.inf,
        *,
        low_open: bool = True,
    ) -> float:
        """A finite number above `low` (or at it, unless `low_open`) and at most `high`."""
        value = self.get(name)
        if value is None:
            value = default
        if value is None:
            raise self.bad(name, "is missing")
        if type(value) not in (int, float):
            raise self.bad(name, f"must be a number, not {value!r:.80}")
        if not abs(value) <= 1e30:
            raise self.bad(name, f"must be finite, not {value!r:.80}")
        if value > high or value < low or (low_open and value == low):
            above = "above" if low_open else "at least"
            most = "" if high == math.inf else f" and at most {high:g}"
            raise self.bad(name, f"must be {above} {low:g}{most}, not {value!r:.80}")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        value = self.get(name)
        if value is None:
            return default
        if type(value) is not bool:
            raise self.bad(name, f"must be true or false, not {value!r:.80}")
        return value

    def text(self, name: str, default: str) -> str:
        value = self.get(name)
        if value is None:
            return default
        if type(value) is not str:
            raise self.bad(name, f"must be a string, not {value!r:.80}")
        return value

    def ids(self, name: str, vocab_size: int) -> tuple[int, ...]:
        """One token id or a list of them, each in the vocabulary; empty where there is none."""
        value = self.get(name)
        if value is None:
            return ()
        listed = value if type(value) is list else [value]
        for item in listed:
            if type(item) is not int or not 0 <= item < vocab_size:
                raise self.bad(name, f"must be token ids below {vocab_size}, not {value!r:.80}")
        return tuple(listed)


def read_object(path: Path) -> dict[str, Any]:
    """Parse a JSON file that must hold an object. Raises BadModel."""
    try:
        if path.stat().st_size > _MAX_FILE_BYTES:
            raise BadModel(f"{path.name}: larger than {_MAX_FILE_BYTES >> 20} MiB")
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise BadModel(f"{path.name}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise BadModel(f"{path.name}: not JSON ({error!s:.200})") from error
    if type(value) is not dict:
        raise BadModel(f"{path.name}: must be a JSON object, not {type(value).__name__}")
    return value
