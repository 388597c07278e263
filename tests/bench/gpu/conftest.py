"""Kernels are tested in a child: see tests/engine/kernels/interpreter.py."""

from tests.engine.kernels.interpreter import *  # noqa: F403
