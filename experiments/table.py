"""A Markdown table of a sweep: one row a group of cells, mean and 95 % interval over its seeds.

    python -m experiments.table --workdir=runs/arch --by=preset,match --columns=fvu,delta_ce

± is the half-width of Student's interval of the mean. Columns that no cell has are left out.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
from absl import flags
from scipy import stats

from experiments import command_line
from scale_sae_jax.errors import UserError
from scale_sae_jax.sweep import MAIN_RESULTS

FLAGS = flags.FLAGS


def define(argv: list[str]) -> None:
    del argv
    flags.DEFINE_string("workdir", None, "Folder of a sweep.")
    flags.DEFINE_list("by", None, "Columns whose values make a group.")
    flags.DEFINE_list("columns", list(MAIN_RESULTS), "Results to show.")
    flags.DEFINE_string("output", None, "Markdown file to write as well.")
    flags.mark_flags_as_required(["workdir", "by"])


def read_rows(workdir: Path) -> list[dict[str, Any]]:
    """The rows of results.parquet. Raises UserError if it is not there, damaged or empty."""
    path = workdir / "results.parquet"
    if not path.is_file():
        raise UserError(f"{workdir} has no results.parquet: fill it with experiments.sweep")
    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except (pa.ArrowInvalid, OSError):
        raise UserError(f"{path} is damaged: the same experiments.sweep writes it anew") from None
    if not rows:
        raise UserError(f"{path} holds no finished cell yet")
    return rows


def markdown(rows: list[dict[str, Any]], by: list[str], columns: list[str]) -> str:
    """The table, groups in the order of their first rows.

    Raises UserError for an unknown name in `by`, and for a group with two cells of one seed: its
    spread would not be that of seeds.
    """
    for name in by:
        if name not in rows[0]:
            known = ", ".join(rows[0])
            raise UserError(f"--by={name}: there is no such column; the results have {known}")
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in by), []).append(row)
    for key, group in groups.items():
        seeds = [row.get("seed") for row in group]
        if len(set(seeds)) < len(seeds):
            where = " ".join(map(str, key))
            raise UserError(f"--by={','.join(by)}: '{where}' has several cells of one seed: "
                            "name in --by what else sets cells apart")
    cells = []
    for name in columns:
        values = [[r[name] for r in group if r.get(name) is not None] for group in groups.values()]
        if any(values):
            cells.append((name, _formatted(name, values)))
    seeds = [str(len(group)) for group in groups.values()]
    shown = [("seeds", seeds), *cells]
    lines = [
        [*by, *(name for name, _ in shown)],
        [*("---" for _ in by), *("---:" for _ in shown)],
        *(
            [*map(str, key), *(column[i] for _, column in shown)]
            for i, key in enumerate(groups)
        ),
    ]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _formatted(name: str, groups: list[list[Any]]) -> list[str]:
    """A column, each group as 'mean ± half-width', all with the same number of digits."""
    every = [value for group in groups for value in group]
    if not all(isinstance(value, int | float) for value in every):
        raise UserError(f"--columns={name} is not a column of numbers")
    largest = max(map(abs, every))
    counts = all(isinstance(value, int) for value in every)
    form = ",.0f" if counts or largest >= 1000 else ".1f" if largest >= 10 else ".4f"
    return [_mean(group, form) for group in groups]


def _mean(values: list[float], form: str) -> str:
    """'-' for no value; a count that is the same for all seeds stands alone."""
    if not values:
        return "-"
    mean, n = format(np.mean(values), form), len(values)
    if n == 1:
        return mean
    if isinstance(values[0], int) and len(set(values)) == 1:
        return mean
    half = stats.t.ppf(0.975, n - 1) * np.std(values, ddof=1) / np.sqrt(n)
    return f"{mean} ± {format(half, form)}"


def main() -> None:
    workdir = Path(FLAGS.workdir)
    text = markdown(read_rows(workdir), FLAGS.by, FLAGS.columns)
    if FLAGS.output:
        try:
            Path(FLAGS.output).write_text(text + "\n")
        except OSError as error:
            raise UserError(f"cannot write {FLAGS.output}: {error.strerror}") from None
    print(text)


if __name__ == "__main__":
    command_line.start(main, define)
