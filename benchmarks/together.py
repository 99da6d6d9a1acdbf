"""What a step of several autoencoders together costs, beside the same of each alone.

    python -m benchmarks.together --d=576 --latents=4096 --experts=16 --batch=1024 --runs=3

One JSON line a preset: `s_per_step` of one run alone, `s_per_step_together` of `--runs` of them
that differ in seed, learning rate and L0 (a step of all), and `ratio`, the time together over that
of one after the other. Both are on one device, in float32, and without dead latents.
"""

import dataclasses
import json
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from benchmarks.step import define_sizes
from experiments import command_line
from scale_sae_jax.activations.array import ActivationArray
from scale_sae_jax.config import Config, OptimConfig, SAEConfig
from scale_sae_jax.sae.presets import preset
from scale_sae_jax.training.matching import STEPS, step_seconds
from scale_sae_jax.training.together import program_of

FLAGS = flags.FLAGS


def define(argv: list[str]) -> None:
    del argv
    define_sizes()
    flags.DEFINE_list("presets", ["paper", "topk"], "Options of the autoencoders.")
    flags.DEFINE_integer("runs", 3, "Autoencoders together.", lower_bound=2)
    flags.DEFINE_integer("repeats", 5, "Timed calls, of which the median counts.", lower_bound=1)


def seconds_together(sae: SAEConfig, x: np.ndarray) -> float:
    """Median seconds of a step of all runs, after a first call."""
    rows = ActivationArray(x.reshape(-1, FLAGS.d), x.mean((0, 1)), 1.0)
    configs = [
        Config(seed=run, steps=1000, batch_size=FLAGS.batch, optim=OptimConfig(lr=1e-4 * (1 + run)),
               sae=dataclasses.replace(sae, k=max(sae.active, FLAGS.k >> run)))
        for run in range(FLAGS.runs)
    ]
    program, times = program_of(configs, rows), []
    now, batches = program.create(program.read(0, 1, 1)), program.read(0, STEPS, STEPS)
    for _ in range(FLAGS.repeats + 1):
        begin = time.perf_counter()
        now, _ = jax.block_until_ready(program.steps(now, batches, STEPS, rows.mean))
        times.append(time.perf_counter() - begin)
    return float(np.median(times[1:])) / STEPS


def main() -> None:
    x = np.random.default_rng(0).normal(size=(STEPS, FLAGS.batch, FLAGS.d)).astype(np.float32)
    sizes = {name: FLAGS[name].value for name in ("latents", "experts", "active", "k")}
    for name in FLAGS.presets:
        sae = preset(name, **sizes)
        sae = dataclasses.replace(sae, match="width") if sae.architecture != "scale" else sae
        alone = step_seconds(sae, jnp.asarray(x), FLAGS.repeats)
        several = seconds_together(sae, x)
        line = {"preset": name, "runs": FLAGS.runs, **sizes, "d": FLAGS.d, "batch": FLAGS.batch}
        line |= {"s_per_step": alone, "s_per_step_together": several}
        line |= {"ratio": several / (FLAGS.runs * alone), "platform": jax.default_backend()}
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    command_line.start(main, define)
