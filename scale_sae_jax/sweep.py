"""Grids of runs as plain data: their cells, one folder a cell, and one row of results a cell.

    DIR/CELL/ (the folder of a run)  DIR/activations-HASH/  DIR/results.csv  DIR/results.parquet
    DIR/matched-HASH.json (a width)

A grid is a Python file with `get_grid(arg)`, which returns a list of `cell(...)`. Cells that read
the same activations share one store, and inside a process one model and one held-out reading.
"""

import dataclasses
import importlib.util
import itertools
import os
import re
import shlex
import traceback
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event
from typing import Any

from ml_collections import ConfigDict

from scale_sae_jax import workdir as folders
from scale_sae_jax.config import Config, TextConfig, digest, flatten, from_config_dict
from scale_sae_jax.console import Console
from scale_sae_jax.errors import UserError
from scale_sae_jax.evaluation.flops import forward_flops
from scale_sae_jax.parallel import processes
from scale_sae_jax.parallel.mesh import mesh_of_run
from scale_sae_jax.results import MAIN_RESULTS, RESULTS, write_rows
from scale_sae_jax.run import check_run, load, measure_run, run, sized, write_evaluation
from scale_sae_jax.sae.presets import preset
from scale_sae_jax.sae.registry import build, experts_of
from scale_sae_jax.sources import (
    Heldout,
    Sources,
    check_rows,
    open_sources,
    read_heldout,
    resolved,
)
from scale_sae_jax.training.interrupts import Interrupted

# Of an evaluation on another text, what a row keeps under its name.
OTHER_TEXT = (
    "fvu", "fvu_ci95", "mse", "delta_ce", "delta_ce_ci95", "recovered", "l0", "eval_tokens",
    "eval_documents", "eval_documents_skipped",
)
# What a stream's batches depend on beside their source; the last three may decide the mesh.
OF_A_STREAM = (
    "seed", "steps", "batch_size", "mesh", "sae.architecture", "sae.experts", "sae.match",
)
Axes = dict[str, str | int | float | bool]
# By `inputs_key`: the sources, and the held-out reading of each text.
Shared = dict[str, tuple[Sources, dict[str, Heldout]]]


