"""Which settings are refused, and with what advice."""

import dataclasses
import math

from scale_sae_jax.config.settings import CHOICES, Config, SAEConfig, flatten
from scale_sae_jax.errors import UserError


def check(config: Config) -> None:
    """Refuses unknown choices and settings that contradict each other. Raises UserError."""
    for path, allowed in CHOICES.items():
        section, name = path.split(".")
        value = getattr(getattr(config, section), name)
        choices = ", ".join(choice or "''" for choice in allowed)
        _require(value in allowed, f"config.{path} = '{value}' must be one of {choices}")
    for path, value in flatten(dataclasses.asdict(config)).items():
        finite = not isinstance(value, float) or math.isfinite(value)
        _require(finite, f"config.{path} = {value} must be a finite number")
    for name in ("steps", "batch_size", "steps_per_call", "log_every", "keep_checkpoints"):
        value = getattr(config, name)
        _require(value > 0, f"config.{name} = {value} must be at least 1")
    _require(config.checkpoint_every >= 0, "config.checkpoint_every must not be negative")
    _check_sae(config.sae)
    _check_sources(config)
    _require(
        -(2**31) <= config.seed < 2**32,
        f"config.seed = {config.seed} must lie between {-(2**31)} and {2**32 - 1}",
    )
    optim = config.optim
    _require(optim.lr >= 0 and optim.clip >= 0, "config.optim.lr and .clip must not be negative")
    for name in ("warmup", "decay"):
        value = getattr(optim, name)
        _require(0 <= value <= 1, f"config.optim.{name} = {value} is a fraction: 0 to 1")
    for name in ("b1", "b2"):
        value = getattr(optim, name)
        _require(0 <= value < 1, f"config.optim.{name} = {value} must be at least 0 and below 1")
    _require(optim.eps > 0, f"config.optim.eps = {optim.eps} must be positive")
    _require(config.eval.tokens > 0, "config.eval.tokens must be at least 1")
    for name in ("bootstrap", "seed"):
        value = getattr(config.eval, name)
        _require(value >= 0, f"config.eval.{name} = {value} must not be negative")


def _check_sae(sae: SAEConfig) -> None:
    for name in ("latents", "experts", "active", "k", "prefixes"):
        value = getattr(sae, name)
        _require(value > 0, f"config.sae.{name} = {value} must be at least 1")
    _require(
        sae.orthogonality_chunk > 1,
        f"config.sae.orthogonality_chunk = {sae.orthogonality_chunk} must be at least 2",
    )
    _require(sae.latents < 2**31, f"config.sae.latents = {sae.latents} must be below {2**31}")
    _require(
        sae.latents % sae.experts == 0,
        f"config.sae.latents = {sae.latents} is not divisible by experts = {sae.experts}: "
        f"take {max(1, sae.latents // sae.experts) * sae.experts} latents",
    )
    _require(
        sae.active <= sae.experts,
        f"config.sae.active = {sae.active} exceeds experts = {sae.experts}: lower active",
    )
    _require(
        0 < sae.dead_after < 2**31,  # tokens are counted in int32
        f"config.sae.dead_after = {sae.dead_after} must lie between 1 and {2**31 - 1}",
    )
    for name in (
        "load_balance", "auxk_weight", "auxk_latents", "orthogonality", "balance_rate",
        "penalty_rate",
    ):
        value = getattr(sae, name)
        _require(value >= 0, f"config.sae.{name} = {value} must not be negative")
    for name in ("penalty", "bandwidth"):
        value = getattr(sae, name)
        _require(value > 0, f"config.sae.{name} = {value} must be positive")
    width = sae.active * sae.latents // sae.experts
    _require(
        sae.k <= width,
        f"config.sae.k (l0) = {sae.k} exceeds the {width} latents of the {sae.active} active "
        "experts: lower l0, or raise active or latents",
    )
    _require(
        sae.topk_scope != "expert" or sae.k % sae.active == 0,
        f"config.sae.topk_scope = 'expert' gives each of {sae.active} experts k/active latents: "
        f"k (l0) = {sae.k} must be divisible by active",
    )


def _check_sources(config: Config) -> None:
    lm, text, activations = config.lm, config.text, config.activations
    if config.synthetic.features:
        for name, path in (("lm", lm.path), ("text", text.path), ("activations", activations.path)):
            _require(path == "", f"config.{name}.path = '{path}' and config.synthetic.features are "
                     "two sources of activations: leave one out")
        return
    _require(
        activations.max_norm_ratio >= 0,
        f"config.activations.max_norm_ratio = {activations.max_norm_ratio} must not be negative: "
        "0 keeps all",
    )
    if activations.is_array:
        _require(
            activations.buffer == 0,
            f"config.activations.path = '{activations.path}' is an array, which needs no "
            "config.activations.buffer: leave one out",
        )
        _require(
            0 < text.heldout_fraction < 1,
            f"config.text.heldout_fraction = {text.heldout_fraction} must lie between 0 and 1",
        )
        return
    _require(lm.path != "", "config.lm.path is empty: name a model folder, or train on an array "
             "with configs/array.py:path=FILE.npy")
    _require(text.path != "", "config.text.path is empty: name a text file with "
             "--config.text.path=FILE.jsonl")
    _require(lm.layer >= 0, f"config.lm.layer = {lm.layer} must be 0 or more")
    _require(lm.rows_per_batch > 0, "config.lm.rows_per_batch must be at least 1")
    _require(text.max_documents >= 0,
             f"config.text.max_documents = {text.max_documents} must not be negative: 0 takes all")
    _require(text.context > 1, f"config.text.context = {text.context} must be at least 2")
    _require(
        text.heldout_path != "" or 0 < text.heldout_fraction < 1,
        f"config.text.heldout_fraction = {text.heldout_fraction} must lie between 0 and 1, "
        "or give config.text.heldout_path",
    )
    _require(activations.buffer >= 0, "config.activations.buffer must not be negative")
    _require(
        not (activations.buffer and activations.path),
        f"config.activations.path = '{activations.path}' is a store, and config.activations.buffer "
        "trains without one: leave one out",
    )
    _require(activations.tokens >= 0, "config.activations.tokens must not be negative")
    _require(activations.shard_rows > 0, "config.activations.shard_rows must be at least 1")


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise UserError(message)
