"""Tests run on 8 forced CPU devices, with every jaxtyping annotation checked by beartype."""

import jax
from jaxtyping import install_import_hook

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_disable_most_optimizations", True)  # compile time is most of the run
install_import_hook("scale_sae_jax", "beartype.beartype")
