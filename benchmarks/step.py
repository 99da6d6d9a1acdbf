"""Time of a training step, against what the machine's matrix multiply allows.

    python -m benchmarks.step --preset=paper --d=768 --latents=24576 --experts=64 --active=2 \
        --k=32 --batch=4096
    python -m benchmarks.step --sweep=experts

prints a JSON line a setting. Useful FLOPs are encoder and decoder forward, both weight gradients
and the code's gradient, 10 T e m d; `matmul_gflops` is a [4096, 768] x [768, 6144] product timed in
the same process, and `mfu` is the useful rate over it. Medians of `--repeats` steps after warm-up.
`--sweep` varies one size: 'experts' with the active width fixed (the dictionary grows), the others
alone.
"""

import json
import resource
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from experiments import command_line
from scale_sae_jax.config import OptimConfig, SAEConfig
from scale_sae_jax.errors import UserError
from scale_sae_jax.sae import build
from scale_sae_jax.sae.presets import preset
from scale_sae_jax.training import optim, state
from scale_sae_jax.training.step import make_step

FLAGS = flags.FLAGS
SWEEPS = {
    "experts": (16, 32, 64, 128, 256),
    "active": (1, 2, 4, 8),
    "latents": (6144, 12_288, 24_576, 49_152),
    "batch": (1024, 2048, 4096, 8192),
}


def define(argv: list[str]) -> None:
    del argv
    flags.DEFINE_string("preset", "paper", "Options of the autoencoder.")
    flags.DEFINE_integer("d", 768, "Width of the activations.", lower_bound=1)
    flags.DEFINE_integer("latents", 24_576, "Dictionary width.", lower_bound=1)
    flags.DEFINE_integer("experts", 64, "Experts.", lower_bound=1)
    flags.DEFINE_integer("active", 2, "Experts a token uses.", lower_bound=1)
    flags.DEFINE_integer("k", 32, "L0.", lower_bound=1)
    flags.DEFINE_integer("batch", 4096, "Activations a step.", lower_bound=1)
    flags.DEFINE_integer("repeats", 5, "Timed steps.", lower_bound=1)
    flags.DEFINE_enum("sweep", None, list(SWEEPS), "Size to vary.")


def median_seconds(call: Callable[[], object], repeats: int) -> float:
    """Median over `repeats` calls, after one that compiles."""
    jax.block_until_ready(call())
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - begin)
    return float(np.median(times))


def matmul_gflops(repeats: int) -> float:
    a = jax.random.normal(jax.random.key(0), (4096, 768))
    b = jax.random.normal(jax.random.key(1), (768, 6144))
    product = jax.jit(jnp.matmul)
    return 2 * 4096 * 768 * 6144 / median_seconds(lambda: product(a, b), repeats) / 1e9


def measure(
    config: SAEConfig, width: int, batch: int, repeats: int
) -> dict[str, float | int | str]:
    """Times of one setting: the whole step, and forward and backward without the optimiser."""
    sae = build(config, width)
    adam = OptimConfig()
    tx = optim.optimiser(adam, config.latents, 1000, config.decoder_norm)
    rate = optim.schedule(adam, config.latents, 1000)
    x = jax.random.normal(jax.random.key(0), (batch, width))
    now = state.create(sae, tx, 0, x)
    dead = jnp.zeros(config.latents, bool)

    def objective(params, x):
        return sae.loss(params, x, dead).total

    gradient = jax.jit(jax.grad(objective)).lower(now.params, x).compile()
    gradient_seconds = median_seconds(lambda: gradient(now.params, x), repeats)

    step = make_step(sae, tx, rate, config.dead_after)
    holder = [now]

    def one_step():
        holder[0], metrics = step(holder[0], x, jnp.zeros(width))
        return metrics["loss"], holder[0].step

    seconds = median_seconds(one_step, repeats)
    active_width = config.active * config.latents // config.experts
    useful = 10 * batch * active_width * width
    peak = matmul_gflops(repeats)
    return {
        "d": width,
        "latents": config.latents,
        "experts": config.experts,
        "active": config.active,
        "k": config.k,
        "batch": batch,
        "s_per_step": seconds,
        "s_forward_backward": gradient_seconds,
        "tok_per_s": batch / seconds,
        "flops_per_step": useful,
        "matmul_gflops": peak,
        "mfu": useful / seconds / 1e9 / peak,
        "temporary_gb": gradient.memory_analysis().temp_size_in_bytes / 1e9,
        "peak_rss_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
        "platform": jax.devices()[0].platform,
    }


def settings() -> list[tuple[SAEConfig, int]]:
    """(autoencoder, batch) of each line to print."""
    sizes = {name: FLAGS[name].value for name in ("latents", "experts", "active", "k")}
    base = {**sizes, "batch": FLAGS.batch}
    lines = [base]
    if FLAGS.sweep:
        lines = [base | {FLAGS.sweep: value} for value in SWEEPS[FLAGS.sweep]]
    if FLAGS.sweep == "experts":
        size = FLAGS.latents // FLAGS.experts
        lines = [line | {"latents": line["experts"] * size} for line in lines]
    return [(preset(FLAGS.preset, **{n: line[n] for n in sizes}), line["batch"]) for line in lines]


def main() -> None:
    for config, batch in settings():
        if config.latents % config.experts or config.active > config.experts:
            raise UserError("--latents must be divisible by --experts, and --active at most that")
        if config.k > config.active * config.latents // config.experts:
            raise UserError(f"--k={config.k} exceeds the latents of the active experts: lower it")
        print(json.dumps(measure(config, FLAGS.d, batch, FLAGS.repeats)), flush=True)


if __name__ == "__main__":
    command_line.start(main, define)
