"""The training loop: batches in, one donated state through, records and checkpoints out."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from threading import Event
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from scale_sae_jax.activations.batches import batch_ids
from scale_sae_jax.config import Config
from scale_sae_jax.errors import UserError
from scale_sae_jax.parallel import processes
from scale_sae_jax.parallel.experts import on_mesh
from scale_sae_jax.parallel.mesh import EVERYWHERE, TOKENS, mesh_of_run
from scale_sae_jax.sae.autoencoder import Autoencoder
from scale_sae_jax.sae.registry import build
from scale_sae_jax.training import metrics, state
from scale_sae_jax.training.checkpoints import Checkpoints
from scale_sae_jax.training.optim import optimiser, schedule
from scale_sae_jax.training.step import make_steps


@runtime_checkable
class Activations(Protocol):
    """Rows of activations: n of them, d coordinates, their mean [D], and rows(ids) [T, D]."""

    n: int
    d: int
    mean: np.ndarray

    def rows(self, ids: np.ndarray) -> np.ndarray: ...


@runtime_checkable
class OnDevices(Protocol):
    """Activations that are made where they are used: batches [room, T, D] on the mesh."""

    def batches(self, first: int, last: int, room: int) -> jax.Array: ...


@dataclasses.dataclass(frozen=True)
class Summary:
    """How a run ended: steps done, whether all of them, the last record, and the final state.

    sae: the autoencoder, on the mesh where the state lies.
    """

    sae: Autoencoder
    step: int
    finished: bool
    last: dict[str, Any]
    state: state.TrainState


def train(
    config: Config,
    activations: Activations,
    workdir: Path,
    stop: Event,
    show: Callable[[dict[str, Any]], None] = lambda record: None,
) -> Summary:
    """Trains until `config.steps` or until `stop` is set, from the newest checkpoint in `workdir`.

    The batch of a step is a pure function of (seed, step), so a resumed run takes the steps that
    an uninterrupted one would take, bit for bit on the same mesh. Every process of a program calls
    this alike; each reads its devices' rows, and one of them writes. Raises UserError when the loss
    or the gradient is no longer finite; checkpoints before that step stay.
    """
    sae = build(config.sae, activations.d)
    mesh = mesh_of_run(config, sae.experts)
    sae = on_mesh(sae, mesh)
    tx = optimiser(config.optim, sae.latents, config.steps, sae.config.decoder_norm)
    rate = schedule(config.optim, sae.latents, config.steps)
    layout = state.layout(sae, tx, config.optim, mesh)
    everywhere = NamedSharding(mesh, EVERYWHERE)
    steps_fn = make_steps(sae, tx, rate, sae.config.dead_after, (layout, everywhere))
    mean = np.asarray(activations.mean)

    with Checkpoints(workdir / "checkpoints", config.keep_checkpoints) as checkpoints:
        start = checkpoints.latest
        if start is None:
            create = partial(state.create, sae, tx, config.optim, config.seed)
            first = _read_batches(config, activations, mesh, 0, 1, 1)
            now = jax.jit(lambda x: create(x[0]), out_shardings=layout)(first)
        else:
            now = checkpoints.restore(start, state.abstract(sae, tx, config.optim, mesh))
        start = int(now.step)
        kept = metrics.keep_until(workdir / "metrics.jsonl", start) if processes.leads() else []
        last = kept[-1] if kept else {}
        clock = _Clock(start, last.get("seconds", 0.0), config.batch_size)

        with contextlib.ExitStack() as stack:
            write = lambda record: None  # noqa: E731
            if processes.leads():
                settings = dataclasses.asdict(config) if config.wandb else None
                write = stack.enter_context(metrics.MetricsWriter(workdir, start, settings)).write
            batches = _read_ahead(config, activations, mesh, start)
            for step, n, x in batches:
                now, values = steps_fn(now, x, n, mean)
                finished = step == config.steps
                stopping = processes.any_of(stop.is_set())
                if step % config.log_every == 0 or step == 1 or finished or stopping:
                    _refuse_bad(now, checkpoints)
                    last = {"step": step, **clock.read(step)}
                    last |= {name: float(value) for name, value in values.items()}
                    if step % config.log_every == 0 or step == 1 or finished:
                        write(last)
                    show(last)
                due = config.checkpoint_every and step % config.checkpoint_every == 0
                if due or finished or stopping:
                    _refuse_bad(now, checkpoints)
                    checkpoints.save(now)
                if stopping:
                    break
            batches.close()
    return Summary(sae, int(now.step), int(now.step) >= config.steps, last, now)


def _read_batches(
    config: Config, activations: Activations, mesh: Mesh, first: int, last: int, room: int
) -> jax.Array:
    """The batches [room, T, D] of steps first ... last - 1, split over the mesh; zeros after them.

    Each process reads the rows of its own devices.
    """
    if isinstance(activations, OnDevices):
        return activations.batches(first, last, room)
    ids = [
        batch_ids(config.seed, step, config.batch_size, activations.n)
        for step in range(first, last)
    ]

    def part(index: tuple[slice, ...]) -> np.ndarray:
        rows = [activations.rows(batch[index[1]]) for batch in ids]
        return np.stack(rows + (room - len(rows)) * [np.zeros_like(rows[0])])

    shape = (room, config.batch_size, activations.d)
    where = NamedSharding(mesh, PartitionSpec(None, *TOKENS))
    return jax.make_array_from_callback(shape, where, part)


def _read_ahead(
    config: Config, activations: Activations, mesh: Mesh, start: int
) -> Iterator[tuple[int, int, jax.Array]]:
    """(last step, n, batches [C, T, D]) for the remaining steps, n at a time.

    The batches of the next call are read while the device computes; those after the n-th are void.
    Programs that make batches on devices are started in the order of the calls.
    """

    def read(first: int, last: int) -> jax.Array:
        return _read_batches(config, activations, mesh, first, last, config.steps_per_call)

    calls = list(_calls(config, start))
    if isinstance(activations, OnDevices):
        yield from ((last, last - first, read(first, last)) for first, last in calls)
        return
    if not calls:
        return
    with ThreadPoolExecutor(max_workers=1) as reader:
        coming = reader.submit(read, *calls[0])
        for (first, last), after in zip(calls, [*calls[1:], None], strict=True):
            x = coming.result()
            coming = reader.submit(read, *after) if after else None
            yield last, last - first, x


def _calls(config: Config, start: int) -> Iterator[tuple[int, int]]:
    """(steps done before, steps done after) of each call, which ends where a record is due."""
    due = [config.log_every, config.checkpoint_every or config.steps]
    while start < config.steps:
        ends = [start + config.steps_per_call, config.steps, *(e * (start // e + 1) for e in due)]
        end = 1 if start == 0 else min(ends)
        yield start, end
        start = end


def _refuse_bad(now: state.TrainState, checkpoints: Checkpoints) -> None:
    """Raises UserError if any step so far was not finite. Waits for the device."""
    bad = int(now.bad_step)
    if bad < 0:
        return
    good = checkpoints.latest
    kept = "there is no checkpoint before it" if good is None else f"checkpoint {good} is kept"
    raise UserError(
        f"step {bad + 1}: the loss or its gradient is not finite; {kept}; "
        "lower --config.optim.lr, or look for bad activations"
    )


class _Clock:
    """Training time over all sessions of a run, and the speed since the last reading."""

    def __init__(self, step: int, seconds: float, batch_size: int):
        self._batch_size = batch_size
        self._begin = time.perf_counter() - seconds
        self._step, self._seconds = step, seconds

    def read(self, step: int) -> dict[str, int | float]:
        seconds = time.perf_counter() - self._begin
        speed = (step - self._step) * self._batch_size / max(seconds - self._seconds, 1e-9)
        self._step, self._seconds = step, seconds
        tokens = step * self._batch_size
        return {"tokens": tokens, "seconds": seconds, "tokens_per_second": speed}
