"""Which cells of a sweep train together, and the folder they share meanwhile.

    DIR/together-HASH/cells.json  DIR/together-HASH/checkpoints/

A company is cells whose settings differ in seed, learning rate and L0 alone (on a stream, whose
batches depend on the seed, in the latter two). Its folder is there
from its first step until each of its cells has its last checkpoint, so that a killed sweep goes on
with the same companies.
"""

import shutil
from itertools import islice
from pathlib import Path
from threading import Event

import jax

from scale_sae_jax import workdir as folders
from scale_sae_jax.config import digest
from scale_sae_jax.console import Console
from scale_sae_jax.errors import UserError
from scale_sae_jax.sweep import (
    Cell,
    Shared,
    finished,
    inputs_key,
    sources_of,
    tell_failure,
)
from scale_sae_jax.training.interrupts import Interrupted
from scale_sae_jax.training.together import shape, train_together


def check_together(most: int) -> None:
    """Raises UserError where cells cannot train together."""
    if most > 1 and jax.process_count() > 1:
        raise UserError(
            f"--together={most}: cells train together in one process, here are "
            f"{jax.process_count()}; run one process a machine, each with its own --filter"
        )


def company(here: Cell, cells: list[Cell], workdir: Path, most: int) -> list[Cell]:
    """The cells that train with `here`, itself among them; none if it trains alone.

    One that was begun goes on. Else it is `here` and the next of `cells` that fit it and have not
    begun, `most` of them. A run that asks for a mesh, for a width that takes as long as another, or
    for Weights & Biases, which follows one run a process, trains alone.
    """
    begun = _begun(cells, workdir)
    for members in begun:
        if here in members:
            return members
    taken = {other.name for members in begun for other in members}
    asked, c = _shape(here), here.config

    def fits(other: Cell) -> bool:
        fresh = other.name not in taken and not (workdir / other.name / "checkpoints").exists()
        return fresh and _shape(other) == asked and finished(other, workdir) is None

    if c.mesh or c.wandb or c.sae.match == "time" or not fits(here):
        return []
    members = list(islice(filter(fits, cells[cells.index(here):]), most))
    return members if len(members) > 1 else []


def train_company(
    cells: list[Cell], workdir: Path, stop: Event, console: Console, shared: Shared
) -> None:
    """Trains a company to its end, so that `sweep.run_cell` finds each cell trained.

    Raises Interrupted when `stop` was set; the same call goes on. What else goes wrong is raised
    as it is, after its traceback was written to error.txt in the folder of each cell.
    """
    console.note(f"{', '.join(here.name for here in cells)} train together")
    try:
        _train(cells, workdir, stop, console, shared)
    except Interrupted:
        raise
    except Exception:
        for here in cells:
            tell_failure(here, workdir)
        raise


def _train(
    cells: list[Cell], workdir: Path, stop: Event, console: Console, shared: Shared
) -> None:
    folder, steps = _folder(cells, workdir), cells[0].config.steps
    for here in cells:
        folders.claim(here.config, workdir / here.name)
    sources = sources_of(cells[0], workdir, stop, console, shared)
    if not (folder / "cells.json").exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        folders.write_json(folder / "cells.json", {"cells": [here.name for here in cells]})
    ended = train_together(
        [here.config for here in cells],
        sources.train,
        folder / "checkpoints",
        [workdir / here.name for here in cells],
        stop,
        lambda record: console.step(record, steps),
    )
    if not ended:
        raise Interrupted("training stopped and saved")
    (folder / "cells.json").unlink()
    shutil.rmtree(folder)


def _begun(cells: list[Cell], workdir: Path) -> list[list[Cell]]:
    """The companies of these cells that were begun with their very settings, and none finished.

    What one leaves whose cells were finished in another way is removed.
    """
    by_name = {here.name: here for here in cells}
    found = []
    for path in sorted(workdir.glob("together-*/cells.json")):
        names = folders.read_json(path, "cells that train together").get("cells")
        names = names if isinstance(names, list) else []
        members = [by_name[name] for name in names if isinstance(name, str) and name in by_name]
        same = members and _folder(members, workdir) == path.parent
        if same and all(finished(here, workdir) is None for here in members):
            found.append(members)
        elif same:
            shutil.rmtree(path.parent, ignore_errors=True)
    return found


def _folder(cells: list[Cell], workdir: Path) -> Path:
    return workdir / f"together-{digest({here.name: repr(here.config) for here in cells})}"


def _shape(here: Cell) -> tuple[str, object]:
    return inputs_key(here.config), shape(here.config)
