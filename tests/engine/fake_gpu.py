"""A GPU that computes nothing: what would run on one is held to devices, launches and waits.

Its tensors are torch's FakeTensors: they have a device, a shape and a dtype, and an operation on
two devices raises. Triton kernels are bound as for a launch, and what Triton would then compile is
noted instead. Noted as well is every wait: whatever brings a number to the host, and each copy
that is not from or to pinned memory. A number that is read is 0.

FakeTensors of a device that torch was built without do not take every call of Tensor's: those that
a step makes are taken over here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

aten = torch.ops.aten
H200 = {"name": "NVIDIA H200", "major": 9, "minor": 0, "multi_processor_count": 132}
_READS = {
    getattr(Tensor, name)
    for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__")
}


class FakeGpu(TorchFunctionMode):
    """Within it, `cuda` is a device."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self.compiled: list[str] = []
        self.captured: list[str] = []  # of these, and of the waits, what was inside a capture
        self.launches = self.replays = 0
        self.capturing = False
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        self._pinned: list[Tensor] = []
        self._own: dict[Any, Callable[..., Any]] = {
            Tensor.__getitem__: self._index,
            Tensor.to: self._to,
            Tensor.copy_: self._copy,
            Tensor.contiguous: lambda t: aten.clone(t, memory_format=torch.contiguous_format),
            torch.tensor: lambda values, device, **more: self._to(
                torch.tensor(values, **more), device
            ),
        }

    def wait(self, what: str) -> None:
        self.waits.append(what)
        if self.capturing:
            self.captured.append(what)

    def pinned(self, tensor: Tensor) -> bool:
        ours = {each.untyped_storage().data_ptr() for each in self._pinned}
        return tensor.untyped_storage().data_ptr() in ours

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if kwargs.pop("pin_memory", False):
            self._pinned.append(func(*args, **kwargs))
            return self._pinned[-1]
        if not any(map(_is_of_device, (*args, *kwargs.values()))):
            return func(*args, **kwargs)
        if func in _READS:
            self.wait(func.__name__)
            zeros = torch.zeros(args[0].shape, dtype=args[0].dtype)
            return zeros if func is Tensor.cpu else func(zeros)
        if func in self._own:
            return self._own[func](*args, **kwargs)
        with self._mode:
            return func(*args, **kwargs)

    def _index(self, tensor: Tensor, index: Any) -> Tensor:
        dim = 0
        for one in index if isinstance(index, tuple) else (index,):
            if isinstance(one, slice):
                if one != slice(None):
                    tensor = aten.slice(tensor, dim, one.start, one.stop)
                dim += 1
            elif one is None:
                tensor, dim = aten.unsqueeze(tensor, dim), dim + 1
            elif isinstance(one, int):
                tensor = aten.select(tensor, dim, one)
            else:
                assert dim == 0, "not taken over: an index tensor of another dimension"
                if not isinstance(one, FakeTensor) or one.dtype == torch.bool:
                    self.wait("index that the host has, or must count")
                    one = self._to(torch.zeros(len(one), dtype=torch.int64), "cuda")
                tensor = aten.index(tensor, [one])
        return tensor

    def _to(self, tensor: Tensor, *what: Any, non_blocking: bool = False) -> Tensor:
        dtype = next((each for each in what if isinstance(each, torch.dtype)), tensor.dtype)
        if any(map(_is_of_device, what)) and not isinstance(tensor, FakeTensor):
            self._check_copy(tensor, non_blocking)
            with self._mode:
                return torch.empty(tensor.shape, dtype=dtype, device="cuda")
        return tensor if dtype == tensor.dtype else aten._to_copy(tensor, dtype=dtype)

    def _copy(self, target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
        assert source.expand_as(target).shape == target.shape
        for host in (target, source):
            if not isinstance(host, FakeTensor):
                self._check_copy(host, non_blocking)
        return target if isinstance(target, FakeTensor) else target.zero_()

    def _check_copy(self, host: Tensor, non_blocking: bool) -> None:
        if not (non_blocking and self.pinned(host)):
            self.wait(f"copy of {tuple(host.shape)}")

    def compile(self, fn: Any, key: str, _signature: Any, device: int, *_: Any) -> Any:
        """In place of JITFunction._do_compile."""
        name = fn.fn.__name__
        self.compiled.append(name)
        if self.capturing:
            self.captured.append(name)
        kernel = SimpleNamespace(
            function=None, packed_metadata=None, launch_metadata=lambda *_: None, run=self._launch
        )
        fn.device_caches[device][0][key] = kernel
        return kernel

    def _launch(self, *arguments: Any) -> None:
        self.launches += 1
        assert all(0 < size < 1 << 16 for size in arguments[1:3]), f"grid {arguments[:3]}"
        for one in arguments:
            if isinstance(one, Tensor):
                assert isinstance(one, FakeTensor) or self.pinned(one), "a kernel reads the host"

    @contextmanager
    def graph(self, graph: object, **_: object) -> Iterator[None]:
        self.capturing = True
        yield
        self.capturing = False

    def replay(self) -> None:
        self.replays += 1


def _is_of_device(value: object) -> bool:
    if isinstance(value, str | torch.device):
        return str(value).startswith("cuda")
    if isinstance(value, list | tuple):
        return any(map(_is_of_device, value))
    return isinstance(value, FakeTensor)


def _data_ptr(tensor: Tensor) -> int:
    """Somewhere: no two tensors at one place, and aligned as the real ones are."""
    return int(tensor.untyped_storage()._cdata * 512 + tensor.storage_offset() * tensor.itemsize)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGpu]:
    fake = FakeGpu()
    stream = SimpleNamespace(synchronize=lambda: None, wait_stream=lambda other: None)
    event = SimpleNamespace(
        record=lambda stream=None: None, synchronize=lambda: None, query=lambda: True
    )
    for name, value in {
        "_lazy_init": lambda: None,
        "CUDAGraph": lambda: SimpleNamespace(pool=lambda: (0, 1), replay=fake.replay),
        "Event": lambda: event,
        "Stream": lambda *_, **__: stream,
        "current_stream": lambda *_: stream,
        "device": nullcontext,
        "get_device_capability": lambda *_: (H200["major"], H200["minor"]),
        "get_device_properties": lambda *_: SimpleNamespace(**H200),
        "graph": fake.graph,
        "stream": nullcontext,
        "synchronize": lambda *_: None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(FakeTensor, "data_ptr", _data_ptr)
    compiled_for: set[Any] = set()

    def compile_nothing(fn: Any, *arguments: Any) -> Any:
        compiled_for.add(fn)
        return fake.compile(fn, *arguments)

    monkeypatch.setattr(JITFunction, "_do_compile", compile_nothing)
    before = driver._active
    driver.set_active(
        SimpleNamespace(
            get_current_device=lambda: 0,
            get_current_stream=lambda device: 0,
            get_current_target=lambda: GPUTarget("cuda", 90, 32),
        )
    )
    with fake:
        yield fake
    driver._active = before
    for fn in compiled_for:
        fn.device_caches.clear()
