"""A static site about what latents and experts do; it opens from disk and needs no network."""

from scale_sae_jax.report.dashboard.data import About, sentence, tokens_named
from scale_sae_jax.report.dashboard.site import write_site

__all__ = ["About", "sentence", "tokens_named", "write_site"]
