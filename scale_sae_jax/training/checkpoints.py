"""Checkpoints of the training state: asynchronous, the last few and the best one kept.

Orbax writes each step into `checkpoints/STEP`, complete or not at all.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from scale_sae_jax.errors import UnwrittenError, UserError, telling
from scale_sae_jax.sae.autoencoder import Params
from scale_sae_jax.training.state import TrainState

policies = ocp.training.preservation_policies


class Checkpoints:
    """The checkpoints of one run. Use as a context manager: leaving it waits for pending writes.

    Raises UserError if the folder cannot be made, or what was measured at a step not be read.
    """

    def __init__(self, folder: Path, keep: int = 1):
        best = policies.BestN(get_metric_fn=lambda metrics: metrics["fvu"], reverse=True, n=1)
        keep_policy = policies.AnyPreservationPolicy([policies.LatestN(keep), best])
        self._folder = folder
        remedy = "move what is there, make room, or choose another --workdir"
        with telling(f"{folder} cannot be written", remedy):
            folder.mkdir(parents=True, exist_ok=True)
        try:  # reads what was measured at each step
            self._orbax = ocp.training.Checkpointer(
                folder.resolve(), preservation_policy=keep_policy
            )
        except ValueError as error:
            raise UserError(
                f"{folder} holds a damaged checkpoint: {str(error)[:200]}; delete the folder of "
                "the newest step in it to fall back on an older one"
            ) from error
        self._pending = None

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_) -> None:
        with _writable(self._folder):
            self._orbax.close()

    @property
    def latest(self) -> int | None:
        """Step of the newest complete checkpoint, or None. Waits for a pending write."""
        if self._pending is not None:
            with _writable(self._folder):
                self._pending.result()
        newest = self._orbax.latest
        return None if newest is None else newest.step

    @property
    def steps(self) -> list[int]:
        """Steps of all complete checkpoints, ascending."""
        return sorted(checkpoint.step for checkpoint in self._orbax.checkpoints)

    @property
    def best(self) -> int | None:
        """Step of the checkpoint with the lowest running FVU, or None."""
        ranked = [c for c in self._orbax.checkpoints if c.metrics and "fvu" in c.metrics]
        return min(ranked, key=lambda c: c.metrics["fvu"]).step if ranked else None

    def seconds(self, step: int) -> float | None:
        """What training took up to that checkpoint, in all sessions; None if it does not tell."""
        found = {c.step: c.metrics or {} for c in self._orbax.checkpoints}
        return found.get(step, {}).get("seconds")

    def save(self, state: TrainState, seconds: float) -> None:
        """Copies the state to the host and writes it in the background.

        Of several autoencoders in one state, the mean FVU ranks it.

        Args:
          seconds: that training took up to here.
        """
        if self._pending is not None:
            with _writable(self._folder):
                self._pending.result()
        step, fvu = int(state.step), float(np.nanmean(state.fvu))
        with _writable(self._folder):
            measures = {"fvu": fvu, "seconds": seconds}
            self._pending = self._orbax.save_async(step, state, force=True, metrics=measures)

    def restore(self, step: int, target: TrainState) -> TrainState:
        """The state at `step`, laid out as the abstract `target`.

        Raises UserError if it is damaged, or of a version whose state held something else.
        """
        with _readable(self._folder / str(step)):
            if set(self._stored(step)) != set(target._fields):
                raise UserError(
                    f"checkpoint {step} in {self._folder} is another version's: train anew in "
                    "another folder; scale_sae_jax.load still takes its parameters"
                )
            return self._orbax.load(step, target)

    def restore_params(self, step: int, target: Params) -> Params:
        """The parameters alone: of the moments, twice as large, nothing is read."""
        with _readable(self._folder / str(step)):
            unread = jax.tree.map(lambda _: ocp.PLACEHOLDER, self._stored(step))
            return self._orbax.load(step, unread | {"params": target})["params"]

    def width(self, step: int) -> int:
        """D of the stored autoencoder, from the shape of b_dec. Raises UserError if damaged."""
        with _readable(self._folder / str(step)):
            return self._stored(step)["params"]["b_dec"].shape[0]

    def _stored(self, step: int) -> dict[str, Any]:
        """The names of the arrays of a checkpoint, as a tree, with their shapes."""
        return self._orbax.metadata(step).metadata


@contextlib.contextmanager
def _writable(folder: Path) -> Iterator[None]:
    """What Orbax raises where a checkpoint cannot be written, as UserError."""
    try:
        yield
    except (OSError, ValueError) as error:
        full = "RESOURCE_EXHAUSTED" in str(error) or "No space left" in str(error)
        if isinstance(error, ValueError) and not full:
            raise
        reason = "No space left on device" if full else str(error)[:200]
        raise UnwrittenError(
            f"a checkpoint cannot be written to {folder}: {reason}; make room, then the same "
            "command goes on from the one before"
        ) from error


@contextlib.contextmanager
def _readable(checkpoint: Path) -> Iterator[None]:
    """What Orbax raises for a damaged checkpoint, as UserError."""
    try:
        yield
    except (KeyError, TypeError) as error:  # of the reader itself: they tell a user nothing
        raise _unreadable(checkpoint, "its files are damaged") from error
    except (ValueError, OSError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise _unreadable(checkpoint, reason[:200]) from error


def _unreadable(checkpoint: Path, reason: str) -> UserError:
    return UserError(
        f"checkpoint {checkpoint.name} cannot be read: {reason}; delete {checkpoint} to fall back "
        "on an older one, or the run's folder to train anew"
    )
