"""Objects that hold tensors, sent from one process to another through a pipe.

Tensors travel by value: what torch does by itself, a shared memory file for each, fails where
/dev/shm is small or files run out. They arrive dense and at addresses that suit vector
instructions, whatever they were views of, because the last bits of a product may depend on both.
"""

from __future__ import annotations

import io
import pickle
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from moecc import registry
from moecc.errors import MoeccError

Bytes: TypeAlias = bytes | bytearray | memoryview

HEAD = struct.Struct("<2Q")  # the bytes of an object without its tensors, and of their shapes
_ALIGNED = 64  # bytes, as torch allocates
_LARGEST = 1 << 30  # bytes in one call of the system, which may not take more than 2 GiB


class Pipe(Protocol):
    """A file without a buffer, which may read or write less than it was asked to."""

    def readinto(self, buffer: Any, /) -> int | None: ...
    def write(self, data: Any, /) -> int | None: ...


@dataclass(frozen=True)
class Packed:
    """An object, pickled without its tensors, and these: dense, on the CPU, each of them once."""

    data: bytes
    tensors: Sequence[Tensor]

    @classmethod
    def of(cls, value: object) -> Self:
        """Pack an object. Raise MoeccError for a tensor that is sparse or on a device."""
        file = io.BytesIO()
        pickler = _Pickler(file)
        pickler.dump(value)
        return cls(file.getvalue(), [_dense(t) for t in pickler.tensors])

    def unpacked(self) -> object:
        """Return the object, with these very tensors."""
        return _Unpickler(self.data, self.tensors).load()

    def copy(self) -> Self:
        """Return the same with tensors of its own, as they arrive in another process."""
        return type(self)(self.data, [t.clone() for t in self.tensors])

    def aligned(self) -> Self:
        """Return the same with tensors at addresses that they could have in another process."""
        found = [t.clone() if t.data_ptr() % _ALIGNED else t for t in self.tensors]
        return type(self)(self.data, found)

    def send(self, pipe: Pipe) -> None:
        """Write everything into a pipe. Raise OSError if nobody reads it."""
        shapes = pickle.dumps([(t.dtype, tuple(t.shape)) for t in self.tensors])
        for part in (HEAD.pack(len(self.data), len(shapes)), self.data, shapes):
            _write(pipe, part)
        for tensor in self.tensors:
            _write(pipe, as_bytes(tensor).data)

    @classmethod
    def receive(cls, pipe: Pipe, head: bytes | None = None) -> Self:
        """Read what `send` wrote. head: its first `HEAD.size` bytes, if they are read already.

        Raise EOFError if the other process has ended.
        """
        sizes = HEAD.unpack(_read(pipe, HEAD.size) if head is None else head)
        data, shapes = (bytes(_read(pipe, size)) for size in sizes)
        tensors = [torch.empty(shape, dtype=dtype) for dtype, shape in pickle.loads(shapes)]
        for tensor in tensors:
            _fill(pipe, as_bytes(tensor).data)
        return cls(data, tensors)


def as_bytes(tensor: Tensor) -> npt.NDArray[np.uint8]:
    """Return the memory of a tensor of `Packed`."""
    found: npt.NDArray[np.uint8] = tensor.view(-1).view(torch.uint8).numpy()
    return found


def _read(pipe: Pipe, size: int) -> bytearray:
    """Read `size` bytes. Raise EOFError if there are fewer."""
    found = bytearray(size)
    _fill(pipe, found)
    return found


def _dense(tensor: Tensor) -> Tensor:
    if tensor.device.type != "cpu" or tensor.layout != torch.strided:
        kind = f"a {tensor.layout} tensor on {tensor.device}"
        raise MoeccError(f"workers can't be sent {kind}; give dense tensors on the CPU")
    return tensor.detach().resolve_conj().resolve_neg().contiguous()


class _Pickler(pickle.Pickler):
    """Puts tensors aside, and a number in the place of each."""

    def __init__(self, file: io.BytesIO):
        super().__init__(file, protocol=5)
        self.tensors: list[Tensor] = []
        self._numbers: dict[int, int] = {}  # by identity

    def persistent_id(self, value: object) -> int | None:
        if not isinstance(value, Tensor):
            return None
        if id(value) not in self._numbers:
            self._numbers[id(value)] = len(self.tensors)
            self.tensors.append(value)
        return self._numbers[id(value)]


class _Unpickler(pickle.Unpickler):
    def __init__(self, data: bytes, tensors: Sequence[Tensor]):
        super().__init__(io.BytesIO(data))
        self.tensors = tensors

    def persistent_load(self, number: int) -> Tensor:
        return self.tensors[number]

    def find_class(self, module: str, name: str) -> object:
        registry.provide(module)
        return super().find_class(module, name)


def _write(pipe: Pipe, data: Bytes) -> None:
    left = memoryview(data)
    while left:
        left = left[pipe.write(left[:_LARGEST]) or 0 :]


def _fill(pipe: Pipe, buffer: Bytes) -> None:
    left = memoryview(buffer)
    while left:
        count = pipe.readinto(left[:_LARGEST])
        if not count:
            raise EOFError("the other process has ended")
        left = left[count:]
