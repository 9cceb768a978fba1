"""Mutations of what a program reads, drawn from a seed: JSON, text and bytes.

Most change one thing that the format knows, such as a key or a number, so that the program gets
past its first check. The rest change characters and bytes.
"""

from __future__ import annotations

import copy
import json
import math
import random
import re
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

T = TypeVar("T")
Place = tuple[str | int, ...]  # keys and positions, from the outside to a part of a JSON value

WHOLE = (
    *(0, 1, 2, 3, 7, 64, 255, 256, 65536, -1, -2, 10**9),
    *(1 << 31, 1 << 32, 1 << 53, 1 << 60, 1 << 63, 1 << 64, -(1 << 63), 10**400),
)
NUMBERS: tuple[int | float, ...] = (
    *WHOLE,
    *(0.0, -0.0, 0.5, 1.0, 2.5, -1.5, 1e-320, 1e9, 1e30, 1e308, math.inf, -math.inf, math.nan),
)
ESCAPES = ("\0", "\n", "\r", "\x07", "\x1b[2J", "\x1b]0;x\x07", "\x9b31m", "\u202e", "\u2028")
STRINGS = (
    *("", " ", "a", "0", "-1", "nan", "None", "true", "1e999"),
    *("x" * 300, "n" * 5000, "9" * 5000, "a" * 63 + "!"),
    *("é", "中文", "\U0001d511", "٣", "²", "ﬁ", "e\u0301", *ESCAPES, "a\0b", "x\x1b[31mred"),
    *("\ud800", "\udfff", "../x", "../../../etc/passwd", ".", "..", "/", "./", "a/b", "~"),
    *("%s%n", "{0}", "{", "}", "'", '"', "\\", "$(id)", ";", "*", "[", "(", "(?P<x>", "C:\\x"),
)
# Text in the place of a JSON value.
RAW_JSON = (
    *("NaN", "Infinity", "-Infinity", "1e999", "-1e999", "-0", "0x1", "01", "1_0", "+1", "1."),
    *("9" * 5000, "-" + "9" * 400, "1" + "0" * 30),
    *("[" * 100_000, '{"a":' * 100_000, "[" * 70 + "]" * 70, '{"a":' * 200 + "1" + "}" * 200),
    *('"\\ud800"', '"\\udfff\\ud800"', '"\\u0000"', '"\\u001b[2J"', '"\x00"', '"\x1b"', '"\\x"'),
    *("'x'", "tru", "undefined", "{}", "[]", "[[]]", "[{}]", '""', "", ",", ":", "]", "}"),
    *("/* */ 1", "1 // x", "1,", '{"a":1,"a":2}', "\ufeff1", '"' + "x" * 100_000 + '"'),
)
_VALUE = re.compile(r'(?<=[:\[,])\s*("(?:[^"\\]|\\.)*"|-?[\d.][\d.eE+-]*|true|false|null)')


