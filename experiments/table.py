"""A Markdown table of a sweep: one row a group of cells, mean and 95 % interval over its seeds.

    python -m experiments.table --workdir=runs/arch --by=preset,match --columns=fvu,delta_ce

--where=part=error,k=32 keeps the rows with these values. ± is the half-width of Student's interval
of the mean. Columns that no cell has are left out.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
from absl import flags

from experiments import command_line
from scale_sae_jax.errors import UserError, telling
from scale_sae_jax.report.arms import Arm, arms_of
from scale_sae_jax.sweep import MAIN_RESULTS
from scale_sae_jax.workdir import RESULTS

FLAGS = flags.FLAGS


def define(argv: list[str]) -> None:
    del argv
    flags.DEFINE_string("workdir", None, "Folder of a sweep.")
    flags.DEFINE_list("by", None, "Columns whose values make a group.")
    define_where()
    flags.DEFINE_list("columns", list(MAIN_RESULTS), "Results to show.")
    flags.DEFINE_string("output", None, "Markdown file to write as well.")
    flags.mark_flags_as_required(["workdir", "by"])


def define_where() -> None:
    flags.DEFINE_list("where", [], "Keep the rows with these values, AXIS=VALUE,AXIS=VALUE.")


def read_rows(workdir: Path, where: Sequence[str] = ()) -> list[dict[str, Any]]:
    """The rows of results.parquet with the values that `where` asks for, 'k=32'.

    Raises UserError if the file is not there, damaged or empty, or no row has them.
    """
    rows = _read(workdir).to_pylist()
    if not rows:
        raise UserError(f"{workdir}/{RESULTS} holds no finished cell yet")
    for part in where:
        name, equals, value = part.partition("=")
        if not equals:
            raise UserError(f"--where={part}: write COLUMN=VALUE")
        if name not in rows[0]:
            raise _no_column(f"--where={part}", name, rows)
        kept = [row for row in rows if str(row[name]) == value]
        if not kept:
            known = ", ".join(sorted({str(row[name]) for row in rows}))
            raise UserError(f"--where={part}: no row has it; there are {known}")
        rows = kept
    return rows


def read_axes(workdir: Path) -> list[str]:
    """The columns that are axes of the grid. Raises UserError as `read_rows`."""
    axes = (_read(workdir).schema.metadata or {}).get(b"axes", b"[]")
    return json.loads(axes)


def _read(workdir: Path) -> pa.Table:
    path = workdir / RESULTS
    if not path.is_file():
        raise UserError(f"{workdir} has no {RESULTS}: fill it with experiments.sweep")
    try:
        return pyarrow.parquet.read_table(path)
    except (pa.ArrowInvalid, OSError):
        raise UserError(f"{path} is damaged: the same experiments.sweep writes it anew") from None


def _no_column(flag: str, name: str, rows: list[dict[str, Any]]) -> UserError:
    known = ", ".join(rows[0])
    return UserError(f"{flag}: there is no column '{name}'; the results have {known}")


def markdown(rows: list[dict[str, Any]], by: list[str], columns: list[str]) -> str:
    """The table as Markdown; see `groups_table`."""
    head, *lines = groups_table(rows, by, columns)
    rule = [*("---" for _ in by), *("---:" for _ in head[len(by):])]
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, rule, *lines))


def groups_table(rows: list[dict[str, Any]], by: list[str], columns: list[str]) -> list[list[str]]:
    """The heading and a line a group, groups in the order of their first rows.

    Raises UserError for an unknown name, and for a group with two cells of one seed: its spread
    would not be that of seeds. A main result that no row has is left out.
    """
    for flag, names in (("by", by), ("columns", set(columns).difference(MAIN_RESULTS))):
        for name in names:
            if not any(name in row for row in rows):
                raise _no_column(f"--{flag}={name}", name, rows)
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


def main() -> None:
    workdir = Path(FLAGS.workdir)
    text = markdown(read_rows(workdir, FLAGS.where), FLAGS.by, FLAGS.columns)
    if FLAGS.output:
        with telling(f"cannot write {FLAGS.output}"):
            Path(FLAGS.output).write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    command_line.start(main, define)
