"""TopK SAE (arXiv 2406.04093): the k largest latents of each token, and AuxK against dead ones.

The encoder's products are dense; its gradient, the decoder and its gradient touch the k winners
alone.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from scale_sae_jax.sae import kernels, selection
from scale_sae_jax.sae.codes import Codes
from scale_sae_jax.sae.dictionary import DictionarySAE
from scale_sae_jax.sae.lookup import lookup
from scale_sae_jax.sae.losses import Loss
from scale_sae_jax.sae.products import products_at, rounded_dot
from scale_sae_jax.sae.sparsity import count_slots, one_load


class TopKSAE(DictionarySAE):
    """z = TopK(ReLU(W_enc (x - b_dec) + b_enc)), loss |x - x^|^2 + weight * AuxK."""

    sparse_codes = True
    revives = True
    options = ("auxk_weight", "auxk_latents")

    def encode(self, x: Float[Array, "T D"]) -> Codes:
        acts, acts_at = self.latents(x)
        return self.winners(acts, acts_at)

    def latents(self, x: Float[Array, "T D"]):
        """All latents as constants [T, L], and a function from ids to some with their gradient."""
        c, z = self.config, self.centred(x)
        bias = self.b_enc + self.shift()
        products = rounded_dot(*jax.lax.stop_gradient((z, self.w_enc)), c.dtype)
        kernel = kernels.one_expert(c.kernel)

        def acts_at(ids: Int[Array, "T K"]) -> Float[Array, "T K"]:
            along = products_at(z, self.w_enc, products, ids, kernel, c.dtype)
            return jax.nn.relu(along + lookup(bias, ids, kernel))

        return jax.nn.relu(products + jax.lax.stop_gradient(bias)), acts_at

    def winners(self, acts, acts_at) -> Codes:
        ids = selection.top_k(acts, self.config.k)[1]
        used = jnp.arange(self.config.k) < self.target
        return Codes(jnp.where(used, acts_at(ids), 0) * self.unit, ids)

    def loss(self, x: Float[Array, "T D"], dead: Bool[Array, " L"] | None) -> Loss:
        acts, acts_at = self.latents(x)
        codes = self.winners(acts, acts_at)
        mse, residual = self.squared_error(x, codes, self.b_dec)
        auxk = self.auxk(acts, acts_at, dead, residual)
        return Loss(
            total=mse + self.config.auxk_weight * auxk,
            mse=mse,
            terms={"auxk": auxk},
            firing=self.shards.total(count_slots(codes, self.config.latents)),
            expert_load=one_load(),
            tracked={},
        )
