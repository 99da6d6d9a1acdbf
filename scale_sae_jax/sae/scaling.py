"""Feature scaling: the low-pass part of an expert's encoder stays, the rest is scaled by 1 + omega.

With L_i the low-pass part (the same vector a_i for all m latents) and H_i = W_i - L_i, the scaled
encoder is W^_i = L_i + (1 + omega_i) H_i (Scale SAE, section 3, feature scaling), so that

    x W^_i = x W_i + omega_i (x W_i - x . a_i).

No second matrix is needed, and where a_i is the mean encoder direction, x . a_i is the mean of the
products x W_i.
"""

from jaxtyping import Array, Float


def scale_features(
    products: Float[Array, "*B"], omega: Float[Array, "*#B"], along: Float[Array, "*#B"]
) -> Float[Array, "*B"]:
    """x W^_i from `products` = x W_i and `along` = x . a_i; along = 0 scales the whole encoder."""
    return products + omega * (products - along)


def low_pass(w_enc: Float[Array, "N D M"], transform: Float[Array, "D D"]) -> Float[Array, "N D"]:
    """a_i = A mean_i: the mean encoder direction of each expert, through a learned map."""
    return w_enc.mean(axis=-1) @ transform
