"""Samples of synthetic activations, each a pure function of the features and its id.

Every random number is a hash of (seed, sample id, feature, purpose), so a sample does not depend on
what it is drawn with, and only the features in question cost any work: roots and free features in
every sample, children only where their parent fires. The three steps are those of `synthetic.py`.

Precision: a candidate is decided by comparing 31 uniform bits with the normal tail in float32, so
its probability is right to about 1e-6 of itself plus 5e-10. Other normals invert the distribution
function on 23 bits and end at 5.3 standard deviations.

What finds no slot is left out (a root with its children). `dropped` counts it: nothing, in the
first 262,144 samples of the benchmark's settings.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt32

from scale_sae_jax.activations.synthetic_features import Layout, World
from scale_sae_jax.sae.codes import Codes

TOGETHER, AT_ONCE = 64, 8  # samples and slots whose directions are added in one pass
NOISE, MAGNITUDE, CHOICE, FACTOR = range(4)  # purposes of random numbers
GOLDEN = 0x9E3779B9  # 2^32 over the golden ratio, odd


class Drawn(NamedTuple):
    """True codes of samples [T, S], and how many firing features found no slot [T]."""

    codes: Codes
    dropped: Array


@partial(jax.jit, static_argnames="layout")
def draw(world: World, ids: UInt32[Array | np.ndarray, " T"], layout: Layout) -> Drawn:
    """The true codes of the samples with these ids."""
    *levels, first_free, end = layout.starts
    with jax.default_matmul_precision("float32"):  # rounded factors would be another sample
        stream = Stream(world, jnp.asarray(ids))
        values, features, lost_roots = stream.scan(0, layout.starts[1], layout.root_slots)
        chosen = [(values, features)]
        for start, stop in zip(levels, levels[1:], strict=False):
            first_child = stop + (features - start) * layout.branching
            values, features = stream.children(values, features, first_child, layout.branching)
            chosen.append((values, features))
        *free, lost_free = stream.scan(first_free, end, layout.free_slots)
    values, features = (jnp.concatenate(part, 1) for part in zip(*chosen, free, strict=True))
    codes, lost = compact(values, features, layout.slots)
    return Drawn(codes, lost_roots + lost_free + lost)


@jax.jit
def compose(world: World, codes: Codes) -> Float[Array, "T D"]:
    """The samples with these codes, T a multiple of `TOGETHER`.

    As many slots are read as the fullest of `TOGETHER` samples has, `AT_ONCE` in one pass. Slots
    that are read in vain add 0, so a sample does not depend on its neighbours.
    """
    padding = (0, 0), (0, -codes.ids.shape[1] % AT_ONCE)
    values, ids = (jnp.pad(part, padding) for part in codes)

    def few(chunk: tuple[Array, Array]) -> Array:
        values, _ = chunk
        used = (values > 0).sum(axis=1).max()

        def add(number: Array, x: Array) -> Array:
            v, i = (jax.lax.dynamic_slice_in_dim(a, number * AT_ONCE, AT_ONCE, 1) for a in chunk)
            return x + sum(v[:, s, None] * world.directions[i[:, s]] for s in range(AT_ONCE))

        blank = jnp.zeros((TOGETHER, world.directions.shape[1]))
        return jax.lax.fori_loop(0, -(-used // AT_ONCE), add, blank)

    chunks = tuple(part.reshape(-1, TOGETHER, part.shape[1]) for part in (values, ids))
    return jax.lax.map(few, chunks).reshape(len(values), -1) + world.bias


class Stream:
    """The random numbers of T samples, and what fires by them."""

    def __init__(self, world: World, ids: Array):
        self.world = world
        self.keys = mix(ids + world.seeds[0]), mix(mix(ids ^ world.seeds[1]) + jnp.uint32(GOLDEN))
        self.factors = self.normals(FACTOR, jnp.arange(world.weights.shape[1]))  # [T, factors]

    def scan(self, start: int, stop: int, slots: int) -> tuple[Array, Array, Array]:
        """Magnitudes [T, slots] and features of the candidates among start ... stop - 1.

        The third is how many found no slot [T].
        """
        words = max(-(-(stop - start) // 32), 1)

        def by_bits(table: Array) -> Array:  # [stop - start, ...] as [32, words, ...]
            padding = ((0, 32 * words - (stop - start)), (0, 0))
            padded = jnp.pad(table[start:stop], padding, constant_values=1)
            return padded.reshape(32, words, -1)

        weights, scalars = by_bits(self.world.weights), by_bits(self.world.scalars)

        def pack(bit: Array, packed: Array) -> Array:
            features = start + bit * words + jnp.arange(words)
            shared = self.factors @ weights[bit].T
            marked = self.candidates(features, shared, scalars[bit]) & (features < stop)
            return packed | (marked.astype(jnp.uint32) << bit.astype(jnp.uint32))

        empty = jnp.zeros((self.factors.shape[0], words), jnp.uint32)
        columns, used, lost = set_bits(jax.lax.fori_loop(0, 32, pack, empty), slots)
        features = jnp.minimum(start + columns, len(self.world.scalars) - 1)
        return jnp.where(used, self.magnitudes(features), 0), features, lost

    def children(
        self,
        values: Float[Array, "T P"],
        parents: Int[Array, "T P"],
        first_child: Int[Array, "T P"],
        branching: int,
    ) -> tuple[Float[Array, "T P"], Int[Array, "T P"]]:
        """The magnitude and feature of the child of each parent, 0 where none fires."""
        brood = (first_child[..., None] + jnp.arange(branching)).reshape(len(parents), -1)
        shared = jnp.einsum("tcf,tf->tc", self.world.weights[brood], self.factors)
        fires = self.candidates(brood, shared, self.world.scalars[brood])
        alone = jnp.where(fires, self.magnitudes(brood), 0)
        lots = jnp.where(alone > 0, self.bits(CHOICE, brood) | 1, 0)
        drawn = lots.reshape(*parents.shape, branching).argmax(-1)
        child = jnp.take_along_axis(alone.reshape(*parents.shape, branching), drawn[..., None], -1)
        scale = values / self.world.scalars[parents, 2]
        return child[..., 0] * scale, first_child + drawn

    def candidates(
        self,
        features: Int[Array, "*T C"],
        shared: Float[Array, "T C"],
        scalars: Float[Array, "*T C 4"],
    ) -> Bool[Array, "T C"]:
        """Whether the copula's normals, of which the factors' part is `shared`, exceed the cuts."""
        cut, noise = scalars[..., 0], scalars[..., 1]
        tail = 0.5 * jax.lax.erfc((cut - shared) * (np.float32(np.sqrt(0.5)) / noise))
        bits = (self.bits(NOISE, features) >> 1).astype(jnp.int32)  # signed ones convert faster
        return bits.astype(jnp.float32) * np.float32(2**-31) < tail

    def magnitudes(self, features: Int[Array, "T C"]) -> Float[Array, "T C"]:
        """ReLU(mean + std * normal)."""
        mean, std = (self.world.scalars[features, column] for column in (2, 3))
        return jnp.maximum(mean + std * self.normals(MAGNITUDE, features), 0)

    def normals(self, purpose: int, features: Int[Array, "*T C"]) -> Float[Array, "T C"]:
        odd = (self.bits(purpose, features) >> 9).astype(jnp.float32) + 0.5  # over 2^23 in (0, 1)
        return np.float32(np.sqrt(2)) * jax.lax.erf_inv(odd * np.float32(2**-22) - 1)

    def bits(self, purpose: int, features: Int[Array, "*T C"]) -> UInt32[Array, "T C"]:
        """Random words: a hash of the samples' keys, the purpose and the feature."""
        lanes = features.astype(jnp.uint32) * jnp.uint32(4) + jnp.uint32(purpose)
        first, second = (key[:, None] for key in self.keys)
        return mix(first ^ (lanes * jnp.uint32(GOLDEN)), second)


