"""Many-expert sparse autoencoders in JAX: train them, measure them, look inside.

    sae, params = scale_sae_jax.load("runs/quickstart")
    codes = sae.encode(params, x)
    attached = scale_sae_jax.attach_run("runs/quickstart")
    attached.predict("The capital of France is", steer={7: 50.0})
"""

from scale_sae_jax.attached import attach, attach_run
from scale_sae_jax.errors import UserError
from scale_sae_jax.interop.load import load

__version__ = "0.1.0"
__all__ = ["UserError", "attach", "attach_run", "load"]
