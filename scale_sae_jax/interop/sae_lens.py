"""SAELens 6 directories: cfg.json and sae_weights.safetensors, in and out, without SAELens.

Architectures `standard`, `topk`, `jumprelu` and `gated` are SAELens' own. A many-expert autoencoder
is `scale_moe`, which SAELens runs once `scale_sae_jax.interop.sae_lens_plugin` is imported:

    W_enc [D, L], b_enc [L], W_dec [L, D], b_dec [D], W_router [D, N], b_router_in [D],
    b_router_out [N]; balance [N] and threshold [] where its options have them
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from scale_sae_jax.errors import UserError
from scale_sae_jax.interop import files
from scale_sae_jax.interop.experts import ExpertSAE, from_experts, one_expert, to_experts
from scale_sae_jax.interop.plain import PlainSAE, from_plain, to_plain
from scale_sae_jax.sae.autoencoder import Autoencoder, Params
from scale_sae_jax.sae.registry import has_experts

CFG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
FORMAT = "6.54.12"  # the SAELens whose layout this is
KIND = "a SAELens directory"
ARCHITECTURES = {"relu": "standard", "topk": "topk", "jumprelu": "jumprelu", "gated": "gated"}
OPTIONS = ("active", "k", "gate", "gate_at", "topk_scope")  # of scale_moe, by their own names
# Tensor names of SAELens for the fields of PlainSAE and ExpertSAE.
COMMON = {"w_enc": "W_enc", "w_dec": "W_dec", "b_dec": "b_dec"}
PLAIN = {
    "standard": COMMON | {"b_enc": "b_enc"},
    "topk": COMMON | {"b_enc": "b_enc"},
    "jumprelu": COMMON | {"b_enc": "b_enc", "threshold": "threshold"},
    "gated": COMMON | {"b_enc": "b_gate", "b_mag": "b_mag", "r_mag": "r_mag"},
}
EXPERTS = COMMON | {
    "b_enc": "b_enc",
    "w_router": "W_router",
    "c_router": "b_router_out",
    "b_router": "b_router_in",
    "balance": "balance",
    "threshold": "threshold",
}


def save(
    sae: Autoencoder,
    params: Params,
    folder: Path,
    metadata: Mapping[str, Any] | None = None,
    expert: int | None = None,
) -> None:
    """Writes the directory. Everything is folded into float32 weights for raw activations.

    Args:
      folder: new or empty.
      metadata: about model and text, see `origin`; SAELens' own names.
      expert: this expert alone, where that is the same function on its tokens.

    Raises UserError where that cannot be expressed, for weights that are not finite, and for a
    folder that holds something.
    """
    cfg, tensors = describe(sae, params, metadata or {}, expert)
    tensors = files.finite(tensors, str(folder))
    files.fresh(folder)
    files.write_tensors(folder / WEIGHTS, tensors)
    files.write_object(folder / CFG, cfg)


def describe(
    sae: Autoencoder, params: Params, metadata: Mapping[str, Any], expert: int | None = None
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """cfg.json and the tensors, by SAELens' names."""
    if has_experts(sae.config):
        given = to_experts(sae, params)
        if expert is None:
            return _describe_experts(given, metadata)
        plain = one_expert(given, expert)
    elif expert is not None:
        raise UserError(f"architecture '{sae.config.architecture}' has no experts to choose from")
    else:
        plain = to_plain(sae, params)
    architecture = ARCHITECTURES[plain.kind]
    cfg = _common(architecture, plain.width, plain.latents, metadata)
    if architecture == "topk":
        cfg |= {"k": plain.k, "rescale_acts_by_decoder_norm": False}
    else:
        cfg["metadata"]["l0_target"] = plain.k
    return cfg, {theirs: getattr(plain, ours) for ours, theirs in PLAIN[architecture].items()}


def _describe_experts(given: ExpertSAE, metadata: Mapping[str, Any]):
    cfg = _common("scale_moe", given.width, given.latents, metadata)
    cfg |= {"n_experts": given.experts, "balanced": given.balance is not None}
    cfg |= {name: getattr(given, name) for name in OPTIONS}
    tensors = {theirs: getattr(given, ours) for ours, theirs in EXPERTS.items()}
    return cfg, {name: array for name, array in tensors.items() if array is not None}


def _common(architecture: str, width: int, latents: int, metadata: Mapping[str, Any]):
    return {
        "architecture": architecture,
        "d_in": width,
        "d_sae": latents,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {"sae_lens_version": FORMAT, "trained_with": "scale_sae_jax"} | dict(metadata),
    }


