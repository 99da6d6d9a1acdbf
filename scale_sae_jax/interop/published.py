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
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from scale_sae_jax.errors import UserError
from scale_sae_jax.interop.files import as_numpy, read_tensors, refuse_others, take
from scale_sae_jax.sae.autoencoder import Autoencoder, Params
from scale_sae_jax.sae.presets import preset
from scale_sae_jax.sae.registry import build

EXPERT = ("encoder.weight", "encoder.bias", "decoder")
SHARED = {"gate.weight", "gate.bias", "b_gate", "b_dec", "omega", "lp_transform_encoder.weight"}
SWITCH = {"encoder.weight", "decoder", "b_dec", "router.weight", "router.bias", "b_router"}


def from_state_dict(
    state: Mapping[str, Any], k: int, active: int, heaviside: bool = False
) -> tuple[Autoencoder, Params]:
    """An autoencoder that computes what the published module with these weights computes.

    Args:
      state: tensor name to array (NumPy, JAX, or a torch tensor). `beta` and
        `lp_transform_decoder.*`, which nothing uses, may be among them.
      k: L0 of the checkpoint. active: its selected experts e. heaviside: the authors' switch that
        gives every selected expert weight 1.

    Raises UserError for a tensor that is missing, of a wrong shape, not finite or not known, and
    for k and active that do not fit.
    """
    for name, value in (("k", k), ("active", active)):
        if value < 1:
            raise UserError(f"{name} = {value} must be at least 1: give the checkpoint's own")
    arrays = {name: as_numpy(value) for name, value in state.items()}
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


def from_file(
    path: str | Path, k: int, active: int, heaviside: bool = False
) -> tuple[Autoencoder, Params]:
    """`from_state_dict` of a .safetensors file or a `torch.save`d state dict (needs PyTorch).

    Raises UserError also for a file that is missing or damaged, and for a pickle that holds more
    than tensors: it could run code.
    """
    return from_state_dict(read_tensors(Path(path)), k, active, heaviside)


def _many_experts(arrays: dict[str, np.ndarray], k: int, active: int):
    w_router = take(arrays, "gate.weight", (None, None))
    n, d = w_router.shape
    first = take(arrays, "expert_modules.0.encoder.weight", (None, d))
    m = first.shape[0]
    experts = [f"expert_modules.{i}" for i in range(n)]
    known = {f"{e}.{part}" for e in experts for part in EXPERT}
    unused = {name for name in arrays if name == "beta" or name.startswith("lp_transform_decoder.")}
    refuse_others(arrays, known | SHARED | unused, "checkpoint")
    params = {
        "w_enc": np.stack([take(arrays, f"{e}.encoder.weight", (m, d)).T for e in experts]),
        "b_enc": np.stack([take(arrays, f"{e}.encoder.bias", (m,)) for e in experts]),
        "w_dec": np.stack([take(arrays, f"{e}.decoder", (m, d)) for e in experts]),
        "b_dec": take(arrays, "b_dec", (d,)),
        "w_router": w_router.T,
        "c_router": take(arrays, "gate.bias", (n,)),
        "b_router": take(arrays, "b_gate", (d,)),
    }
    scaling, load_balance = "none", 0.01
    if "omega" in arrays:
        scaling, load_balance = "mean_lp", 3.0
        params["omega"] = take(arrays, "omega", (n,))
        params["low_pass"] = take(arrays, "lp_transform_encoder.weight", (d, d)).T
    config = preset("authors", latents=n * m, experts=n, active=active, k=k)
    config = dataclasses.replace(
        config, feature_scaling=scaling, tie_biases=False, load_balance=load_balance
    )
    return config, params


def _switch(arrays: dict[str, np.ndarray], k: int, active: int):
    w_router = take(arrays, "router.weight", (None, None))
    n, d = w_router.shape
    w_enc = take(arrays, "encoder.weight", (None, d))
    latents = w_enc.shape[0]
    if latents % n:
        raise UserError(f"encoder.weight has {latents} rows, not a multiple of {n} experts")
    m = latents // n
    refuse_others(arrays, SWITCH, "checkpoint")
    params = {
        "w_enc": w_enc.reshape(n, m, d).swapaxes(1, 2),
        "w_dec": take(arrays, "decoder", (latents, d)).reshape(n, m, d),
        "b_dec": take(arrays, "b_dec", (d,)),
        "w_router": w_router.T,
        "c_router": take({"router.bias": np.zeros(n)} | arrays, "router.bias", (n,)),
        "b_router": take(arrays, "b_router", (d,)),
    }
    return preset("switch", latents=latents, experts=n, active=active, k=k), params
