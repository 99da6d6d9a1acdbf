"""ReLU SAE with an L1 penalty weighted by decoder norms (Conerly et al. 2024, "Training SAEs").

The decoder is not normalised: with its norms in the penalty, shrinking latents by growing their
rows gains nothing.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from scale_sae_jax.sae.dictionary import DictionarySAE
from scale_sae_jax.sae.losses import Loss, mean_square
from scale_sae_jax.sae.sparsity import count_dense, one_load, sparsity_weight, steer


class ReLUSAE(DictionarySAE):
    """f = ReLU(W_enc z + b_enc), loss |x - x^|^2 + scale^2 penalty sum_i f_i |W_dec_i|.

    Beside the parameters of `DictionarySAE`: penalty [], which is steered to the target L0.
    """

    options = ("penalty", "penalty_rate")

    def setup(self):
        super().setup()
        self.penalty = self.param("penalty", nn.initializers.constant(self.config.penalty), ())

    def start(self, x: Float[Array, "T D"]) -> dict[str, Array]:
        """Biases with which as many latents fire at the start as are asked for.

        From 0 they would take Adam thousands of batches; meanwhile the penalty bends the encoder.
        """
        begun = super().start(x)
        return begun | self.start_bias(x, begun)

    def acts(self, x: Float[Array, "T D"]) -> Float[Array, "T L"]:
        return jax.nn.relu(self.products(x) + self.b_enc)

    def loss(self, x: Float[Array, "T D"], dead: Bool[Array, " L"] | None) -> Loss:
        del dead
        c, acts = self.config, self.acts(x)
        mean, fired = self.shards.mean, count_dense(acts)
        mse = mean(mean_square(self.residual(x, acts)))
        sparsity = mean((acts * jnp.linalg.norm(self.w_dec, axis=-1)).sum(-1).mean())
        l0 = mean(fired.sum() / x.shape[0])
        weight = sparsity_weight(self.penalty, l0, self.target) * self.unit**2
        return Loss(
            total=mse + weight * sparsity,
            mse=mse,
            terms={"sparsity": sparsity, "penalty": self.penalty},
            firing=self.shards.total(fired),
            expert_load=one_load(),
            tracked={"penalty": steer(self.penalty, l0, self.target, c.penalty_rate)},
        )