def load(folder: Path) -> tuple[Autoencoder, Params]:
    """An autoencoder of ours that computes what SAELens computes with this directory.

    Raises UserError for files that are missing, damaged or do not fit each other, for weights that
    are not finite, and for settings that ours cannot express, with the reason.
    """
    source = str(folder / CFG)
    cfg = files.read_cfg(folder / CFG, KIND)
    architecture = files.field(cfg, "architecture", str, source)
    if architecture != "scale_moe" and architecture not in PLAIN:
        known = ", ".join((*PLAIN, "scale_moe"))
        raise UserError(f"{source}: architecture '{architecture}' is not read: only {known}")
    _check(cfg, source)
    tensors = files.read_tensors(folder / WEIGHTS)
    if architecture == "scale_moe":
        return from_experts(_read_experts(cfg, tensors, folder))
    return from_plain(_read_plain(architecture, cfg, tensors, folder))


def _check(cfg: dict[str, Any], source: str) -> None:
    metadata = cfg.get("metadata")
    version = metadata.get("sae_lens_version") if isinstance(metadata, dict) else None
    major = str(version).split(".")[0]
    if not major.isdecimal() or int(major) < 6:
        raise UserError(f"{source} is older than SAELens 6: load and save it with SAELens 6 first")
    if cfg.get("normalize_activations", "none") != "none":
        raise UserError(
            f"{source}: normalize_activations = {cfg['normalize_activations']!r:.40} scales each "
            "activation at run time, which ours does not: fold it into the weights and save again"
        )
    if cfg.get("reshape_activations", "none") != "none":
        raise UserError(f"{source}: reshape_activations is for attention heads, which ours is not")


def _read_plain(
    architecture: str, cfg: dict[str, Any], tensors: files.Tensors, folder: Path
) -> PlainSAE:
    source, where = str(folder / CFG), str(folder / WEIGHTS)
    d, latents = (files.size(cfg, name, source) for name in ("d_in", "d_sae"))
    shapes = {"w_enc": (d, latents), "w_dec": (latents, d), "b_dec": (d,)}
    names = PLAIN[architecture]
    files.refuse_others(tensors, set(names.values()), where)
    arrays = {
        ours: files.take(tensors, theirs, shapes.get(ours, (latents,)), where)
        for ours, theirs in names.items()
    }
    if not files.field(cfg, "apply_b_dec_to_input", bool, source):
        shift = arrays["b_dec"] @ arrays["w_enc"]  # ours subtracts b_dec from x first
        arrays["b_enc"] = arrays["b_enc"] + shift
        if architecture == "gated":
            arrays["b_mag"] = arrays["b_mag"] + np.exp(arrays["r_mag"]) * shift
    if architecture == "topk":
        k = files.size(cfg, "k", source)
        if cfg.get("rescale_acts_by_decoder_norm", False):
            norm = np.linalg.norm(arrays["w_dec"], axis=1)
            if not norm.all():
                raise UserError(f"{where}: a row of W_dec is 0, and codes are divided by its norm")
            arrays["w_enc"], arrays["b_enc"] = arrays["w_enc"] * norm, arrays["b_enc"] * norm
            arrays["w_dec"] = arrays["w_dec"] / norm[:, None]
    else:
        asked = cfg["metadata"].get("l0_target")
        k = asked if type(asked) is int and 0 < asked <= latents else 0
    kind = {theirs: ours for ours, theirs in ARCHITECTURES.items()}[architecture]
    return PlainSAE(kind=kind, k=k, **arrays)


def _read_experts(cfg: dict[str, Any], tensors: files.Tensors, folder: Path) -> ExpertSAE:
    source, where = str(folder / CFG), str(folder / WEIGHTS)
    d, m, n = (files.size(cfg, name, source) for name in ("d_in", "d_sae", "n_experts"))
    if cfg.get("apply_b_dec_to_input") is not True:
        raise UserError(f"{source}: apply_b_dec_to_input must be true of scale_moe")
    options = {name: files.field(cfg, name, str, source) for name in OPTIONS[2:]}
    options |= {name: files.size(cfg, name, source) for name in OPTIONS[:2]}
    absent = set() if files.field(cfg, "balanced", bool, source) else {"balance"}
    if options["topk_scope"] != "batch":
        absent.add("threshold")
    names = {ours: theirs for ours, theirs in EXPERTS.items() if ours not in absent}
    files.refuse_others(tensors, set(names.values()), where)
    shapes = {
        "w_enc": (d, m),
        "b_enc": (m,),
        "w_dec": (m, d),
        "b_dec": (d,),
        "w_router": (d, n),
        "c_router": (n,),
        "b_router": (d,),
        "balance": (n,),
        "threshold": (),
    }
    arrays = {o: files.take(tensors, theirs, shapes[o], where) for o, theirs in names.items()}
    return ExpertSAE(**options, **arrays)
