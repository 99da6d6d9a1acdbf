"""Run every cell of a grid: train, evaluate, and one row of results each.

    python -m experiments.sweep --grid=configs/grids/architectures.py:seeds=3 --workdir=runs/arch

Prints a line a cell, and at its end how long the cells that are left will take. Every cell is the
folder of a run, DIR/CELL. Finished cells are skipped, a cell that fails is told and left (its
traceback in DIR/CELL/error.txt), and the same command again goes on. To evaluate a finished cell
anew, delete its cell.json. DIR/results.csv and .parquet hold a row for each finished cell of the
grid, with the command that runs it alone. Several processes can run it as one program, as
experiments.train; a cell that fails then ends it. Cells of one shape (seeds, say) share compiled
programs, and with --together=4 up to four that differ in seed, learning rate and L0 alone train in
one step, on one device or spread over several (on a stream: in the latter two); of the time of such
a company, each cell is billed its share.

Exit status: 0 done or stopped, 1 if a cell failed, 2 for a user's mistake.
"""

import contextlib
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from textwrap import shorten
from threading import Event
from typing import Any

import jax
from absl import flags
from jax.experimental.compilation_cache import compilation_cache

from experiments import command_line
from experiments.console import Bars
from scale_sae_jax import sweep
from scale_sae_jax.company import check_together, company, train_company
from scale_sae_jax.console import Console
from scale_sae_jax.errors import UnwrittenError, UserError, telling
from scale_sae_jax.parallel import processes
from scale_sae_jax.sources import resolved
from scale_sae_jax.training.interrupts import Interrupted, stop_requests

FLAGS = flags.FLAGS
COLUMNS = (  # heading, result, format
    ("FVU", "fvu", ".4f"),
    ("delta CE", "delta_ce", ".4f"),
    ("L0", "l0", ".1f"),
    ("dead", "dead", ".1%"),
    ("tokens/s", "tokens_per_second", ",.0f"),
    ("seconds", "train_seconds", ".0f"),
)


def define(argv: list[str]) -> None:
    del argv
    flags.DEFINE_string("grid", None, "Grid file, with an argument after a colon.")
    flags.DEFINE_string("workdir", None, "Folder of the cells and the results.")
    flags.DEFINE_string("filter", "", "Run cells whose name contains this; a comma is an 'or'.")
    flags.DEFINE_integer("together", 1, "Train up to so many cells in one step.", lower_bound=1)
    flags.DEFINE_bool("dry_run", False, "List the cells and what they cost, and do nothing.")
    flags.DEFINE_integer("d", 0, "With --dry_run: width of the activations, for the arithmetic.",
                         lower_bound=0)
    flags.mark_flags_as_required(["grid", "workdir"])


def run_cells(
    chosen: list[sweep.Cell],
    grid: list[sweep.Cell],
    workdir: Path,
    stop: Event,
    command: list[str],
    together: int = 1,
) -> list[str]:
    """Runs the chosen cells that are not finished; returns the names of those that failed.

    Args:
      together: how many cells may train in one step.

    Prints a table that grows by a line a cell, and writes the results of the whole grid after
    each. Raises Interrupted when `stop` was set and cells are left.
    """
    width = max(len(cell.name) for cell in chosen)
    to_run = sum(sweep.finished(cell, workdir) is None for cell in chosen)
    ran, begin = 0, time.monotonic()
    say(f"{'cell':<{width}}" + "".join(f"{name:>11}" for name, _, _ in COLUMNS) + "       left")
    keys = [sweep.inputs_key(cell.config) for cell in chosen]
    failed, shared, tried = [], {}, {}
    processes.lead_alone(lambda: sweep.write_results(grid, workdir, command))
    for number, cell in enumerate(chosen, 1):
        results = sweep.finished(cell, workdir)
        if results is None:
            ran += 1
            if processes.any_of(stop.is_set()):
                raise Interrupted(f"sweep stopped before cell {cell.name}")
            label = f"{number}/{len(chosen)} {cell.name}: "
            bars = Bars(label) if processes.leads() else Console()
            try:
                sweep.check_steps(cell, workdir)
                if together > 1:
                    train_with_others(
                        cell, chosen, workdir, stop, bars, shared, together, tried
                    )
                results = sweep.run_cell(cell, workdir, stop, bars, shared)
            except Interrupted as stopped:
                raise Interrupted(f"{cell.name}: {stopped}") from None
            except UnwrittenError:  # nor can the next cell's be written
                raise
            except Exception as error:  # one cell's: the others may do better
                if processes.lost(error):
                    raise
                kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
                reason = kind + shorten(str(error), 400)
                if processes.several():  # they may wait in this cell, for what does not come
                    raise UserError(
                        f"cell {cell.name} failed: {reason}; with several processes a failed cell "
                        "ends the sweep: mend it, or choose others with --filter, and start again"
                    ) from error
                failed.append(cell.name)
                say(f"{cell.name:<{width}}  failed: {reason}")
            finally:
                bars.close()
            processes.lead_alone(lambda: sweep.write_results(grid, workdir, command))
        if results is not None:
            each = (time.monotonic() - begin) / max(ran, 1)
            left = to_run - ran
            ends = str(timedelta(seconds=round(each * left))) if ran and left else ""
            say(f"{cell.name:<{width}}{summary(results)}{ends:>11}")
        # A stream holds a model and a buffer on the devices: only the next cell may keep it there.
        ahead = keys[number:][:1] if cell.config.activations.buffer else keys[number:]
        shared = {key: inputs for key, inputs in shared.items() if key in ahead}
    return failed


