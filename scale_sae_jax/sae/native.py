"""CPU kernels of our own (`native.cc`): the gradients of matrices, from winning latents alone.

Few of its experts' latents win a token, but XLA's scatters for CPUs add one number after the other,
so that products with dense codes of all of them are faster. These kernels sort the slots by latent,
and write each row, or each column of an encoder, once.

They are compiled at installation. Without a C++ compiler `library` is None, there is no kernel of
this name, and CPUs take `loop`.
"""

import ctypes
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from scale_sae_jax.sae.gathered import wide


def _load() -> ctypes.CDLL | None:
    """The library, whose functions XLA knows from then on."""
    paths = [Path(__file__).with_name("_native" + suffix) for suffix in EXTENSION_SUFFIXES]
    found = next((path for path in paths if path.exists()), None)
    if found is None:
        return None
    library = ctypes.CDLL(str(found))
    for name in ("scale_sae_scatter", "scale_sae_scatter_columns"):
        handler = jax.ffi.pycapsule(getattr(library, name))
        jax.ffi.register_ffi_target(name, handler, platform="cpu")
    return library


library = _load()


def scatter(
    values: Float[Array, "T K"], ids: Int[Array, "T K"], grad: Float[Array, "T D"], latents: int
) -> Float[Array, "L D"]:
    """Sum over t and k with ids[t, k] = l of values[t, k] * grad[t]; other ids are left out."""
    return _call("scale_sae_scatter", (latents, grad.shape[1]), values, ids, grad)


def scatter_columns(
    start: Float[Array, "N D"],
    values: Float[Array, "T K"],
    ids: Int[Array, "T K"],
    x: Float[Array, "T D"],
    size: int,
) -> Float[Array, "N D M"]:
    """start_i in all M = size columns, plus, in that of latent i * M + m, its row of `scatter`."""
    return _call("scale_sae_scatter_columns", (*start.shape, size), start, values, ids, x)


def _call(name: str, shape: tuple[int, ...], *arrays: Array) -> Array:
    call = jax.ffi.ffi_call(
        name, jax.ShapeDtypeStruct(shape, jnp.float32), vmap_method="sequential"
    )
    integers = [jnp.issubdtype(array.dtype, jnp.integer) for array in arrays]
    return call(*[a.astype(jnp.int32) if i else wide(a) for a, i in zip(arrays, integers)])
