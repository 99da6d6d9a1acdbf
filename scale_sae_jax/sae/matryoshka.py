"""Matryoshka SAE (arXiv 2503.17547): every prefix of the dictionary must reconstruct by itself.

The latents compete as in BatchTopK. General features then settle in the small prefixes, instead of
being absorbed into specific ones.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from scale_sae_jax.sae.batchtopk import BatchTopKSAE
from scale_sae_jax.sae.losses import mean_square
from scale_sae_jax.sae.products import rounded_dot


def prefix_sizes(latents: int, prefixes: int) -> list[int]:
    """`prefixes` sizes that double up to all latents: 256, 512, 1024 for (1024, 3)."""
    return sorted({max(1, latents >> halvings) for halvings in range(prefixes)})


class MatryoshkaSAE(BatchTopKSAE):
    """Loss: the mean over the prefixes of |x - x^_prefix|^2, + weight * AuxK."""

    options = (*BatchTopKSAE.options, "prefixes")

    def reconstruction(self, x: Float[Array, "T D"], kept: Float[Array, "T L"]):
        residual, errors, begin = x - self.b_dec, [], 0
        codes = kept * self.unit
        for end in prefix_sizes(self.config.latents, self.config.prefixes):
            rows = self.w_dec[begin:end]
            residual = residual - rounded_dot(codes[:, begin:end], rows.T, self.config.dtype)
            errors.append(mean_square(residual))
            begin = end
        errors = self.shards.mean(jnp.stack(errors))
        return errors.mean(), errors[-1], residual


