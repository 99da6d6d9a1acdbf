"""Gated SAE (arXiv 2404.16014): one path decides which latents fire, another how strongly.

Both share the encoder's directions. The L1 penalty acts on the deciding path alone, so that it does
not shrink the magnitudes; an auxiliary reconstruction through a frozen decoder trains that path.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from scale_sae_jax.sae.dictionary import DictionarySAE
from scale_sae_jax.sae.losses import Loss, mean_square
from scale_sae_jax.sae.sparsity import count_dense, one_load, sparsity_weight, steer


class GatedSAE(DictionarySAE):
    """pi = W_enc z + b_enc, f = 1[pi > 0] ReLU(exp(r_mag) W_enc z + b_mag) (equations 6 and 7).

    Loss (equation 8): |x - x^|^2 + scale^2 penalty |ReLU(pi)|_1 + |x - x^_frozen(ReLU(pi))|^2.
    Beside the parameters of `DictionarySAE`: r_mag, b_mag [L], penalty []; b_enc is the paper's
    b_gate.
    """

    options = ("penalty", "penalty_rate")

    def setup(self):
        super().setup()
        zeros = nn.initializers.zeros
        self.r_mag = self.param("r_mag", zeros, (self.config.latents,))
        self.b_mag = self.param("b_mag", zeros, (self.config.latents,))
        self.penalty = self.param("penalty", nn.initializers.constant(self.config.penalty), ())

    def start(self, x: Float[Array, "T D"]) -> dict[str, Array]:
        """Gates that let as many latents through at the start as are asked for; see `relu`."""
        begun = super().start(x)
        return begun | self.start_bias(x, begun)

    def paths(self, x: Float[Array, "T D"]) -> tuple[Float[Array, "T L"], Float[Array, "T L"]]:
        """pi, and the magnitudes of the latents that it lets through."""
        products = self.products(x)
        gate = products + self.b_enc
        magnitude = jax.nn.relu(jnp.exp(self.r_mag) * products + self.b_mag)
        return gate, jnp.where(gate > 0, magnitude, 0)

    def acts(self, x: Float[Array, "T D"]) -> Float[Array, "T L"]:
        return self.paths(x)[1]

    def loss(self, x: Float[Array, "T D"], dead: Bool[Array, " L"] | None) -> Loss:
        del dead
        c, mean = self.config, self.shards.mean
        gate, acts = self.paths(x)
        through, fired = jax.nn.relu(gate), count_dense(acts)
        mse = mean(mean_square(self.residual(x, acts)))
        auxiliary = mean(mean_square(self.residual(x, through, frozen=True)))
        sparsity = mean(through.sum(-1).mean())
        l0 = mean(fired.sum() / x.shape[0])
        weight = sparsity_weight(self.penalty, l0, self.target) * self.unit**2
        return Loss(
            total=mse + weight * sparsity + auxiliary,
            mse=mse,
            terms={"sparsity": sparsity, "auxiliary": auxiliary, "penalty": self.penalty},
            firing=self.shards.total(fired),
            expert_load=one_load(),
            tracked={"penalty": steer(self.penalty, l0, self.target, c.penalty_rate)},
        )