@dataclass(frozen=True)
class Cell:
    """A run of a grid: where it lies on the grid's axes, and its settings.

    texts: what it is evaluated on beside its own held-out text, by name; `biomedical` gives
    columns such as biomedical_fvu.
    """

    axes: Axes
    config: Config
    texts: Mapping[str, TextConfig] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Its folder: words as they are, numbers with their axis, 'topk-active-seed=0'."""
        words = (v if isinstance(v, str) else f"{name}={v}" for name, v in self.axes.items())
        return re.sub(r"[^A-Za-z0-9.=+-]+", "_", "-".join(words)).lstrip(".-") or "cell"


def axis(name: str, values: Iterable[str | int | float | bool]) -> list[Axes]:
    """One axis as a list of points; `+` joins lists end to end."""
    return [{name: value} for value in values]


def product(*factors: list[Axes]) -> list[Axes]:
    """Every mixture of a point of each list; the last one varies fastest."""
    return [
        {name: value for point in points for name, value in point.items()}
        for points in itertools.product(*factors)
    ]


def cell(
    axes: Axes,
    settings: ConfigDict,
    overrides: Mapping[str, Any] | None = None,
    texts: Mapping[str, TextConfig] | None = None,
) -> Cell:
    """A cell from what a config file's `get_config` returns.

    Args:
      overrides: settings by dotted names, {'steps': 500, 'eval.tokens': 4096}.

    Raises UserError for settings that do not fit together, as `from_config_dict`.
    """
    settings.update_from_flattened_dict(overrides or {})
    try:
        here = Cell(axes, from_config_dict(settings), texts or {})
        if here.texts and not here.config.lm.path:
            raise UserError(
                f"to be evaluated on {', '.join(here.texts)} it needs a language model, and an "
                "array or synthetic data has none: take other data, or another grid"
            )
        return here
    except UserError as error:
        raise UserError(f"cell {Cell(axes, Config()).name}: {error}") from error


def read_grid(name: str) -> list[Cell]:
    """The cells of 'FILE.py[:ARG]', in their order.

    Raises UserError: no such file, the file fails, or cells that it cannot tell apart.
    """
    path, _, arg = name.partition(":")
    if not Path(path).is_file():
        raise UserError(f"--grid={name}: there is no such file; name one of configs/grids/*.py")
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    if spec is None or spec.loader is None:
        raise UserError(f"--grid={name}: {path} is not a .py file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        cells = module.get_grid(arg)
    except UserError as error:
        raise UserError(f"--grid={name}: {error}") from error
    except Exception as error:  # whatever a grid file of the user's may raise
        if isinstance(error, AttributeError) and error.name == "get_grid":
            raise UserError(
                f"--grid={name}: the file defines no get_grid(): see configs/grids/active.py"
            ) from error
        own = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == path]
        place = f", line {own[-1]}" if own else ""
        raise UserError(f"--grid={name}{place}: {type(error).__name__}: {error}") from error
    if not isinstance(cells, list) or not all(isinstance(c, Cell) for c in cells):
        raise UserError(f"--grid={name}: get_grid must return a list of scale_sae_jax.sweep.cell")
    if not cells:
        raise UserError(f"--grid={name}: the grid has no cells; look at its arguments")
    seen = set()
    for here in cells:
        if here.name in seen:
            raise UserError(f"--grid={name}: two cells are called {here.name}; name what differs")
        seen.add(here.name)
        for taken in here.axes.keys() & {*MAIN_RESULTS, "folder", "command"}:
            raise UserError(f"--grid={name}: axis '{taken}' is the name of a result: rename it")
    return cells


def select(cells: list[Cell], text: str) -> list[Cell]:
    """The cells whose name is, or else contains, one of the comma-separated parts of `text`.

    A part that is a cell's whole name keeps that cell alone. Raises UserError if none is left.
    """
    names = {here.name for here in cells}

    def fits(name: str) -> bool:
        parts = filter(None, text.split(","))
        return any(part == name if part in names else part in name for part in parts)

    kept = [here for here in cells if not text or fits(here.name)]
    if not kept:
        raise UserError(f"--filter={text}: no such cell among {len(cells)}; see them by --dry_run")
    return kept


def place(here: Cell, workdir: Path) -> Cell:
    """The cell with the store of its activations in `workdir`, by a hash of all that it holds.

    One that needs no store, with an array, a buffer or synthetic data, is returned as it is.
    """
    activations = here.config.activations
    if activations.path or activations.buffer or not here.config.lm.path:
        return here
    path = Path(os.path.abspath(workdir / f"activations-{digest(_source_settings(here.config))}"))
    if path.is_relative_to(Path.cwd()):  # a checkout may be moved with its runs
        path = path.relative_to(Path.cwd())
    activations = dataclasses.replace(activations, path=str(path))
    return dataclasses.replace(
        here, config=dataclasses.replace(here.config, activations=activations)
    )


def inputs_key(config: Config) -> str:
    """Equal for cells that share sources and held-out batches.

    A store is read by seed and step; a stream makes the batches of one run, so runs share it only
    where they draw the same ones.
    """
    flat = flatten(dataclasses.asdict(config))
    names = ("eval.tokens", *(OF_A_STREAM if config.activations.buffer else ()))
    return digest({**_source_settings(config), **{name: flat[name] for name in names}})


def _source_settings(config: Config) -> dict[str, Any]:
    """All that tells where activations come from and is not as by default.

    Defaults are left out so that a setting which comes with a new version changes no hash.
    """
    ours, default = (flatten(dataclasses.asdict(c)) for c in (resolved(config), Config()))
    left_out = ("sae", "optim", "eval")
    return {
        name: value for name, value in ours.items()
        if "." in name and name.split(".")[0] not in left_out and value != default[name]
    }


def training_flops(config: Config, width: int) -> float:
    """Floating-point operations of a run's training: three forward passes a token, by `flops.py`.

    A run matched by time counts as the many-expert one it is matched to.
    """
    one = config.sae
    if one.match == "time":
        one = preset("paper", latents=one.latents, experts=one.experts, active=one.active, k=one.k)
    sae = build(one, width)
    sizes = sae.latents, sae.experts, sae.active, sae.k
    forward = forward_flops(width, *sizes, sparse_decoder=sae.sparse_codes)
    return 3.0 * forward.total * config.steps * config.batch_size


def finished(here: Cell, workdir: Path) -> dict[str, Any] | None:
    """The results of a cell that was run with these very settings; None if it is to be run.

    They are read from cell.json, which is written last: eval.json may be older than the settings,
    or since hold another evaluation.
    """
    try:
        record = folders.read_json(workdir / here.name / "cell.json", "a finished cell")
    except UserError:
        return None
    try:
        same = from_config_dict(record.get("config")) == here.config
    except UserError:  # of another version
        return None
    results = record.get("results")
    return results if same and isinstance(results, dict) else None


def check_steps(here: Cell, workdir: Path) -> None:
    """Raises UserError for a cell begun with other steps: on two schedules, it is no cell's run."""
    folder = workdir / here.name
    if not (folder / "metrics.jsonl").exists():
        return
    begun = folders.read_config(folder).steps
    if begun != here.config.steps:
        raise UserError(
            f"{folder} holds a cell of config.steps = {begun}, not {here.config.steps}: choose "
            "another --workdir, or delete this folder"
        )


