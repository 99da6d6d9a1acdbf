"""The many-expert autoencoder as it is written to files, in the unit of the activations.

    logits = (x - b_router) W_router + c_router     the e largest (plus balance) choose the experts
    acts   = ReLU((x - b_dec) W_enc + b_enc)        of the chosen experts, others 0
    codes  = gate and top-k as the options say;  x^ = codes W_dec + b_dec

The scaled encoder W^ = L + (1 + omega) (W - L) (Scale SAE, arXiv 2511.05745, section 3) is written
out, and the input scale goes into the router's weights, the biases and the threshold.
"""

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from scale_sae_jax.config import CHOICES, SAEConfig
from scale_sae_jax.errors import UserError
from scale_sae_jax.interop.plain import PlainSAE
from scale_sae_jax.sae.autoencoder import Autoencoder, Params
from scale_sae_jax.sae.registry import build, has_experts

BALANCE_RATE = 1e-3  # of an imported balance, should it be trained on; any but 0 keeps it


@dataclass(frozen=True)
class ExpertSAE:
    """N experts of M = L / N latents; latent id = expert * M + latent. Options as `SAEConfig`'s.

    balance: added to the logits for the choice of experts alone; None if there is none.
    threshold: of topk_scope 'batch', where a latent above it counts; else None.
    """

    active: int
    k: int
    gate: str
    gate_at: str
    topk_scope: str
    w_enc: Float[np.ndarray, "D L"]
    b_enc: Float[np.ndarray, " L"]
    w_dec: Float[np.ndarray, "L D"]
    b_dec: Float[np.ndarray, " D"]
    w_router: Float[np.ndarray, "D N"]
    c_router: Float[np.ndarray, " N"]
    b_router: Float[np.ndarray, " D"]
    balance: Float[np.ndarray, " N"] | None = None
    threshold: Float[np.ndarray, ""] | None = None

    @property
    def width(self) -> int:
        return self.w_enc.shape[0]

    @property
    def experts(self) -> int:
        return self.w_router.shape[1]

    @property
    def latents(self) -> int:
        return self.w_enc.shape[1]


def to_experts(sae: Autoencoder, params: Params) -> ExpertSAE:
    """The same function with the encoder's scaling and the input scale folded, float64."""
    c = sae.config
    if not has_experts(c):
        raise UserError(f"architecture '{c.architecture}' has no experts: export it as it is")
    p = {name: np.asarray(leaf, np.float64) for name, leaf in params.items()}
    scale = p.get("scale", np.float64(1))
    return ExpertSAE(
        active=c.active,
        k=c.k,
        gate=c.gate,
        gate_at=c.gate_at,
        topk_scope=c.topk_scope,
        w_enc=scaled_encoder(c.feature_scaling, p).transpose(1, 0, 2).reshape(sae.width, -1),
        b_enc=scale * p["b_enc"].reshape(-1) if "b_enc" in p else np.zeros(c.latents),
        w_dec=p["w_dec"].reshape(-1, sae.width),
        b_dec=p["b_dec"],
        w_router=p["w_router"] / scale,
        c_router=p["c_router"],
        b_router=p.get("b_router", p["b_dec"]),
        balance=p.get("balance"),
        threshold=np.asarray(scale * p["threshold"]) if c.topk_scope == "batch" else None,
    )


def scaled_encoder(
    feature_scaling: str, params: dict[str, np.ndarray]
) -> Float[np.ndarray, "N D M"]:
    """W^ = L + (1 + omega) (W - L), with the low-pass part L that the option names."""
    w = params["w_enc"]
    if feature_scaling == "none":
        return w
    low = w.mean(-1)
    if feature_scaling == "mean_lp":
        low = low @ params["low_pass"]
    if feature_scaling == "gain":
        low = np.zeros_like(low)
    low = low[..., None]
    return low + (1 + params["omega"][:, None, None]) * (w - low)


def from_experts(given: ExpertSAE) -> tuple[Autoencoder, Params]:
    """An autoencoder of ours that computes the same, without feature scaling or input scale.

    Raises UserError for options that are unknown or do not fit the sizes.
    """
    n, latents = given.experts, given.latents
    for name in ("gate", "gate_at", "topk_scope"):
        value, allowed = getattr(given, name), CHOICES[f"sae.{name}"]
        if value not in allowed:
            raise UserError(f"scale_moe: {name} = {value!r} must be one of {', '.join(allowed)}")
    if latents % n or given.active > n or given.k > given.active * (latents // n):
        raise UserError(
            f"scale_moe: {latents} latents, {n} experts, {given.active} active and k = {given.k} "
            "do not fit each other: the file is damaged"
        )
    if given.topk_scope == "expert" and given.k % given.active:
        raise UserError(f"scale_moe: k = {given.k} cannot be split over {given.active} experts")
    params = {
        "w_enc": given.w_enc.reshape(given.width, n, -1).transpose(1, 0, 2),
        "b_enc": given.b_enc.reshape(n, -1),
        "w_dec": given.w_dec.reshape(n, -1, given.width),
        "b_dec": given.b_dec,
        "w_router": given.w_router,
        "c_router": given.c_router,
        "b_router": given.b_router,
    }
    if given.topk_scope == "batch":
        params["threshold"] = given.threshold
    if given.balance is not None:
        params["balance"] = given.balance
    config = SAEConfig(
        latents=latents,
        experts=n,
        active=given.active,
        k=given.k,
        gate=given.gate,
        gate_at=given.gate_at,
        topk_scope=given.topk_scope,
        feature_scaling="none",
        decoder_norm="none",
        balance_rate=0.0 if given.balance is None else BALANCE_RATE,
    )
    return build(config, given.width), {n: jnp.asarray(a, jnp.float32) for n, a in params.items()}


def one_expert(given: ExpertSAE, expert: int) -> PlainSAE:
    """Expert number `expert` alone: exact on the tokens that the router sends to it.

    Raises UserError where it is not the same function: with several active experts their latents
    compete for the same k slots, and a weight other than 1 comes from the router.
    """
    if not 0 <= expert < given.experts:
        raise UserError(f"expert {expert} is out of range: there are 0 to {given.experts - 1}")
    if given.active > 1:
        raise UserError(
            f"one expert alone is not this autoencoder: {given.active} experts are active a token, "
            "and their latents share one code; only with active = 1 can experts be split"
        )
    if given.gate == "prob":
        raise UserError(
            "one expert alone is not this autoencoder: gate 'prob' multiplies its code by the "
            "router's probability; only experts with weight 1 (gate 'one' or 'renorm') can be split"
        )
    m = given.latents // given.experts
    own = slice(expert * m, (expert + 1) * m)
    by_threshold = given.topk_scope == "batch"
    return PlainSAE(
        kind="jumprelu" if by_threshold else "topk",
        k=given.k,
        w_enc=given.w_enc[:, own],
        w_dec=given.w_dec[own],
        b_enc=given.b_enc[own],
        b_dec=given.b_dec,
        threshold=np.full(m, given.threshold) if by_threshold else None,
    )
