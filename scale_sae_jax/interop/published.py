"""Published checkpoints: the Scale SAE authors' many-expert modules, and the original Switch SAE.

Three layouts, told apart by their keys (m latents an expert, N experts, width D):

- Scale: `expert_modules.{i}.encoder.weight` [m, D], `.encoder.bias` [m], `.decoder` [m, D],
  `gate.weight` [N, D], `gate.bias` [N], `b_gate` [D], `b_dec` [D], `omega` [N],
  `lp_transform_encoder.weight` [D, D]; `beta` and `lp_transform_decoder.*` are never used;
- the same without `omega`: the authors' arm without feature scaling;
- Switch: `encoder.weight` [N m, D], `router.weight` [N, D], `decoder` [N m, D], `b_dec`,
  `b_router`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from scale_sae_jax.errors import UserError
from scale_sae_jax.sae.autoencoder import Autoencoder, Params
from scale_sae_jax.sae.presets import preset
from scale_sae_jax.sae.registry import build


def from_state_dict(
    state: Mapping[str, Any], k: int, active: int, heaviside: bool = False
) -> tuple[Autoencoder, Params]:
    """An autoencoder that computes what the published module with these weights computes.

    Args:
      state: tensor name to array (NumPy, JAX, or a CPU torch tensor without gradient).
      k: L0 of the checkpoint. active: its selected experts e. heaviside: the authors' switch that
        gives every selected expert weight 1.

    Raises UserError for a missing tensor, a wrong shape, or k and active that do not fit.
    """
    arrays = {name: np.asarray(value, dtype=np.float32) for name, value in state.items()}
    if "router.weight" in arrays:
        config, params = _switch(arrays, k, active)
    else:
        config, params = _many_experts(arrays, k, active)
    if heaviside:
        config = dataclasses.replace(config, gate="one")
    width = params["b_dec"].shape[0]
    if config.k > config.active * (config.latents // config.experts):
        raise UserError(f"k = {k} exceeds the latents of {active} active experts: lower k")
    if config.active > config.experts:
        raise UserError(f"active = {active} exceeds the checkpoint's {config.experts} experts")
    return build(config, width), {name: jnp.asarray(value) for name, value in params.items()}


def _many_experts(arrays: dict[str, np.ndarray], k: int, active: int):
    w_router = _get(arrays, "gate.weight", (None, None))
    n, d = w_router.shape
    first = _get(arrays, "expert_modules.0.encoder.weight", (None, d))
    m = first.shape[0]
    experts = [f"expert_modules.{i}" for i in range(n)]
    params = {
        "w_enc": np.stack([_get(arrays, f"{e}.encoder.weight", (m, d)).T for e in experts]),
        "b_enc": np.stack([_get(arrays, f"{e}.encoder.bias", (m,)) for e in experts]),
        "w_dec": np.stack([_get(arrays, f"{e}.decoder", (m, d)) for e in experts]),
        "b_dec": _get(arrays, "b_dec", (d,)),
        "w_router": w_router.T,
        "c_router": _get(arrays, "gate.bias", (n,)),
        "b_router": _get(arrays, "b_gate", (d,)),
    }
    scaling = "none"
    if "omega" in arrays:
        scaling = "mean_lp"
        params["omega"] = _get(arrays, "omega", (n,))
        params["low_pass"] = _get(arrays, "lp_transform_encoder.weight", (d, d)).T
    config = preset("authors", latents=n * m, experts=n, active=active, k=k)
    return dataclasses.replace(config, feature_scaling=scaling, tie_biases=False), params


def _switch(arrays: dict[str, np.ndarray], k: int, active: int):
    w_router = _get(arrays, "router.weight", (None, None))
    n, d = w_router.shape
    w_enc = _get(arrays, "encoder.weight", (None, d))
    latents = w_enc.shape[0]
    if latents % n:
        raise UserError(f"encoder.weight has {latents} rows, not a multiple of {n} experts")
    m = latents // n
    params = {
        "w_enc": w_enc.reshape(n, m, d).swapaxes(1, 2),
        "w_dec": _get(arrays, "decoder", (latents, d)).reshape(n, m, d),
        "b_dec": _get(arrays, "b_dec", (d,)),
        "w_router": w_router.T,
        "c_router": arrays.get("router.bias", np.zeros(n, np.float32)),
        "b_router": _get(arrays, "b_router", (d,)),
    }
    return preset("switch", latents=latents, experts=n, active=active, k=k), params


def _get(arrays: dict[str, np.ndarray], name: str, shape: tuple[int | None, ...]) -> np.ndarray:
    if name not in arrays:
        raise UserError(f"checkpoint has no tensor '{name}': it holds {', '.join(sorted(arrays))}")
    array = arrays[name]
    fits = array.ndim == len(shape) and all(
        want is None or have == want for have, want in zip(array.shape, shape, strict=True)
    )
    if not fits:
        raise UserError(f"checkpoint tensor '{name}' has shape {array.shape}, expected {shape}")
    return array
