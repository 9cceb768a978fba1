"""Names for types that many modules speak about."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

# a JSON object: text, numbers, lists and further objects by name
Json: TypeAlias = dict[str, Any]
# takes a remark for the user, one line
Say: TypeAlias = Callable[[str], None]
# (items, label) -> the same items, shown as they are worked on
Progress: TypeAlias = Callable[[Iterable[Any], str], Iterable[Any]]
# the result of a graph node: mostly a tensor, else a tuple of tensors, a number or None
Value: TypeAlias = Any
# transformers has no common type for these: each family has attributes of its own
Config: TypeAlias = Any
Tokenizer: TypeAlias = Any
FamilyModule: TypeAlias = Any
