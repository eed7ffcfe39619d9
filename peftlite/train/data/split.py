"""Splitting: groups stay whole, strata keep their shares, a seed gives the same parts again."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Hashable, Mapping, Sequence

import numpy as np

UNITS = 10**9  # shares are counted in billionths, so that 0.1 of 10 is 1
EXACT = 2**16  # rows of a part up to which the best choice of groups is found among all


def split(
    groups: Sequence[Hashable],
    strata: Sequence[Hashable],
    shares: Sequence[float],
    seed: int,
) -> list[list[int]]:
    """The rows of each part, as positions in ascending order; the first part is the rest.

    Each part of each stratum has its share of it, rounded up or down, where groups are single
    rows; with larger groups, as near to that as any choice of them comes. A group of several
    strata counts to the one that most of its rows have.

    Args:
        groups, strata: of every row.
        shares: of the parts after the first, in (0, 1).
        seed: of the order in which groups are taken, which goes by a hash.
    """
    units = [round(share * UNITS) for share in shares]
    units = [UNITS - sum(units), *units]
    members = defaultdict(list)
    for row, group in enumerate(groups):
        members[group].append(row)
    parts: list[list[int]] = [[] for _ in units]
    owed = [0] * len(units)
    for ordered in _by_stratum(members, strata, seed):
        left = [members[group] for group in ordered]
        targets = round_shares(sum(map(len, left)), units, owed)
        for part, target in zip(parts[1:], targets[1:], strict=True):
            taken = closest([len(rows) for rows in left], target)
            part += [row for i in sorted(taken) for row in left[i]]
            left = [rows for i, rows in enumerate(left) if i not in taken]
        parts[0] += [row for rows in left for row in rows]
    return [sorted(part) for part in parts]


def _by_stratum(
    members: Mapping[Hashable, Sequence[int]], strata: Sequence[Hashable], seed: int
) -> list[list[Hashable]]:
    """The groups of each stratum, in the order of their hashes."""
    found = defaultdict(list)
    for group in sorted(members, key=lambda group: _hash(seed, group)):
        ((stratum, _),) = Counter(strata[row] for row in members[group]).most_common(1)
        found[stratum].append(group)
    return [found[stratum] for stratum in sorted(found, key=repr)]


def _hash(seed: int, group: Hashable) -> bytes:
    return hashlib.sha256(f"{seed} {group!r}".encode(errors="surrogatepass")).digest()


def round_shares(count: int, units: Sequence[int], owed: list[int]) -> list[int]:
    """`count` in whole shares, each rounded up or down: up those that are owed most so far."""
    counts = [unit * count // UNITS for unit in units]
    rests = [unit * count % UNITS for unit in units]
    for i, rest in enumerate(rests):
        owed[i] += rest
    uneven = sorted((i for i, rest in enumerate(rests) if rest), key=lambda i: -owed[i])
    for i in uneven[: count - sum(counts)]:
        counts[i] += 1
        owed[i] -= UNITS
    return counts


def closest(sizes: Sequence[int], target: int) -> set[int]:
    """Which sizes add up nearest to a target: of all choices the best, and an early one.

    A target above `EXACT` is first filled in order until what is left is no more than that.
    """
    taken = set()
    for i, size in enumerate(sizes):
        if target > EXACT and size <= target:
            taken.add(i)
            target -= size
    # bit s of `reached`: some of the sizes so far add up to s; `last[s]` ended the first that did
    reached, last = 1, {0: -1}
    inside = (1 << 2 * target + 1) - 1  # more than that is farther from the target than nothing
    for i, size in enumerate(sizes):
        if last.get(target) is not None:
            break
        if i not in taken and (new := (reached << size) & inside & ~reached):
            reached |= new
            last.update((s, i) for s in _bits(new))
    best = min(last, key=lambda s: (abs(s - target), s))
    while best:
        taken.add(last[best])
        best -= sizes[last[best]]
    return taken


def _bits(number: int) -> list[int]:
    """Which bits of a number are set."""
    if number & (number - 1) == 0:
        return [number.bit_length() - 1]
    data = np.frombuffer(number.to_bytes(number.bit_length() // 8 + 1, "little"), np.uint8)
    return np.flatnonzero(np.unpackbits(data, bitorder="little")).tolist()
