"""Names for types that many modules speak about."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

# an object as JSON holds it: text, numbers, lists and such objects by name
Json: TypeAlias = dict[str, Any]
# takes a remark for the user, one line
Say: TypeAlias = Callable[[str], None]
# (items, label) -> the same items, shown as they are worked on
Progress: TypeAlias = Callable[[Iterable[Any], str], Iterable[Any]]
# what transformers has no common type for: each family has attributes of its own
Config: TypeAlias = Any
Tokenizer: TypeAlias = Any
FamilyModule: TypeAlias = Any
