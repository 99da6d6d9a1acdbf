"""The rows of a sweep by arm, cells that differ in nothing but their seed; means over seeds."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

Row = dict[str, Any]
TIMES = ("train_seconds", "tokens_per_second", "seconds_per_step")


class Interval(NamedTuple):
    """Mean over seeds, and the half-width of Student's 95 % interval; nan from one seed."""

    mean: float
    half: float


@dataclass(frozen=True)
class Arm:
    """Cells alike but for their seed. axes: what sets them apart from the others."""

    axes: dict[str, Any]
    rows: list[Row]

    @property
    def name(self) -> str:
        return " ".join(
            str(v) if isinstance(v, str) else f"{n}={v}" for n, v in self.axes.items()
        ) or "all"

    def values(self, column: str) -> list[Any]:
        """A result in each of its cells, where it is defined."""
        return [row[column] for row in self.rows if row.get(column) is not None]

    def interval(self, column: str) -> Interval | None:
        """Its mean and interval; None where no cell has it.

        The time of cells that trained together is one measurement, and has none over seeds.
        """
        values = self.values(column)
        if not values:
            return None
        shared = column in TIMES and any((n or 1) > 1 for n in self.values("trained_together"))
        n = 1 if shared else len(values)
        half = stats.t.ppf(0.975, n - 1) * np.std(values, ddof=1) / np.sqrt(n) if n > 1 else np.nan
        return Interval(float(np.mean(values)), float(half))


def apart(axes: list[str], *without: str) -> list[str]:
    """The axes that set arms apart: all but the seed, and that of a curve."""
    return [name for name in axes if name not in ("seed", *without)]


def arms_of(rows: Iterable[Row], names: list[str]) -> list[Arm]:
    """Rows with the same values of `names`, in the order of their first rows."""
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row.get(name) for name in names), []).append(row)
    return [
        Arm({n: v for n, v in zip(names, key, strict=True) if v is not None}, group)
        for key, group in groups.items()
    ]


def number_axes(rows: list[Row], axes: list[str]) -> list[str]:
    """The axes, beside the seed, along which curves can be drawn: numbers, several of them."""
    found = []
    for name in axes:
        values = {row[name] for row in rows if row.get(name) is not None}
        numbers = all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
        if name != "seed" and numbers and len(values) > 1:
            found.append(name)
    return found
