"""Where latents fire: counts, histograms and contexts of every latent, in one pass over text.

A latent's *peak* is its largest activation in one piece of a document; a piece gives at most one
context, the window of tokens around the peak. Of each latent are kept the `top` largest peaks and
a uniform sample of all of them: those with the smallest hash. Both are independent of how the text
is cut into batches, and memory grows with latents, not with text.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, UInt64

from scale_sae_jax.activations.batches import GOLDEN, mix64

OUTSIDE = -1  # token id of a place in a window that lies outside of the piece


@dataclass(frozen=True)
class Plan:
    """What to keep of each latent.

    top: contexts with the largest peaks. sampled: contexts of the uniform sample. before, after:
    tokens of a window on the two sides of the peak. bins: of the histogram, a power of two.
    """

    top: int = 10
    sampled: int = 12
    before: int = 16
    after: int = 8
    bins: int = 32


class Peaks(NamedTuple):
    """E peaks by latent, each with its window of W = before + 1 + after places."""

    latent: Int[np.ndarray, " E"]
    value: Float[np.ndarray, " E"]
    row: Int[np.ndarray, " E"]  # running number of the row of text
    position: Int[np.ndarray, " E"]  # in the row
    tokens: Int[np.ndarray, "E W"]  # OUTSIDE where the piece has none
    acts: Float[np.ndarray, "E W"]  # of the peak's latent

    def of(self, latent: int) -> "Peaks":
        """Those of one latent."""
        first, last = np.searchsorted(self.latent, (latent, latent + 1))
        return Peaks(*(field[first:last] for field in self))


class Contexts(NamedTuple):
    """What is known of L latents after some text.

    firing [L]: kept tokens on which each fires. pieces [L]: pieces of text in which it does.
    histogram [L, bins]: its activations in equal bins of [0, 2^exponent), exponent [L] the least
    that holds them all. top: largest peaks first. sample: in the order of their hash. tokens: kept
    tokens read. rows: rows of text read.
    """

    firing: Int[np.ndarray, " L"]
    pieces: Int[np.ndarray, " L"]
    histogram: Int[np.ndarray, "L bins"]
    exponent: Int[np.ndarray, " L"]
    top: Peaks
    sample: Peaks
    tokens: int
    rows: int


class Fired(NamedTuple):
    """E (row, latent, position) of one batch where a latent fires, in this order."""

    row: Int[np.ndarray, " E"]  # in the batch
    latent: Int[np.ndarray, " E"]
    position: Int[np.ndarray, " E"]
    value: Float[np.ndarray, " E"]


def nothing_read(latents: int, plan: Plan) -> Contexts:
    """The contexts of `latents` latents before any text."""
    counts, width = np.zeros(latents, np.int64), plan.before + 1 + plan.after
    none = Peaks(
        np.zeros(0, np.int64), np.zeros(0, np.float32), np.zeros(0, np.int64),
        np.zeros(0, np.int64), np.zeros((0, width), np.int32), np.zeros((0, width), np.float32),
    )
    histogram = np.zeros((latents, plan.bins), np.int64)
    lowest = np.full(latents, np.iinfo(np.int16).min, np.int64)
    return Contexts(counts, counts, histogram, lowest, none, none, 0, 0)


def read(
    contexts: Contexts,
    plan: Plan,
    values: Float[np.ndarray, "B S K"],
    ids: Int[np.ndarray, "B S K"],
    kept: Bool[np.ndarray, "B S"],
    tokens: Int[np.ndarray, "B S"],
    segments: Int[np.ndarray, "B S"],
) -> Contexts:
    """The contexts after one more batch of rows.

    Args:
      values, ids: codes, 0 where a slot is unused. kept: positions that count.
      tokens, segments: the rows; 0 is padding, equal numbers are one piece of a document.
    """
    latents, length = len(contexts.firing), tokens.shape[1]
    fired = events(values, ids, kept)
    peak = peaks_of_pieces(fired, segments)
    row = contexts.rows + fired.row[peak]
    latent, value, position = fired.latent[peak], fired.value[peak], fired.position[peak]

    def merged(before: Peaks, key_before: np.ndarray, key: np.ndarray, most: int) -> Peaks:
        """The `most` peaks of each latent with the smallest keys; windows are made for these."""
        able = np.flatnonzero(may_enter(before.latent, key_before, latent, key, most, latents))
        touched = np.zeros(latents, bool)
        touched[latent[able]] = True
        old = np.flatnonzero(touched[before.latent])
        place = before.row[old] * length + before.position[old], row[able] * length + position[able]
        pairs = (before.latent[old], latent[able]), (key_before[old], key[able]), place
        chosen = smallest(*map(np.concatenate, pairs), most)
        stays = chosen < len(old)
        new = able[chosen[~stays] - len(old)]
        around = fired.row[peak][new], latent[new], position[new]
        window = windows(plan, fired, latents, tokens, segments, *around)
        added = Peaks(latent[new], value[new], row[new], position[new], *window)
        # Places in the joined arrays: what was there, then what is new and stays.
        joined = [np.concatenate(pair) for pair in zip(before, added, strict=True)]
        index = np.empty_like(chosen)
        index[stays], index[~stays] = old[chosen[stays]], len(before.latent) + np.arange(len(new))
        index = np.concatenate([np.flatnonzero(~touched[before.latent]), index])
        index = index[np.argsort(joined[0][index], kind="stable")]
        return Peaks(*(field[index] for field in joined))

    top, sample = contexts.top, contexts.sample
    hashes = spread(sample.row, sample.position, sample.latent), spread(row, position, latent)
    histogram, exponent = counted(contexts.histogram, contexts.exponent, fired)
    return Contexts(
        firing=contexts.firing + np.bincount(fired.latent, minlength=latents),
        pieces=contexts.pieces + np.bincount(latent, minlength=latents),
        histogram=histogram,
        exponent=exponent,
        top=merged(top, -top.value, -value, plan.top),
        sample=merged(sample, *hashes, plan.sampled),
        tokens=contexts.tokens + int(kept.sum()),
        rows=contexts.rows + len(tokens),
    )


def events(
    values: Float[np.ndarray, "B S K"],
    ids: Int[np.ndarray, "B S K"],
    kept: Bool[np.ndarray, "B S"],
) -> Fired:
    """Where latents fire at kept positions."""
    row, position, slot = np.nonzero((values != 0) & kept[..., None])
    latent = ids[row, position, slot].astype(np.int64)
    order = np.lexsort((position, latent, row))
    value = values[row, position, slot].astype(np.float32)
    return Fired(row[order], latent[order], position[order], value[order])


def peaks_of_pieces(
    fired: Fired, segments: Int[np.ndarray, "B S"]
) -> Int[np.ndarray, " G"]:
    """Indices of the largest event of each (row, latent, piece); the first of equal ones."""
    piece = segments[fired.row, fired.position]
    keys = np.stack([fired.row, fired.latent, piece])
    starts = np.ones(keys.shape[1], bool)
    starts[1:] = (keys[:, 1:] != keys[:, :-1]).any(0)
    group = np.cumsum(starts) - 1
    order = np.lexsort((fired.position, -fired.value, group))
    return order[starts]  # a group has the same places in both orders


def may_enter(
    latent_before: Int[np.ndarray, " C"],
    key_before: np.ndarray,
    latent: Int[np.ndarray, " E"],
    key: np.ndarray,
    most: int,
    latents: int,
) -> Bool[np.ndarray, " E"]:
    """Whether an event may be among the `most` of its latent, given those before it.

    Args:
      latent_before, key_before: as `smallest` left them, in the order of latents and keys.
    """
    counts = np.bincount(latent_before, minlength=latents)
    last = (counts.cumsum() - 1)[latent]
    full = counts[latent] == most
    return ~full | (key <= key_before[np.where(full, last, 0)]) if full.any() else ~full


def smallest(
    latent: Int[np.ndarray, " E"], key: np.ndarray, tie: Int[np.ndarray, " E"], most: int
) -> Int[np.ndarray, " C"]:
    """Indices of the `most` events of each latent with the smallest keys, by latent and key."""
    order = np.lexsort((tie, key, latent))
    ordered = latent[order]
    rank = np.arange(len(order)) - np.searchsorted(ordered, ordered)
    return order[rank < most]


def windows(
    plan: Plan,
    fired: Fired,
    latents: int,
    tokens: Int[np.ndarray, "B S"],
    segments: Int[np.ndarray, "B S"],
    row: Int[np.ndarray, " E"],
    latent: Int[np.ndarray, " E"],
    position: Int[np.ndarray, " E"],
) -> tuple[Int[np.ndarray, "E W"], Float[np.ndarray, "E W"]]:
    """Tokens around E places of a batch, and the activations of the place's latent on them."""
    length = tokens.shape[1]
    places = position[:, None] + np.arange(-plan.before, plan.after + 1)  # [E, W]
    clipped = places.clip(0, length - 1)
    same = segments[row[:, None], clipped] == segments[row, position][:, None]
    inside = same & (places == clipped)
    found = np.where(inside, tokens[row[:, None], clipped], OUTSIDE).astype(np.int32)
    have = (fired.row * latents + fired.latent) * length + fired.position  # ascending
    want = (row * latents + latent)[:, None] * length + clipped
    at = np.searchsorted(have, want).clip(max=len(have) - 1)
    hit = inside & (have[at] == want)
    return found, np.where(hit, fired.value[at], 0).astype(np.float32)


