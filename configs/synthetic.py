"""Training on synthetic activations with known features, by default those of SynthSAEBench-16k.

    python -m experiments.train --config=configs/synthetic.py:l0=32,experts=16,latents=4096

Samples are drawn as they are read, none twice. The evaluation adds the metrics against the true
features (scale_sae_jax/evaluation/ground_truth.py).
"""

from scale_sae_jax.config import (
    Config,
    EvalConfig,
    OptimConfig,
    SyntheticConfig,
    parse_arg,
    to_config_dict,
)
from scale_sae_jax.sae.presets import from_arg


def get_config(arg=""):
    arg = parse_arg(
        arg,
        features=16_384,
        l0=32,
        experts=16,
        active=0,
        latents=4096,
        preset="paper",
        match="",
        seed=0,
    )
    return to_config_dict(
        Config(
            seed=arg.seed,
            steps=10_000,
            batch_size=1024,
            synthetic=SyntheticConfig(features=arg.features),
            sae=from_arg(arg),
            optim=OptimConfig(lr=3e-4),
            eval=EvalConfig(tokens=65_536),
        )
    )
