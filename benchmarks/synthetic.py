"""Speed of the synthetic activations, and what they come to.

    python -m benchmarks.synthetic --features=16384 --samples=65536

prints a JSON line:

    samples_per_s    median over the calls of `rows`, --batch samples each
    l0, norm         means over the samples: true features that fire, and |x|
    l0_max           largest number of true features of a sample
    dropped_share    share of samples that lack a feature for want of a slot
"""

import json
import time

import jax
import numpy as np
from absl import flags

from experiments import command_line
from scale_sae_jax.activations.synthetic import open_synthetic
from scale_sae_jax.config import SyntheticConfig
from scale_sae_jax.errors import UserError

FLAGS = flags.FLAGS


def define(argv: list[str]) -> None:
    del argv
    flags.DEFINE_integer("features", 16_384, "Features.", lower_bound=1)
    flags.DEFINE_integer("d", 768, "Width of the activations.", lower_bound=1)
    flags.DEFINE_integer("samples", 65_536, "Samples to draw.", lower_bound=1)
    flags.DEFINE_integer("batch", 8192, "Samples a call.", lower_bound=1)


def main() -> None:
    config = SyntheticConfig(features=FLAGS.features, d=FLAGS.d, samples=FLAGS.samples)
    try:
        activations, _ = open_synthetic(config)  # compiles
    except MemoryError as error:
        raise UserError(
            f"--features={FLAGS.features} with --d={FLAGS.d} does not fit into memory: {error}; "
            "lower them"
        ) from None
    seconds, norms, l0, dropped = [], [], [], []
    for start in range(0, FLAGS.samples, FLAGS.batch):
        ids = np.arange(start, min(start + FLAGS.batch, FLAGS.samples))
        begin = time.perf_counter()
        x = activations.rows(ids)
        seconds.append((time.perf_counter() - begin) / len(ids))
        norms.append(np.linalg.norm(x, axis=1))
        l0.append(np.count_nonzero(activations.codes(ids).values, axis=1))
        dropped.append(activations.dropped(ids))
    norms, l0, dropped = (np.concatenate(parts) for parts in (norms, l0, dropped))
    line = {
        "features": FLAGS.features,
        "d": FLAGS.d,
        "samples": FLAGS.samples,
        "samples_per_s": 1 / float(np.median(seconds)),
        "l0": float(l0.mean()),
        "l0_max": int(l0.max()),
        "norm": float(norms.mean()),
        "dropped_share": float(np.mean(dropped > 0)),
        "platform": jax.devices()[0].platform,
    }
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    command_line.start(main, define)
