"""Named sets of options: what the paper says, what its code does, and what it is compared with."""

import dataclasses
from typing import Any

from scale_sae_jax.config import CHOICES, SAEConfig
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
    # The best many-expert options that a search found: configs/grids/ours.py, docs/results/.
    "ours": dict(
        input_scale=True,
        gate_at="code",
        topk_scope="batch",
        load_balance=0.03,
    ),
    # One dictionary: see the file of each architecture for its paper.
    "relu": dict(architecture="relu", decoder_norm="none", auxk=False, penalty=3.0),
    "gated": dict(architecture="gated", auxk=False, penalty=4.0),
    "jumprelu": dict(architecture="jumprelu", auxk=False, penalty=2.0),
    "topk": dict(architecture="topk"),
    "batchtopk": dict(architecture="batchtopk"),
    "matryoshka": dict(architecture="matryoshka"),
}


def preset(
    name: str, *, latents: int, experts: int, active: int, k: int, match: str = ""
) -> SAEConfig:
    """The settings of a preset at a given size.

    Args:
      name: one of PRESETS.
      latents, experts, active: the many-expert SAE, or the one to compare with; `active` = 0 means
        the preset's own (switch 1, else 2).
      k: L0.
      match: for one dictionary, see `SAEConfig.match`, by default 'active'. For a preset with its
        own number of active experts, 'active' gives it as many fewer, wider experts as it takes
        for the same active width.

    Raises UserError for an unknown name or match, or a preset that cannot be matched.
    """
    if name not in PRESETS:
        raise UserError(f"preset '{name}' is unknown: choose one of {', '.join(PRESETS)}")
    if match not in CHOICES["sae.match"]:
        known = ", ".join(filter(None, CHOICES["sae.match"]))
        raise UserError(f"match={match} is unknown: choose one of {known}, or leave it out")
    options = PRESETS[name]
    config = dataclasses.replace(SAEConfig(), **options)
    asked = active or min(SAEConfig().active if match else config.active, experts)
    sizes = dict(latents=latents, experts=experts, active=asked, k=k)
    if "architecture" in options:
        sizes["match"] = match or "active"
    elif match == "time":
        raise UserError(f"match=time is for one dictionary; preset '{name}' has experts")
    elif match and "active" in options:
        sizes |= _own_active(sizes, options["active"], match)
    return dataclasses.replace(config, **sizes)


def from_arg(arg: Any) -> SAEConfig:
    """The preset that a config file's parsed argument asks for, at its sizes."""
    return preset(
        arg.preset,
        latents=arg.latents,
        experts=arg.experts,
        active=arg.active,
        k=arg.l0,
        match=arg.match,
    )


def _own_active(sizes: dict[str, int], own: int, match: str) -> dict[str, int]:
    if match == "width":
        return {"active": own}
    if sizes["active"] > sizes["experts"]:
        raise UserError(
            f"active={sizes['active']} exceeds experts={sizes['experts']}: a token uses at most all"
        )
    experts = sizes["experts"] * own
    if experts % sizes["active"]:
        raise UserError(
            f"match=active: {sizes['experts']} experts cannot be regrouped from "
            f"{sizes['active']} active ones to {own}: choose a multiple"
        )
    return {"active": own, "experts": experts // sizes["active"]}
