"""Mutations of safetensors files: tensors and their shapes, types, names and values; headers."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from typing import Any

from _mutate import NUMBERS, STRINGS, Mutator

Tensor = tuple[str, list[Any], bytes]  # dtype, shape, bytes
SIZES = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
}
_ODD_DTYPES = ("F4", "F99", "f32", "", "float32", "\x1b[2J", 3, None, ["F32"], {"a": 1}, True)
_WORDS = ("0", "1", "7", "99", "weight", "bias", "codes", "experts", "model", "__metadata__")
_MOST = 1 << 20  # bytes of a tensor that a mutation makes
_MANY = 200_000  # names
# NaN, infinity and large numbers in float32, bfloat16 or float16
_PATTERNS = (b"\0", b"\xff", b"\0\0\xc0\x7f", b"\0\0\x80\x7f", b"\x7f\x7f", b"\xf0\x49\x74\x72")


def mutated(m: Mutator, raw: bytes) -> bytes:
    """Change a safetensors file: its tensors half of the time, else its header or its bytes."""
    length = int.from_bytes(raw[:8], "little")
    head, data = raw[8 : 8 + length], raw[8 + length :]
    kind = m.random.random()
    if kind < 0.15:
        return m.raw(raw)
    if kind < 0.2:
        near = [0, 1, 7, length + 1, length - 1, 2 * length, len(raw), 1 << 40, (1 << 64) - 1]
        return m.pick(near).to_bytes(8, "little") + raw[8:]
    if kind < 0.5:
        return _with_header(m.json(head), data)
    table = json.loads(head)
    metadata = table.pop("__metadata__", None)
    tensors = {
        n: (e["dtype"], e["shape"], data[slice(*e["data_offsets"])]) for n, e in table.items()
    }
    for _ in range(m.pick([1, 1, 2, 4])):
        _change(m, tensors)
    return _written(tensors, m.value() if m.chance(0.05) else metadata)


def _change(m: Mutator, tensors: dict[str, Tensor]) -> None:
    """Change one tensor, or what is called so."""
    name = m.pick(list(tensors)) if tensors else "x"
    dtype, shape, data = tensors.setdefault(name, ("F32", [1], bytes(4)))
    match m.random.randrange(8):
        case 0:
            del tensors[name]
        case 1:
            tensors[_name(m, name)] = tensors.pop(name)
        case 2:
            tensors[_name(m, name)] = tensors[name]
        case 3:
            other = m.pick(list(tensors))
            tensors[name], tensors[other] = tensors[other], tensors[name]
        case 4:
            kind: Any = m.pick(_ODD_DTYPES) if m.chance(0.2) else m.pick(list(SIZES))
            tensors[name] = kind, shape, _resized(data, kind, shape)
        case 5:
            tensors[name] = dtype, shape, _values(m, data)
        case 6:
            count = _MANY if m.chance(0.005) else m.pick([1, 2, 9, 300])
            start = _name(m, name)[:200]
            tensors.update({f"{start}.{i}": ("U8", [0], b"") for i in range(count)})
        case _:
            sizes = _shape(m, shape)
            tensors[name] = dtype, sizes, _resized(data, dtype, sizes)


def _shape(m: Mutator, shape: Sequence[Any]) -> list[Any]:
    """Change a shape: its sizes, their order, or how many there are."""
    sizes = list(shape)
    if sizes and m.chance(0.6):
        at = m.random.randrange(len(sizes))
        n = sizes[at]
        near = [0, 1, m.pick(NUMBERS), str(n), None]
        near += [n + 1, n - 1, 2 * n, n // 2, float(n)] if isinstance(n, int) else []
        return [*sizes[:at], m.pick(near), *sizes[at + 1 :]]
    whole = [math.prod(sizes)] if all(type(n) is int for n in sizes) else []
    return m.pick([sizes[::-1], sizes[:-1], [*sizes, 1], [1, *sizes], [], [0], [1] * 65, whole])


def _values(m: Mutator, data: bytes) -> bytes:
    """Fill some of a tensor's bytes with those of odd numbers, or any."""
    filled = (m.pick([*_PATTERNS, m.random.randbytes(4)]) * (len(data) + 1))[: len(data)]
    start = 4 * m.random.randrange(len(data) // 4 + 1) if m.chance(0.7) else 0
    end = start + m.pick([4, 64, len(data)])
    return data[:start] + filled[start:end] + data[end:]


def _name(m: Mutator, name: str) -> str:
    """Change the name of a tensor: its numbers, its parts, or its characters."""
    parts = name.split(".")
    at = m.random.randrange(len(parts))
    word = m.pick(m.pick([_WORDS, STRINGS]))
    ways = [
        re.sub(r"\d{1,9}", lambda digits: str(int(digits[0]) + 1), name, count=1),
        ".".join([*parts[:at], word, *parts[at + 1 :]]),
        ".".join([*parts[:at], word, *parts[at:]]),
        ".".join(parts[:at] + parts[at + 1 :]),
        ".".join(parts[::-1]),
        *(m.text(name), word, f"{name}_scale_inv", f"{name}_blocks", f"model.{name}"),
    ]
    return m.pick(ways)


def _resized(data: bytes, dtype: object, shape: Sequence[object]) -> bytes:
    """Return as many bytes as a tensor has; `data` if there is no such number, or a large one."""
    sizes = [n for n in shape if type(n) is int and 0 <= n <= _MOST]
    if dtype not in list(SIZES) or len(sizes) < len(shape):
        return data
    size = math.prod(sizes) * SIZES[str(dtype)]
    return data if size > _MOST else (data * (size // max(len(data), 1) + 1) + bytes(size))[:size]


def _written(tensors: dict[str, Tensor], metadata: object) -> bytes:
    table: dict[str, object] = {} if metadata is None else {"__metadata__": metadata}
    end = 0
    for name, (dtype, shape, data) in tensors.items():
        table[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + len(data)]}
        end += len(data)
    head = json.dumps(table).encode()
    return _with_header(head, b"".join(data for _, _, data in tensors.values()))


def _with_header(head: bytes, data: bytes) -> bytes:
    return len(head).to_bytes(8, "little") + head + data
