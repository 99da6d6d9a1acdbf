"""Autoencoders of one shape in one vmapped step: runs that differ in seed, learning rate or L0.

Their states lie in one `TrainState` whose arrays, but for the step, have a leading axis [U] of
runs, split over the devices. A run with less than the largest L0 leaves slots unused. Each run
takes the steps that it takes alone, up to rounding; those on a stream have one seed, for it makes
the batches of that seed.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from threading import Event
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from scale_sae_jax.activations.batches import batch_ids
from scale_sae_jax.config import Config
from scale_sae_jax.parallel.mesh import EVERYWHERE, placed
from scale_sae_jax.sae.registry import build
from scale_sae_jax.training import state
from scale_sae_jax.training.checkpoints import Checkpoints
from scale_sae_jax.training.loop import Activations, OnDevices, Program, Records, follow
from scale_sae_jax.training.optim import learning_rate, optimiser, schedule
from scale_sae_jax.training.step import make_step, repeated

RUN, TOGETHER = "run", "together"  # axes of the mesh, and of `jax.vmap` on each of its devices
# Where the axis of runs is in a state, and how it lies on the mesh.
LEADING = state.TrainState(None, *[0] * (len(state.TrainState._fields) - 1))
ON_RUNS = PartitionSpec(RUN)
PLACES = state.TrainState(EVERYWHERE, *[ON_RUNS] * (len(state.TrainState._fields) - 1))


def shape(config: Config) -> Config:
    """Equal for runs that can train together."""
    return dataclasses.replace(
        config,
        seed=config.seed if config.activations.buffer else 0,
        optim=dataclasses.replace(config.optim, lr=0.0),
        sae=dataclasses.replace(config.sae, k=config.sae.active),
    )


def train_together(
    configs: list[Config],
    activations: Activations,
    folder: Path,
    workdirs: list[Path],
    stop: Event,
    show: Callable[[dict[str, Any]], None] = lambda record: None,
) -> bool:
    """Trains runs of one `shape` to their end, each with its records in its own workdir.

    Then saves each run's last state in its workdir, where `train` finds it. A run whose loss or
    gradient was not finite is left out: `train` says why.

    Args:
      folder: of the checkpoints of all together; they go on from the newest.
      show: called with the records of the first run.

    Returns whether it came to the end before `stop` was set. For one process. Raises UserError if
    no run is finite.
    """
    program = program_of(configs, activations)
    shows = [show, *(lambda record: None for _ in configs[1:])]
    records = list(map(Records, configs, workdirs, shows))
    mean = np.asarray(activations.mean)
    with Checkpoints(folder, configs[0].keep_checkpoints) as checkpoints:
        now = follow(program, configs[0], mean, checkpoints, records, stop)
        if int(now.step) < configs[0].steps:
            return False
        seconds = checkpoints.seconds(checkpoints.latest)
    for place, (config, workdir) in enumerate(zip(configs, workdirs, strict=True)):
        if int(now.bad_step[place]) < 0:
            with Checkpoints(workdir / "checkpoints", config.keep_checkpoints) as checkpoints:
                if checkpoints.latest is None:
                    checkpoints.save(_part(now, place), seconds)
    return True


def program_of(configs: list[Config], activations: Activations) -> Program:
    """All runs as one program, on as many devices as divide them."""
    first = configs[0]
    l0s = np.array([config.sae.k for config in configs])
    sae = build(dataclasses.replace(first.sae, k=int(l0s.max())), activations.d)
    seeds = np.array([config.seed % 2**32 for config in configs], np.uint32)
    peaks = np.array([learning_rate(c.optim, sae.latents) for c in configs], np.float32)
    mesh = _mesh(len(configs))
    on_devices = isinstance(activations, OnDevices)  # as all runs draw the same batches
    of_batch = None if on_devices else 0

    def of_run(l0: Array, peak: Array):
        """The autoencoder, its optimiser and learning rate, by what runs differ in."""
        own = sae if l0s.min() == l0s.max() else sae.with_l0(l0)
        sizes = first.optim, sae.latents, first.steps
        tx = optimiser(*sizes, sae.config.decoder_norm, peak)
        return own, tx, schedule(*sizes, peak)

    def create(x: Array, seed: Array, l0: Array, peak: Array) -> state.TrainState:
        own, tx, _ = of_run(l0, peak)
        return state.create(own, tx, first.optim, seed, x)

    def step(now: state.TrainState, x: Array, mean: Array, l0: Array, peak: Array):
        return make_step(*of_run(l0, peak), sae.config.dead_after, TOGETHER)(now, x, mean)

    create_all = jax.vmap(create, (of_batch, 0, 0, 0), LEADING)
    step_all = jax.vmap(step, (LEADING, of_batch, None, 0, 0), (LEADING, 0), axis_name=TOGETHER)
    batches = EVERYWHERE if on_devices else PartitionSpec(None, RUN)
    steps = jax.jit(
        jax.shard_map(
            repeated(step_all),
            mesh=mesh,
            in_specs=(PLACES, batches, EVERYWHERE, EVERYWHERE, ON_RUNS, ON_RUNS),
            out_specs=(PLACES, ON_RUNS),
            check_vma=False,
        ),
        donate_argnums=0,
    )

    def read(first: int, last: int, room: int) -> jax.Array:
        if on_devices:
            x = activations.batches(first, last, room)
            return jax.device_put(x, NamedSharding(mesh, EVERYWHERE))
        return _read_batches(configs, activations, mesh, first, last, room)

    batch = (first.batch_size, sae.width)
    x = jax.ShapeDtypeStruct(batch if on_devices else (len(configs), *batch), np.float32)
    shapes = jax.eval_shape(create_all, x, seeds, l0s, peaks)
    layout = placed(mesh, PLACES)

    def abstract(where: NamedSharding, part: Any) -> Any:
        lies = lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where)  # noqa: E731
        return jax.tree.map(lies, part)

    return Program(
        read=read,
        on_devices=on_devices,
        create=jax.jit(lambda x: create_all(x[0], seeds, l0s, peaks), out_shardings=layout),
        abstract=jax.tree.map(abstract, layout, shapes),
        steps=lambda now, x, n, mean: steps(now, x, n, mean, l0s, peaks),
    )


def _read_batches(
    configs: list[Config], activations: Activations, mesh: Mesh, first: int, last: int, room: int
) -> Float[Array, "C U T D"]:
    """The batches of steps first ... last - 1 of each run, those that it reads alone."""
    size = configs[0].batch_size

    def part(index: tuple[slice, ...]) -> np.ndarray:
        x = np.zeros((room, len(configs[index[1]]), size, activations.d), np.float32)
        for place, config in enumerate(configs[index[1]]):
            for step in range(first, last):
                ids = batch_ids(config.seed, step, size, activations.n)
                x[step - first, place] = activations.rows(ids)
        return x

    where = NamedSharding(mesh, PartitionSpec(None, RUN))
    sizes = (room, len(configs), size, activations.d)
    return jax.make_array_from_callback(sizes, where, part)


def _mesh(runs: int) -> Mesh:
    count = max(n for n in range(1, jax.device_count() + 1) if runs % n == 0)
    return jax.make_mesh((count,), (RUN,), (AxisType.Auto,), devices=jax.devices()[:count])


def _part(now: state.TrainState, place: int) -> state.TrainState:
    """The state of one run."""
    parts = jax.tree.map(lambda a: a[place], now._replace(step=()))
    return parts._replace(step=now.step)
