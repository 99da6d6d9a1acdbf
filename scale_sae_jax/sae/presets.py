"""Named sets of options: what the paper says, what its code does, and what it is compared with."""

import dataclasses

from scale_sae_jax.config import SAEConfig
from scale_sae_jax.errors import UserError

PRESETS = {
    # The paper's formulas: the defaults of SAEConfig.
    "paper": {},
    # The authors' published code, with its quirks.
    "authors": dict(
        gate="softmax_probs",
        gate_at="code",
        feature_scaling="mean_lp",
        decoder_norm="coordinate",
        tie_biases=True,
        auxk=False,
    ),
    # Switch SAE (arXiv 2410.08201).
    "switch": dict(
        active=1, gate="prob", gate_at="code", feature_scaling="none", encoder_bias=False
    ),
    # The paper's method without feature scaling.
    "plain": dict(feature_scaling="none"),
}


def preset(name: str, *, latents: int, experts: int, active: int, k: int) -> SAEConfig:
    """The settings of a preset at a given size; `active` = 0 means its own (switch 1, else 2).

    Raises UserError for an unknown name.
    """
    if name not in PRESETS:
        raise UserError(f"preset '{name}' is unknown: choose one of {', '.join(PRESETS)}")
    config = dataclasses.replace(SAEConfig(), **PRESETS[name])
    active = active or min(config.active, experts)
    return dataclasses.replace(config, latents=latents, experts=experts, active=active, k=k)
