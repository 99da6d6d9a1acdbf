"""What travels between the parts of an autoencoder: sparse codes and routing decisions."""

from typing import NamedTuple

from jaxtyping import Array, Bool, Float, Int


class Codes(NamedTuple):
    """Sparse codes of T activations in K slots each.

    values [T, K]: decoder coefficients, gates included; 0 in an unused slot.
    ids [T, K]: global latent id = expert * m + latent, int32.
    """

    values: Float[Array, "*T K"]
    ids: Int[Array, "*T K"]


class Slots(NamedTuple):
    """Which of the E * m latents of a token's experts have a slot, without their values.

    places [R, K]: where in E * m; None: K = E * m, all of them in their order.
    kept [R, K]: whether the slot is used; its value is 0 otherwise.
    pair, expert, ids [R, K]: the place of its expert among the token's experts, and this device's
    numbers of expert and latent.
    """

    places: Int[Array, "R K"] | None
    kept: Bool[Array, "R K"]
    pair: Int[Array, "R K"]
    expert: Int[Array, "R K"]
    ids: Int[Array, "R K"]


class Routing(NamedTuple):
    """Router output for T activations.

    logits, probs [T, N]: over all experts. experts [T, E]: the selected ones, ascending ids, so
    that a tie between latents of two experts goes to the lower global id.
    """

    logits: Float[Array, "*T N"]
    probs: Float[Array, "*T N"]
    experts: Int[Array, "*T E"]
