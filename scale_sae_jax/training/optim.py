"""Adam on parameters whose decoder stays normalised.

The decoder moves on the sphere: its gradient loses the component along each row before Adam, and
the update that Adam proposes is replaced by the step to the normalised point after it.
"""

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from scale_sae_jax.config import OptimConfig
from scale_sae_jax.sae.start import normalise


def learning_rate(config: OptimConfig, latents: int) -> float:
    """The set rate, or the published rule 2e-4 / sqrt(L / 2^14)."""
    return config.lr or 2e-4 / (latents / 2**14) ** 0.5


def schedule(
    config: OptimConfig, latents: int, steps: int, peak: Float[Array, ""] | None = None
) -> optax.Schedule:
    """Linear warm-up, constant, then linear to 0 over the last `decay` of the steps.

    Args:
      peak: the constant, where it is not `learning_rate` but known to the compiled program only.
    """
    peak = learning_rate(config, latents) if peak is None else peak
    warmup, decay = round(config.warmup * steps), round(config.decay * steps)

    def rate(step):
        rising = (step + 1) / max(warmup, 1)
        falling = (steps - step) / max(decay, 1)
        return peak * jnp.minimum(1.0, jnp.minimum(rising, falling))

    return rate


def optimiser(
    config: OptimConfig,
    latents: int,
    steps: int,
    decoder_norm: str,
    peak: Float[Array, ""] | None = None,
) -> optax.GradientTransformation:
    """Clip by global norm, project the decoder's gradient, Adam, learning rate, renormalise.

    Args:
      peak: see `schedule`.
    """
    return optax.chain(
        clip(config.clip) if config.clip else optax.identity(),
        optax.masked(tangent(), is_decoder) if decoder_norm != "none" else optax.identity(),
        optax.scale_by_adam(config.b1, config.b2, config.eps),
        optax.scale_by_learning_rate(schedule(config, latents, steps, peak)),
        optax.masked(retract(decoder_norm), is_decoder),
    )


def clip(limit: float) -> optax.GradientTransformation:
    """Shrinks the gradient to the global norm `limit`, as `optax.clip_by_global_norm`.

    By one factor, which XLA multiplies in where the gradient is used. A quotient of every element,
    as there, it computes beforehand and stores.
    """

    def update(updates, params):
        factor = jnp.minimum(1.0, limit / optax.tree.norm(updates))
        return jax.tree.map(lambda g: factor * g, updates)

    return optax.stateless(update)


def is_decoder(params: optax.Params) -> optax.Params:
    """True at the leaves named w_dec."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "w_dec", params)


def tangent() -> optax.GradientTransformation:
    """g - <g, d> d for every row d of the decoder.

    Unit rows lose their radial component exactly. With `decoder_norm='coordinate'` rows are not
    unit, and this is the raw projection of the published code.

    Products first, then the difference, which XLA computes where Adam uses it and does not store
    (on CPUs, JAX 0.10.2 does both at once and stores it, which takes as long).
    """

    def update(updates, params):
        def project(g, d):
            along = jax.lax.optimization_barrier((g * d).sum(-1, keepdims=True))
            return g - along * d

        return jax.tree.map(project, updates, params)

    return optax.stateless(update)


def retract(norm: str) -> optax.GradientTransformation:
    """The update that ends on the normalised point: normalise(w + u) - w."""

    def update(updates, params):
        return jax.tree.map(lambda u, w: normalise(w + u, norm) - w, updates, params)

    return optax.stateless(update)
