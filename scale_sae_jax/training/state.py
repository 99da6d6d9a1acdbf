"""Everything a run must carry from one step to the next, as one pytree."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Integer

from scale_sae_jax.config import OptimConfig
from scale_sae_jax.parallel.mesh import EVERYWHERE, ON_EXPERTS, local_mesh, param_specs, placed
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
    seed: int | Integer[Array, ""],
    first_batch: Float[Array, "T D"] | None = None,
) -> TrainState:
    """The state before the first step, in the dtypes that `config` keeps it in.

    Call it in a `jax.jit` with `layout` as its out_shardings, so that no device holds all of it.
    """
    params = sae.init(jax.random.key(seed), first_batch)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=precision.kept_as(params, config.param_dtype),
        opt_state=precision.kept_as(tx.init(params), config.moment_dtype),
        since_fired=jnp.zeros(sae.latents, jnp.int32),
        fvu=jnp.ones(()),
        bad_step=jnp.full((), -1, jnp.int32),
    )


def layout(
    sae: Autoencoder, tx: optax.GradientTransformation, config: OptimConfig, mesh: Mesh
) -> TrainState:
    """Where each array of the state lies, as shardings."""
    shapes, by_expert = _shapes(sae, tx, config), sae.module.by_expert
    specs = TrainState(
        step=EVERYWHERE,
        params=param_specs(shapes.params, by_expert),
        opt_state=param_specs(shapes.opt_state, by_expert),
        since_fired=ON_EXPERTS if by_expert else EVERYWHERE,
        fvu=EVERYWHERE,
        bad_step=EVERYWHERE,
    )
    return placed(mesh, specs)


def abstract(
    sae: Autoencoder,
    tx: optax.GradientTransformation,
    config: OptimConfig,
    mesh: Mesh | None = None,
) -> TrainState:
    """Shapes, dtypes and shardings of the state, for restoring; computes nothing.

    Args:
      mesh: where it is to lie; on the first device of this process if not given.
    """
    mesh = mesh or local_mesh(1)
    return jax.tree.map(
        lambda s, where: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where),
        _shapes(sae, tx, config),
        layout(sae, tx, config, mesh),
    )


def _shapes(sae: Autoencoder, tx: optax.GradientTransformation, config: OptimConfig) -> TrainState:
    return jax.eval_shape(lambda: create(sae, tx, config, 0))