def spread(
    row: Int[np.ndarray, " E"], position: Int[np.ndarray, " E"], latent: Int[np.ndarray, " E"]
) -> UInt64[np.ndarray, " E"]:
    """A hash of each event, uniform over 64 bits."""
    place = (row.astype(np.uint64) << np.uint64(20)) + position.astype(np.uint64)
    return mix64(mix64(place) + latent.astype(np.uint64) * GOLDEN)


def counted(
    histogram: Int[np.ndarray, "L bins"], exponent: Int[np.ndarray, " L"], fired: Fired
) -> tuple[Int[np.ndarray, "L bins"], Int[np.ndarray, " L"]]:
    """The histogram with more events; where a latent outgrows its range, the range doubles.

    Bins of a range are pairs, or runs, of the bins of a smaller one, so no event is counted in a
    bin that it would not be in had the range been known from the start.
    """
    bins = histogram.shape[1]
    needed = exponent.copy()
    np.maximum.at(needed, fired.latent, np.frexp(fired.value)[1])
    total, wider = histogram.copy(), np.flatnonzero(needed > exponent)
    grown = (needed - exponent)[wider].clip(max=bins.bit_length())
    places = np.arange(len(wider))[:, None] * bins + (np.arange(bins) >> grown[:, None])
    regrouped = np.bincount(places.ravel(), histogram[wider].ravel(), len(wider) * bins)
    total[wider] = regrouped.reshape(-1, bins)
    share = np.ldexp(fired.value.astype(np.float64), -needed[fired.latent])  # in [0, 1)
    place = fired.latent * bins + (share * bins).astype(np.int64).clip(0, bins - 1)
    np.add.at(total.reshape(-1), place, 1)
    return total, needed
