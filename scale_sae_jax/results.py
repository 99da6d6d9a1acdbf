"""The results of a sweep: results.csv and results.parquet, a row a finished cell."""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from scale_sae_jax.errors import UserError, telling

RESULTS = "results.parquet"  # in the folder of the sweep
# The results that a table shows unless told otherwise; an axis must not hide one of them.
MAIN_RESULTS = (
    "l0", "fvu", "delta_ce", "dead", "redundancy_0.7", "redundancy_0.7_intra",
    "redundancy_0.7_inter", "redundancy_0.7_null", "flops_per_token", "active_width",
    "total_width", "tokens_per_second", "seconds_per_step", "mcc", "uniqueness", "f1",
)


def write_rows(rows: list[dict[str, Any]], axes: list[str], workdir: Path) -> None:
    """Writes both files, each whole; the .parquet names the axes in its metadata."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    table = pa.table({name: _column([row.get(name) for row in rows]) for name in names})
    table = table.replace_schema_metadata({"axes": json.dumps(axes)})
    _replace(workdir / "results.csv", lambda path: pyarrow.csv.write_csv(table, path))
    _replace(workdir / RESULTS, lambda path: pyarrow.parquet.write_table(table, path))


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
            raise no_column(f"--where={part}", name, rows)
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


def no_column(flag: str, name: str, rows: list[dict[str, Any]]) -> UserError:
    known = ", ".join(rows[0])
    return UserError(f"{flag}: there is no column '{name}'; the results have {known}")


def _column(values: list[Any]) -> pa.Array:
    """An array of one type: text if the types do not mix."""
    kinds = {type(value) for value in values if value is not None}
    if len(kinds) > 1 and kinds != {int, float}:
        values = [None if value is None else str(value) for value in values]
    return pa.array(values)


def _replace(path: Path, write: Callable[[str], object]) -> None:
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")  # others may run cells too
    with telling(f"{path} cannot be written", "make room, then start again"):
        write(str(partial))
        os.replace(partial, path)
