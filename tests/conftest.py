"""Settings of the whole suite."""

from __future__ import annotations

import os

from hypothesis import settings

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the suite runs in parallel on few cores

# On a shared machine a slow example is no failure; the same examples each time, a failure is ours.
settings.register_profile("ours", deadline=None, derandomize=True)
settings.load_profile("ours")
