"""Which latents survive: the global top-k over all latents of a token's selected experts.

All scopes take a >= 0 of the E * m latents of each token's experts and say which survive, by place
or by mark. A latent that is 0 never counts as active, never more than k survive, and a tie goes to
the lower place, which is the lower global id. Choosing has no gradient.

With experts on several devices (`shards`), acts are those of the R tokens that a device's experts
see, 0 at experts that lie elsewhere; E * m is the place of a winner that lies elsewhere.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.custom_batching import sequential_vmap
from jaxtyping import Array, Bool, Float, Int

from scale_sae_jax.errors import UserError
from scale_sae_jax.sae import triton
from scale_sae_jax.sae.groups import Groups
from scale_sae_jax.sae.joined import joined
from scale_sae_jax.sae.shards import Shards

GROUP = 32
NARROW = 128  # rows of fewer than so many values a winner are not worth two stages
PIECES, PIECE_ROWS = 64, 32  # at most so many, of at least so many rows
THRESHOLD_DECAY = 0.9
CHUNK_PAIRS = 512


def top_k(
    values: Float[Array, "T W"], k: int
) -> tuple[Float[Array, "T K"], Int[Array, "T K"]]:
    """The k largest of each row and their places; exactly `jax.lax.top_k` without NaN, faster.

    The k winners lie in the k groups of neighbours with the largest maxima: any other group is
    beaten by k values, one from each of those. On a tie the lower group counts as larger, and
    groups go on in their order, so a tie between values goes to the lower place as well.
    """
    tokens, width = values.shape
    if width < NARROW * k or width % GROUP:
        return _top_k_of_rows(values, k)
    grouped = values.reshape(tokens, -1, GROUP)
    _, groups = _top_k_of_rows(grouped.max(-1), k)
    groups = jnp.sort(groups, axis=-1)  # [T, K]
    candidates = jnp.take_along_axis(grouped, groups[..., None], axis=1)
    winners, slots = _top_k_of_rows(candidates.reshape(tokens, -1), k)
    group = jnp.take_along_axis(groups, slots // GROUP, axis=-1)
    return winners, group * GROUP + slots % GROUP


def _top_k_of_rows(
    values: Float[Array, "T W"], k: int
) -> tuple[Float[Array, "T K"], Int[Array, "T K"]]:
    """`jax.lax.top_k`, on CPUs in pieces: one call keeps one core busy, many calls keep all.

    On GPUs it sorts whole rows: there the winners are found first, and sorted alone. On CPUs, the
    last line changes nothing, but keeps the values in use: pieces whose values nobody needs would
    share one buffer for them, and wait for each other.
    """

    def whole(values):
        return tuple(jax.lax.top_k(values, k))

    def in_pieces(values):
        tokens, width = values.shape
        pieces = max(1, min(PIECES, tokens // PIECE_ROWS))
        found = [jax.lax.top_k(piece, k) for piece in jnp.array_split(values, pieces)]
        values, ids = (jnp.concatenate(parts) for parts in zip(*found, strict=True))
        last = jnp.where(jnp.isnan(values), width - 1, width)
        return values, jnp.minimum(ids, last)

    fits = k < values.shape[1] <= triton.WIDEST
    with_gpu = triton.backend and jax.default_backend() == "gpu"  # not to be traced elsewhere
    of_gpu = partial(winners_first, k=k) if with_gpu and fits else whole

    def on_platform(values):
        ways = dict(cpu=in_pieces, cuda=of_gpu, rocm=of_gpu, default=whole)
        return jax.lax.platform_dependent(values, **ways)

    return joined(on_platform, lambda values: (0,))(values)


def winners_first(
    values: Float[Array, "T W"], k: int
) -> tuple[Float[Array, "T K"], Int[Array, "T K"]]:
    """`jax.lax.top_k` that sorts the winners alone."""
    places = triton.largest(values, k)
    found, order = jax.lax.top_k(jnp.take_along_axis(values, places, axis=-1), k)
    return found, jnp.take_along_axis(places, order, axis=-1)


def batch_winners(
    acts: Float[Array, "T W"], k: int, l0: Int[Array, ""] | None = None
) -> Bool[Array, "T W"]:
    """Marks the k * T largest values > 0 of the batch; a tie goes to the lower token, then place.

    Args:
      l0: marks the l0 * T largest; at most k.

    Looks for them among the 4 k largest of each token. Only if all of those win in some token,
    which may have still more, the whole batch is searched. Under `jax.vmap` batches are taken one
    after the other, for together all would be searched whole.
    """
    _check_places(acts)
    tokens, width = acts.shape
    slots, most = min(4 * k, width), (k if l0 is None else l0) * tokens

    def winners(acts: Float[Array, "T W"], most: Int[Array, ""]) -> Bool[Array, "T W"]:
        wins = jnp.arange(k * tokens) < most

        def mark(places: Int[Array, " P"]) -> Bool[Array, "T W"]:
            return jnp.zeros(acts.size, bool).at[places].set(wins).reshape(acts.shape)

        def among_all() -> Bool[Array, "T W"]:
            return mark(jax.lax.top_k(acts.reshape(-1), k * tokens)[1])

        if slots == width:
            return among_all()
        values, ids = top_k(acts, slots)
        _, found = jax.lax.top_k(values.reshape(-1), k * tokens)
        last = (found % slots == slots - 1) & (values.reshape(-1)[found] > 0) & wins
        places = (ids + width * jnp.arange(tokens)[:, None]).reshape(-1)[found]
        return jax.lax.cond(last.any(), among_all, lambda: mark(places))

    acts = jax.lax.stop_gradient(acts)
    return sequential_vmap(winners)(acts, jnp.asarray(most)) & (acts > 0)


def batch_winners_of_all(
    acts: Float[Array, "R W"], most: int | Int[Array, ""], shards: Shards
) -> Bool[Array, "R W"]:
    """Marks this device's part of the `most` largest values > 0 on all devices.

    The smallest of them is found bit by bit, from counts alone; a device counts to `most` only,
    lest the sum overflow. A tie goes to the device that comes first in the mesh, then to the lower
    token and place.
    """
    _check_places(acts)
    bits = jax.lax.bitcast_convert_type(jax.lax.stop_gradient(acts), jnp.int32)

    def narrow(i, least):
        higher = least | (1 << (30 - i))  # acts >= 0, whose bits are in their order
        enough = shards.total(jnp.minimum((bits >= higher).sum(), most)) >= most
        return jnp.where(enough, higher, least)

    least = jax.lax.fori_loop(0, 31, narrow, jnp.int32(0))
    above, ties = bits > least, bits == least
    places = most - shards.total(above.sum()) - shards.before(jnp.minimum(ties.sum(), most))
    first = jnp.cumsum(ties.reshape(-1)).reshape(ties.shape) <= places
    return (above | ties & first) & (acts > 0)


def _check_places(acts: Float[Array, "T W"]) -> None:
    """Raises UserError for a batch with more places on one device than an int32 counts."""
    if acts.size >= 2**31:
        tokens, width = acts.shape
        raise UserError(
            f"a top-k over the batch chooses among {tokens} x {width} latents on one device, more "
            "than 2^31 - 1: lower config.batch_size, or use more devices"
        )


def follow_threshold(
    old: Float[Array, ""], values: Float[Array, "..."], shards: Shards = Shards()
) -> Float[Array, ""]:
    """Running mean of the smallest survivor, from the first batch with one on."""
    values = jax.lax.stop_gradient(values)
    new = shards.least(jnp.min(jnp.where(values > 0, values, jnp.inf)))
    mean = jnp.where(old == 0, new, THRESHOLD_DECAY * old + (1 - THRESHOLD_DECAY) * new)
    return jax.lax.stop_gradient(jnp.where(jnp.isfinite(new), mean, old))


def per_token(
    acts: Float[Array, "R E M"],
    k: int,
    groups: Groups | None = None,
    shards: Shards = Shards(),
) -> Int[Array, "R K"]:
    """The k largest latents over all selected experts of each token (Scale SAE, global top-k).

    Args:
      groups: the pairs by expert; needed with experts on several devices.
    """
    if shards.expert == 1:
        return top_k(acts.reshape(acts.shape[0], -1), k)[1]
    return _winners_of_all(acts, k, groups, shards)


def _winners_of_all(
    acts: Float[Array, "R E M"], k: int, groups: Groups, shards: Shards
) -> Int[Array, "R K"]:
    """Places in E * m of the k largest values > 0 of each token; E * m where there are fewer.

    The k largest of each expert, from the device that has it, go to the owner of the token, in the
    order of the experts and by falling value: a tie goes to the lower place, as in `top_k`.
    """
    rows, active, size = acts.shape
    kept = min(k, size)
    values, latents = _largest(acts.reshape(-1, size), kept, groups)
    candidates = values, jnp.where(values > 0, latents, 0)
    own = jax.tree.map(lambda a: a.reshape(rows, -1), candidates)
    values, latents = shards.sum_to_owner(own)  # [T, E * kept]
    winning, winners = jax.lax.top_k(values, k)
    places = winners // kept * size + jnp.take_along_axis(latents, winners, axis=-1)
    return shards.gather(jnp.where(winning > 0, places, active * size))


def _largest(
    acts: Float[Array, "P M"], k: int, groups: Groups
) -> tuple[Float[Array, "P K"], Int[Array, "P K"]]:
    """`top_k` of the pairs whose expert lies here, 0 for the others, which cost nothing."""
    pairs = groups.pairs.size
    chunk = min(CHUNK_PAIRS, pairs)
    order = jnp.pad(groups.pairs, (0, -pairs % chunk), constant_values=pairs)

    def body(i, found):
        at = jax.lax.dynamic_slice_in_dim(order, i * chunk, chunk)
        largest = top_k(acts.at[at].get(mode="clip"), k)
        return jax.tree.map(lambda f, new: f.at[at].set(new, mode="drop"), found, largest)

    found = jnp.zeros((pairs, k), acts.dtype), jnp.zeros((pairs, k), jnp.int32)
    return jax.lax.fori_loop(0, -(-groups.sizes.sum() // chunk), body, found)


def per_expert(acts: Float[Array, "T E M"], k: int) -> Int[Array, "T K"]:
    """k / E latents in each selected expert: the control without competition between experts."""
    tokens, active, size = acts.shape
    _, latents = jax.lax.top_k(acts, k // active)
    return (latents + size * jnp.arange(active)[:, None]).reshape(tokens, k)


def per_batch(
    acts: Float[Array, "R W"],
    k: int,
    shards: Shards = Shards(),
    l0: Int[Array, ""] | None = None,
) -> Bool[Array, "R W"]:
    """Marks the k * T largest latents of the batch (BatchTopK, arXiv 2412.06410).

    Args:
      l0: see `batch_winners`.
    """
    if shards.data * shards.expert == 1:
        return batch_winners(acts, k, l0)
    most = (k if l0 is None else l0) * acts.shape[0] * shards.data
    return batch_winners_of_all(acts, most, shards)
