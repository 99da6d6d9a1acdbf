"""Training directly on an array of activations, float16 or float32 [n, d] in a .npy file.

    python -m experiments.train --config=configs/array.py:path=acts.npy,experts=16,latents=4096

The last 5 % of the rows are held out. Without a language model there is no delta CE.

With the many-expert presets but `ours`, the weight of the load-balance term depends on the unit of
the array; --config.sae.input_scale=true takes that away.
"""

from scale_sae_jax.config import ActivationsConfig, Config, parse_arg, to_config_dict
from scale_sae_jax.errors import UserError
from scale_sae_jax.sae.presets import from_arg


def get_config(arg=""):
    arg = parse_arg(
        arg, path="", l0=32, experts=16, active=0, latents=4096, preset="paper", match="", seed=0
    )
    if not arg.path.endswith(".npy"):
        raise UserError(
            f"configs/array.py:path={arg.path} must be a .npy file of activations: write "
            "configs/array.py:path=FILE.npy"
        )
    return to_config_dict(
        Config(
            seed=arg.seed,
            steps=2000,
            batch_size=2048,
            activations=ActivationsConfig(path=arg.path),
            sae=from_arg(arg),
        )
    )
