"""The fate of a weight in a compiled model, as data; `str()` makes the words that users see."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Self

from moecc.types import Json

_SAID: dict[str, Callable[[Fate], str]] = {
    "kept": lambda fate: "as it was",
    "rewritten": lambda fate: "rewritten",
    "coded": lambda fate: f"{fate.format} {fate.bits} bit",
    "grouped": lambda fate: f"{fate.bits} bit, groups of {fate.group}",
    "part": lambda fate: f"in {fate.of}",
    "tied": lambda fate: f"tied to {fate.of}",
    "unused": lambda fate: "left out",
    "header": lambda fate: "names, shapes and types",
}


@dataclass(frozen=True)
class Fate:
    """The fate of one parameter, by kind.

      kept        as in the source
      rewritten   new values of the same type
      coded       codes in a `format`
      grouped     integers with a scale per `group` of weights
      part        stored in the row `of` another parameter
      tied        shares the tensor `of` another parameter
      unused      the model takes no such tensor
      header      the headers of the files, no parameter

    bits: per weight, without scales and codebooks. Raise ValueError if there is no such kind.
    """

    kind: str
    bits: int | None = None
    group: int | None = None
    format: str = ""
    of: str = ""

    def __post_init__(self) -> None:
        if self.kind not in _SAID:
            raise ValueError(f"no fate {self.kind!r}; there are {', '.join(_SAID)}")

    def __str__(self) -> str:
        return _SAID[self.kind](self)

    def as_json(self) -> Json:
        """Return the fields that are set."""
        return {k: v for k, v in asdict(self).items() if v not in (None, "")}

    @classmethod
    def of_json(cls, value: Json) -> Self:
        """Return the fate that `as_json` wrote."""
        return cls(**value)


KEPT, REWRITTEN, UNUSED, HEADER = map(Fate, ("kept", "rewritten", "unused", "header"))
