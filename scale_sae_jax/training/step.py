"""The training step, a pure function of the state and a batch, and several of them in one call.

Several steps in one compiled call allocate their gradients and activations once. On CPUs, where
fresh memory comes page by page, that is a third of the time.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from scale_sae_jax.sae.autoencoder import Autoencoder
from scale_sae_jax.training import precision
from scale_sae_jax.training.state import TrainState, key_of_step

Metrics = dict[str, Float[Array, ""]]
FVU_DECAY = 0.98  # running mean over about 50 batches


def make_steps(
    sae: Autoencoder,
    tx: optax.GradientTransformation,
    rate: optax.Schedule,
    dead_after: int,
    shardings: tuple[Any, Any] | None = None,
) -> Callable[[TrainState, Array, Any, Array], tuple[TrainState, Metrics]]:
    """The jitted call (state, batches [C, T, D], n, mean [D]) -> (state, metrics of the last step).

    Takes a step on each of the first n >= 1 batches; n is not compiled in. The old state is
    donated.

    Args:
      shardings: of the new state and of the metrics; left to XLA if not given.
    """
    steps = repeated(make_step(sae, tx, rate, dead_after))
    return jax.jit(steps, donate_argnums=0, out_shardings=shardings)


def repeated(step: Callable[..., tuple[TrainState, Metrics]]) -> Callable[..., Any]:
    """(state, batches [C, ...], n, *rest): step(state, batch, *rest) on the first n batches."""

    def steps(state: TrainState, batches: Array, n: Array, *rest: Any):
        nothing = jax.eval_shape(step, state, batches[0], *rest)[1]
        metrics = jax.tree.map(lambda value: jnp.zeros(value.shape, value.dtype), nothing)

        def body(i, carry):
            return step(carry[0], batches[i], *rest)

        return jax.lax.fori_loop(0, n, body, (state, metrics))

    return steps


def make_step(
    sae: Autoencoder,
    tx: optax.GradientTransformation,
    rate: optax.Schedule,
    dead_after: int,
    together: str = "",
) -> Callable[[TrainState, Array, Array], tuple[TrainState, Metrics]]:
    """The step (state, x [T, D], mean [D]) -> (state, metrics).

    `mean` is the mean activation of the training stream, the reference of FVU. `dead_after` is in
    tokens. Metrics describe the batch before the update: loss and its terms, fvu, l0, dead (share
    of latents), load_cv (of the selected experts), grad_norm, lr.

    Args:
      together: name of the axis of a `jax.vmap` around the step. Latents are revived in all of its
        autoencoders, if any has a dead one: a condition of each would take both ways for all.
    """

    def step(state: TrainState, x: Array, mean: Array) -> tuple[TrainState, Metrics]:
        dead = state.since_fired >= dead_after
        before = precision.widen(state.params)
        keys = jax.random.split(key_of_step(state), 3)

        def gradient(params, revive):
            def objective(params):
                loss = sae.loss(params, x, revive, keys[2])
                return loss.total, loss

            return jax.value_and_grad(objective, has_aux=True)(params)

        if sae.revives:
            any_dead = jax.lax.pmax(dead.any(), together) if together else dead.any()
            (total, loss), grads = jax.lax.cond(
                any_dead, lambda p: gradient(p, dead), lambda p: gradient(p, None), before
            )
        else:
            (total, loss), grads = gradient(before, None)
        updates, opt_state = tx.update(grads, precision.widen(state.opt_state), before)
        params = optax.apply_updates(before, updates) | loss.tracked

        tokens = x.shape[0]
        limit = jnp.iinfo(jnp.int32).max - tokens
        silent = jnp.minimum(state.since_fired, limit) + tokens
        since_fired = jnp.where(loss.firing > 0, 0, silent)

        fvu = loss.mse * tokens / jnp.square(x - mean).sum()
        grad_norm = optax.tree.norm(grads)
        bad = ~(jnp.isfinite(total) & jnp.isfinite(grad_norm))
        metrics = {
            "loss": total,
            "mse": loss.mse,
            **loss.terms,
            "fvu": fvu,
            "l0": loss.firing.sum() / tokens,
            "dead": dead.mean(),
            "load_cv": loss.expert_load.std() / loss.expert_load.mean(),
            "grad_norm": grad_norm,
            "lr": rate(state.step),
        }
        new = TrainState(
            step=state.step + 1,
            key=state.key,
            params=precision.narrow(params, state.params, keys[0]),
            opt_state=precision.narrow(opt_state, state.opt_state, keys[1]),
            since_fired=since_fired,
            fvu=FVU_DECAY * state.fvu + (1 - FVU_DECAY) * fvu,
            bad_step=jnp.where((state.bad_step < 0) & bad, state.step, state.bad_step),
        )
        return new, metrics

    return step
