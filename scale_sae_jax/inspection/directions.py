"""Decoder directions side by side: each latent's nearest ones, and a map of all of them."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

BLOCK = 512  # latents compared with all others at a time


class Nearest(NamedTuple):
    """The k nearest other live latents of each of L, by decoder cosine, nearest first.

    Of the same expert (intra) and of other experts (inter); id -1 and cosine 0 where there are no
    more.
    """

    intra: Int[np.ndarray, "L k"]
    intra_cosine: Float[np.ndarray, "L k"]
    inter: Int[np.ndarray, "L k"]
    inter_cosine: Float[np.ndarray, "L k"]


def nearest(
    decoder: Float[Array | np.ndarray, "L D"], live: Bool[np.ndarray, " L"], experts: int, k: int
) -> Nearest:
    """Nearest live latents of all L, dead ones included. `experts` have L / experts rows each."""
    unit, live = _unit(jnp.asarray(decoder)), jnp.asarray(live)
    k, size = min(k, len(unit)), len(unit) // experts
    parts = [
        _nearest_of(unit, live, jnp.arange(start, start + BLOCK) % len(unit), size, k)
        for start in range(0, len(unit), BLOCK)
    ]
    whole = (np.concatenate(field)[: len(unit)] for field in zip(*parts, strict=True))
    return Nearest(*whole)


@partial(jax.jit, static_argnames=("size", "k"))
def _nearest_of(unit: Array, live: Array, ids: Array, size: int, k: int) -> Nearest:
    cosine = jnp.matmul(unit[ids], unit.T, precision=jax.lax.Precision.HIGHEST)
    every = jnp.arange(len(unit))
    same = ids[:, None] // size == every // size
    others = live & (ids[:, None] != every)

    def best(mask: Array) -> tuple[Array, Array]:
        values, found = jax.lax.top_k(jnp.where(mask, cosine, -jnp.inf), k)
        there = jnp.isfinite(values)
        return jnp.where(there, found, -1), jnp.where(there, values, 0.0)

    return Nearest(*best(others & same), *best(others & ~same))


class Plane(NamedTuple):
    """xy [L, 2]: decoder directions on two axes, within [-1, 1]; share: of their variance."""

    xy: Float[np.ndarray, "L 2"]
    share: float


def plane(decoder: Float[Array | np.ndarray, "L D"], live: Bool[np.ndarray, " L"]) -> Plane:
    """The two principal axes of the unit directions of live latents, and all latents on them.

    The inner product of unit directions is their cosine, so this is the plane that keeps most of
    the matrix of (centred) decoder cosines.
    """
    unit = np.asarray(_unit(jnp.asarray(decoder)))
    among = np.flatnonzero(live) if live.any() else np.arange(len(unit))
    blocks = [among[start : start + BLOCK] for start in range(0, len(among), BLOCK)]
    mean = sum(unit[ids].sum(0, dtype=np.float64) for ids in blocks) / len(among)
    centred = (unit[ids] - mean for ids in blocks)
    powers, axes = np.linalg.eigh(sum(rows.T @ rows for rows in centred))
    axes = axes[:, ::-1][:, :2]
    axes = axes * np.sign(axes[np.abs(axes).argmax(0), np.arange(axes.shape[1])])
    xy = unit @ axes - mean @ axes
    share = powers[::-1][:2].sum() / max(powers.sum(), np.finfo(float).tiny)
    return Plane(xy / max(np.abs(xy).max(), np.finfo(float).tiny), float(share))


def _unit(rows: Float[Array, "L D"]) -> Float[Array, "L D"]:
    norms = jnp.linalg.norm(rows, axis=-1, keepdims=True)
    return rows / jnp.maximum(norms, jnp.finfo(norms.dtype).tiny)
