"""What travels between the parts of an autoencoder: sparse codes and routing decisions."""

from typing import NamedTuple

from jaxtyping import Array, Float, Int


class Codes(NamedTuple):
    """Sparse codes of T activations in K slots each.

    values [T, K]: decoder coefficients, gates included; 0 in an unused slot.
    ids [T, K]: global latent id = expert * m + latent, int32.
    """

    values: Float[Array, "*T K"]
    ids: Int[Array, "*T K"]


class Routing(NamedTuple):
    """Router output for T activations.

    logits, probs [T, N]: over all experts. experts [T, E]: the selected ones, ascending ids, so
    that a tie between latents of two experts goes to the lower global id.
    """

    logits: Float[Array, "*T N"]
    probs: Float[Array, "*T N"]
    experts: Int[Array, "*T E"]
