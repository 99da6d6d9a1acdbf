"""Batches as a pure function of (seed, step): there is no iterator state to save or to lose.

Batch `step` covers positions step * batch_size onwards of an endless sequence in which every n
positions, an epoch, are a fresh permutation of range(n). The permutation is a keyed Feistel network
on the smallest even number of bits that holds n, walked along its cycle until it lands below n
(Black & Rogaway, "Ciphers with Arbitrary Finite Domains", 2002), so no permutation is ever stored.
"""

import numpy as np
from jaxtyping import Int64, UInt64

ROUNDS = 6
GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2^64 over the golden ratio, odd


def batch_ids(seed: int, step: int, batch_size: int, n: int) -> Int64[np.ndarray, " T"]:
    """Row ids [batch_size] of 0-based step `step`; a batch may straddle epochs.

    Args:
      seed: any integer; another seed gives another order.
      step: 0-based.
      batch_size: T.
      n: number of rows; each occurs once an epoch.
    """
    positions = step * batch_size + np.arange(batch_size)
    return permuted(positions % n, n, seed, positions // n)


def permuted(
    index: Int64[np.ndarray, " T"], n: int, seed: int, epoch: Int64[np.ndarray, " T"] | int = 0
) -> Int64[np.ndarray, " T"]:
    """Where the permutation of range(n) keyed by (seed, epoch) takes each index."""
    half = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
    seeds = np.array([seed % 2**64], np.uint64)
    keys = mix64(mix64(seeds) ^ np.broadcast_to(np.asarray(epoch, np.uint64), index.shape))
    out = _feistel(index.astype(np.uint64), keys, half)
    while (outside := np.flatnonzero(out >= n)).size:
        out[outside] = _feistel(out[outside], keys[outside], half)
    return out.astype(np.int64)


def _feistel(
    x: UInt64[np.ndarray, " T"], keys: UInt64[np.ndarray, " T"], half: np.uint64
) -> UInt64[np.ndarray, " T"]:
    """A keyed bijection on numbers of 2 * half bits."""
    mask = (np.uint64(1) << half) - np.uint64(1)
    left, right = x >> half, x & mask
    for number in range(ROUNDS):
        mixed = mix64(keys + np.uint64(number) + (right << np.uint64(8)))
        left, right = right, left ^ (mixed & mask)
    return (left << half) | right


def mix64(x: UInt64[np.ndarray, " T"]) -> UInt64[np.ndarray, " T"]:
    """The finaliser of SplitMix64 (Steele, Lea & Flood 2014), after its increment."""
    x = x + GOLDEN
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
