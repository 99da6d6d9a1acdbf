"""The folder of a run: its settings, and what may change when it is resumed.

    config.json  metrics.jsonl  tensorboard/  checkpoints/  activations/  eval.json  evals/
    .run.lock  .activations.lock    while a program works there; a file may stay, and holds nobody
"""

import contextlib
import dataclasses
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Event
from typing import Any

from filelock import FileLock, Timeout

from scale_sae_jax.config import Config, flatten, from_config_dict
from scale_sae_jax.errors import UserError, telling
from scale_sae_jax.files import read_object
from scale_sae_jax.parallel import processes
from scale_sae_jax.results import RESULTS
from scale_sae_jax.training.interrupts import Interrupted

# Settings that do not decide what the next step computes from the same state.
FREE = (
    "steps", "mesh", "steps_per_call", "log_every", "checkpoint_every", "keep_checkpoints", "wandb"
)
FREE_SECTIONS = ("eval",)
# Settings that do, but that a user may well change on purpose when a run goes on.
ADJUSTABLE = ("optim.lr", "optim.warmup", "optim.decay")
# What a run writes once its sources are found good; before that, any setting may be corrected.
BEGUN = ("activations", "metrics.jsonl", "checkpoints")


def claim(config: Config, workdir: Path) -> list[str]:
    """Writes config.json, or checks it against that of the run to be resumed, if it has begun.

    Returns remarks on settings that changed and make the rest of the run another one. Raises
    UserError when the folder holds a run with other settings, or no step is left to take with them.
    """
    path = workdir / "config.json"
    if (workdir / RESULTS).exists() and not path.exists():
        raise UserError(f"{workdir} is the folder of a sweep: choose another --workdir for a run")
    remarks = []
    recorded = read_config(workdir) if path.exists() else None
    if recorded and any((workdir / name).exists() for name in BEGUN):
        old, new = (flatten(dataclasses.asdict(c)) for c in (recorded, config))
        done = _steps_done(workdir)
        if config.steps < done:
            raise UserError(
                f"{workdir} holds a run that has taken {done} steps, more than config.steps = "
                f"{config.steps}: choose another --workdir, or at least {done} steps"
            )
        for name in new:
            if old[name] == new[name] or name in FREE or name.split(".")[0] in FREE_SECTIONS:
                continue
            if name not in ADJUSTABLE:
                raise UserError(
                    f"{workdir} holds a run with config.{name} = {old[name]!r}, not {new[name]!r}: "
                    "choose another --workdir, or the same settings to resume it"
                )
            if config.steps == done:
                raise UserError(
                    f"{workdir} holds a run that has taken all of its {done} steps with config."
                    f"{name} = {old[name]!r}, so {new[name]!r} would do nothing: raise "
                    "config.steps, or choose another --workdir"
                )
            remarks.append(f"config.{name} changed from {old[name]!r} to {new[name]!r}")
        if old["steps"] != new["steps"] and config.steps > done:
            remarks.append(f"config.steps changed from {old['steps']} to {new['steps']}: "
                           "the learning-rate schedule is another one from here on")
    with telling(f"cannot write to {workdir}", "choose another --workdir"):
        workdir.mkdir(parents=True, exist_ok=True)
        write_json(path, dataclasses.asdict(config))
    return remarks


def lock(
    path: Path, wait: Callable[[str], None] | None = None, stop: Event | None = None
) -> FileLock:
    """Keeps other programs from what the file stands for, until it is released or this one dies.

    Makes the folder of the file. Where it cannot, or the file system has no locks, nobody is kept
    out.

    Args:
      wait: told that another holds it, before waiting; without it UserError is raised.
      stop: ends the waiting; nobody is kept out then.
    """
    held = FileLock(path)
    try:
        held.acquire(timeout=0)
    except Timeout:
        if wait is None:
            raise UserError(
                f"another process works in {path.parent}: wait for its end, or choose another "
                "folder"
            ) from None
        wait(f"waiting for another process, which holds {path}")
        while not (stop is not None and stop.is_set()):
            with contextlib.suppress(Timeout):
                held.acquire(timeout=1)
                break
    except (OSError, NotImplementedError):
        pass
    return held


@contextlib.contextmanager
def held(
    path: Path, wait: Callable[[str], None] | None = None, stop: Event | None = None
) -> Iterator[None]:
    """`lock` by the leading process, for all of this program. Interrupted if `stop` is set."""
    taken = processes.lead_alone(lambda: lock(path, wait, stop))
    try:
        if stop is not None and processes.any_of(stop.is_set()):
            raise Interrupted(f"stopped before any work in {path.parent}")
        yield
    finally:
        if taken is not None:
            taken.release()


def _steps_done(workdir: Path) -> int:
    """The step of the newest checkpoint, 0 if there is none."""
    names = [path.name for path in (workdir / "checkpoints").glob("*")]
    return max((int(name) for name in names if name.isdecimal()), default=0)


def read_config(workdir: Path) -> Config:
    """The settings of a run. Raises UserError if the folder holds none."""
    path = workdir / "config.json"
    values = read_json(path, "a run: train one first")
    try:
        return from_config_dict(values)
    except UserError as error:
        raise UserError(
            f"{path} does not hold the settings of a run of this version ({error}): choose another "
            "folder, or the version that wrote it"
        ) from None


def read_json(path: Path, kind: str) -> dict[str, Any]:
    """A JSON object. Raises UserError saying that the folder of `path` is not `kind`."""
    return read_object(path, f"the folder of {kind}", "restore it or start a new run")


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Replaces the file whole."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(values, indent=2) + "\n")
    os.replace(partial, path)
