"""Groups of a sweep's cells as a table: mean and 95 % interval over the seeds of each."""

from typing import Any

import numpy as np

from scale_sae_jax.errors import UserError
from scale_sae_jax.report.arms import Arm, arms_of
from scale_sae_jax.results import MAIN_RESULTS, no_column


def groups_table(rows: list[dict[str, Any]], by: list[str], columns: list[str]) -> list[list[str]]:
    """The heading and a line a group, groups in the order of their first rows.

    Raises UserError for an unknown name, and for a group with two cells of one seed: its spread
    would not be that of seeds. A main result that no row has is left out.
    """
    for flag, names in (("by", by), ("columns", set(columns).difference(MAIN_RESULTS))):
        for name in names:
            if not any(name in row for row in rows):
                raise no_column(f"--{flag}={name}", name, rows)
    groups = arms_of(rows, by)
    for group in groups:
        seeds = [row.get("seed") for row in group.rows]
        if len(set(seeds)) < len(seeds):
            where = " ".join(map(str, group.axes.values()))
            raise UserError(f"--by={','.join(by)}: '{where}' has several cells of one seed: "
                            "name in --by what else sets cells apart")
    cells = [(name, _formatted(name, groups)) for name in columns
             if any(group.values(name) for group in groups)]
    shown = [("seeds", [str(len(group.rows)) for group in groups]), *cells]
    return [
        [*by, *(name for name, _ in shown)],
        *(
            [*(str(group.rows[0][name]) for name in by), *(column[i] for _, column in shown)]
            for i, group in enumerate(groups)
        ),
    ]


def _formatted(name: str, groups: list[Arm]) -> list[str]:
    """A column, each group as 'mean ± half-width', all with the same number of digits."""
    every = [value for group in groups for value in group.values(name)]
    if not all(isinstance(value, int | float) for value in every):
        raise UserError(f"--columns={name} is not a column of numbers")
    largest = max(map(abs, every))
    counts = all(isinstance(value, int) for value in every)
    form = ",.0f" if counts or largest >= 1000 else ".1f" if largest >= 10 else ".4f"
    return [_mean(group, name, form) for group in groups]


def _mean(group: Arm, name: str, form: str) -> str:
    """'-' for no value; a count that is the same for all seeds stands alone."""
    found, values = group.interval(name), group.values(name)
    if found is None:
        return "-"
    mean = format(found.mean, form)
    same = isinstance(values[0], int) and len(set(values)) == 1
    return mean if same or np.isnan(found.half) else f"{mean} ± {format(found.half, form)}"
