"""Activations with known features: a sparse sum of directions, drawn anew for every sample id.

The settings of SynthSAEBench-16k (Chanin & Garriga-Alonso, arXiv 2602.14687) are the defaults. A
sample is x = bias + sum_i a_i * direction_i, with a >= 0 drawn in three steps:

1. Feature i is a candidate when a standard normal exceeds its cut. The normals correlate through
   `rank` factors (a Gaussian copula); the cuts give falling, Zipf-like firing rates.
2. The first features form trees, numbered level by level over all trees; the rest are free. A child
   needs its parent, and of the candidates among siblings one, drawn uniformly, fires. To make up
   for both, its candidate rate is rate / parent's rate * (1 + other siblings' rates / parent's
   rate), at most 1, as published. That is a first-order correction: siblings whose rates add up to
   more than their parent's still fire less often than their rates say.
3. A magnitude is ReLU(mean_i + std_i * normal); a child's is multiplied by its parent's, itself
   scaled, over the parent's mean_i. A feature whose magnitude is 0 does not fire.

Every random number is a hash of (seed, sample id, feature, purpose), so a sample does not depend on
what it is drawn with, and only the features in question cost any work: roots and free features in
every sample, children only where their parent fires.

Precision: a candidate is decided by comparing 31 uniform bits with the normal tail in float32, so
its probability is right to about 1e-6 of itself plus 5e-10. Other normals invert the distribution
function on 23 bits and end at 5.3 standard deviations.

A sample has slots for a fixed number of roots, of free features and of features in all, so many
Poisson deviations over the mean; what is beyond is left out (a root with its children).
`dropped` counts it: nothing, in the first 262,144 samples of the benchmark's settings.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int, Int64, UInt32
from scipy.special import ndtri

from scale_sae_jax.config import SyntheticConfig
from scale_sae_jax.errors import UserError
from scale_sae_jax.sae.codes import Codes

CHUNK = 1024  # samples drawn in one call
TOGETHER, AT_ONCE = 64, 8  # samples and slots whose directions are added in one pass
MEAN_SAMPLES = 16_384
MAX_SAMPLES = 2**31  # so that ids are 32-bit words
# Free features spread most: they are rare, and all the likelier when the factors are large.
ROOT_DEVIATIONS, FREE_DEVIATIONS, ALL_DEVIATIONS = 8, 24, 12
NOISE, MAGNITUDE, CHOICE, FACTOR = range(4)  # purposes of random numbers
GOLDEN = 0x9E3779B9  # 2^32 over the golden ratio, odd


class Layout(NamedTuple):
    """What the shapes of a sample depend on.

    starts: the first feature of each level of the trees, then the first free one, then F.
    """

    starts: tuple[int, ...]
    branching: int
    root_slots: int
    free_slots: int
    slots: int


class World(NamedTuple):
    """The features, and the `seeds` [2] of the samples.

    directions [F, D]: unit rows. bias [D]. weights [F, factors]: on the factors of the copula.
    scalars [F, 4]: cut, standard deviation of the noise, mean and standard deviation of the
    magnitude.
    """

    seeds: Array
    directions: Array
    bias: Array
    weights: Array
    scalars: Array


class Drawn(NamedTuple):
    """True codes of samples [T, S], and how many firing features found no slot [T]."""

    codes: Codes
    dropped: Array


@dataclass(frozen=True, eq=False)
class SyntheticActivations:
    """Samples first_id ... first_id + n - 1 of a world; reads as `ActivationArray` does.

    mean [D] and median_norm are estimated on training samples, in the held-out part too. A
    row is the same, bit for bit, whatever it is read with.
    """

    world: World
    layout: Layout
    first_id: int
    n: int
    mean: Float32[np.ndarray, " D"]
    median_norm: float

    @property
    def features(self) -> Float32[Array, "F D"]:
        """The true directions, unit rows."""
        return self.world.directions

    @property
    def d(self) -> int:
        return self.features.shape[1]

    def rows(self, ids: Int64[np.ndarray, " T"]) -> Float32[np.ndarray, "T D"]:
        """The samples with these ids, in 0 ... n - 1."""
        return np.concatenate(self._read(ids, lambda drawn: compose(self.world, drawn.codes)))

    def codes(self, ids: Int64[np.ndarray, " T"]) -> Codes:
        """Their true codes: magnitudes [T, S] and feature ids [T, S], both 0 in an unused slot."""
        parts = self._read(ids, lambda drawn: drawn.codes)
        return Codes(*(jnp.asarray(np.concatenate(part)) for part in zip(*parts, strict=True)))

    def dropped(self, ids: Int64[np.ndarray, " T"]) -> Int[np.ndarray, " T"]:
        """How many roots and free features these samples lack for want of a slot."""
        return np.concatenate(self._read(ids, lambda drawn: drawn.dropped))

    def _read(self, ids: np.ndarray, part: Callable[[Drawn], Any]) -> list[Any]:
        """`part` of the samples, as NumPy, by chunks of one size, so that it compiles once."""
        if ids.size and not 0 <= ids.min() <= ids.max() < self.n:
            raise IndexError(f"sample ids must lie in 0 ... {self.n - 1}")
        chunks = []
        for start in range(0, max(len(ids), 1), CHUNK):
            chunk = (ids[start : start + CHUNK] + self.first_id).astype(np.uint32)
            padded = np.pad(chunk, (0, CHUNK - len(chunk)))
            chunks.append((part(draw(self.world, padded, self.layout)), len(chunk)))
        return [jax.tree.map(lambda p, n=n: np.asarray(p)[:n], drawn) for drawn, n in chunks]


def open_synthetic(config: SyntheticConfig) -> tuple[SyntheticActivations, SyntheticActivations]:
    """Training and held-out samples of the same features.

    Raises UserError for settings that contradict each other.
    """
    check_synthetic(config)
    shared = {
        "world": make_world(config),
        "layout": make_layout(config),
    }
    blank = {"mean": np.zeros(config.d, np.float32), "median_norm": 0.0}
    training = SyntheticActivations(first_id=0, n=config.samples, **shared, **blank)
    sample = training.rows(np.arange(min(config.samples, MEAN_SAMPLES)))
    shared |= {
        "mean": sample.mean(axis=0, dtype=np.float64).astype(np.float32),
        "median_norm": float(np.median(np.linalg.norm(sample, axis=1))),
    }
    return (
        SyntheticActivations(first_id=0, n=config.samples, **shared),
        SyntheticActivations(first_id=config.samples, n=config.heldout, **shared),
    )


def check_synthetic(config: SyntheticConfig) -> None:
    """Raises UserError for settings that contradict each other."""
    forest = _starts(config)[-2]
    at_least_1 = ("d", "samples", "heldout", "roots", "branching", "factors")
    not_negative = ("seed", "depth", "correlation", "std_spread", "bias")
    rules = [(getattr(config, name) > 0, f"{name} must be at least 1") for name in at_least_1]
    rules += [(getattr(config, name) >= 0, f"{name} must not be negative") for name in not_negative]
    rules += [
        (
            config.features >= max(forest, 2),
            f"features = {config.features} must be at least 2 and hold the {forest} of the trees: "
            "raise it, or lower roots, branching or depth",
        ),
        (
            config.samples + config.heldout <= MAX_SAMPLES,
            f"samples and heldout must not exceed {MAX_SAMPLES} together",
        ),
        (
            0 < config.min_rate <= config.max_rate < 1 and config.exponent > 0,
            "rates must obey 0 < min_rate <= max_rate < 1, and exponent must be positive",
        ),
        (
            min(config.first_mean, config.last_mean) > 0,
            "first_mean and last_mean must be positive",
        ),
    ]
    for holds, message in rules:
        if not holds:
            raise UserError(f"config.synthetic.{message}")


def firing_rates(config: SyntheticConfig) -> Float[np.ndarray, " F"]:
    """Nominal firing rates: rank^-exponent, mapped linearly onto min_rate ... max_rate."""
    falling = np.arange(1, config.features + 1.0) ** -config.exponent
    share = (falling - falling[-1]) / (falling[0] - falling[-1])
    return config.min_rate + (config.max_rate - config.min_rate) * share


def candidate_rates(config: SyntheticConfig) -> Float[np.ndarray, " F"]:
    """P(candidate), by step 2 above."""
    nominal, starts = firing_rates(config), _starts(config)
    rates = nominal.copy()
    for start, stop, end in zip(starts, starts[1:-1], starts[2:-1], strict=False):
        parent = nominal[start:stop, None]
        child = nominal[stop:end].reshape(-1, config.branching)
        others = child.sum(axis=1, keepdims=True) - child
        rates[stop:end] = (child / parent * (1 + others / parent)).ravel()
    return np.minimum(rates, 1.0)


def make_layout(config: SyntheticConfig) -> Layout:
    rates, starts = firing_rates(config), _starts(config)

    def slots(mean: float, deviations: int) -> int:
        return int(np.ceil(mean + deviations * np.sqrt(mean)))

    roots, free = rates[: starts[1]].sum(), rates[starts[-2] :].sum()
    root_slots = min(slots(roots, ROOT_DEVIATIONS), starts[1])
    free_slots = min(slots(free, FREE_DEVIATIONS), starts[-1] - starts[-2])
    most = root_slots * (config.depth + 1) + free_slots
    every = slots(roots * (config.depth + 1) + free, ALL_DEVIATIONS)
    return Layout(starts, config.branching, root_slots, free_slots, min(every, most))


def make_world(config: SyntheticConfig) -> World:
    """The features of these settings."""
    rng, count = np.random.default_rng(config.seed), config.features
    directions = tight_frame(rng.standard_normal((count, config.d), np.float32))
    bias = rng.standard_normal(config.d)
    weights = config.correlation * rng.standard_normal((count, config.factors))
    norms = np.linalg.norm(weights, axis=1, keepdims=True)
    weights *= np.minimum(1, np.sqrt(0.99) / np.maximum(norms, 1e-9))  # noise keeps 1 % at least
    scalars = [
        -ndtri(candidate_rates(config)),
        np.sqrt(1 - np.sum(weights**2, axis=1)),
        np.linspace(config.first_mean, config.last_mean, count),
        np.abs(config.std_mean + config.std_spread * rng.standard_normal(count)),
    ]
    return World(
        seeds=jnp.asarray(rng.integers(2**32, size=2, dtype=np.uint32)),
        directions=directions,
        bias=jnp.asarray(config.bias / np.linalg.norm(bias) * bias, jnp.float32),
        weights=jnp.asarray(weights, jnp.float32),
        scalars=jnp.asarray(np.column_stack(scalars), jnp.float32),
    )


@partial(jax.jit, static_argnames="steps")
def tight_frame(rows: Float[Array | np.ndarray, "F D"], steps: int = 16) -> Float[Array, "F D"]:
    """Unit rows near the given ones whose squared cosines have the least sum that is possible.

    They have it when all singular values are equal (those that F < D leaves at 0 aside). A step is
    a damped Newton-Schulz iteration towards that, and makes the rows units again.
    """
    count, width = rows.shape

    def unit(r: Array) -> Array:
        return r / jnp.linalg.norm(r, axis=1, keepdims=True)

    def step(_: Array, r: Array) -> Array:
        return unit(1.25 * r - 0.25 / max(count / width, 1) * (r @ (r.T @ r)))

    with jax.default_matmul_precision("float32"):
        return jax.lax.fori_loop(0, steps, step, unit(jnp.asarray(rows)))


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


def _starts(config: SyntheticConfig) -> tuple[int, ...]:
    sizes = [config.roots * config.branching**level for level in range(config.depth + 1)]
    return (*(int(start) for start in np.cumsum([0, *sizes])), config.features)
