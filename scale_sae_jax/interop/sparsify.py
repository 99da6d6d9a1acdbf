"""EleutherAI sparsify: ROOT/layers.8/cfg.json and sae.safetensors, TopK both ways.

    encoder.weight [L, D], encoder.bias [L], W_dec [L, D], b_dec [D]

sparsify encodes with the k largest of ReLU((x - b_dec) W + b) and decodes (values, ids), so the
decoder of any autoencoder can be used there with codes that were made here.
"""

from pathlib import Path
from typing import Any

import numpy as np

from scale_sae_jax.errors import UserError
from scale_sae_jax.interop import files
from scale_sae_jax.interop.experts import one_expert, to_experts
from scale_sae_jax.interop.plain import PlainSAE, from_plain, to_plain
from scale_sae_jax.sae.autoencoder import Autoencoder, Params
from scale_sae_jax.sae.registry import has_experts

CFG, WEIGHTS = "cfg.json", "sae.safetensors"
KIND = "a sparsify folder"
NAMES = {
    "w_enc": "encoder.weight",
    "b_enc": "encoder.bias",
    "w_dec": "W_dec",
    "b_dec": "b_dec",
}


def save(
    sae: Autoencoder, params: Params, root: Path, hookpoint: str, expert: int | None = None
) -> None:
    """Writes root/hookpoint, which must be new or empty.

    Args:
      hookpoint: sparsify's name of the module that is read, such as 'layers.8'.
      expert: this expert alone, where that is the same function on its tokens.

    Raises UserError for any but TopK: sparsify has no other rule by which latents survive.
    """
    if expert is None and has_experts(sae.config):
        raise UserError(
            "many experts are not one TopK SAE: a router masks the latents of all but the selected "
            "experts; write the decoder alone with --decoder_only, or export to sae_lens as "
            "scale_moe"
        )
    if expert is None:
        plain = to_plain(sae, params)
    else:
        plain = one_expert(to_experts(sae, params), expert)
    if plain.kind != "topk":
        raise UserError(
            f"sparsify encodes with top-k only, and '{plain.kind}' keeps latents by another rule: "
            "write the decoder alone with --decoder_only, or export to sae_lens"
        )
    arrays = {"w_enc": plain.w_enc.T, "b_enc": plain.b_enc}
    arrays |= {"w_dec": plain.w_dec, "b_dec": plain.b_dec}
    _write(root, hookpoint, {NAMES[n]: a for n, a in arrays.items()}, plain.k)


def save_decoder(sae: Autoencoder, params: Params, root: Path, hookpoint: str) -> None:
    """Writes a folder of which sparsify can use `decode` alone; exact for every architecture.

    Its codes come from `sae.encode`. The encoder is NaN, so that one who encodes with it sees so.
    """
    rows = np.asarray(sae.decoder(params))
    decoder = {"W_dec": rows, "b_dec": np.asarray(params["b_dec"])}
    decoder = files.finite(decoder, str(root / hookpoint))
    nothing = {
        "encoder.weight": np.full(rows.shape, np.nan, np.float32),
        "encoder.bias": np.full(len(rows), np.nan, np.float32),
    }
    _write(root, hookpoint, decoder, sae.k, nothing)


def _write(
    root: Path,
    hookpoint: str,
    tensors: files.Tensors,
    k: int,
    unchecked: files.Tensors | None = None,
) -> None:
    latents, d = tensors["W_dec"].shape
    folder = files.inside(root, hookpoint, "hookpoint")
    arrays = files.finite(tensors, str(folder)) | dict(unchecked or {})
    files.fresh(folder)
    files.write_tensors(folder / WEIGHTS, arrays)
    files.write_object(
        folder / CFG,
        {
            "activation": "topk",
            "expansion_factor": max(1, latents // d),
            "normalize_decoder": True,
            "num_latents": latents,
            "k": k,
            "multi_topk": False,
            "skip_connection": False,
            "transcode": False,
            "d_in": d,
        },
    )


def load(folder: Path) -> tuple[Autoencoder, Params]:
    """Ours from a folder with cfg.json and sae.safetensors, such as ROOT/layers.8.

    Raises UserError for damaged files, weights that are not finite (as those of a decoder alone),
    and for group-max, skip connections and transcoders, which ours cannot express.
    """
    source, where = str(folder / CFG), str(folder / WEIGHTS)
    cfg = files.read_cfg(folder / CFG, KIND)
    _check(cfg, source)
    d, k = files.size(cfg, "d_in", source), files.size(cfg, "k", source)
    tensors = files.read_tensors(folder / WEIGHTS)
    files.refuse_others(tensors, set(NAMES.values()), where)
    if np.isnan(tensors.get("encoder.weight", 0)).all():
        raise UserError(
            f"{where} holds a decoder alone, without what encodes: load the run that it is of, or "
            "export that to sae_lens"
        )
    w_enc = files.take(tensors, "encoder.weight", (None, d), where)
    latents = len(w_enc)
    if cfg.get("num_latents") not in (None, 0, latents):
        raise UserError(f"{source}: num_latents does not say {latents}, which {WEIGHTS} has")
    plain = PlainSAE(
        kind="topk",
        k=k,
        w_enc=w_enc.T,
        b_enc=files.take(tensors, "encoder.bias", (latents,), where),
        w_dec=files.take(tensors, "W_dec", (latents, d), where),
        b_dec=files.take(tensors, "b_dec", (d,), where),
    )
    return from_plain(plain)


def _check(cfg: dict[str, Any], source: str) -> None:
    if cfg.get("activation", "topk") != "topk":
        raise UserError(f"{source}: activation = {cfg['activation']!r:.40}, and ours has only topk")
    for name, what in (
        ("skip_connection", "adds a linear map of its input"),
        ("transcode", "predicts other activations than it reads"),
    ):
        if cfg.get(name, False):
            raise UserError(f"{source}: {name} is set: that coder {what}, which ours does not")
