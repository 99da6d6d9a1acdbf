"""Many-expert sparse autoencoders in JAX: train them, measure them, look inside.

    sae, params = scale_sae_jax.load("runs/quickstart")
    codes = sae.encode(params, x)
"""

from scale_sae_jax.errors import UserError
from scale_sae_jax.interop.load import load

__version__ = "0.1.0"
__all__ = ["UserError", "load"]
