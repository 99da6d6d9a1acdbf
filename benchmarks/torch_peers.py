"""A training step of this library against PyTorch ones, on the same activations in one process.

    pip install ".[peers]"
    python -m benchmarks.torch_peers --d=768 --latents=24576 --experts=64 --active=2 --k=32 \
        --batch=4096

prints a JSON line for each of `--presets` of this library, then one a rival of equal total width,
with `ratio` = its seconds over those of the first line. All are float32, take Adam with the
gradient clipped to norm 1, and see no dead latents. Where JAX has a GPU, PyTorch computes there
too, and multiplies in TF32 as JAX does:

    sae_lens topk        SAELens' TopKTrainingSAE as it comes (its option use_sparse_activations
                         has no backward pass on CPUs)
    sparsify topk        EleutherAI's SparseCoder
    torch all experts    Scale SAE with the published code's arithmetic: every expert on every
                         token, unselected latents masked, a dense [T, M] code
"""

import importlib.util
import json
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from itertools import cycle, islice

import jax
import numpy as np
from absl import flags

from benchmarks.step import define_sizes
from experiments import command_line
from scale_sae_jax.errors import UserError
from scale_sae_jax.sae.presets import preset
from scale_sae_jax.training.matching import step_seconds

FLAGS = flags.FLAGS
LR = 1e-4


def define(argv: list[str]) -> None:
    del argv
    define_sizes()
    flags.DEFINE_list("presets", ["paper"], "Autoencoders of ours, of the rivals' total width.")
    flags.DEFINE_integer(
        "repeats", 3, "Timed calls, of 8 steps; those of a rival on CPUs of one.", lower_bound=1
    )


def trained(model, loss_of: Callable, after: Callable = lambda: None) -> Callable:
    """One step: gradient, clip, Adam, and what `after` does to the weights."""
    import torch

    adam = torch.optim.Adam(model.parameters(), lr=LR)

    def step(x):
        adam.zero_grad()
        loss_of(x).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.step()
        after()

    return step


def device() -> str:
    return "cuda" if jax.default_backend() == "gpu" else "cpu"


def sae_lens() -> Callable:
    from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.saes.sae import TrainStepInput

    config = TopKTrainingSAEConfig(
        d_in=FLAGS.d, d_sae=FLAGS.latents, k=FLAGS.k, device=device()
    )
    sae = TopKTrainingSAE(config)

    def loss(x):
        given = TrainStepInput(
            sae_in=x,
            coefficients={},
            dead_neuron_mask=None,
            n_training_steps=0,
            is_logging_step=False,
        )
        return sae.training_forward_pass(given).loss

    return trained(sae, loss)


def sparsify() -> Callable:
    with redirect_stdout(sys.stderr):  # sparsify prints how it will decode; lines here are JSON
        from sparsify import SparseCoder, SparseCoderConfig

    config = SparseCoderConfig(num_latents=FLAGS.latents, k=FLAGS.k)
    coder = SparseCoder(FLAGS.d, config, device=device())

    def loss(x):
        return coder(x).fvu

    return trained(coder, loss, coder.set_decoder_norm_to_unit_norm)


def all_experts() -> Callable:
    import torch

    n, d, m = FLAGS.experts, FLAGS.d, FLAGS.latents // FLAGS.experts

    class AllExperts(torch.nn.Module):
        def __init__(self):
            super().__init__()
            w = (torch.rand(n, d, m) * 2 - 1) / d**0.5
            self.w_enc = torch.nn.Parameter(w)
            w_dec = torch.nn.functional.normalize(w.transpose(1, 2), dim=-1)
            self.w_dec = torch.nn.Parameter(w_dec.contiguous())
            self.b_enc = torch.nn.Parameter(torch.zeros(n, m))
            self.omega = torch.nn.Parameter(torch.zeros(n))
            self.b_dec = torch.nn.Parameter(torch.zeros(d))
            self.router = torch.nn.Linear(d, n)

        def loss(self, x):
            p = torch.softmax(self.router(x - self.b_dec), -1)
            chosen = p.topk(FLAGS.active).indices
            gate = torch.zeros_like(p).scatter(1, chosen, p.gather(1, chosen))  # [T, N]
            mean = self.w_enc.mean(-1, keepdim=True)
            scaled = mean + (1 + self.omega[:, None, None]) * (self.w_enc - mean)
            encoder = scaled.transpose(0, 1).reshape(d, -1)
            acts = torch.relu((x - self.b_dec) @ encoder + self.b_enc.reshape(-1))  # [T, M]
            selected = torch.zeros_like(p, dtype=torch.bool).scatter(1, chosen, True)
            acts = torch.where(selected.repeat_interleave(m, 1), acts, 0)
            best = acts.topk(FLAGS.k)
            code = torch.zeros_like(acts).scatter(1, best.indices, best.values)
            code = code * gate.repeat_interleave(m, 1)
            decoded = code @ self.w_dec.reshape(-1, d) + self.b_dec
            share = torch.nn.functional.one_hot(p.argmax(-1), n).float().mean(0)
            return (x - decoded).square().sum(-1).mean() + 3 * d * n * (share * p.mean(0)).sum()

    model = AllExperts().to(device())

    def unit_rows():
        with torch.no_grad():
            model.w_dec.div_(model.w_dec.norm(dim=-1, keepdim=True))

    return trained(model, model.loss, unit_rows)


def seconds(step: Callable, batches: np.ndarray) -> float:
    """Median seconds of a step, after one call to warm up: of 8 steps on a GPU, as one of ours."""
    import torch

    steps = 8 if device() == "cuda" else 1
    given = cycle([torch.from_numpy(batch).to(device()) for batch in batches])
    times = []
    for _ in range(FLAGS.repeats + 1):
        begin = time.perf_counter()
        for x in islice(given, steps):
            step(x)
        if device() == "cuda":
            torch.cuda.synchronize()
        times.append((time.perf_counter() - begin) / steps)
    return float(np.median(times[1:]))


def main() -> None:
    for package in ("torch", "sae_lens", "sparsify"):
        if importlib.util.find_spec(package) is None:
            raise UserError(f"{package} is not installed: pip install '.[peers]'")
    import torch

    torch.set_float32_matmul_precision("high" if device() == "cuda" else "highest")
    sizes = dict(latents=FLAGS.latents, experts=FLAGS.experts, active=FLAGS.active, k=FLAGS.k)
    shape = (8, FLAGS.batch, FLAGS.d)
    batches = np.random.default_rng(0).standard_normal(shape, np.float32)
    ours, first = jax.numpy.asarray(batches), None
    for name in FLAGS.presets:
        config = preset(name, **sizes, match="width")
        spent = step_seconds(config, ours, FLAGS.repeats)
        first = first or spent
        show(f"scale_sae_jax {name}", spent, first)
    for name, make in (
        ("sae_lens topk", sae_lens),
        ("sparsify topk", sparsify),
        ("torch all experts", all_experts),
    ):
        show(name, seconds(make(), batches), first)


def show(name: str, spent: float, first: float) -> None:
    line = {"name": name, "s_per_step": spent, "tok_per_s": FLAGS.batch / spent}
    print(json.dumps(line | {"ratio": spent / first}), flush=True)


if __name__ == "__main__":
    command_line.start(main, define)
