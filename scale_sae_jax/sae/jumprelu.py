"""JumpReLU SAE (arXiv 2407.14435): a learned threshold for each latent, and a penalty on L0 itself.

Both are piecewise constant in the threshold. Their gradients are those of the expected loss,
estimated by a rectangular kernel of width `bandwidth` around it (section 3, equations 11 and 12).
"""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from scale_sae_jax.sae.dictionary import DictionarySAE
from scale_sae_jax.sae.losses import Loss, mean_square
from scale_sae_jax.sae.sparsity import count_dense, one_load, sparsity_weight, steer

TANH_SLOPE = 4.0
# Adam moves each entry alike. An encoder row turns by its own length in some 30 steps of 1e-3; a
# threshold whose logarithm moved so would take 1000.
SPEED = 10.0


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def jump(
    pre: Float[Array, "T L"], threshold: Float[Array, " L"], bandwidth: float
) -> Float[Array, "T L"]:
    """pre where it exceeds the threshold, else 0; d/d threshold = -threshold/bandwidth K."""
    return jnp.where(pre > threshold, pre, 0)


def _jump_forward(pre, threshold, bandwidth):
    return jump(pre, threshold, bandwidth), (pre, threshold)


def _jump_backward(bandwidth, saved, grad):
    pre, threshold = saved
    near = _kernel(pre, threshold, bandwidth)
    d_threshold = -(threshold / bandwidth) * (near * grad).sum(0)
    return jnp.where(pre > threshold, grad, 0), d_threshold


jump.defvjp(_jump_forward, _jump_backward)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def fires(
    pre: Float[Array, "T L"], threshold: Float[Array, " L"], bandwidth: float
) -> Float[Array, "T L"]:
    """1 where pre exceeds the threshold, else 0; d/d threshold = -1/bandwidth K, d/d pre = 0."""
    return (pre > threshold).astype(jnp.float32)


def _fires_forward(pre, threshold, bandwidth):
    return fires(pre, threshold, bandwidth), (pre, threshold)


def _fires_backward(bandwidth, saved, grad):
    pre, threshold = saved
    near = _kernel(pre, threshold, bandwidth)
    return jnp.zeros_like(pre), -(near * grad).sum(0) / bandwidth


fires.defvjp(_fires_forward, _fires_backward)


def _kernel(pre: Array, threshold: Array, bandwidth: float) -> Bool[Array, "T L"]:
    """K((pre - threshold) / bandwidth), 1 within half a bandwidth of the threshold."""
    return jnp.abs(pre - threshold) < bandwidth / 2


class JumpReLUSAE(DictionarySAE):
    """f = JumpReLU_threshold(W_enc z + b_enc), threshold = exp(10 log_threshold).

    Loss: |x - x^|^2 + scale^2 d penalty S, with S of `l0_loss`:
    'quadratic' (L0 / k - 1)^2, which has its least value at the target, or
    'tanh' sum_i tanh(4 f_i |W_dec_i|) / k, with a penalty that is steered to the target.

    Beside the parameters of `DictionarySAE`: log_threshold [L], penalty [].
    """

    options = ("penalty", "penalty_rate", "l0_loss", "bandwidth")

    def setup(self):
        super().setup()
        zeros = nn.initializers.zeros
        self.log_threshold = self.param("log_threshold", zeros, (self.config.latents,))
        self.penalty = self.param("penalty", nn.initializers.constant(self.config.penalty), ())

    def start(self, x: Float[Array, "T D"]) -> dict[str, Array]:
        """Thresholds at which each latent fires for its share of the target L0."""
        begun = super().start(x)
        level = jnp.maximum(self.start_level(x, begun), 1e-3)
        return begun | {"log_threshold": jnp.log(level) / SPEED}

    @property
    def threshold(self) -> Float[Array, " L"]:
        return jnp.exp(SPEED * self.log_threshold)

    def pre(self, x: Float[Array, "T D"]) -> Float[Array, "T L"]:
        return self.products(x) + self.b_enc

    def acts(self, x: Float[Array, "T D"]) -> Float[Array, "T L"]:
        return jump(self.pre(x), self.threshold, self.config.bandwidth)

    def loss(self, x: Float[Array, "T D"], dead: Bool[Array, " L"] | None) -> Loss:
        del dead
        c, pre, threshold = self.config, self.pre(x), self.threshold
        acts = jump(pre, threshold, c.bandwidth)
        mean, fired = self.shards.mean, count_dense(acts)
        mse = mean(mean_square(self.residual(x, acts)))
        l0 = mean(fired.sum() / x.shape[0])
        if c.l0_loss == "quadratic":
            weight = jax.lax.stop_gradient(self.penalty)
            count = mean(fires(pre, threshold, c.bandwidth).sum(-1).mean())
            sparsity = jnp.square(count / self.target - 1)
            after = self.penalty
        else:
            strength = TANH_SLOPE * acts * jnp.linalg.norm(self.w_dec, axis=-1)
            sparsity = mean(jnp.tanh(strength).sum(-1).mean()) / self.target
            weight = sparsity_weight(self.penalty, l0, self.target)
            after = steer(self.penalty, l0, self.target, c.penalty_rate)
        return Loss(
            total=mse + weight * self.width * self.unit**2 * sparsity,
            mse=mse,
            terms={"sparsity": sparsity, "penalty": self.penalty},
            firing=self.shards.total(fired),
            expert_load=one_load(),
            tracked={"penalty": after},
        )
