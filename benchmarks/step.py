"""Time and memory of a training step, against what the machine's matrix multiply allows.

    python -m benchmarks.step --preset=paper --d=768 --latents=24576 --experts=64 --active=2 \
        --k=32 --batch=4096
    python -m benchmarks.step --sweep=experts

prints a JSON line a setting. Everything is timed as training runs it, `--steps_per_call` times in
one compiled call, and is the median of `--repeats` calls:

    s_per_step            the whole step; s_forward_backward without the optimiser, s_optimiser it
                          alone, s_selection the top-k and its gradient alone
    flops_per_step        useful FLOPs, 10 T e m d: encoder and decoder forward, both weight
                          gradients and the code's gradient, as products of the active experts
    matmul_gflops         [4096, 768] x [768, 6144], float32, in the same process just before
    mfu                   useful rate of the whole step over matmul_gflops
    temporary_gb          XLA's temporaries of one forward and backward pass, the gradients apart;
    temporary_bound_gb    4 T e m floats and the T e gathered inputs

`--sweep` varies one size: 'experts' with the active width fixed (the dictionary grows), the others
alone.
"""

import dataclasses
import json
import resource
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags
from jax import Array

from experiments import command_line
from scale_sae_jax.config import CHOICES, OptimConfig, SAEConfig
from scale_sae_jax.errors import UserError
from scale_sae_jax.sae import build, kernels, selection
from scale_sae_jax.sae.presets import preset
from scale_sae_jax.training import optim
from scale_sae_jax.training.matching import step_seconds

FLAGS = flags.FLAGS
SWEEPS = {
    "experts": (16, 32, 64, 128, 256),
    "active": (1, 2, 4, 8),
    "latents": (6144, 12_288, 24_576, 49_152),
    "batch": (1024, 2048, 4096, 8192),
}


def define_sizes() -> None:
    """The sizes of a step, defined alike for every benchmark."""
    flags.DEFINE_integer("d", 768, "Width of the activations.", lower_bound=1)
    flags.DEFINE_integer("latents", 24_576, "Dictionary width.", lower_bound=1)
    flags.DEFINE_integer("experts", 64, "Experts.", lower_bound=1)
    flags.DEFINE_integer("active", 2, "Experts a token uses.", lower_bound=1)
    flags.DEFINE_integer("k", 32, "L0.", lower_bound=1)
    flags.DEFINE_integer("batch", 4096, "Activations a step.", lower_bound=1)


def define(argv: list[str]) -> None:
    del argv
    flags.DEFINE_string("preset", "paper", "Options of the autoencoder.")
    define_sizes()
    flags.DEFINE_enum("kernel", "auto", CHOICES["sae.kernel"], "How experts are multiplied.")
    flags.DEFINE_enum("dtype", "float32", CHOICES["sae.dtype"], "Operands of the products.")
    flags.DEFINE_integer("steps_per_call", 8, "Steps that one compiled call takes.", lower_bound=1)
    flags.DEFINE_integer("repeats", 5, "Timed calls.", lower_bound=1)
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


def looped_seconds(
    function: Callable[..., Any], results: Any, inputs: Array, repeats: int, *constants: Any
) -> float:
    """Seconds of results = function(results, inputs[i], *constants), for all i in one call.

    Results stand where those of the call before stood, as a training state does: fresh memory comes
    page by page, which for the gradient of a large dictionary is a tenth of the time. What depends
    on constants alone, XLA computes once for all i.
    """
    count = len(inputs)

    @partial(jax.jit, donate_argnums=0)
    def loop(results, inputs, *constants):
        body = lambda i, results: function(results, inputs[i], *constants)  # noqa: E731
        return jax.lax.fori_loop(0, count, body, results)

    def call():
        nonlocal results
        results = loop(results, inputs, *constants)
        return results

    return median_seconds(call, repeats) / count


def matmul_gflops(repeats: int) -> float:
    a = jax.random.normal(jax.random.key(0), (4, 4096, 768))
    b = jax.random.normal(jax.random.key(1), (768, 6144))
    seconds = looped_seconds(lambda _, a, b: a @ b, jnp.zeros((4096, 6144)), a, repeats, b)
    return 2 * 4096 * 768 * 6144 / seconds / 1e9


