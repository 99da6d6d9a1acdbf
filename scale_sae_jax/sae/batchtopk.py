"""BatchTopK SAE (arXiv 2412.06410): the k T largest latents of a batch of T tokens.

At inference each token stands alone: latents over a threshold count, the running mean of the
smallest winner of the training batches.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from scale_sae_jax.sae import selection
from scale_sae_jax.sae.dictionary import DictionarySAE
from scale_sae_jax.sae.losses import Loss, mean_square
from scale_sae_jax.sae.sparsity import count_dense, one_load


class BatchTopKSAE(DictionarySAE):
    """Beside the parameters of `DictionarySAE`: threshold [], which follows the batches."""

    revives = True
    options = ("auxk_weight", "auxk_latents")

    def setup(self):
        super().setup()
        self.threshold = self.param("threshold", nn.initializers.zeros, ())

    def acts(self, x: Float[Array, "T D"]) -> Float[Array, "T L"]:
        acts = jax.nn.relu(self.products(x) + self.b_enc)
        return jnp.where(acts > self.threshold, acts, 0)

    def loss(self, x: Float[Array, "T D"], dead: Bool[Array, " L"] | None) -> Loss:
        c, shards = self.config, self.shards
        acts = jax.nn.relu(self.products(x) + self.b_enc)
        kept = jnp.where(selection.per_batch(acts, c.k, shards, self.l0), acts, 0)
        objective, mse, residual = self.reconstruction(x, kept)

        def acts_at(ids):
            return jnp.take_along_axis(acts, ids, axis=-1)

        auxk = self.auxk(acts, acts_at, dead, jax.lax.stop_gradient(residual))
        return Loss(
            total=objective + c.auxk_weight * auxk,
            mse=mse,
            terms={"auxk": auxk},
            firing=shards.total(count_dense(kept)),
            expert_load=one_load(),
            tracked={"threshold": selection.follow_threshold(self.threshold, kept, shards)},
        )

    def reconstruction(self, x: Float[Array, "T D"], kept: Float[Array, "T L"]):
        """(what is differentiated, mse, residual [T, D])."""
        residual = self.residual(x, kept)
        mse = self.shards.mean(mean_square(residual))
        return mse, mse, residual
