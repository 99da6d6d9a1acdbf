"""The paper's setting: GPT-2 small, block 8, OpenWebText, 24,576 latents, 82M activations.

    python -m experiments.train --config=configs/owt.py:l0=32 --workdir=runs/owt

Local files take the place of the hub:

    --config.lm.path=FOLDER --config.text.path=FILE.jsonl

Contexts are 128 tokens; padding, BOS and position 0 are left out. The published runs took the first
20 tokens of each document with everything left in: --config.text.context=20
--config.text.packing=one --config.text.bos=False --config.activations.drop_position_0=False
--config.activations.drop_special=False --config.activations.mask_padding=False
--config.activations.max_norm_ratio=0.
"""

from scale_sae_jax.config import (
    ActivationsConfig,
    Config,
    EvalConfig,
    LMConfig,
    TextConfig,
    parse_arg,
    to_config_dict,
)
from scale_sae_jax.sae.presets import from_arg


def get_config(arg=""):
    arg = parse_arg(
        arg, l0=32, experts=64, active=0, latents=24_576, preset="paper", match="", seed=0
    )
    return to_config_dict(
        Config(
            seed=arg.seed,
            steps=10_000,
            batch_size=8192,
            lm=LMConfig(path="openai-community/gpt2", layer=8, rows_per_batch=64),
            text=TextConfig(path="Skylion007/openwebtext", heldout_fraction=0.005),
            activations=ActivationsConfig(tokens=0),
            sae=from_arg(arg),
            eval=EvalConfig(tokens=131_072),
        )
    )
