"""Tests run on 8 forced CPU devices, with every jaxtyping annotation checked by beartype."""

import jax
from jaxtyping import install_import_hook

jax.config.update("jax_num_cpu_devices", 8)
install_import_hook("scale_sae_jax", "beartype.beartype")