def optimiser_of(config: SAEConfig) -> tuple[optax.GradientTransformation, optax.Schedule]:
    adam = OptimConfig()
    tx = optim.optimiser(adam, config.latents, 1000, config.decoder_norm)
    return tx, optim.schedule(adam, config.latents, 1000)


def forward_backward(config: SAEConfig, batches: Array, repeats: int) -> tuple[float, int]:
    """Seconds of the loss and its gradient, and XLA's bytes of temporaries for one of them."""
    sae = build(config, batches.shape[2])
    params = sae.init(jax.random.key(0), batches[0])

    def gradient(_, x, params):
        return jax.grad(lambda p: sae.loss(p, x, None).total)(params)

    memory = jax.jit(gradient).lower(None, batches[0], params).compile().memory_analysis()
    zeros = jax.tree.map(jnp.zeros_like, params)
    seconds = looped_seconds(gradient, zeros, batches, repeats, params)
    return seconds, memory.temp_size_in_bytes


def selection_seconds(config: SAEConfig, batches: Array, repeats: int) -> float:
    """The top-k over the active latents, and its gradient."""
    size = config.latents // config.experts
    acts = jax.random.uniform(jax.random.key(0), (*batches.shape[:2], config.active, size))

    def survivors(acts):
        places = selection.per_token(jax.lax.stop_gradient(acts), config.k)
        return jnp.take_along_axis(acts.reshape(len(acts), -1), places, axis=-1)

    gradient = jax.grad(lambda acts: survivors(acts).sum())
    return looped_seconds(lambda _, acts: gradient(acts), jnp.zeros(acts.shape[1:]), acts, repeats)


def optimiser_seconds(config: SAEConfig, batches: Array, repeats: int) -> float:
    """Clipping, projection, Adam and renormalisation, given the gradient."""
    tx, _ = optimiser_of(config)
    params = build(config, batches.shape[2]).init(jax.random.key(0))

    def update(results, entry):
        params, opt_state, gradient = results
        gradient = jax.tree.map(lambda g: g.at[(0,) * g.ndim].set(entry), gradient)  # a new one
        updates, opt_state = tx.update(gradient, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, gradient

    results = params, tx.init(params), jax.tree.map(lambda p: 0.01 * p, params)
    return looped_seconds(update, results, jnp.linspace(0, 1, len(batches)), repeats)


def measure(
    config: SAEConfig, width: int, batch: int, calls: int, repeats: int
) -> dict[str, float | int | str]:
    """The line of one setting."""
    batches = jax.random.normal(jax.random.key(0), (calls, batch, width))
    peak = matmul_gflops(repeats)
    gradient_seconds, temporaries = forward_backward(config, batches, repeats)
    seconds = step_seconds(config, batches, repeats)
    active_width = config.active * config.latents // config.experts
    useful = 10 * batch * active_width * width
    pairs = batch * config.active
    platform = jax.default_backend()
    return {
        "d": width,
        "latents": config.latents,
        "experts": config.experts,
        "active": config.active,
        "k": config.k,
        "batch": batch,
        "kernel": kernels.best(platform) if config.kernel == "auto" else config.kernel,
        "dtype": config.dtype,
        "s_per_step": seconds,
        "s_forward_backward": gradient_seconds,
        "s_optimiser": optimiser_seconds(config, batches, repeats),
        "s_selection": selection_seconds(config, batches, repeats),
        "tok_per_s": batch / seconds,
        "flops_per_step": useful,
        "matmul_gflops": peak,
        "mfu": useful / seconds / 1e9 / peak,
        "temporary_gb": temporaries / 1e9,
        "temporary_bound_gb": 4 * (4 * batch * active_width + pairs * width) / 1e9,
        "peak_rss_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
        "platform": platform,
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
    how = {"kernel": FLAGS.kernel, "dtype": FLAGS.dtype}
    return [
        (dataclasses.replace(preset(FLAGS.preset, **{n: l[n] for n in sizes}), **how), l["batch"])
        for l in lines
    ]


def main() -> None:
    for config, batch in settings():
        if config.latents % config.experts or config.active > config.experts:
            raise UserError("--latents must be divisible by --experts, and --active at most that")
        if config.k > config.active * config.latents // config.experts:
            raise UserError(f"--k={config.k} exceeds the latents of the active experts: lower it")
        line = measure(config, FLAGS.d, batch, FLAGS.steps_per_call, FLAGS.repeats)
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    command_line.start(main, define)
