"""Philox-4x32-10, the counter-based generator behind attention's dropout, in plain integer tensors.

A counter-based generator has no state: the four 32-bit words at a counter are a pure function of the counter and
the key, so forward, backward, every tile and every backend can ask for the same bit independently and get it.

Source: Salmon, Moraes, Dror, Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_WORD = 0xFFFFFFFF


def _multiply(a: Tensor, multiplier: int) -> tuple[Tensor, Tensor]:
    """High and low word of the 64-bit product; in halves of ``a``, so that no int64 overflows."""
    upper, lower = (a >> 16) * multiplier, (a & 0xFFFF) * multiplier
    return (upper + (lower >> 16)) >> 16, ((upper << 16) + lower) & _WORD


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """The four words at ``counter`` under ``key``.

    Args:
        counter: four int64 tensors that broadcast together, values in [0, 2**32).
        key: two int64 tensors that broadcast with them, values in [0, 2**32).

    Returns:
        Four int64 tensors of the broadcast shape, values in [0, 2**32).

    Example:
        >>> zero = torch.zeros((), dtype=torch.int64)
        >>> [f"{int(word):08x}" for word in philox((zero, zero, zero, zero), (zero, zero))]
        ['6627e8d5', 'e169c58d', 'bc57ac4c', '9b00dbd8']
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        high0, low0 = _multiply(c0, _MULTIPLIERS[0])
        high1, low1 = _multiply(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _KEY_STEPS[0]) & _WORD, (k1 + _KEY_STEPS[1]) & _WORD
    return c0, c1, c2, c3


def threshold(dropout_p: float) -> int:
    """A score is dropped where its word is below this: floor(dropout_p * 2**32)."""
    return int(dropout_p * 4294967296.0)


def keep_mask(seed: Tensor, dropout_p: float, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    """Which attention weights dropout keeps: the bit of (b, h, i, j) is a pure function of ``seed`` and those four.

    The key is (seed's low word, seed's high word), the counter (j // 4, i, h, b), the lane j % 4.

    Args:
        seed: int64 [1] (or any shape that broadcasts with the rest).
        dropout_p: chance of a weight to be dropped, in [0, 1].
        b, h, i, j: int64, broadcastable: batch, query head, query position, key position.

    Returns:
        bool of the broadcast shape, True where the weight is kept.
    """
    key = (seed & _WORD, (seed >> 32) & _WORD)
    words = philox((j // 4, i, h, b), key)
    lane = j % 4
    word = torch.where(lane < 2, torch.where(lane == 0, words[0], words[1]), torch.where(lane == 2, words[2], words[3]))
    return word >= threshold(dropout_p)
