"""Everything a run must carry from one step to the next, as one pytree."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from scale_sae_jax.config import OptimConfig
from scale_sae_jax.sae.autoencoder import Autoencoder
from scale_sae_jax.training import precision


class TrainState(NamedTuple):
    """The state after `step` steps.

    since_fired [N * M]: tokens since each latent last fired, saturating at the int32 maximum.
    fvu: running mean of the batches' FVU, by which checkpoints are ranked.
    bad_step: first step whose loss or gradient was not finite; -1 while there was none.
    """

    step: Int[Array, ""]
    params: Any
    opt_state: Any
    since_fired: Int[Array, " L"]
    fvu: Float[Array, ""]
    bad_step: Int[Array, ""]


def create(
    sae: Autoencoder,
    tx: optax.GradientTransformation,
    config: OptimConfig,
    seed: int,
    first_batch: Float[Array, "T D"] | None = None,
) -> TrainState:
    """The state before the first step, in the dtypes that `config` keeps it in."""
    params = sae.init(jax.random.key(seed), first_batch)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=precision.kept_as(params, config.param_dtype),
        opt_state=precision.kept_as(tx.init(params), config.moment_dtype),
        since_fired=jnp.zeros(sae.latents, jnp.int32),
        fvu=jnp.ones(()),
        bad_step=jnp.full((), -1, jnp.int32),
    )


def abstract(
    sae: Autoencoder, tx: optax.GradientTransformation, config: OptimConfig
) -> TrainState:
    """Shapes and dtypes of the state, for restoring; computes nothing."""
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = jax.eval_shape(lambda: create(sae, tx, config, 0))
    return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=device), shapes)
