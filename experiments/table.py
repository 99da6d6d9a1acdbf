"""A Markdown table of a sweep: one row a group of cells, mean and 95 % interval over its seeds.

    python -m experiments.table --workdir=runs/arch --by=preset,match --columns=fvu,delta_ce

--where=part=error,k=32 keeps the rows with these values. ± is the half-width of Student's interval
of the mean. Columns that no cell has are left out.
"""

from pathlib import Path
from typing import Any

from absl import flags

from experiments import command_line
from scale_sae_jax.errors import telling
from scale_sae_jax.report.groups import groups_table
from scale_sae_jax.report.page import markdown_table
from scale_sae_jax.results import MAIN_RESULTS, read_rows

FLAGS = flags.FLAGS


def define(argv: list[str]) -> None:
    del argv
    flags.DEFINE_string("workdir", None, "Folder of a sweep.")
    flags.DEFINE_list("by", None, "Columns whose values make a group.")
    command_line.define_where()
    flags.DEFINE_list("columns", list(MAIN_RESULTS), "Results to show.")
    flags.DEFINE_string("output", None, "Markdown file to write as well.")
    flags.mark_flags_as_required(["workdir", "by"])


def markdown(rows: list[dict[str, Any]], by: list[str], columns: list[str]) -> str:
    """The table as Markdown; see `groups_table`."""
    head, *lines = groups_table(rows, by, columns)
    return markdown_table(head, lines, len(by))


def main() -> None:
    workdir = Path(FLAGS.workdir)
    text = markdown(read_rows(workdir, FLAGS.where), FLAGS.by, FLAGS.columns)
    if FLAGS.output:
        with telling(f"cannot write {FLAGS.output}"):
            Path(FLAGS.output).write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    command_line.start(main, define)
