"""What each latent and each expert does: contexts, tokens, neighbours. Numbers only, no pages."""

from scale_sae_jax.inspection.look import Findings, look

__all__ = ["Findings", "look"]
