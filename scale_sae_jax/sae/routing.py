"""Which experts a token uses, with what weight, and the loss that keeps them all in use."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from scale_sae_jax.sae.codes import Routing
from scale_sae_jax.sae.shards import Shards


def route(
    x: Float[Array, "T D"],
    offset: Float[Array, " D"],
    w_router: Float[Array, "D N"],
    c_router: Float[Array, " N"],
    active: int,
    balance: Float[Array, " N"] | None = None,
) -> Routing:
    """p = softmax((x - b) W + c) and the `active` most probable experts (Scale SAE, section 3).

    They are those with the largest logits, whose order remains where float32 makes several p 0.

    Args:
      x: activations less some constant; offset: that constant less b.
      balance: added to the logits for the choice of experts alone, see `rebalanced`.
    """
    logits = x @ w_router + (c_router + offset @ w_router)
    probs = jax.nn.softmax(logits, axis=-1)
    _, experts = jax.lax.top_k(logits if balance is None else logits + balance, active)
    return Routing(logits, probs, jnp.sort(experts, axis=-1))


def gates(routing: Routing, kind: str) -> Float[Array, "T E"]:
    """Weight of each selected expert; `kind` is the option `gate`.

    'renorm' and 'softmax_probs' are constant 1 when one expert is active: the router then gets no
    gradient from the reconstruction.
    """
    p = jnp.take_along_axis(routing.probs, routing.experts, axis=-1)  # [T, E]
    if kind == "prob":
        return p
    if kind == "renorm":
        return p / p.sum(-1, keepdims=True)
    if kind == "softmax_probs":
        return jax.nn.softmax(p, axis=-1)
    if kind == "softmax_logits":
        chosen = jnp.take_along_axis(routing.logits, routing.experts, axis=-1)
        return jax.nn.softmax(chosen, axis=-1)
    if kind == "one":
        return jnp.ones_like(p)
    raise ValueError(f"unknown gate {kind!r}")


def expert_share(
    routing: Routing, count: str, shards: Shards = Shards()
) -> Float[Array, " N"]:
    """f_i, the share of the routing that expert i got in the whole batch; sums to 1.

    Args:
      count: 'argmax' counts the most probable expert of each token, 'selected' all E of them.
    """
    tokens, experts = routing.probs.shape
    if count == "argmax":
        chosen = routing.probs.argmax(-1)[:, None]
    else:
        chosen = routing.experts
    counts = jnp.zeros(experts).at[chosen.reshape(-1)].add(1.0)
    return shards.mean(counts / chosen.size)


def rebalanced(
    balance: Float[Array, " N"], load: Float[Array, " N"], rate: float
) -> Float[Array, " N"]:
    """The balance for the next batch: experts with less than their share of the load gain `rate`.

    Evens out the load without an auxiliary loss (Wang et al. 2024, arXiv 2408.15664).
    """
    return balance + rate * jnp.sign(1 / load.shape[0] - load)


def load_balance(
    routing: Routing, width: int, count: str, shards: Shards = Shards()
) -> Float[Array, ""]:
    """d N sum_i f_i P_i, least (= d) when experts share the tokens evenly (Switch SAE, eq. 7).

    P_i is the mean router probability; the gradient flows through it alone.
    """
    share = jax.lax.stop_gradient(expert_share(routing, count, shards))
    return width * share.shape[0] * jnp.vdot(share, shards.mean(routing.probs.mean(0)))
