"""What the devices of a mesh tell each other when experts lie on some of them and tokens on all.

The mesh has two axes. Along `data` lie different tokens. Along `expert` lie different experts; a
token lies on one device there as well, its own, but its neighbours along `expert` see it for a
while, so that each can do the work of its experts:

    gather          own tokens -> tokens of the whole row of devices along `expert`
    sum_to_owner    partial sums over experts for the row's tokens -> the sums, each on its owner
    mean, total     over all tokens, or over those of all devices with the same experts

Without a mesh (one device) each of these returns what it is given. The methods need to run inside
`jax.shard_map` otherwise; `parallel/experts.py` is where that is.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

DATA, EXPERT = "data", "expert"


@dataclass(frozen=True)
class Shards:
    """Sizes of the mesh's axes."""

    data: int = 1
    expert: int = 1

    def local(self, experts: int) -> int:
        """How many of the N experts a device has."""
        return experts // self.expert

    def first(self, experts: int) -> Int[Array, ""] | int:
        """Global id of the first expert of this device."""
        return jax.lax.axis_index(EXPERT) * self.local(experts) if self.expert > 1 else 0

    def gather(self, own: Any) -> Any:
        """A pytree of arrays [T, ...] of own tokens as [T * expert, ...]."""
        if self.expert == 1:
            return own
        return jax.tree.map(lambda a: jax.lax.all_gather(a, EXPERT, tiled=True), own)

    def sum_to_owner(self, partial: Any) -> Any:
        """A pytree of arrays [T * expert, ...], summed over `expert`: rows [T, ...] of own tokens.

        Its gradient is `gather`.
        """
        if self.expert == 1:
            return partial
        return jax.tree.map(lambda a: jax.lax.psum_scatter(a, EXPERT, tiled=True), partial)

    def mean(self, value: Any) -> Any:
        """Means over all devices."""
        return jax.lax.pmean(value, (DATA, EXPERT)) if self.data * self.expert > 1 else value

    def total(self, value: Any) -> Any:
        """Sums over all devices."""
        return jax.lax.psum(value, (DATA, EXPERT)) if self.data * self.expert > 1 else value

    def total_over_data(self, value: Any) -> Any:
        """Sums over the devices with the same experts."""
        return jax.lax.psum(value, DATA) if self.data > 1 else value

    def least(self, value: Float[Array, ""]) -> Float[Array, ""]:
        """The smallest over all devices."""
        return jax.lax.pmin(value, (DATA, EXPERT)) if self.data * self.expert > 1 else value

    def before(self, count: Int[Array, ""]) -> Int[Array, ""]:
        """The sum of `count` over the devices before this one, in the order of the mesh."""
        if self.data * self.expert == 1:
            return jnp.zeros((), count.dtype)
        everyone = jax.lax.all_gather(count, (DATA, EXPERT))
        place = jax.lax.axis_index((DATA, EXPERT))
        return jnp.where(jnp.arange(everyone.size) < place, everyone, 0).sum()
