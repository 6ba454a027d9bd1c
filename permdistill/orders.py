"""Orders of K options, as plain integer arrays.

An *order* is a permutation ``order`` of ``0..K-1`` in which ``order[k]`` is the index of the original option that is
shown at position ``k`` (so position 0 carries label "A"). A list of orders is an array of shape (order, K). Scores that
a model gives to *positions* are turned into scores of *options* by :func:`to_options`, and back by :func:`to_positions`;
everything after the teacher is in option space, with axes (item, order, option).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations
from math import factorial

import numpy as np

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
MIN_OPTIONS, MAX_OPTIONS = 2, len(LETTERS)
ENUMERATED = 6  # up to so many options all K! orders are listed: 720; of 7 they are 5,040


def _check_k(k: int) -> None:
    if not MIN_OPTIONS <= k <= MAX_OPTIONS:
        raise ValueError(f"K = {k} options: give {MIN_OPTIONS}..{MAX_OPTIONS}")


def all_orders(k: int) -> np.ndarray:
    """All K! orders in lexicographic order, the original (identity) first. Shape (K!, K). Raises ValueError above
    :data:`ENUMERATED` options."""
    _check_k(k)
    if k > ENUMERATED:
        raise ValueError(
            f"K = {k} options have {factorial(k):,} orders, all of them are listed for K = {MIN_OPTIONS}..{ENUMERATED}: "
            "take cyclic, Williams or reverse pairs of orders"
        )
    return np.array(list(permutations(range(k))), dtype=np.int64)


def cyclic_orders(k: int) -> np.ndarray:
    """The K rotations of the original order, the original first. Shape (K, K)."""
    _check_k(k)
    return (np.arange(k)[:, None] + np.arange(k)[None, :]) % k


def reverse_pairs(orders: np.ndarray) -> np.ndarray:
    """Each order and its reverse, one after the other: (2 x order, K). Of two calls they are the most balanced: what an
    option gains by standing early it loses by standing late (Wei et al., Findings of ACL 2024)."""
    orders = np.asarray(orders)
    return np.stack([orders, orders[:, ::-1]], axis=1).reshape(-1, orders.shape[1])


def williams_orders(k: int) -> np.ndarray:
    """A Williams design, the original order first: (K, K) for even K, (2K, K) for odd K.

    A Latin square in which each option also follows each other one equally often: once for even K; for odd K, where one
    square cannot do that, twice in two squares, each the other's mirror image (Williams 1949).
    """
    _check_k(k)
    zigzag = np.array([(i + 1) // 2 if i % 2 else (k - i // 2) % k for i in range(k)])  # 0, 1, k-1, 2, k-2, ..
    square = (zigzag + np.arange(k)[:, None]) % k
    square = np.argsort(square[0])[square]  # renamed, so that the first row is the original order
    return np.concatenate([square, square[:, ::-1]]) if k % 2 else square


def sample_orders(k: int, n: int, rng: np.random.Generator) -> np.ndarray:
    """``n`` different orders drawn uniformly without replacement. Shape (n, K).

    Raises ValueError when ``n`` is not in 1..K!.
    """
    if not 1 <= n <= factorial(k):
        raise ValueError(f"n = {n} orders of K = {k} options: there are only 1..{factorial(k)}")
    if k <= ENUMERATED:
        return all_orders(k)[rng.choice(factorial(k), size=n, replace=False)]
    found: dict[tuple[int, ...], None] = {}  # of so many orders the same one hardly comes twice
    while len(found) < n:
        found[tuple(rng.permutation(k).tolist())] = None
    return np.array(list(found), dtype=np.int64)


SETS = ("all", "cyclic", "williams", "pairs")


def order_set(name: str, k: int, fixed: Sequence[int] = (), seed: int = 0) -> np.ndarray:
    """The orders that a name stands for, the original first: (order, K).

    name   of :data:`SETS` ("pairs" is the original and its reverse), or how many random orders, e.g. "8": the original and
           others, K! at most, drawn without replacement. All questions of K options share them, so that their scores are
           one array; a larger number goes on from a smaller one
    fixed  options that keep their places, while the others take these orders

    Raises ValueError for another name.
    """
    _check_k(k)
    if fixed:
        free = np.setdiff1d(np.arange(k), fixed)
        own = order_set(name, len(free), seed=seed) if len(free) > 1 else np.arange(len(free))[None]
        result = np.tile(np.arange(k), (len(own), 1))
        result[:, free] = free[own]
        return result
    if name == "pairs":
        return reverse_pairs(np.arange(k)[None])
    if name in SETS:
        return {"all": all_orders, "cyclic": cyclic_orders, "williams": williams_orders}[name](k)
    if not (name.isascii() and name.isdecimal() and int(name)):
        raise ValueError(f"orders {name!r}: give {', '.join(SETS)}, or how many random ones")
    rng, found = np.random.default_rng(seed), {tuple(range(k)): None}
    while len(found) < min(int(name), factorial(k)):
        found[tuple(rng.permutation(k).tolist())] = None
    return np.array(list(found), dtype=np.int64)


def inverse(orders: np.ndarray) -> np.ndarray:
    """Inverse permutations: ``inverse(order)[o]`` is the position at which option ``o`` is shown. Same shape."""
    return np.argsort(orders, axis=-1)


def to_options(by_position: np.ndarray, orders: np.ndarray) -> np.ndarray:
    """Values by position (..., order, position) -> values by option (..., order, option)."""
    return np.take_along_axis(by_position, np.broadcast_to(inverse(orders), by_position.shape), axis=-1)


def to_positions(by_option: np.ndarray, orders: np.ndarray) -> np.ndarray:
    """Values by option (..., order, option) -> values by position (..., order, position)."""
    return np.take_along_axis(by_option, np.broadcast_to(orders, by_option.shape), axis=-1)


def apply(order: Sequence[int] | np.ndarray, options: Sequence[str]) -> list[str]:
    """The options as shown: ``[options[order[0]], options[order[1]], ...]``."""
    return [options[i] for i in order]