class Mutator:
    """Draws mutations. Equal seeds draw the same."""

    def __init__(self, seed: str):
        self.random = random.Random(seed)

    def pick(self, choices: Sequence[T]) -> T:
        return self.random.choice(choices)

    def chance(self, share: float) -> bool:
        return self.random.random() < share

    # ---------------------------------------------------------------- JSON

    def value(self, depth: int = 0) -> object:
        """Draw any value that JSON holds, most often a number or a string."""
        kind = self.random.randrange(10)
        if kind < 4:
            return self.pick(NUMBERS)
        if kind < 7 or depth > 2:
            return self.pick(STRINGS)
        if kind == 7:
            return self.pick([None, True, False])
        inner = [self.value(depth + 1) for _ in range(self.random.randrange(4))]
        return inner if kind == 8 else {self.pick(STRINGS): part for part in inner}

    def near(self, value: object) -> object:
        """Draw a value that resembles `value`, or any."""
        if self.chance(0.3):
            return self.pick([self.value(), [value], {"a": value}, str(value), None])
        match value:
            case bool():
                return self.pick([not value, int(value), str(value)])
            case int():
                real = float(max(min(value, 1 << 64), -(1 << 64)))
                return self.pick([value + 1, value - 1, 2 * value, value // 2, -value, real])
            case float():
                return self.pick([-value, value * 1e30, value / 3, 0, value + 0.5])
            case str():
                return self.text(value)
            case list():
                more = [*value, self.value()]
                return self.pick([value[:-1], value * 2, value[::-1], more, [], value[:1] * 9])
            case dict():
                less = dict(list(value.items())[1:])
                return self.pick([less, {}, list(value), {**value, "x": self.value()}])
            case _:
                return self.value()

    def tree(
        self, value: object, keys: Sequence[str] = (), values: Sequence[object] = ()
    ) -> object:
        """Change a JSON value in one to three places. keys, values: more that may be put in."""
        box: list[Any] = [copy.deepcopy(value)]
        for _ in range(self.pick([1, 1, 1, 2, 3])):
            if box:
                *outer, last = self.pick(list(_places(box)))
                self._edit(_part(box, outer), last, box[0], keys, values)
        return box[0] if box else None

    def _edit(
        self, part: Any, last: Any, whole: object, keys: Sequence[str], values: Sequence[object]
    ) -> None:
        """Change part[last], in which `whole` is everything."""
        new = self.pick(values) if values and self.chance(0.5) else self.value()
        name = self.pick(keys) if keys and self.chance(0.8) else self.text(str(last))
        match self.random.randrange(8):
            case 0:
                del part[last]
            case 1 if isinstance(part, dict):
                part[name] = part.pop(last) if self.chance(0.5) else new
            case 2 if isinstance(part[last], dict):
                part[last][name] = new
            case 3:
                other = self.pick(list(part) if isinstance(part, dict) else range(len(part)))
                part[last], part[other] = part[other], part[last]
            case 4:
                source = [p for p in _places([whole]) if len(p) > 1]
                part[last] = copy.deepcopy(_part([whole], self.pick(source))) if source else new
            case 5:
                part[last] = new
            case _:
                part[last] = self.near(part[last])

    def json(self, raw: bytes, keys: Sequence[str] = (), values: Sequence[object] = ()) -> bytes:
        """Change a JSON file: its values four times in five, else its text or bytes."""
        if self.chance(0.2):
            return self.pick([self._raw_value, self._raw_value, self.raw, self._spoiled])(raw)
        found = self.tree(json.loads(raw), keys, values)
        text = json.dumps(found, indent=2, ensure_ascii=self.chance(0.7))
        return text.encode("utf-8", "surrogatepass")

    def _raw_value(self, raw: bytes) -> bytes:
        text = raw.decode("utf-8", "replace")
        found = list(_VALUE.finditer(text))
        start, end = self.pick(found).span() if found else (0, len(text))
        return (text[:start] + self.pick(RAW_JSON) + text[end:]).encode("utf-8", "surrogatepass")

    def _spoiled(self, raw: bytes) -> bytes:
        text = raw.decode("utf-8", "replace")
        other = [text.encode("utf-16"), b"\xef\xbb\xbf" + raw, raw.replace(b"a", b"\xe9", 1)]
        whole = [b"null", b"[]", b"{}", b"0", b'""', b"", b"\0" * 64]
        around = [b"[" + raw + b"]", raw + raw, raw[:-1], b"{" + raw, b" " * 5000 + raw]
        return self.pick([*other, *whole, *around])

    # ---------------------------------------------------------------- text and bytes

    def text(self, text: str, words: Sequence[str] = ()) -> str:
        """Change a text in one to three places. words: more that may be put in."""
        for _ in range(self.pick([1, 1, 2, 3])):
            start = self.random.randrange(len(text) + 1)
            end = min(len(text), start + self.pick([0, 1, 1, 2, 5, 20]))
            before, span, after = text[:start], text[start:end], text[end:]
            put = [
                *("", span * 2, span.swapcase(), span[::-1], chr(self.random.randrange(0x110000))),
                *(self.pick(STRINGS), self.pick(ESCAPES), str(self.pick(NUMBERS))),
                *((self.pick(words) for _ in range(6)) if words else ()),
            ]
            whole = [before, after, after + before, text * 2]
            text = before + self.pick(put) + after if self.chance(0.85) else self.pick(whole)
        return text

    def words(self, text: str, words: Sequence[str]) -> str:
        """Change one to three words or signs of a text: to one of `words`, mostly."""
        parts = re.findall(r"\w+|\W", text)
        for _ in range(self.pick([1, 1, 2, 3])):
            at = self.random.randrange(len(parts) + 1)
            part = parts[at : at + 1]
            new = self.pick([self.pick(words)] * 4 + [str(self.pick(NUMBERS)), self.pick(STRINGS)])
            parts[at : at + 1] = self.pick([[new]] * 5 + [[], [*part, new], part * 2])
        return "".join(parts)

    def raw(self, raw: bytes) -> bytes:
        """Change some bytes: flip bits, cut, double, swap, fill or insert."""
        for _ in range(self.pick([1, 1, 2, 8])):
            start = self.random.randrange(len(raw) + 1)
            end = min(len(raw), start + self.pick([1, 1, 2, 8, 100, len(raw)]))
            before, span, after = raw[:start], raw[start:end], raw[end:]
            flipped = bytes([span[0] ^ 1 << self.random.randrange(8), *span[1:]]) if span else b""
            fill = [bytes(len(span)), b"\xff" * len(span), self.random.randbytes(len(span))]
            put = [b"", 2 * span, self.random.randbytes(4) + span, *fill, *[flipped] * 4]
            whole = [before, after, after + before, raw + b"\0", b""]
            raw = before + self.pick(put) + after if self.chance(0.8) else self.pick(whole)
        return raw


def _places(value: object, path: Place = ()) -> Iterator[Place]:
    """Yield the place of every part of a JSON value."""
    inner: Any = value.items() if isinstance(value, dict) else ()
    inner = enumerate(value) if isinstance(value, list) else inner
    for key, part in inner:
        yield (*path, key)
        yield from _places(part, (*path, key))


def _part(value: Any, path: Sequence[str | int]) -> Any:
    for key in path:
        value = value[key]
    return value
