"""Figures and tables of a sweep: one HTML page, one Markdown file, and the pictures.

    python -m experiments.report --workdir=runs/arch

Writes DIR/report/index.html (self-contained), report.md, and each figure as .png and .svg. Arms are
cells alike but for their seed; intervals are 95 % over seeds. What a sweep has no results for is
left out. --where=part=error,k=32 reports on the cells with these values alone, in a folder of its
own. Needs matplotlib: pip install '.[plot]'.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from experiments import command_line
from scale_sae_jax import load
from scale_sae_jax.errors import telling
from scale_sae_jax.report.arms import Arm, apart, arms_of, number_axes
from scale_sae_jax.report.groups import groups_table
from scale_sae_jax.report.page import Picture, Table, html, markdown
from scale_sae_jax.results import MAIN_RESULTS, read_axes, read_rows
from scale_sae_jax.workdir import read_json

FLAGS = flags.FLAGS
HEAT_MAPS = 4  # arms whose experts are compared


def define(argv: list[str]) -> None:
    del argv
    flags.DEFINE_string("workdir", None, "Folder of a sweep.")
    flags.DEFINE_string("output", None, "Folder of the report; in WORKDIR if not given.")
    command_line.define_where()
    flags.mark_flag_as_required("workdir")


def inside(workdir: Path, arms: list[Arm]) -> tuple[dict[str, Any], ...]:
    """Of the first cell of each many-expert arm: load of experts, omega, and decoder [N, M, D]."""
    loads, omegas, decoders = {}, {}, {}
    for arm in arms:
        folder = workdir / arm.rows[0]["folder"]
        results = read_json(folder / "cell.json", "a finished cell")["results"]
        if len(results.get("expert_load") or []) < 2:
            continue
        loads[arm.name] = np.array(results["expert_load"])
        sae, params = load(folder)
        if "omega" in params:
            omegas[arm.name] = np.asarray(params["omega"])
        if len(decoders) < HEAT_MAPS:
            rows = np.asarray(sae.decoder(params))
            decoders[arm.name] = rows.reshape(sae.experts, -1, rows.shape[-1])
    return loads, omegas, decoders


def drawings(
    workdir: Path, rows: list[dict[str, Any]], axes: list[str]
) -> list[tuple[Picture, Callable[[], Any]]]:
    """What to draw; a drawing that has nothing to show gives None."""
    from scale_sae_jax.report import figures

    arms = arms_of(rows, apart(axes))
    loads, omegas, decoders = inside(workdir, arms)
    first = "Of the first seed."
    few = f"The first {HEAT_MAPS} of {len(loads)} arms. " if len(loads) > HEAT_MAPS else ""
    found = [
        (Picture("quality", "Quality", "Lower is better. Bars are 95 % over seeds."),
         lambda: figures.quality(arms)),
        (Picture("pareto", "Quality against cost", "The line joins arms that no other one beats at "
         "the same cost or less. Time is that of this machine."), lambda: figures.pareto(arms)),
        (Picture("generalisation", "On other text", "Lower is better. Bars are 95 % over seeds."),
         lambda: figures.generalisation(arms)),
        (Picture("redundancy", "Latents alike", "Of every live latent the largest decoder cosine "
         "with another one, of its expert and of others: its mean, and the share over a "
         "threshold; next to what as many random directions give."),
         lambda: figures.redundancy(arms)),
        (Picture("expert_load", "Load of experts", first), lambda: figures.expert_load(loads)),
        (Picture("specialisation", "Specialisation of experts", "Mutual information of token and "
         "expert; the estimate is biased upward, by what shuffled tokens give."),
         lambda: figures.specialisation(arms)),
        (Picture("omega", "Feature scaling", f"omega of every expert. {first}"),
         lambda: figures.omega(omegas)),
        (Picture("similarity", "Experts alike", "Mean over the latents of one expert (row) of the "
         f"largest decoder cosine with another latent of an expert (column). {few}{first}"),
         lambda: figures.similarity(decoders)),
    ]
    for axis in number_axes(rows, axes):
        picture = Picture(f"along_{axis}", f"By {axis}", "Bars are 95 % over seeds.")
        found.append((picture, lambda axis=axis: figures.along(rows, axes, axis)))
    return found


def tables(rows: list[dict[str, Any]], axes: list[str]) -> list[Table]:
    """Means over seeds, and every cell with the command that runs it."""
    head, *lines = groups_table(rows, apart(axes), list(MAIN_RESULTS))
    cells = Table(
        "Every cell", [*axes, "fvu", "command"],
        [[str(row.get(n, "")) for n in axes]
         + ["-" if row["fvu"] is None else f"{row['fvu']:.4f}", row["command"]]
         for row in rows],
        commands="command",
    )
    return [Table("Means and 95 % intervals over seeds", head, lines), cells]


def main() -> None:
    workdir = Path(FLAGS.workdir)
    rows = read_rows(workdir, FLAGS.where)
    fixed = {part.partition("=")[0] for part in FLAGS.where}
    axes = [name for name in read_axes(workdir)
            if name not in fixed and any(row.get(name) is not None for row in rows)]
    output = Path(FLAGS.output or workdir / "-".join(["report", *FLAGS.where]))
    matplotlib = command_line.import_matplotlib()
    matplotlib.rcParams["svg.hashsalt"] = "report"  # the same figure, the same file
    with telling(f"cannot write {output}", "choose another --output"):
        output.mkdir(parents=True, exist_ok=True)
        pictures = []
        for picture, draw in drawings(workdir, rows, axes):
            figure = draw()
            if figure is None:
                continue
            for ending in ("png", "svg"):
                figure.savefig(output / f"{picture.name}.{ending}", dpi=130)
            pictures.append(picture)
        title = " ".join([f"Sweep {workdir.name}", *FLAGS.where])
        arms = len(arms_of(rows, apart(axes)))
        lead = f"{len(rows)} cells, {arms} arms. All figures come from held-out data."
        both = title, lead, pictures, tables(rows, axes)
        (output / "index.html").write_text(html(*both, output))
        (output / "report.md").write_text(markdown(*both))
    print(f"{output}/index.html")


if __name__ == "__main__":
    command_line.start(main, define)
