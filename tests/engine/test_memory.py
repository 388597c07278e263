from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cluster import pressure
from cluster.errors import StartError
from engine import memory
from engine.models.decoder import Decoder
from engine.ops import TorchOps
from tests.engine.shapes import CONFIG

CPU = torch.device("cpu")


def test_free_memory_is_what_the_kernel_says() -> None:
    total = int(Path("/proc/meminfo").read_text().split()[1]) << 10
    assert 0 < memory.free_bytes(CPU) < total


def test_what_torch_only_keeps_of_a_gpu_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    free = [100]
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: free.append(300))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free[-1], 1000))
    assert memory.free_bytes(torch.device("cuda")) == 300


def test_blocks_that_do_not_fit_say_how_many_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda device: (64 << 20) + 10_500)
    memory.check_blocks(10, 1000, CPU)
    with pytest.raises(StartError) as caught:
        memory.check_blocks(11, 1000, CPU)
    assert "but 10 do: --num-blocks 10, or --kv-cache-memory-bytes 10000" in str(caught.value)


def test_weights_that_do_not_fit_are_refused_before_they_are_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = Decoder(CONFIG, TorchOps(torch.float32))
    monkeypatch.setattr(memory, "free_bytes", lambda device: model.bytes)
    memory.check_weights(model)
    monkeypatch.setattr(memory, "free_bytes", lambda device: model.bytes - 1)
    with pytest.raises(StartError, match=r"GB of weights do not fit on cpu, .*--quantization int8"):
        memory.check_weights(model)


def test_a_kv_cache_that_would_hold_up_new_requests_is_told_of(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Half of all is used: 3,500 of the 5,000 bytes left bring that to 85 %."""
    monkeypatch.setattr(pressure, "memory", lambda: 0.5)
    monkeypatch.setattr(memory, "free_bytes", lambda device: 5000)
    memory.warn_of_pressure(3400, 0.85, CPU)
    memory.warn_of_pressure(5000, 0, CPU)
    assert not caplog.records
    memory.warn_of_pressure(3600, 0.85, CPU)
    [record] = caplog.records
    assert vars(record)["memory"] == 0.86
