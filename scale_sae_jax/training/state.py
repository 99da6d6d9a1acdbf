"""Everything a run must carry from one step to the next, as one pytree."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Integer, Key, UInt32

from scale_sae_jax.config import OptimConfig
from scale_sae_jax.parallel.mesh import EVERYWHERE, ON_EXPERTS, local_mesh, param_specs, placed
from scale_sae_jax.sae.autoencoder import Autoencoder, Params
from scale_sae_jax.training import precision


class TrainState(NamedTuple):
    """The state after `step` steps.

    key: data of the random key that the keys of all steps are derived from, see `key_of_step`.
    since_fired [L]: tokens since each latent last fired, saturating at the int32 maximum.
    fvu: running mean of the batches' FVU, by which checkpoints are ranked.
    bad_step: first step whose loss or gradient was not finite; -1 while there was none.
    """

    step: Int[Array, ""]
    key: UInt32[Array, "2"]
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
    key = jax.random.key(seed)
    params = sae.init(key, first_batch)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        key=jax.random.key_data(key),
        params=precision.kept_as(params, config.param_dtype),
        opt_state=precision.kept_as(tx.init(params), config.moment_dtype),
        since_fired=jnp.zeros(sae.latents, jnp.int32),
        fvu=jnp.ones(()),
        bad_step=jnp.full((), -1, jnp.int32),
    )


def key_of_step(state: TrainState) -> Key[Array, ""]:
    """The random key of the step to take."""
    return jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)


def layout(
    sae: Autoencoder, tx: optax.GradientTransformation, config: OptimConfig, mesh: Mesh
) -> TrainState:
    """Where each array of the state lies, as shardings."""
    shapes, by_expert = _shapes(sae, tx, config), sae.module.by_expert
    specs = TrainState(
        step=EVERYWHERE,
        key=EVERYWHERE,
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
    return _lying(_shapes(sae, tx, config), layout(sae, tx, config, mesh or local_mesh(1)))


def abstract_params(sae: Autoencoder, config: OptimConfig, mesh: Mesh | None = None) -> Params:
    """Those of `abstract`."""
    start = lambda: precision.kept_as(sae.init(jax.random.key(0)), config.param_dtype)  # noqa: E731
    shapes = jax.eval_shape(start)
    specs = param_specs(shapes, sae.module.by_expert)
    return _lying(shapes, placed(mesh or local_mesh(1), specs))


def _lying(shapes: Any, where: Any) -> Any:
    lies = lambda s, place: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place)  # noqa: E731
    return jax.tree.map(lies, shapes, where)


def _shapes(sae: Autoencoder, tx: optax.GradientTransformation, config: OptimConfig) -> TrainState:
    return jax.eval_shape(lambda: create(sae, tx, config, 0))
