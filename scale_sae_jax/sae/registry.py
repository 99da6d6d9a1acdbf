"""Names of architectures, and the only place that looks at them."""

import dataclasses

from scale_sae_jax.config import SAEConfig
from scale_sae_jax.errors import UserError
from scale_sae_jax.sae.autoencoder import Autoencoder
from scale_sae_jax.sae.batchtopk import BatchTopKSAE
from scale_sae_jax.sae.dictionary import DictionarySAE
from scale_sae_jax.sae.gated import GatedSAE
from scale_sae_jax.sae.jumprelu import JumpReLUSAE
from scale_sae_jax.sae.matryoshka import MatryoshkaSAE
from scale_sae_jax.sae.relu import ReLUSAE
from scale_sae_jax.sae.scale import ScaleSAE
from scale_sae_jax.sae.topk import TopKSAE

ARCHITECTURES = {
    "scale": ScaleSAE,
    "relu": ReLUSAE,
    "gated": GatedSAE,
    "jumprelu": JumpReLUSAE,
    "topk": TopKSAE,
    "batchtopk": BatchTopKSAE,
    "matryoshka": MatryoshkaSAE,
}


def build(config: SAEConfig, width: int) -> Autoencoder:
    """The autoencoder that `config` names, for activations with `width` coordinates.

    Its own config holds the sizes that `match` resolves to. Raises UserError as `has_experts`, and
    for sizes that the architecture cannot have.
    """
    module = ARCHITECTURES.get(config.architecture)
    if not has_experts(config):
        config = _one_dictionary(config)
    return Autoencoder(module(config, width), config, width)


def has_experts(config: SAEConfig) -> bool:
    """Whether the architecture has experts, and not one dictionary.

    Raises UserError for an unknown name, and for a `match` of an architecture with experts.
    """
    if config.architecture not in ARCHITECTURES:
        raise UserError(
            f"config.sae.architecture = '{config.architecture}' is unknown: "
            f"choose one of {', '.join(ARCHITECTURES)}"
        )
    if issubclass(ARCHITECTURES[config.architecture], DictionarySAE):
        return False
    if config.match:
        raise UserError(
            f"config.sae.match = '{config.match}' sets the width of one dictionary, but "
            f"architecture '{config.architecture}' has experts: leave match empty"
        )
    return True


def _one_dictionary(config: SAEConfig) -> SAEConfig:
    """The config with the width that `match` asks for, and one expert."""
    if config.match == "time" and config.experts > 1:
        raise UserError(
            "config.sae.match = 'time' is measured by experiments.train; here give a width with "
            "match=width"
        )
    if not config.match and config.experts > 1:
        raise UserError(
            f"config.sae.experts = {config.experts}: architecture '{config.architecture}' has one "
            "dictionary; set experts and active to 1, or match to active or width"
        )
    share = config.active if config.match == "active" else config.experts
    latents = share * (config.latents // config.experts)
    return dataclasses.replace(config, latents=latents, experts=1, active=1)


def without_effect(config: SAEConfig) -> list[str]:
    """Options that were set, and that other architectures have, but this one has not."""
    own = ARCHITECTURES[config.architecture].options
    others = {name for module in ARCHITECTURES.values() for name in module.options} - {*own}
    default = SAEConfig()
    return sorted(name for name in others if getattr(config, name) != getattr(default, name))


def experts_of(config: SAEConfig) -> int:
    """Experts of the autoencoder, before its width is known. Raises UserError as `build`."""
    by_time = config.match == "time" and not has_experts(config)
    return 1 if by_time else build(config, 1).experts
