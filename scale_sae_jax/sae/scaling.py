"""Feature scaling: the low-pass part of an expert's encoder stays, the rest is scaled by 1 + omega.

With L_i the low-pass part (the same vector a_i for all m latents) and H_i = W_i - L_i, the scaled
encoder is W^_i = L_i + (1 + omega_i) H_i = (1 + omega_i) W_i - omega_i L_i, so that

    x W^_i = (1 + omega_i) (x W_i) - omega_i (x . a_i):

one scalar a token and expert, and no second matrix (Scale SAE, section 3, feature scaling).
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def low_pass(
    w_enc: Float[Array, "N D M"], transform: Float[Array, "D D"] | None
) -> Float[Array, "N D"]:
    """a_i: the mean encoder direction of each expert, through `transform` if there is one."""
    mean = w_enc.mean(axis=-1)
    return mean if transform is None else mean @ transform


def scale_features(
    products: Float[Array, "T E M"],
    along: Float[Array, "T N"] | None,
    omega: Float[Array, " N"],
    experts: Int[Array, "T E"],
) -> Float[Array, "T E M"]:
    """x W^ from `products` = x W of the selected experts.

    Args:
      along: x . a_i of every token and expert; None scales the whole encoder (control `gain`).
    """
    scale = omega[experts][..., None]  # [T, E, 1]
    scaled = (1 + scale) * products
    if along is None:
        return scaled
    return scaled - scale * jnp.take_along_axis(along, experts, axis=-1)[..., None]
