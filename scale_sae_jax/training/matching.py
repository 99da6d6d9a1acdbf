"""The dictionary width at which a step takes as long as that of a many-expert autoencoder, here."""

import dataclasses
import time
from collections.abc import Iterator
from itertools import count, islice

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from scale_sae_jax.config import OptimConfig, SAEConfig
from scale_sae_jax.sae import build
from scale_sae_jax.sae.presets import preset
from scale_sae_jax.training import state
from scale_sae_jax.training.optim import optimiser, schedule
from scale_sae_jax.training.step import make_steps

STEPS = 4  # in a timed call
CALLS = 9
ROUNDS = 3
MULTIPLE = 64


def equal_time_latents(config: SAEConfig, width: int, batch_size: int) -> int:
    """The width of `config`'s one dictionary whose step takes the time of preset 'paper'.

    Args:
      config: latents, experts, active and k are those of the many-expert autoencoder.
      width: D.

    Times the dictionary at the many-expert active and total widths, each in turn with the
    many-expert step, and up to `ROUNDS` times more where the time, as a power of the width between
    the two around it, is expected to be equal. The result is a multiple of 64.
    """
    batches = jax.random.normal(jax.random.key(0), (STEPS, batch_size, width))
    sizes = {name: getattr(config, name) for name in ("latents", "experts", "active", "k")}
    goal = call_seconds(preset("paper", **sizes), batches)

    def ratio(latents: int) -> float:
        one = dataclasses.replace(config, latents=latents, experts=1, active=1, match="")
        pairs = zip(islice(call_seconds(one, batches), CALLS), goal, strict=False)
        return float(np.median([ours / theirs for ours, theirs in pairs]))

    def expected() -> int:
        by_time = sorted(known, key=known.get)
        shorter = sum(known[latents] <= 1 for latents in by_time)
        at = min(max(shorter, 1), len(by_time) - 1)
        low, high = by_time[at - 1], by_time[at]
        rise = max(np.log(known[high] / known[low]), 1e-3)
        share = np.clip(-np.log(known[low]) / rise, -1, 2)  # within 0 and 1 where times lie around
        wanted = low * (high / low) ** share
        fewest = -(-config.k // MULTIPLE) * MULTIPLE
        return int(np.clip(round(wanted / MULTIPLE) * MULTIPLE, fewest, 4 * config.latents))

    active = config.active * (config.latents // config.experts)
    if active == config.latents:
        return active
    known = {latents: ratio(latents) for latents in (active, config.latents)}
    for _ in range(ROUNDS):
        guess = expected()
        if guess in known:
            return guess
        known[guess] = ratio(guess)
    return expected()


def step_seconds(config: SAEConfig, batches: Float[Array, "C T D"], calls: int = 3) -> float:
    """Median seconds of a training step on one device, C of them in a call."""
    return float(np.median(list(islice(call_seconds(config, batches), calls)))) / len(batches)


def call_seconds(config: SAEConfig, batches: Float[Array, "C T D"]) -> Iterator[float]:
    """Seconds of one call after another, each of C training steps; the first is not told."""
    sae, optim = build(config, batches.shape[2]), OptimConfig()
    tx = optimiser(optim, sae.latents, 1000, sae.config.decoder_norm)
    steps = make_steps(sae, tx, schedule(optim, sae.latents, 1000), sae.config.dead_after)
    now = state.create(sae, tx, optim, 0, batches[0])
    for call in count():
        begin = time.perf_counter()
        now, _ = jax.block_until_ready(steps(now, batches, len(batches), jnp.zeros(sae.width)))
        if call:
            yield time.perf_counter() - begin
