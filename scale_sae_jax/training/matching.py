"""The dictionary width at which a step takes as long as that of a many-expert autoencoder, here."""

import dataclasses
import time

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
MULTIPLE = 64


def equal_time_latents(config: SAEConfig, width: int, batch_size: int) -> int:
    """The width of `config`'s one dictionary whose step takes the time of preset 'paper'.

    Args:
      config: latents, experts, active and k are those of the many-expert autoencoder.
      width: D.

    Measures that step, then the dictionary's at the many-expert active and total widths, and once
    more between them; the time is taken as a power of the width. The result is a multiple of 64.
    """
    batches = jax.random.normal(jax.random.key(0), (STEPS, batch_size, width))
    sizes = {name: getattr(config, name) for name in ("latents", "experts", "active", "k")}
    goal = step_seconds(preset("paper", **sizes), batches)

    def seconds(latents: int) -> float:
        one = dataclasses.replace(config, latents=latents, experts=1, active=1, match="")
        return step_seconds(one, batches)

    def between(low: int, high: int) -> int:
        points = np.log([low, high])
        times = np.log([known[low], known[high]])
        slope = max((times[1] - times[0]) / (points[1] - points[0]), 0.1)
        wanted = np.exp(points[0] + (np.log(goal) - times[0]) / slope)
        fewest = -(-config.k // MULTIPLE) * MULTIPLE
        return int(np.clip(round(wanted / MULTIPLE) * MULTIPLE, fewest, 4 * config.latents))

    active = config.active * (config.latents // config.experts)
    known = {latents: seconds(latents) for latents in sorted({active, config.latents})}
    if len(known) == 1:
        return active
    guess = between(active, config.latents)
    if guess in known:
        return guess
    known[guess] = seconds(guess)
    other = min(known.keys() - {guess}, key=lambda w: abs(np.log(known[w] / goal)))
    return between(*sorted((guess, other)))


def step_seconds(config: SAEConfig, batches: Float[Array, "C T D"], calls: int = 3) -> float:
    """Median seconds of a training step on one device, C of them in a call, after a first call."""
    sae, optim = build(config, batches.shape[2]), OptimConfig()
    tx = optimiser(optim, sae.latents, 1000, sae.config.decoder_norm)
    steps = make_steps(sae, tx, schedule(optim, sae.latents, 1000), sae.config.dead_after)
    now, times = state.create(sae, tx, optim, 0, batches[0]), []
    for _ in range(calls + 1):
        begin = time.perf_counter()
        now, _ = jax.block_until_ready(steps(now, batches, len(batches), jnp.zeros(sae.width)))
        times.append(time.perf_counter() - begin)
    return float(np.median(times[1:])) / len(batches)
