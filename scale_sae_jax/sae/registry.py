"""Names of architectures, and the only place that looks at them."""

from scale_sae_jax.config import SAEConfig
from scale_sae_jax.errors import UserError
from scale_sae_jax.sae.autoencoder import Autoencoder
from scale_sae_jax.sae.scale import ScaleSAE

ARCHITECTURES = {"scale": ScaleSAE}


def build(config: SAEConfig, width: int) -> Autoencoder:
    """The autoencoder that `config` names, for activations with `width` coordinates."""
    if config.architecture not in ARCHITECTURES:
        raise UserError(
            f"config.sae.architecture = '{config.architecture}' is unknown: "
            f"choose one of {', '.join(ARCHITECTURES)}"
        )
    return Autoencoder(ARCHITECTURES[config.architecture](config, width), config, width)
