"""CPU kernels of our own (`cpp/`), for products, decoding and the gradients of matrices.

    grouped_dot       `Kernel.dot`: runs of any length, without padding, each matrix read once
    sum_and_dots      `Kernel.sum_and_dots`: a token's rows are still in the cache for the second
    scatter           the sum of `gathered.py`
    scatter_columns   the same, into the columns of experts' encoders

Few of its experts' latents win a token, but XLA's scatters for CPUs add one number after the other,
so that products with dense codes of all of them are faster. These kernels sort the slots by latent,
and write each row, or each column of an encoder, once.

They are compiled at installation. Without a C++ compiler, or where what was compiled is for another
machine or of another version, `library` is None: there is no kernel of this name, and CPUs take
`loop`.
"""

import ctypes
from collections.abc import Sequence
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from scale_sae_jax.sae.gathered import wide

HANDLERS = (
    "scale_sae_grouped_dot",
    "scale_sae_sum_and_dots",
    "scale_sae_scatter",
    "scale_sae_scatter_columns",
)


def _load(folder: Path) -> ctypes.CDLL | None:
    """The library, whose functions XLA knows from then on."""
    paths = [folder / ("_native" + suffix) for suffix in EXTENSION_SUFFIXES]
    found = next((path for path in paths if path.exists()), None)
    if found is None:
        return None
    try:
        library = ctypes.CDLL(str(found))
        handlers = {name: getattr(library, name) for name in HANDLERS}
    except (OSError, AttributeError):
        return None
    for name, handler in handlers.items():
        jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(handler), platform="cpu")
    return library


library = _load(Path(__file__).parent)


def grouped_dot(
    x: Float[Array, "R A"],
    index: Int[Array, " P"],
    w: Float[Array, "N A B"],
    sizes: Int[Array, " N"],
) -> Float[Array, "P B"]:
    """Row p is x[index[p]] times the matrix of its expert; 0 beyond the last expert's run.

    Args:
      sizes: rows of each expert, in the order of the experts.
    """
    shapes = [(index.size, w.shape[2])]
    (products,) = _call("scale_sae_grouped_dot", shapes, x, index, w, sizes)
    return products


def sum_and_dots(
    start: Float[Array, "T D"],
    values: Float[Array, "T K"],
    ids: Int[Array, "T K"],
    rows: Float[Array, "L D"],
) -> tuple[Float[Array, "T D"], Float[Array, "T K"]]:
    """start_t + sum_k values[t, k] * rows[ids[t, k]], and its dot product with each row."""
    shapes = [start.shape, ids.shape]
    total, dots = _call("scale_sae_sum_and_dots", shapes, start, values, ids, rows)
    return total, dots


def scatter(
    values: Float[Array, "T K"], ids: Int[Array, "T K"], grad: Float[Array, "T D"], latents: int
) -> Float[Array, "L D"]:
    """Sum over t and k with ids[t, k] = l of values[t, k] * grad[t]; other ids are left out."""
    (rows,) = _call("scale_sae_scatter", [(latents, grad.shape[1])], values, ids, grad)
    return rows


def scatter_columns(
    start: Float[Array, "N D"],
    values: Float[Array, "T K"],
    ids: Int[Array, "T K"],
    x: Float[Array, "T D"],
    size: int,
) -> Float[Array, "N D M"]:
    """start_i in all M = size columns, plus, in that of latent i * M + m, its row of `scatter`."""
    shapes = [(*start.shape, size)]
    (columns,) = _call("scale_sae_scatter_columns", shapes, start, values, ids, x)
    return columns


def _call(name: str, shapes: Sequence[tuple[int, ...]], *arrays: Array) -> list[Array]:
    results = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    integers = [jnp.issubdtype(array.dtype, jnp.integer) for array in arrays]
    operands = [a.astype(jnp.int32) if i else wide(a) for a, i in zip(arrays, integers)]
    return jax.ffi.ffi_call(name, results, vmap_method="sequential")(*operands)
