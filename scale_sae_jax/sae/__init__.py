"""Sparse autoencoders: pure functions, the modules that hold their parameters, and one handle."""

from scale_sae_jax.sae.autoencoder import Autoencoder
from scale_sae_jax.sae.codes import Codes, Routing
from scale_sae_jax.sae.registry import build

__all__ = ["Autoencoder", "Codes", "Routing", "build"]
