"""How many latents fire for a token (L0), and how often each latent fires (density, dead)."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

# Quarter decades of log10 firing frequency, the same for every run so that runs can be compared.
DENSITY_EDGES = np.linspace(-8.0, 0.0, 33)


def firing_counts(
    ids: Int[Array, "T K"], fired: Bool[Array, "T K"], latents: int
) -> Int[Array, " L"]:
    """How many tokens each of the L latents fires for; slots that are not `fired` count nothing."""
    return jnp.zeros(latents, jnp.int32).at[ids].add(fired.astype(jnp.int32))


def l0_percentiles(l0: Int[np.ndarray, " T"]) -> dict[str, float | None]:
    """5th and 95th percentile over tokens: the least L0 that so many tokens stay within."""
    if not l0.size:
        return {"l0_p5": None, "l0_p95": None}
    low, high = np.percentile(l0, (5, 95), method="inverted_cdf")
    return {"l0_p5": float(low), "l0_p95": float(high)}


def density_metrics(
    firing: Int[np.ndarray, " L"], tokens: int
) -> dict[str, float | list[int] | list[float]]:
    """Share of latents that never fire, and the histogram of log10 frequency of the others.

    Args:
      firing: tokens that each latent fires for.
      tokens: tokens looked at, at least 1.
    """
    alive = firing[firing > 0]
    frequency = np.log10(alive / tokens).clip(DENSITY_EDGES[0], DENSITY_EDGES[-1])
    counts, _ = np.histogram(frequency, DENSITY_EDGES)
    return {
        "dead": float(np.mean(firing == 0)),
        "density": counts.tolist(),
        "density_edges": DENSITY_EDGES.tolist(),
    }
