"""A static site about what latents and experts do; it opens from disk and needs no network."""

from scale_sae_jax.report.dashboard.data import About, sentence, tokens_named
from scale_sae_jax.report.dashboard.site import site_folder, write_site

__all__ = ["About", "sentence", "site_folder", "tokens_named", "write_site"]