def mix(x: UInt32[Array, "*T"], second: UInt32[Array, "*#T"] | int = 0) -> UInt32[Array, "*T"]:
    """Wellons' `lowbias32`, with a second key added half-way: one word alone would make many pairs
    of (sample, feature) share their number."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = ((x ^ (x >> 15)) + jnp.uint32(second)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)


def set_bits(
    packed: UInt32[Array, "T W"], slots: int
) -> tuple[Int[Array, "T S"], Bool[Array, "T S"], Int[Array, " T"]]:
    """Numbers bit * W + word of up to `slots` set bits of each row, in the order of words.

    Also which slots are used, the others hold any number, and how many set bits are left out.
    """
    words = packed.shape[1]
    counts = jax.lax.population_count(packed).astype(jnp.int32)
    upto = jnp.cumsum(counts, axis=1)
    slot = jnp.arange(slots)
    word = jnp.zeros((packed.shape[0], slots), jnp.int32)  # words that end before the slot's bit
    for step in (2**power for power in reversed(range(words.bit_length()))):
        last = jnp.minimum(word + step, words) - 1
        before = jnp.take_along_axis(upto, last, axis=1) <= slot
        word = jnp.where(before, last + 1, word)
    word = jnp.minimum(word, words - 1)
    rest = jnp.take_along_axis(packed, word, axis=1)
    rank = slot - jnp.take_along_axis(upto - counts, word, axis=1)
    bit = jnp.zeros_like(rank)
    for width in (16, 8, 4, 2, 1):  # is the bit in the lower half of what is left?
        low = (rest >> bit.astype(jnp.uint32)) & jnp.uint32(2**width - 1)
        below = jax.lax.population_count(low).astype(jnp.int32)
        upper = rank >= below
        bit, rank = bit + width * upper, rank - below * upper
    return bit * words + word, slot < upto[:, -1:], jnp.maximum(upto[:, -1] - slots, 0)


def compact(
    values: Float[Array, "T C"], features: Int[Array, "T C"], slots: int
) -> tuple[Codes, Int[Array, " T"]]:
    """The positive values in `slots` slots with their features, and how many are left out."""
    padded = jnp.pad(values > 0, ((0, 0), (0, -values.shape[1] % 32)))
    powers = jnp.uint32(1) << jnp.arange(32, dtype=jnp.uint32)[:, None]
    packed = (padded.reshape(len(values), 32, -1) * powers).sum(axis=1, dtype=jnp.uint32)
    columns, used, lost = set_bits(packed, slots)
    columns = jnp.minimum(columns, values.shape[1] - 1)
    taken = (jnp.take_along_axis(part, columns, axis=1) for part in (values, features))
    return Codes(*(jnp.where(used, part, 0) for part in taken)), lost
