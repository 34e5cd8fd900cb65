"""Dimensions as products of factors: what views split, contractions tie and concatenations join.

A dimension of a tensor is a list of factors, the slowest first; one of a single element is the
empty list. Two dimensions that a network adds, multiplies or contracts with one another are *tied*:
who reorders the one must reorder the other alike. What the outside can see, or an operation that
nobody taught us, makes a factor *rigid*: it cannot be reordered at all.

    view (…, 768) as (…, 12, 64)      the factor of 768 becomes a product of 12 and 64
    cat of 32 and 64 channels         a factor of 96, whose parts are the two
    x[:, 0] of (…, 3, 12, 64)         three variants of 12 and of 64, one for each index
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from math import prod
from typing import NamedTuple, final


@final
class Factor:
    """One factor, or a name for the one that it was tied to.

    Attributes:
        size: how many indices it has.
        product: factors that it was split into, the slowest first.
        parts: dimensions that it is the concatenation of.
        variants: by index of another factor, what this one is there; all of them are tied where
            this one is.
        rigid: whether it cannot be reordered.
        traits: what the network does to it.
    """

    __slots__ = ("parts", "product", "rigid", "same", "size", "slow", "traits", "variants")

    def __init__(self, size: int, *, rigid: bool = False, traits: Iterable[str] = ()) -> None:
        self.size = size
        self.same: Factor | None = None
        self.product: list[Factor] | None = None
        self.parts: list[Dimension] | None = None
        self.variants: list[Factor] | None = None
        self.slow: Factor | None = None  # what it was split from as the faster part
        self.rigid = rigid
        self.traits = set(traits)


Dimension = list[Factor]
INDEXED = "indexed"
"""Trait of a factor whose indices are told apart, each with variants of its own."""


class Placement(NamedTuple):
    """Where a factor lies in a dimension: index j is at offset + j·stride, and at every repeat.

    `repeats` are (count, stride) of what surrounds it.
    """

    factor: Factor
    offset: int
    stride: int
    repeats: tuple[tuple[int, int], ...]


def root(factor: Factor) -> Factor:
    """The factor that this one was tied to."""
    while factor.same is not None:
        factor = factor.same
    return factor


def leaves(dimension: Iterable[Factor]) -> Dimension:
    """The factors that were split no further, without those of one index."""
    found: Dimension = []
    for each in map(root, dimension):
        found += leaves(each.product) if each.product else [each]
    return [each for each in found if each.size != 1]


def extent(dimension: Iterable[Factor]) -> int:
    """How many indices a dimension has."""
    return prod(each.size for each in dimension)


def fresh(shape: Iterable[int], *, rigid: bool = False) -> list[Dimension]:
    """Dimensions of this shape that nothing is known of."""
    return [[Factor(int(n), rigid=rigid)] if n != 1 else [] for n in shape]


def fix(dimension: Iterable[Factor]) -> None:
    """Make rigid all that a dimension is made of."""
    for each in leaves(dimension):
        each.rigid = True
        for inner in [*(each.parts or ()), *([each.variants] if each.variants else ())]:
            fix(inner)


def mark(dimension: Iterable[Factor], trait: str) -> None:
    """Note what the network does to all that a dimension is made of."""
    for each in leaves(dimension):
        each.traits.add(trait)
        for inner in [*(each.parts or ()), *([each.variants] if each.variants else ())]:
            mark(inner, trait)


def tie(mine: Dimension, theirs: Dimension) -> None:
    """From now on the two dimensions are reordered alike; what does not fit together is fixed."""
    ours, others = leaves(mine), leaves(theirs)
    if extent(ours) != extent(others):
        fix(ours)
        fix(others)
        return
    while ours and others:
        a, b = root(ours.pop()), root(others.pop())
        if a.product or b.product:
            ours += a.product or [a]
            others += b.product or [b]
            ours, others = leaves(ours), leaves(others)
        elif a.size == b.size:
            _join(a, b)
        elif a.size % b.size == 0:
            ours += split(a, a.size // b.size)
            others.append(b)
        elif b.size % a.size == 0:
            others += split(b, b.size // a.size)
            ours.append(a)
        else:
            fix([*ours, a])
            fix([*others, b])
            return


def split(factor: Factor, slower: int) -> list[Factor]:
    """Make a factor the product of `slower` and the rest, in place."""
    factor = root(factor)
    faster = factor.size // slower
    halves = [Factor(n, rigid=factor.rigid, traits=factor.traits) for n in (slower, faster)]
    halves[0].slow, halves[1].slow = factor.slow, halves[0]
    if factor.variants is not None:
        pairs = [split(each, slower) for each in factor.variants]
        halves[0].variants, halves[1].variants = map(list, zip(*pairs, strict=True))
        factor.variants = None
    if factor.parts is not None:
        if not _split_parts(factor.parts, slower, faster, halves):
            fix([factor])
            fix(halves)
        factor.parts = None
    factor.product = halves
    return halves


def _split_parts(parts: list[Dimension], slower: int, faster: int, halves: list[Factor]) -> bool:
    """Split a concatenation: at its seams, or each part alike."""
    sizes = [extent(leaves(part)) for part in parts]
    if sizes == [faster] * slower and all(len(leaves(part)) == 1 for part in parts):
        halves[1].variants = [leaves(part)[0] for part in parts]
        return True
    if all(size % faster == 0 for size in sizes):
        pieces = []
        for part, size in zip(parts, sizes, strict=True):
            pair = Factor(size // faster), Factor(faster)
            tie(part, list(pair))
            tie([pair[1]], [halves[1]])
            pieces.append([pair[0]])
        halves[0].parts = pieces
        return True
    return False


def reshaped(dimensions: Sequence[Dimension], shape: Sequence[int]) -> list[Dimension] | None:
    """The dimensions of a view of another shape, or None where that cuts through a factor."""
    flat = [each for dimension in dimensions for each in leaves(dimension)]
    found: list[Dimension] = []
    for size in reversed(shape):
        built: Dimension = []
        missing = size
        while missing > 1:
            if not flat:
                return None
            last = root(flat.pop())
            if last.product:
                flat += leaves(last.product)
            elif missing % last.size == 0:
                built.insert(0, last)
                missing //= last.size
            elif last.size % missing == 0:
                flat += split(last, last.size // missing)
            else:
                return None
        found.insert(0, built)
    return found


def joined(dimensions: Sequence[Dimension]) -> Dimension:
    """The concatenation of dimensions."""
    if len(dimensions) == 1:
        return dimensions[0]
    whole = Factor(sum(extent(leaves(each)) for each in dimensions))
    whole.parts = [each if leaves(each) else [Factor(1)] for each in dimensions]
    return [whole]


def cut(dimension: Dimension, sizes: Sequence[int]) -> list[Dimension]:
    """A dimension in pieces of these sizes, one behind the other."""
    inner = leaves(dimension)
    if not inner:
        return [list(dimension) for _ in sizes]
    first, rest = inner[0], inner[1:]
    faster = extent(rest)
    if any(size % faster for size in sizes):
        fix(dimension)
        return [fresh((size,), rigid=True)[0] for size in sizes]
    _seam(first, [size // faster for size in sizes])
    parts = root(first).parts or [[first]]
    pieces, remaining = [], iter(parts)
    for size in sizes:
        taken, found = 0, list[Dimension]()
        while taken < size // faster:
            found.append(next(remaining))
            taken += extent(leaves(found[-1]))
        pieces.append([*joined(found), *rest])
    return pieces


def at_index(dimensions: Sequence[Dimension], axis: int, index: int) -> list[Dimension]:
    """The dimensions of a tensor at one index of a dimension, which is gone.

    Where the others were split off that dimension, they may be another thing at every index, as the
    queries, keys and values of a fused projection are.
    """
    chosen = leaves(dimensions[axis])
    others = [each for number, each in enumerate(dimensions) if number != axis]
    if len(chosen) != 1 or chosen[0].rigid or chosen[0].parts or chosen[0].variants:
        fix(dimensions[axis])
        return others
    slow = chosen[0]
    slow.traits.add(INDEXED)
    found = []
    for dimension in others:
        inner = leaves(dimension)
        for number, each in enumerate(inner):
            if _came_from(each, slow):
                if each.variants is None:
                    each.variants = [
                        Factor(each.size, rigid=each.rigid, traits=each.traits)
                        for _ in range(slow.size)
                    ]
                inner[number] = each.variants[index]
        found.append(inner)
    return found


def _came_from(factor: Factor, slow: Factor) -> bool:
    """Whether a factor was the faster part when `slow` was split off, or a part of that."""
    seen = factor.slow
    while seen is not None:
        if any(each is slow for each in leaves([seen])):
            return True
        seen = seen.slow
    return False


def _join(a: Factor, b: Factor) -> None:
    """One factor out of two of the same size."""
    if a is b:
        return
    if a.variants is not None or b.variants is not None:
        _join_variants(a, b)
        return
    if a.parts is not None and b.parts is not None:
        _seam(a, [extent(leaves(part)) for part in b.parts])
        _seam(b, [extent(leaves(part)) for part in a.parts])
        for mine, theirs in zip(a.parts, b.parts, strict=True):
            tie(mine, theirs)
    keep, gone = (b, a) if a.parts is None and b.parts is not None else (a, b)
    gone.same = keep
    keep.slow = keep.slow or gone.slow
    for trait in keep.traits | gone.traits:
        mark([keep], trait)
    if keep.rigid or gone.rigid:
        fix([keep])


def _join_variants(a: Factor, b: Factor) -> None:
    """Tie every variant of the two with one another, and with the one that has none."""
    plain = [[each] for each in (a, b) if each.variants is None]
    every = [*plain, *([each] for each in (*(a.variants or ()), *(b.variants or ())))]
    for other in every[1:]:
        tie(every[0], other)


def _seam(factor: Factor, sizes: Sequence[int]) -> None:
    """Make a factor a concatenation that has seams behind each of these sizes, in place."""
    factor = root(factor)
    if factor.parts is None:
        if len(sizes) == 1:
            return
        factor.parts = [[Factor(size, rigid=factor.rigid, traits=factor.traits)] for size in sizes]
        return
    seams, at = set[int](), 0
    for size in sizes:
        at += size
        seams.add(at)
    found, at = [], 0
    for part in factor.parts:
        size = extent(leaves(part))
        inside = sorted(seam - at for seam in seams if at < seam < at + size)
        if inside:
            ends = [0, *inside, size]
            found += cut(part, [end - start for start, end in pairwise(ends)])
        else:
            found.append(part)
        at += size
    factor.parts = found


def placed(dimension: Dimension) -> Iterator[Placement]:
    """Where every leaf of a dimension lies in it."""
    yield from _placed(leaves(dimension), 0, 1, ())


def _placed(
    inner: Sequence[Factor], offset: int, stride: int, repeats: tuple[tuple[int, int], ...]
) -> Iterator[Placement]:
    strides = [stride * extent(inner[number + 1 :]) for number in range(len(inner))]
    whole = list(zip(inner, strides, strict=True))
    for number, (factor, step) in enumerate(whole):
        around = [(each.size, by) for at, (each, by) in enumerate(whole) if at != number]
        if factor.variants is not None:
            slow = next((at for at in whole[:number] if len(factor.variants) == at[0].size), None)
            if slow is not None and _came_from(factor, root(slow[0])):
                others = [pair for pair in around if pair != (slow[0].size, slow[1])]
                for index, each in enumerate(factor.variants):
                    where = offset + index * slow[1]
                    yield from _placed(leaves([each]), where, step, (*repeats, *others))
                continue
            for each in factor.variants:
                fix([each])
        if factor.parts is not None:
            at = 0
            for part in factor.parts:
                ours = (*repeats, *around)
                yield from _placed(leaves(part), offset + at * step, step, ours)
                at += extent(leaves(part))
            continue
        yield Placement(factor, offset, step, (*repeats, *around))
