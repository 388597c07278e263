"""Marks for tests of the C++ kernels, which a machine without a compiler does not have."""

from __future__ import annotations

import pytest

from engine import native

needs_native = pytest.mark.skipif(not native.available(), reason=native.why_not() or "built")
