from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from cluster.errors import StartError
from engine import native
from engine.backend import choose_ops, find_device
from tests.engine.shapes import CONFIG
from tests.native import needs_native

CPU = torch.device("cpu")
FP32 = torch.float32


@needs_native
def test_the_cpu_takes_the_native_kernels() -> None:
    ops = choose_ops(CONFIG, CPU, FP32)
    assert (ops.name, ops.dtype, ops.kv_dtype) == ("native", FP32, FP32)
    half = choose_ops(CONFIG, CPU, torch.bfloat16)
    assert (half.dtype, half.kv_dtype) == (FP32, torch.bfloat16)


def test_without_native_kernels_torch_with_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(native, "why_not", lambda: "no compiler was there")
    assert choose_ops(CONFIG, CPU, FP32).name == "torch"
    [record] = caplog.records
    assert record.levelname == "WARNING" and record.__dict__["reason"] == "no compiler was there"
    with pytest.raises(StartError, match="--kernels native: no compiler was there"):
        choose_ops(CONFIG, CPU, FP32, "native")


@needs_native
def test_a_head_that_native_kernels_do_not_do(caplog: pytest.LogCaptureFixture) -> None:
    odd = replace(CONFIG, head_dim=12)
    assert choose_ops(odd, CPU, FP32).name == "torch"
    assert "head_dim 12" in caplog.records[0].__dict__["reason"]
    with pytest.raises(StartError, match="head_dim 12 is not a multiple of 8"):
        choose_ops(odd, CPU, FP32, "native")


@pytest.mark.parametrize(
    ("kernels", "quantization", "message"),
    [
        ("torch", "int8", "--quantization int8 needs --kernels native, and this worker has torch"),
        ("triton", "none", "--kernels triton: they run on a GPU alone"),
    ],
)
def test_what_does_not_go_together(kernels: str, quantization: str, message: str) -> None:
    with pytest.raises(StartError, match=message):
        choose_ops(CONFIG, CPU, FP32, kernels, quantization)


def test_plain_torch_is_for_the_cpu() -> None:
    with pytest.raises(StartError, match="--kernels torch: its attention is for the CPU"):
        choose_ops(CONFIG, torch.device("cuda"), torch.bfloat16, "torch")


def test_what_triton_kernels_do_not_do() -> None:
    from engine.kernels.backend import unfit

    fits = replace(CONFIG, head_dim=64)
    assert unfit(fits, torch.bfloat16, 16) == ""
    assert "head_dim 8 is not one of 64" in unfit(CONFIG, torch.bfloat16, 16)
    assert "--block-size 8 is not one of 16" in unfit(fits, torch.bfloat16, 8)
    assert "float32" in unfit(fits, torch.float32, 16)


@pytest.mark.parametrize("name", ["nowhere", "cuda", "meta"])
def test_a_device_that_is_not_here(name: str) -> None:
    if name == "cuda" and torch.cuda.is_available():
        pytest.skip("it is")
    with pytest.raises(StartError, match=f"device '{name}'"):
        find_device(name)
