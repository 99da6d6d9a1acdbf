"""The training loop: batches in, one donated state through, records and checkpoints out."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from threading import Event
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Float32

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
from scale_sae_jax.training.interrupts import Interrupted
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
    create = partial(state.create, sae, tx, config.optim, config.seed)
    program = Program(
        read=partial(read_batches, config, activations, mesh),
        on_devices=isinstance(activations, OnDevices),
        create=jax.jit(lambda x: create(x[0]), out_shardings=layout),
        abstract=state.abstract(sae, tx, config.optim, mesh),
        steps=make_steps(sae, tx, rate, sae.config.dead_after, (layout, everywhere)),
    )
    records = Records(config, workdir, show)
    with Checkpoints(workdir / "checkpoints", config.keep_checkpoints) as checkpoints:
        now = follow(program, config, np.asarray(activations.mean), checkpoints, [records], stop)
    return Summary(sae, int(now.step), int(now.step) >= config.steps, records.last, now)


class Program(NamedTuple):
    """Training as functions, of one autoencoder or of several in one state.

    read(first, last, room): the batches of steps first ... last - 1, see `read_batches`.
    on_devices: whether reading them is work of the devices.
    create(batches): the state before the first step. abstract: what it is restored as.
    steps(state, batches, n, mean): as `make_steps` returns it.
    """

    read: Callable[[int, int, int], jax.Array]
    on_devices: bool
    create: Callable[[jax.Array], state.TrainState]
    abstract: state.TrainState
    steps: Callable[..., tuple[state.TrainState, Any]]


def follow(
    program: Program,
    config: Config,
    mean: Float32[np.ndarray, " D"],
    checkpoints: Checkpoints,
    records: list["Records"],
    stop: Event,
) -> state.TrainState:
    """From the newest checkpoint to `config.steps`, or until `stop` is set; returns the last state.

    Args:
      records: one for each autoencoder.

    Raises Interrupted where the very first batch was not read before `stop` was set.
    """
    newest = checkpoints.latest
    if newest is None:
        start, seconds = 0, 0.0
        now = program.create(program.read(0, 1, 1))
    else:
        start, seconds = newest, checkpoints.seconds(newest) or 0.0
        now = checkpoints.restore(newest, program.abstract)
    with contextlib.ExitStack() as stack:
        for own in records:
            stack.enter_context(own.writing(start))
        clock = _Clock(start, seconds, config.batch_size, len(records))

        def save() -> None:
            _refuse_bad(now, checkpoints)
            checkpoints.save(now, clock.seconds())

        batches, step, saved = _read_ahead(program, config, start), start, start
        for step, n, x in batches:
            now, values = program.steps(now, x, n, mean)
            logged = step % config.log_every == 0 or step in (1, config.steps)
            due = config.checkpoint_every and step % config.checkpoint_every == 0
            # Hosts that ask each other wait for their devices: only where these are waited for.
            asked = logged or due or not processes.several()
            stopping = asked and processes.any_of(stop.is_set())
            if logged or stopping:
                _refuse_bad(now, checkpoints)
                values = {name: np.atleast_1d(value) for name, value in values.items()}
                shared = {"step": step, **clock.read(step)}
                for place, own in enumerate(records):
                    own.take(shared | {n: float(v[place]) for n, v in values.items()}, logged)
            if due:
                save()
                saved = step
            if stopping:
                break
        batches.close()
        if step != saved:
            save()
    return now


def read_batches(
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
    program: Program, config: Config, start: int
) -> Iterator[tuple[int, int, jax.Array]]:
    """(last step, n, batches [C, T, D]) for the remaining steps, n at a time.

    The batches of the next call are read while the device computes; those after the n-th are void.
    Programs that make batches on devices are started in the order of the calls. Ends early where
    reading is interrupted.
    """

    def read(first: int, last: int) -> jax.Array:
        return program.read(first, last, longest_call(config))

    calls = list(_calls(config, start))
    if program.on_devices:
        with contextlib.suppress(Interrupted):
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


def longest_call(config: Config) -> int:
    """How many steps one call takes at most, and so for how many batches there must be room."""
    return min(config.steps_per_call, config.steps, *_due(config))


def _due(config: Config) -> list[int]:
    """Every how many steps a record and a checkpoint are due."""
    return [config.log_every, config.checkpoint_every or config.steps]


def _calls(config: Config, start: int) -> Iterator[tuple[int, int]]:
    """(steps done before, steps done after) of each call, which ends where a record is due."""
    due = _due(config)
    while start < config.steps:
        ends = [start + config.steps_per_call, config.steps, *(e * (start // e + 1) for e in due)]
        end = 1 if start == 0 else min(ends)
        yield start, end
        start = end


def _refuse_bad(now: state.TrainState, checkpoints: Checkpoints) -> None:
    """Raises UserError if no autoencoder was finite in all steps so far. Waits for the device."""
    first = np.atleast_1d(now.bad_step)
    if (first < 0).any():
        return
    bad = int(first.max())
    good = checkpoints.latest
    kept = "there is no checkpoint before it" if good is None else f"checkpoint {good} is kept"
    raise UserError(
        f"step {bad + 1}: the loss or its gradient is not finite; {kept}; "
        "lower --config.optim.lr, or look for bad activations"
    )


class Records:
    """The records of one run: metrics.jsonl and the other sinks, and what is shown.

    last: the newest one.
    """

    def __init__(self, config: Config, workdir: Path, show: Callable[[dict[str, Any]], None]):
        self._config, self._workdir, self._show = config, workdir, show
        self.last: dict[str, Any] = {}

    @contextlib.contextmanager
    def writing(self, start: int) -> Iterator[None]:
        """Goes on after step `start`; what a later step has written is dropped."""
        self._write = lambda record: None
        with contextlib.ExitStack() as stack:
            if processes.leads():
                kept = metrics.keep_until(self._workdir / "metrics.jsonl", start)
                self.last = kept[-1] if kept else {}
                settings = dataclasses.asdict(self._config) if self._config.wandb else None
                writer = metrics.MetricsWriter(self._workdir, start, settings)
                self._write = stack.enter_context(writer).write
            yield

    def take(self, record: dict[str, Any], due: bool) -> None:
        """Shows a record; writes it where one is due, not where training merely stops."""
        self.last = record
        if due:
            self._write(record)
        self._show(record)


class _Clock:
    """Training time over all sessions of a run, and the speed since the last reading.

    Of runs that train together, each takes an even share of the time.

    Args:
      step, seconds: where the run goes on, and what it took to get there.
    """

    def __init__(self, step: int, seconds: float, batch_size: int, together: int):
        self._batch_size, self._together = batch_size, together
        self._before, self._begin = seconds, time.perf_counter()
        self._step, self._seconds = step, seconds

    def seconds(self) -> float:
        return self._before + (time.perf_counter() - self._begin) / self._together

    def read(self, step: int) -> dict[str, int | float]:
        """What a record tells of time; `together` only where several runs share it."""
        seconds = self.seconds()
        speed = (step - self._step) * self._batch_size / max(seconds - self._seconds, 1e-9)
        self._step, self._seconds = step, seconds
        times = {"seconds": seconds, "tokens_per_second": speed}
        shared = {"together": self._together} if self._together > 1 else {}
        return {"tokens": step * self._batch_size, **times, **shared}
