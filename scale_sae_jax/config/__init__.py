"""Settings of a run: the dataclasses, what is refused of them, and how they come from outside."""

from scale_sae_jax.config.border import from_config_dict, parse_arg, to_config_dict
from scale_sae_jax.config.checks import check
from scale_sae_jax.config.settings import (
    CHOICES,
    OF_A_TEXT,
    ActivationsConfig,
    Config,
    EvalConfig,
    LMConfig,
    OptimConfig,
    SAEConfig,
    SyntheticConfig,
    TextConfig,
    digest,
    flatten,
)

__all__ = [
    "ActivationsConfig",
    "CHOICES",
    "Config",
    "EvalConfig",
    "LMConfig",
    "OF_A_TEXT",
    "OptimConfig",
    "SAEConfig",
    "SyntheticConfig",
    "TextConfig",
    "check",
    "digest",
    "flatten",
    "from_config_dict",
    "parse_arg",
    "to_config_dict",
]
