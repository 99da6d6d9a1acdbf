"""The many-expert autoencoder once more, slow and obvious: the tests hold every fast path to it.

Everything is dense: all experts encode every token, W^ is written out, unselected latents are
masked, and the code is a [T, N m] matrix.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from scale_sae_jax.config import SAEConfig

Params = dict[str, Array]


class Dense(NamedTuple):
    """Decoder coefficients [T, N m], reconstruction [T, D], router probabilities and selection."""

    codes: Float[Array, "T L"]
    x_hat: Float[Array, "T D"]
    probs: Float[Array, "T N"]
    selected: Bool[Array, "T N"]
    acts: Float[Array, "T N M"]
    gates: Float[Array, "T N"]


def forward(config: SAEConfig, params: Params, x: Float[Array, "T D"]) -> Dense:
    """Codes as training computes them (scope 'batch' compares the tokens of the batch)."""
    n, d, m = params["w_enc"].shape
    tokens = x.shape[0]

    scale = jax.lax.stop_gradient(params.get("scale", 1.0))
    centred = (x - params.get("b_router", params["b_dec"])) / scale
    logits = centred @ params["w_router"] + params["c_router"]
    probs = jax.nn.softmax(logits, -1)
    selected = _largest(logits + params.get("balance", 0), config.active)
    gates = _gates(config.gate, logits, probs, selected)

    encoder = _scaled_encoder(config, params)
    bias = params.get("b_enc", jnp.zeros((n, m)))
    centred = (x - params["b_dec"]) / scale
    acts = jax.nn.relu(jnp.einsum("td,ndm->tnm", centred, encoder) + bias)
    if config.gate_at == "code":
        acts = acts * gates[..., None]
    acts = jnp.where(selected[..., None], acts, 0)

    if config.topk_scope == "token":
        kept = _largest(acts.reshape(tokens, -1), config.k).reshape(acts.shape)
    elif config.topk_scope == "expert":
        kept = _largest(acts, config.k // config.active)
    else:
        kept = _largest(acts.reshape(1, -1), config.k * tokens).reshape(acts.shape)
    z = jnp.where(kept, acts, 0) * scale
    if config.gate_at == "output":
        z = z * gates[..., None]
    x_hat = jnp.einsum("tnm,nmd->td", z, params["w_dec"]) + params["b_dec"]
    return Dense(z.reshape(tokens, -1), x_hat, probs, selected, acts, gates)


def loss(
    config: SAEConfig, params: Params, x: Float[Array, "T D"], dead: Bool[Array, " L"]
) -> Float[Array, ""]:
    """mean |x - x^|^2 + alpha d N sum f P + AuxK."""
    n, d, m = params["w_enc"].shape
    out = forward(config, params, x)
    total = ((x - out.x_hat) ** 2).sum(-1).mean()

    chosen = _largest(out.probs, 1) if config.load_balance_from == "argmax" else out.selected
    share = chosen.mean(0) / chosen[0].sum()
    scale = jax.lax.stop_gradient(params.get("scale", 1.0))
    total += config.load_balance * scale**2 * d * n * (share * out.probs.mean(0)).sum()

    if config.auxk:
        slots = min(config.auxk_latents or d // 2, config.active * m)
        candidates = jnp.where(dead.reshape(n, m), out.acts, 0)
        kept = _largest(candidates.reshape(len(x), -1), slots).reshape(candidates.shape)
        z = jnp.where(kept, candidates, 0) * scale
        if config.gate_at == "output":
            z = z * out.gates[..., None]
        residual = jax.lax.stop_gradient(x - out.x_hat)
        rebuilt = jnp.einsum("tnm,nmd->td", z, params["w_dec"])
        aux = ((residual - rebuilt) ** 2).sum(-1).mean()
        total += config.auxk_weight * jnp.where(dead.any(), aux, 0)
    return total


def _largest(values: Float[Array, "... W"], k: int) -> Bool[Array, "... W"]:
    """Marks the k largest of the last axis; of equal values the first ones."""
    mine, other = values[..., :, None], values[..., None, :]
    place = jnp.arange(values.shape[-1])
    beaten_by = (other > mine) | ((other == mine) & (place[None, :] < place[:, None]))
    return beaten_by.sum(-1) < k


def _gates(kind: str, logits: Array, probs: Array, selected: Array) -> Array:
    if kind == "prob":
        return probs
    if kind == "renorm":
        return probs / jnp.where(selected, probs, 0).sum(-1, keepdims=True)
    if kind == "softmax_probs":
        return jax.nn.softmax(jnp.where(selected, probs, -jnp.inf), -1)
    if kind == "softmax_logits":
        return jax.nn.softmax(jnp.where(selected, logits, -jnp.inf), -1)
    return jnp.ones_like(probs)


def _scaled_encoder(config: SAEConfig, params: Params) -> Array:
    w = params["w_enc"]
    if config.feature_scaling == "none":
        return w
    omega = params["omega"][:, None, None]
    if config.feature_scaling == "gain":
        return (1 + omega) * w
    low = w.mean(-1)
    if config.feature_scaling == "mean_lp":
        low = low @ params["low_pass"]
    return low[..., None] + (1 + omega) * (w - low[..., None])
