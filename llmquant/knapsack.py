"""Choose one option of every group for the least total cost within a total size."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

STATES = 1 << 18
"""Most partial choices kept after a group. With more than that, the cheapest in each of as many ranges of sizes is
kept: still a choice of exactly its size, but perhaps not the very best one."""


def choose(groups: Sequence[Sequence[tuple[int, float]]], limit: int) -> list[int] | None:
    """Return the index of the chosen option (size, cost) of every group; None where even the smallest are too large.

    Dynamic programming over all sizes that partial choices can have, of which only those are kept that are not
    both larger and dearer than another (the multiple-choice knapsack problem; Kellerer, Pferschy and Pisinger,
    "Knapsack problems", 2004, chapter 11).
    """
    room = limit - sum(min(size for size, _ in group) for group in groups)
    if room < 0:
        return None
    sizes, costs = np.zeros(1, np.int64), np.zeros(1)
    trail: list[tuple[npt.NDArray[np.int32], npt.NDArray[np.int16]]] = []
    for group in groups:
        least = min(size for size, _ in group)
        more = np.array([size - least for size, _ in group], np.int64)
        all_sizes = (sizes[:, None] + more).ravel()
        all_costs = (costs[:, None] + np.array([cost for _, cost in group])).ravel()
        order = np.lexsort((all_costs, all_sizes))
        order = order[all_sizes[order] <= room]
        # a larger choice stays only if it is cheaper than every smaller one
        before = np.minimum.accumulate(np.concatenate([[np.inf], all_costs[order]]))[:-1]
        order = _thin(order[all_costs[order] < before], all_sizes, room)
        sizes, costs = all_sizes[order], all_costs[order]
        trail.append(((order // len(group)).astype(np.int32), (order % len(group)).astype(np.int16)))
    chosen = []
    at = len(sizes) - 1
    for parent, option in reversed(trail):
        chosen.append(int(option[at]))
        at = int(parent[at])
    return chosen[::-1]


def _thin(order: npt.NDArray[np.int64], sizes: npt.NDArray[np.int64], room: int) -> npt.NDArray[np.int64]:
    """Return the last, which is the cheapest, in each of ``STATES`` ranges of sizes."""
    if len(order) <= STATES:
        return order
    place = sizes[order] * STATES // (room + 1)
    last: npt.NDArray[np.int64] = order[np.append(place[1:] != place[:-1], True)]
    return last
