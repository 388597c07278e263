"""The CUDA runtime's calls for memory that two processes share, in ctypes.

Source  CUDA Runtime API, 6.11 (cudaIpcGetMemHandle, cudaIpcOpenMemHandle, cudaIpcCloseMemHandle):
        a handle is opened by another process only, and exported memory is freed last.
"""

from __future__ import annotations

import ctypes
from typing import Any, Final, Protocol

import torch

HANDLE_BYTES: Final = 64
_LAZY_PEER_ACCESS: Final = 1  # cudaIpcMemLazyEnablePeerAccess
_BY_ADDRESS: Final = 4  # cudaMemcpyDefault: an address says where it is


class Driver(Protocol):
    """Memory of one device that another process can reach. Addresses are the caller's own.

    Every call but `copy` may hold the thread up, for milliseconds.
    """

    def export(self, size: int) -> tuple[int, bytes]:
        """New memory, and the handle by which another process opens it. Raises OSError."""

    def free(self, address: int) -> None:
        """What `export` gave. Nobody has it open any more."""

    def open(self, handle: bytes) -> int:
        """Another process's memory. Raises OSError if it is not to be reached from here."""

    def close(self, address: int) -> None:
        """What `open` gave. Nothing that was queued uses it any more."""

    def copy(self, to: int, source: int, size: int) -> None:
        """Queue a copy on the calling thread's current stream. Raises OSError."""


class _Handle(ctypes.Structure):
    _fields_ = (("reserved", ctypes.c_char * HANDLE_BYTES),)


class CudaDriver:
    """Of `device`, which has a number. Raises OSError where torch's CUDA runtime is not found."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        major = (torch.version.cuda or "").partition(".")[0]
        # torch has loaded it: under this name the loader finds that very one.
        library = ctypes.CDLL(f"libcudart.so.{major}")
        pointer, size = ctypes.c_void_p, ctypes.c_size_t
        to_pointer = ctypes.POINTER(pointer)
        library.cudaMalloc.argtypes = (to_pointer, size)
        library.cudaFree.argtypes = (pointer,)
        library.cudaIpcGetMemHandle.argtypes = (ctypes.POINTER(_Handle), pointer)
        library.cudaIpcOpenMemHandle.argtypes = (to_pointer, _Handle, ctypes.c_uint)
        library.cudaIpcCloseMemHandle.argtypes = (pointer,)
        library.cudaMemcpyAsync.argtypes = (pointer, pointer, size, ctypes.c_int, pointer)
        library.cudaGetErrorString.restype = ctypes.c_char_p
        self._library = library

    def export(self, size: int) -> tuple[int, bytes]:
        # Of its own and not from torch's pool, whose memory is handed out in parts: a handle opens
        # all of the allocation that an address lies in.
        address, handle = ctypes.c_void_p(), _Handle()
        self._call("cudaMalloc", ctypes.byref(address), size)
        assert address.value is not None
        try:
            self._call("cudaIpcGetMemHandle", ctypes.byref(handle), address)
        except OSError:
            self.free(address.value)
            raise
        return address.value, ctypes.string_at(ctypes.byref(handle), HANDLE_BYTES)

    def free(self, address: int) -> None:
        self._call("cudaFree", address)

    def open(self, handle: bytes) -> int:
        address = ctypes.c_void_p()
        opened = _Handle.from_buffer_copy(handle)
        self._call("cudaIpcOpenMemHandle", ctypes.byref(address), opened, _LAZY_PEER_ACCESS)
        assert address.value is not None
        return address.value

    def close(self, address: int) -> None:
        self._call("cudaIpcCloseMemHandle", address)

    def copy(self, to: int, source: int, size: int) -> None:
        stream = torch.cuda.current_stream(self._device).cuda_stream
        self._call("cudaMemcpyAsync", to, source, size, _BY_ADDRESS, stream)

    def _call(self, name: str, *arguments: Any) -> None:
        with torch.cuda.device(self._device):
            code = getattr(self._library, name)(*arguments)
            if code == 0:
                return
            # Taken back, or torch's next launch would report it as its own.
            self._library.cudaGetLastError()
            text = self._library.cudaGetErrorString(code).decode()
            raise OSError(f"{name}: {text}")
