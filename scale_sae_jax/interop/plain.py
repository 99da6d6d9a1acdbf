"""Autoencoders with one dictionary as other libraries write them, in the unit of the activations.

    pre = (x - b_dec) W_enc + b_enc      codes = f(pre)      x^ = codes W_dec + b_dec

Every format is another set of names for these arrays. Ours divides activations by `scale` first;
since all f here are homogeneous, that goes into the biases and thresholds.
"""

import dataclasses
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from scale_sae_jax.config import SAEConfig
from scale_sae_jax.errors import UserError
from scale_sae_jax.sae.autoencoder import Autoencoder, Params
from scale_sae_jax.sae.jumprelu import SPEED
from scale_sae_jax.sae.registry import build

KINDS = {
    "relu": "relu",
    "topk": "topk",
    "jumprelu": "jumprelu",
    "batchtopk": "jumprelu",
    "matryoshka": "jumprelu",
    "gated": "gated",
}
LEAST_THRESHOLD = 1e-37


@dataclass(frozen=True)
class PlainSAE:
    """D coordinates, L latents. `kind` says what f is:

    relu      ReLU(pre)
    topk      the k largest of ReLU(pre)
    jumprelu  ReLU(pre) where pre > threshold
    gated     ReLU(exp(r_mag) (pre - b_enc) + b_mag) where pre > 0; b_enc is the gate's bias
    """

    kind: str
    k: int  # of topk; elsewhere the L0 that was asked for, 0 if it is not known
    w_enc: Float[np.ndarray, "D L"]
    w_dec: Float[np.ndarray, "L D"]
    b_enc: Float[np.ndarray, " L"]
    b_dec: Float[np.ndarray, " D"]
    threshold: Float[np.ndarray, " L"] | None = None
    r_mag: Float[np.ndarray, " L"] | None = None
    b_mag: Float[np.ndarray, " L"] | None = None

    @property
    def width(self) -> int:
        return self.w_enc.shape[0]

    @property
    def latents(self) -> int:
        return self.w_enc.shape[1]


def to_plain(sae: Autoencoder, params: Params) -> PlainSAE:
    """The same function in the unit of the activations, float32.

    BatchTopK and Matryoshka at inference are JumpReLU with one constant threshold. Raises UserError
    for many experts: a router masks their latents, which no single dictionary does.
    """
    kind = KINDS.get(sae.config.architecture)
    if kind is None:
        raise UserError(
            f"architecture '{sae.config.architecture}' with {sae.experts} experts is not one "
            "dictionary: a router masks the latents of all but the selected experts; export it to "
            "sae_lens as scale_moe"
        )
    p = {name: np.asarray(leaf, np.float64) for name, leaf in params.items()}
    scale = p["scale"]
    plain = PlainSAE(
        kind=kind,
        k=sae.k,
        w_enc=p["w_enc"].T,
        w_dec=p["w_dec"],
        b_enc=scale * p.get("b_enc", np.zeros(sae.latents)),
        b_dec=p["b_dec"],
    )
    if kind == "gated":
        plain = dataclasses.replace(plain, r_mag=p["r_mag"], b_mag=scale * p["b_mag"])
    elif kind == "jumprelu":
        own = np.exp(SPEED * p["log_threshold"]) if "log_threshold" in p else p["threshold"]
        plain = dataclasses.replace(plain, threshold=scale * own * np.ones(sae.latents))
    return plain


def from_plain(plain: PlainSAE) -> tuple[Autoencoder, Params]:
    """An autoencoder of ours that computes the same, with scale 1.

    A constant threshold becomes BatchTopK, others JumpReLU, whose thresholds are positive: one that
    is not never decides anything, for ReLU comes first, and becomes `LEAST_THRESHOLD`.
    """
    if plain.k > plain.latents:
        raise UserError(f"k = {plain.k} exceeds the {plain.latents} latents: the file is damaged")
    params = {
        "w_enc": plain.w_enc.T,
        "w_dec": plain.w_dec,
        "b_enc": plain.b_enc,
        "b_dec": plain.b_dec,
        "scale": np.ones(()),
    }
    architecture, penalty = plain.kind, {"penalty": np.ones(())}
    if plain.kind == "jumprelu" and np.ptp(plain.threshold) == 0:
        architecture = "batchtopk"
        params["threshold"] = plain.threshold[0]
    elif plain.kind == "jumprelu":
        threshold = np.maximum(plain.threshold, LEAST_THRESHOLD)
        params |= {"log_threshold": np.log(threshold) / SPEED} | penalty
    elif plain.kind == "gated":
        params |= {"r_mag": plain.r_mag, "b_mag": plain.b_mag} | penalty
    elif plain.kind == "relu":
        params |= penalty
    config = SAEConfig(
        architecture=architecture,
        latents=plain.latents,
        experts=1,
        active=1,
        k=plain.k or min(SAEConfig().k, plain.latents),
        decoder_norm="none",
    )
    return build(config, plain.width), {n: jnp.asarray(a, jnp.float32) for n, a in params.items()}


def as_jumprelu(plain: PlainSAE) -> PlainSAE:
    """The same function as JumpReLU with a threshold a latent.

    ReLU has threshold 0. Of Gated, pre > 0 says the same of the magnitude: it exceeds
    b_mag - exp(r_mag) b_gate (Gated SAE, arXiv 2404.16014, appendix on JumpReLU). Raises UserError
    for TopK, whose threshold differs from token to token.
    """
    if plain.kind == "jumprelu":
        return plain
    if plain.kind == "relu":
        return dataclasses.replace(plain, kind="jumprelu", threshold=np.zeros(plain.latents))
    if plain.kind == "gated":
        gain = np.exp(np.asarray(plain.r_mag, np.float64))
        return dataclasses.replace(
            plain,
            kind="jumprelu",
            w_enc=plain.w_enc * gain,
            b_enc=plain.b_mag,
            threshold=plain.b_mag - gain * plain.b_enc,
            r_mag=None,
            b_mag=None,
        )
    raise UserError(
        "topk is not a JumpReLU: what it keeps depends on a token's other latents, not on a "
        "threshold of each; train batchtopk or jumprelu for this format"
    )


def not_centred(plain: PlainSAE) -> Float[np.ndarray, " L"]:
    """The bias b_enc - b_dec W_enc of an encoder that sees x instead of x - b_dec."""
    return plain.b_enc - np.asarray(plain.b_dec, np.float64) @ np.asarray(plain.w_enc, np.float64)