def train_with_others(
    cell: sweep.Cell,
    chosen: list[sweep.Cell],
    workdir: Path,
    stop: Event,
    console: Console,
    shared: sweep.Shared,
    most: int,
    tried: dict[str, Exception | None],
) -> None:
    """Trains a cell in company, if there is one for it and it was not tried before.

    Args:
      tried: by name of a cell, what went wrong in company; the company is added.

    Raises what went wrong, for each cell of a company.
    """
    if cell.name not in tried:
        others = company(cell, chosen, workdir, most)
        names = [other.name for other in others]
        tried |= dict.fromkeys(names)
        try:
            if others:
                train_company(others, workdir, stop, console, shared)
        except Interrupted:
            raise
        except Exception as error:
            tried |= dict.fromkeys(names, error)
    if error := tried.get(cell.name):
        raise error


@contextlib.contextmanager
def shared_programs() -> Iterator[None]:
    """What one cell compiles, the next of the same shape finds, in a folder that goes at the end.

    A folder that the user has set (JAX_COMPILATION_CACHE_DIR) stays, and what is in it.
    """
    if jax.config.jax_compilation_cache_dir:
        yield
        return
    always = "jax_persistent_cache_min_compile_time_secs"
    before = getattr(jax.config, always)
    with tempfile.TemporaryDirectory() as folder:
        compilation_cache.set_cache_dir(folder)
        compilation_cache.reset_cache()
        jax.config.update(always, 0)
        try:
            yield
        finally:
            jax.config.update("jax_compilation_cache_dir", None)
            compilation_cache.reset_cache()
            jax.config.update(always, before)


def say(line: str) -> None:
    if processes.leads():
        print(line, flush=True)


def summary(results: dict[str, Any]) -> str:
    """A line of the table."""
    found = ((results.get(key), form) for _, key, form in COLUMNS)
    return "".join(f"{'-' if value is None else format(value, form):>11}" for value, form in found)


def bill(cells: list[sweep.Cell], width: int) -> str:
    """What the cells come to, in one line; arithmetic where the width of activations is given."""
    trained = sum(c.config.steps * c.config.batch_size for c in cells)
    stores = {c.config.activations.path: resolved(c.config).activations.tokens for c in cells
              if c.config.lm.path and not c.config.activations.buffer}
    flops = sum(sweep.training_flops(c.config, width) for c in cells) if width else 0
    parts = [
        f"{len(cells)} cell{'s' if len(cells) != 1 else ''} to run",
        f"{trained:,} activations to train on",
        f"{sum(stores.values()):,} to harvest" if stores else "",
        f"{flops:.3g} FLOP of training" if width else "",
    ]
    return ", ".join(filter(None, parts))


def main() -> None:
    check_together(FLAGS.together)
    workdir = Path(FLAGS.workdir)
    if command_line.holds_only(FLAGS.grid, "get_config", "get_grid"):
        raise UserError(f"--grid={FLAGS.grid}: this is the config of one run: use "
                        f"experiments.train --config={FLAGS.grid}")
    grid = [sweep.place(cell, workdir) for cell in sweep.read_grid(FLAGS.grid)]
    chosen = sweep.select(grid, FLAGS.filter)
    if FLAGS.dry_run:
        for cell in chosen:
            print(cell.name + ("  (finished)" if sweep.finished(cell, workdir) else ""))
        print(bill([c for c in chosen if not sweep.finished(c, workdir)], FLAGS.d))
        return
    if (workdir / "config.json").exists():
        raise UserError(f"{workdir} is the folder of a run: choose another --workdir for a sweep")
    with telling(f"cannot write to {workdir}", "choose another --workdir"):
        workdir.mkdir(parents=True, exist_ok=True)
    command = ["python", "-m", "experiments.sweep", f"--grid={FLAGS.grid}", f"--workdir={workdir}"]
    try:
        with stop_requests() as stop, shared_programs():
            failed = run_cells(chosen, grid, workdir, stop, command, FLAGS.together)
    except Interrupted as stopped:
        say(f"{stopped}; the same command goes on from there ({workdir})")
        return
    say(f"{len(chosen) - len(failed)} of {len(chosen)} cells finished: {workdir}/results.csv")
    if failed:
        print(f"error: failed: {', '.join(failed)} (see {workdir}/CELL/error.txt)", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    command_line.start(main, define, processes_join=True)
