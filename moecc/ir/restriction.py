"""The input shapes that a trace holds for, as data; the sentence is made where it is shown."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from moecc.types import Json


@dataclass(frozen=True)
class Restriction:
    """The sequence lengths S that a program holds for.

    They are low <= S <= high (None: no bound) without the excluded ones. A restriction is false if
    the program holds for every length.
    """

    low: int = 1
    high: int | None = None
    excluded: tuple[int, ...] = ()

    def __bool__(self) -> bool:
        return self != Restriction()

    def holds(self, sequence: int) -> bool:
        """Return whether the program holds for sequences of this length."""
        bounded = self.high is None or sequence <= self.high
        return self.low <= sequence and bounded and sequence not in self.excluded

    def __str__(self) -> str:
        if self.excluded:
            return "sequence other than " + ", ".join(map(str, self.excluded))
        low = f"{self.low} <= " if self.low > 1 else ""
        high = "" if self.high is None else f" <= {self.high}"
        return f"{low}sequence{high}" if self else ""

    def as_json(self) -> Json | None:
        """Return the fields, or None if the program holds for every length."""
        return {**asdict(self), "excluded": list(self.excluded)} if self else None

    @classmethod
    def of_json(cls, value: Json) -> Restriction:
        """Return the restriction that `as_json` wrote."""
        return cls(**{**value, "excluded": tuple(value["excluded"])})