def sources_of(
    here: Cell, workdir: Path, stop: Event, console: Console, shared: Shared
) -> Sources:
    """Where a cell's activations come from, opened if `shared` has it not; see `run_cell`."""
    key = inputs_key(here.config)
    if key not in shared:
        check_run(here.config)
        shared[key] = open_sources(here.config, workdir / here.name, stop, console), {}
    check_rows(here.config, shared[key][0])
    return shared[key][0]


def run_cell(
    here: Cell, workdir: Path, stop: Event, console: Console, shared: Shared
) -> dict[str, Any]:
    """Runs a cell to its end, or on to it, and returns its results.

    Args:
      shared: what cells read alike; this cell's is added if not there.

    Raises Interrupted when `stop` was set. What else goes wrong is raised as it is, after its
    traceback was written to error.txt in the folder of the cell.
    """
    config, folder, key = here.config, workdir / here.name, inputs_key(here.config)
    try:
        sources = sources_of(here, workdir, stop, console, shared)
        readings = shared[key][1]

        def heldout(text: TextConfig) -> Heldout:
            name = digest(dataclasses.asdict(text))
            if name not in readings:
                readings[name] = read_heldout(config, text, sources, console)
            return readings[name]

        _share_match(here, workdir, sources.train.d)
        results = run(config, folder, stop, console, sources, heldout(config.text))
        if here.texts:
            sae, params = load(folder, mesh=mesh_of_run(config, experts_of(config.sae)))
        for name, text in here.texts.items():
            parts = sources, heldout(text), sae, params, config.steps, console
            other = measure_run(config, text, folder, *parts)
            write_evaluation(config, text, folder, other, last=True)
            results |= {f"{name}_{key}": other[key] for key in OTHER_TEXT}
    except Interrupted:
        raise
    except Exception:
        tell_failure(here, workdir)
        raise

    def finish() -> None:
        record = {"config": dataclasses.asdict(config), "results": results}
        folders.write_json(folder / "cell.json", record)
        (folder / "error.txt").unlink(missing_ok=True)

    processes.lead_alone(finish)
    return results


def _share_match(here: Cell, workdir: Path, width: int) -> None:
    """Lets cells of one SAE setting, seeds say, have one width matched by time: matched-HASH.json.

    Measured for each of them, its noise would pass for that of the seeds.
    """
    config, own = here.config, workdir / here.name / "matched.json"
    if config.sae.match != "time":
        return
    asked = {"width": width, "batch_size": config.batch_size, **dataclasses.asdict(config.sae)}
    shared = workdir / f"matched-{digest(asked)}.json"

    def copy(source: Path, target: Path) -> None:
        if source.exists() and not target.exists():
            folders.write_json(target, folders.read_json(source, "a grid matched by time"))

    own.parent.mkdir(exist_ok=True)
    processes.lead_alone(lambda: copy(shared, own))
    sized(config, own.parent, width)
    processes.lead_alone(lambda: copy(own, shared))


def tell_failure(here: Cell, workdir: Path) -> None:
    """Writes the traceback of the exception at hand to error.txt in the folder of the cell."""
    if processes.leads():
        folder = workdir / here.name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "error.txt").write_text(traceback.format_exc())


def write_results(cells: list[Cell], workdir: Path, command: list[str]) -> None:
    """Writes results.csv and .parquet: a row for each finished cell of `cells`.

    Columns: axes; scalar results; the two bounds of an interval as _lo and _hi; the cell's folder
    in `workdir`; and `command` with the flag that runs this cell alone. Without a row, a table that
    is there stays: the arguments may be mistyped.
    """
    rows = []
    for here in cells:
        results = finished(here, workdir)
        if results is not None:
            alone = shlex.join([*command, f"--filter={here.name}"])
            where = {"folder": here.name, "command": alone}
            rows.append({**here.axes, **_scalars(results, here.axes), **where})
    if not rows and (workdir / RESULTS).exists():
        return
    axes = list(dict.fromkeys(name for here in cells for name in here.axes))
    write_rows(rows, axes, workdir)


def _scalars(results: dict[str, Any], axes: Axes) -> dict[str, Any]:
    flat = {}
    for name, value in results.items():
        if name.endswith("_ci95"):
            flat[f"{name}_lo"], flat[f"{name}_hi"] = value or (None, None)
        elif not isinstance(value, list | dict) and name not in axes:
            flat[name] = value
    return flat
