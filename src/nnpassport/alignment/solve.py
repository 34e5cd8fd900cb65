"""Bring a suspect's weights into the coordinates of another network, axis by axis.

    permute      Hungarian matching of rows by the sum of their cosines over all tensors of the axis
    in groups    the same inside every pair of groups, and then of the groups (group norm)
    orthogonal   Procrustes
    invertible   Sylvester's equation: writers times G⁻¹, readers times Gᵀ
    inner        heads by products that nothing inside a head changes, then the same in each head

It begins with axes whose tensors are anchored elsewhere, and goes over all of them again. Which
network is aligned to decides what a match is worth.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import NamedTuple, final

import numpy as np
from numpy.typing import NDArray

from nnpassport.alignment.axes import Axes, Axis
from nnpassport.alignment.canonical import Weights, canonical
from nnpassport.alignment.directions import Free, cosines_outside
from nnpassport.alignment.heads import Attention, Side, attentions, pairs_of
from nnpassport.alignment.match import assigned, in_groups, mixture, unit_rows
from nnpassport.alignment.refine import Fit, begun, refined
from nnpassport.alignment.spots import Spot, crossed, spots_of
from nnpassport.alignment.table import sides_of
from nnpassport.alignment.twins import twins_of
from nnpassport.alignment.widened import narrowed
from nnpassport.ground.progress import counted

Matrix = NDArray[np.float64]
SWEEPS = 3
_NOT_LINEAR = {"pointwise", "layer norm", "square", "bilinear"}
"""Traits with which a positive factor does not pass through an axis."""
_TINY = 1e-300
_STILL = 1e-6
"""How far a rotation or mixture may be from none, in each number, and nothing has moved."""
PAIR_ROUNDS = 20
_TELLING = 8
"""So many numbers of a filter have to be left that no mark moves, for it to be known by them."""
SCALINGS = 8
_MARKED = 1e-3
"""What a tensor that may carry the mark counts when rotations are found."""


class Aligned(NamedTuple):
    """A suspect in the reference's coordinates, in canonical form.

    Attributes:
        weights: as `canonical` gives them.
        likeness: by number of the axis, the mean cosine of rows that were matched, in [-1, 1];
            orthogonal and invertible axes have none.
    """

    weights: Weights
    likeness: Mapping[int, float]


class Unit(NamedTuple):
    """What is solved at once: an axis, or groups of a norm or of a convolution with their insides.

    Attributes:
        numbers: of its axes; the outer first.
        groups: of how many it is; 1 for an axis.
        either_sign: each row may be negated.
        normed: each group may be negated, together with a group norm behind it.
        around: where the groups are and their insides are not: the other side of a convolution.
    """

    numbers: tuple[int, ...]
    kind: str
    size: int
    groups: int
    either_sign: bool
    normed: bool
    spots: tuple[Spot, ...]
    around: tuple[Spot, ...] = ()

    @property
    def last(self) -> int:
        """Number of its inner axis."""
        return self.numbers[-1]

    @property
    def inside(self) -> int:
        """How many rows a group has."""
        return self.size // self.groups

    def order_at(self, spot: Spot, order: NDArray[np.int64]) -> NDArray[np.int64]:
        """The order of rows at a spot, of which `order` is the one everywhere else.

        Where a convolution in groups reads what it writes, its outputs have moved the groups.
        """
        written = any((s.tensor, s.dimension, s.groups) == (spot.tensor, 0, 1) for s in self.spots)
        if spot.groups == 1 or not written:
            return order
        return np.arange(self.size) // self.inside * self.inside + order % self.inside


class _Step(NamedTuple):
    """What was done to the tensors of a unit: a tensor that joins later gets the same."""

    spots: tuple[Spot, ...]
    change: Callable[[Spot, Matrix], Matrix]


@dataclass(slots=True, repr=False)
class Work:
    """One suspect on its way into the reference's coordinates.

    Attributes:
        weights: its tensors, in canonical form, as far as they are in place.
        targets: what they are compared with: the reference's, and along the directions in which a
            mark moves each filter the suspect's own.
        likeness: see `Aligned`.
        settled: numbers of the axes that were solved once.
        loose: layers whose rows may be of either sign, as the norm behind them is not known.
        steps: all that was done.
        mixed: by number of an invertible axis, what was multiplied with all that writes it.
        swept: whether all axes were solved once, so that signs of rows can be told.
        moved: whether anything was since this was last set to False.
    """

    weights: Weights
    targets: Weights
    likeness: dict[int, float]
    settled: set[int]
    loose: frozenset[str]
    steps: list[_Step]
    mixed: dict[int, Matrix] = field(default_factory=dict)
    swept: bool = False
    moved: bool = False


@final
@dataclass(frozen=True, slots=True, repr=False)
class Aligner:
    """Aligns suspects to one reference; made by `aligner`.

    `marked` are tensors in which the suspect may differ from the reference by a mark: what can be
    told from others is told from them, so that no rotation takes up the mark; and `free`, of some,
    the directions in which the mark moves each filter. `scaled` are, by tensor, the axes along
    which its rows may be of any scale; `rotated` tensors have pairs that are turned at the end.
    """

    axes: Axes
    reference: Weights
    units: tuple[Unit, ...]
    attentions: tuple[Attention, ...]
    on: Mapping[str, frozenset[int]]
    marked: frozenset[str]
    free: Mapping[str, Free]
    scaled: Mapping[str, Sequence[tuple[Unit, Spot]]]
    rotated: frozenset[str]

    def align(self, tensors: Mapping[str, Matrix], loose: Collection[str] = ()) -> Aligned:
        """The suspect's tensors in the reference's coordinates.

        Tensors of names that the reference does not have are left out. Where an axis is longer than
        the reference's, its best rows are taken. Rows of `loose` tensors may be negated.
        """
        work = self.begun(tensors, loose)
        for unit in self.units:
            self._unite(unit, work)
        waiting = list(self.units)
        while waiting:
            unit = max(waiting, key=lambda each: self._anchored(each, work))
            self.solve(unit, work)
            waiting.remove(unit)
        work.swept = True
        for sweep in range(SWEEPS):
            self._free_directions(work)
            work.moved = False
            for unit in counted(self.units, f"putting units in order, {sweep + 1} of {SWEEPS}"):
                self.solve(unit, work)
            if not work.moved:
                break
        for attention in self.attentions:
            self._solve_heads(attention, work)
        for pairs in self.axes.pairs:
            self._solve_pairs(pairs, work)
        self._rescale_all(work)
        return Aligned(work.weights, work.likeness)

    def begun(self, tensors: Mapping[str, Matrix], loose: Collection[str] = ()) -> Work:
        """A suspect of which nothing is in place yet."""
        known = {name: each for name, each in tensors.items() if name in self.reference}
        weights = canonical(self.axes, known)
        return Work(weights, dict(self.reference), {}, set(), frozenset(loose), [])

    def _unite(self, unit: Unit, work: Work) -> None:
        """Make one of rows that compute the same, where there are more than the reference has."""
        alone = unit.kind == "permute" and unit.groups == 1 and not unit.normed
        spots = [spot for spot in unit.spots if spot.tensor in work.weights]
        matrices = [spot for spot in spots if work.weights[spot.tensor].ndim > 1]
        if not alone or not _longer(unit, matrices, work.weights, self.reference):
            return
        scaled = _is_scaled(self.axes, unit)
        twins = twins_of(
            self.axes, matrices, work.weights, unit.size, scaled=scaled, signed=unit.either_sign
        )
        if twins is not None:
            self._do(tuple(spots), twins.of, work)

    def usable(self, unit: Unit, work: Work, known: set[int] | None = None) -> list[Spot]:
        """Spots whose tensors can be compared along this axis, all their other axes being known."""
        mine = set(unit.numbers) | (work.settled if known is None else known)
        return [
            spot
            for spot in unit.spots
            if spot.tensor in work.weights
            and work.weights[spot.tensor].ndim > 1
            and self.on[spot.tensor] <= mine
            and spot.tensor not in self.rotated
            and _like_but_for(spot, work.weights[spot.tensor], self.reference[spot.tensor])
            and (spot.groups == 1 or self._alike(spot.tensor, work))
        ]

    def _anchored(self, unit: Unit, work: Work) -> float:
        there = [spot for spot in unit.spots if spot.tensor in work.weights]
        usable = self.usable(unit, work)
        if unit.kind == "invertible":  # of any scale says nothing, as long as there is another
            there = [spot for spot in there if spot.tensor not in work.loose] or there
            usable = [spot for spot in usable if any(spot is each for each in there)]
        return len(usable) / max(1, len(there))

    def _free_directions(self, work: Work, names: Collection[str] | None = None) -> None:
        """Compare marked filters from now on by what no mark moves."""
        for name in self.free if names is None else names:
            mine, theirs = work.weights.get(name), self.reference[name]
            scaled = name in self.free and name not in work.loose  # else rows may be of any length
            if scaled and mine is not None and mine.shape == theirs.shape:
                work.targets[name] = self.free[name].taken(mine, theirs)

    def solve(self, unit: Unit, work: Work) -> None:
        """Bring one axis into place, as far as its other axes are."""
        spots = self.usable(unit, work)
        work.settled |= set(unit.numbers)
        if not spots:
            return
        if unit.kind == "permute":
            self._match(unit, spots, work)
            return
        longer = _longer(unit, spots, work.weights, self.reference)
        fitting = [spot for spot in spots if longer or self._fits(spot, work.weights)]
        if not fitting or (longer and all(spot.reads for spot in fitting)):
            return  # of a longer axis only what is written says which of it is used
        self._turn(unit, fitting, longer, work)
        marked = [spot for spot in fitting if spot.tensor in self.free]
        comparable = all(
            self._alike(spot.tensor, work) and spot.tensor not in work.loose for spot in fitting
        )
        if 2 * len(marked) >= len(fitting) and comparable:
            fit = Fit([(spot, spot.reads) for spot in fitting], 1, unit.kind == "orthogonal")
            seen = {spot.tensor: self._comparable(spot, work) for spot in fitting}
            ((back, there),) = refined(fit, seen, self.reference, self.free)
            self._do(unit.spots, self._turning(back, there), work)

    def _alike(self, name: str, work: Work) -> bool:
        return work.weights[name].shape == self.reference[name].shape

    def _turning(self, back: Matrix, there: Matrix) -> Callable[[Spot, Matrix], Matrix]:
        """Multiply what writes an axis with the one, and what reads it with the other."""

        def change(spot: Spot, tensor: Matrix) -> Matrix:
            if tensor.ndim < 2 or tensor.shape[spot.dimension] != _length(spot, self.reference):
                return tensor
            return spot.with_rows(tensor, (there if spot.reads else back) @ spot.rows(tensor))

        return change

    def _turn(self, unit: Unit, spots: Sequence[Spot], longer: int, work: Work) -> None:
        """Rotate or mix the suspect's rows into the reference's, of which there may be fewer."""
        pairs = [(spot, self._rows_of_both(spot, work, longer)) for spot in spots]
        held = [(s, rows) for s, rows in pairs if s.reads or s.tensor not in work.loose]
        # Rows whose norm is not known are of any scale: each such layer is mixed for itself.
        own = {
            spot.tensor: mixture([rows], [True], [1.0])[0]
            for spot, rows in pairs
            if unit.kind != "orthogonal" and spot.tensor in work.loose and not spot.reads
        }
        there = longer or unit.size
        back, forward = np.eye(unit.size, there), np.eye(there, unit.size)
        if unit.kind == "orthogonal":
            trust, basis = [self._trust(s, work) for s, _ in pairs], np.eye(there)
            if longer:
                basis = _written([rows for spot, (rows, _) in pairs if not spot.reads], unit.size)
            forward = basis @ _procrustes([(basis.T @ m, t) for _, (m, t) in pairs], trust)
            back = forward.T
        elif held:
            trust, written = [self._trust(s, work) for s, _ in held], [not s.reads for s, _ in held]
            scaled = [s.reads and s.tensor in work.loose for s, _ in held]
            back, forward = _in_scale([rows for _, rows in held], written, trust, scaled)
        still = not longer and not own and np.abs(back - np.eye(unit.size)).max() <= _STILL
        work.moved |= not still
        if unit.kind == "invertible" and not longer:
            work.mixed[unit.last] = back @ work.mixed.get(unit.last, np.eye(unit.size))

        def change(spot: Spot, tensor: Matrix) -> Matrix:
            by = forward.T if spot.reads else own.get(spot.tensor, back)
            if longer and tensor.ndim > 1:
                wide = spot.along(tensor)
                fits = len(wide.positions) == longer
                return spot.of(by @ wide.rows(tensor), tensor) if fits else tensor
            if tensor.ndim < 2 or tensor.shape[spot.dimension] != _length(spot, self.reference):
                return tensor
            return spot.with_rows(tensor, by @ spot.rows(tensor))

        self._do(unit.spots, change, work)

    def _comparable(self, spot: Spot, work: Work) -> Matrix:
        """A tensor in which rows of any scale are as long as the reference's.

        That is along its other axes, and with the reference's sign where that is free too: else the
        longest rows would say how an axis is turned, and those of the other sign undo it.
        """
        mine, theirs = work.weights[spot.tensor], work.targets[spot.tensor]
        if mine.shape != theirs.shape:
            return mine
        for unit, other in self.scaled.get(spot.tensor, ()):
            if other.dimension != spot.dimension:
                rows, wanted = other.rows(mine), other.rows(theirs)
                lengths = np.linalg.norm(wanted, axis=1) / np.maximum(
                    np.linalg.norm(rows, axis=1), _TINY
                )
                signs = np.where((rows * wanted).sum(1) < 0, -1.0, 1.0)
                told = unit.either_sign and work.swept
                factor = lengths * (signs if told else 1.0)
                mine = other.with_rows(mine, rows * factor[:, None])
        return mine

    def _rows_of_both(self, spot: Spot, work: Work, longer: int) -> tuple[Matrix, Matrix]:
        mine = self._comparable(spot, work)
        rows = (spot.along(mine) if longer else spot).rows(mine)
        return rows, spot.rows(work.targets[spot.tensor])

    def _trust(self, spot: Spot, work: Work) -> float:
        """How far a tensor's rows are to be believed, beside others'."""
        unsure = not work.swept and any(
            unit.either_sign and other.dimension != spot.dimension
            for unit, other in self.scaled.get(spot.tensor, ())
        )
        return (_MARKED if spot.tensor in self.marked else 1.0) * (_MARKED if unsure else 1.0)

    def _do(
        self, spots: tuple[Spot, ...], change: Callable[[Spot, Matrix], Matrix], work: Work
    ) -> None:
        for spot in spots:
            tensor = work.weights.get(spot.tensor)
            if tensor is not None:
                work.weights[spot.tensor] = change(spot, tensor)
        work.steps.append(_Step(spots, change))

    def joined(self, name: str, tensor: Matrix, work: Work) -> Matrix:
        """A tensor in canonical form as it is once all is done to it that was done to the others.

        Raises:
            IndexError: its shape is not one that it could be done to.
        """
        for spots, change in work.steps:
            for spot in spots:
                if spot.tensor == name:
                    tensor = change(spot, tensor)
        return tensor

    def _match(self, unit: Unit, spots: Sequence[Spot], work: Work) -> None:
        """Put the suspect's rows into the order of the reference's."""
        weights = work.weights
        longer = _longer(unit, spots, weights, self.reference)
        cosines = np.zeros((unit.size, longer or unit.size))
        turned = np.zeros_like(cosines)  # what a group that is negated with its norm has negated
        for spot in spots:
            mine = weights[spot.tensor]
            rows = (spot.along(mine) if longer else spot).rows(mine)
            found = self._cosines(spot, rows, work)
            loose = spot.tensor in work.loose and not spot.reads
            if unit.normed and not longer and not spot.reads and mine.ndim > 1:
                turned += found
            else:
                cosines += np.abs(found) if unit.either_sign or loose else found
        signs: Matrix | None = None
        if unit.groups > 1 and not unit.normed:
            order = in_groups(cosines, unit.groups)
        elif not unit.normed or longer:
            order = assigned(cosines)
        else:
            cosines, order = _assigned_in_groups(cosines, turned, unit.groups)
            felt = turned[np.arange(unit.size), order].reshape(unit.groups, -1).sum(1)
            signs = np.repeat(np.where(felt < 0, -1.0, 1.0), unit.inside)
        work.moved |= longer > 0 or not np.array_equal(order, np.arange(unit.size))
        likeness = float(cosines[np.arange(unit.size), order].mean() / len(spots))
        work.likeness[unit.last] = likeness

        def change(spot: Spot, tensor: Matrix) -> Matrix:
            if longer:
                wide = spot.along(tensor)
                if len(wide.positions) != longer:
                    return tensor
                return self._signed(spot, spot.of(wide.rows(tensor)[order], tensor), work)
            if not self._as_long(spot, tensor):
                return tensor
            rows = spot.rows(tensor)[unit.order_at(spot, order)]
            placed = spot.with_rows(
                tensor, rows if signs is None else self._turned(spot, rows, signs)
            )
            return self._signed(spot, placed, work)

        self._do(unit.spots, change, work)
        if unit.around:
            self._do(unit.around, self._regrouped(order[:: unit.inside] // unit.inside), work)

    def _cosines(self, spot: Spot, rows: Matrix, work: Work) -> Matrix:
        """Of the suspect's rows to each of the reference's, in what no mark moves of filters.

        Of filters that a mark may move nearly everywhere, that is too little to tell them apart.
        """
        free = self.free.get(spot.tensor)
        directions = None if free is None else free.of_rows(spot.positions, spot.dimension)
        if directions is None or not _tells(directions.shape[1], directions.shape[2]):
            return unit_rows(spot.rows(work.targets[spot.tensor])) @ unit_rows(rows).T
        return cosines_outside(directions, spot.rows(self.reference[spot.tensor]), rows)

    def _as_long(self, spot: Spot, tensor: Matrix) -> bool:
        """Whether a tensor has as many rows there as the reference's; in groups, in every group."""
        theirs = self.reference[spot.tensor]
        if spot.groups > 1:
            return tensor.shape[:2] == theirs.shape[:2] and tensor.ndim == theirs.ndim
        there = tensor.ndim == theirs.ndim
        return there and tensor.shape[spot.dimension] == theirs.shape[spot.dimension]

    def _regrouped(self, order: NDArray[np.int64]) -> Callable[[Spot, Matrix], Matrix]:
        """Put whole groups into this order."""

        def change(spot: Spot, tensor: Matrix) -> Matrix:
            if not self._as_long(spot, tensor):
                return tensor
            return spot.with_rows(tensor, spot.rows(tensor)[order])

        return change

    def _signed(self, spot: Spot, tensor: Matrix, work: Work) -> Matrix:
        """A loose layer's tensor with the signs of rows that fit the reference's."""
        theirs = work.targets[spot.tensor]
        if spot.tensor not in work.loose or spot.reads or tensor.shape != theirs.shape:
            return tensor
        rows, wanted = spot.rows(tensor), spot.rows(theirs)
        signs = np.where((rows * wanted).sum(1) < 0, -1.0, 1.0)
        return spot.with_rows(tensor, rows * signs[:, None])

    def _turned(self, spot: Spot, rows: Matrix, signs: Matrix) -> Matrix:
        """Rows of groups that were negated with their norm, and the norm's weight, negated back.

        Readers do not feel it; the norm's shift does not take part.
        """
        matrix = self.reference[spot.tensor].ndim > 1
        if spot.reads or not (matrix or spot.tensor.endswith("weight")):
            return rows
        return rows * signs[:, None]

    def _rescale_all(self, work: Work) -> None:
        """Give rows of all units the reference's scale, again and again where they are marked.

        What a mark may have moved of a filter says nothing of its scale, and is taken to be right.
        """
        scaled = [unit for unit in self.units if _is_scaled(self.axes, unit)]
        for unit in scaled:
            self._rescale(unit, work)
        there = {spot.tensor for unit in scaled for spot in unit.spots if spot.reads}
        marked = there & self.free.keys()
        again = [unit for unit in scaled if any(spot.tensor in marked for spot in unit.spots)]
        for _ in range(SCALINGS if again else 0):
            self._free_directions(work, marked)
            for unit in again:
                self._rescale(unit, work)

    def _rescale(self, unit: Unit, work: Work) -> None:
        """Give rows the reference's scale where each may have any, and its sign where that is free.

        Behind a ReLU a reader may be multiplied by what its writer is divided by; of two factors of
        a product one may be negated with the reader.
        """
        for spot in unit.spots:
            mine = work.weights.get(spot.tensor)
            comparable = mine is not None and mine.shape == self.reference[spot.tensor].shape
            if mine is None or not comparable or mine.ndim < 2:
                continue
            rows, theirs = spot.rows(mine), spot.rows(work.targets[spot.tensor])
            factor = (rows * theirs).sum(1) / np.maximum((rows * rows).sum(1), _TINY)
            if not unit.either_sign:
                factor = np.maximum(factor, 0.0)
            if not spot.reads:
                factor = np.sign(factor)
            work.weights[spot.tensor] = spot.with_rows(
                mine, rows * np.where(factor == 0, 1.0, factor)[:, None]
            )

    def _fits(self, spot: Spot, weights: Weights) -> bool:
        mine, theirs = weights[spot.tensor], self.reference[spot.tensor]
        return (
            mine.ndim == theirs.ndim and mine.shape[spot.dimension] == theirs.shape[spot.dimension]
        )

    def _solve_heads(self, attention: Attention, work: Work) -> None:
        sides = [inside.sides for inside in attention.insides]
        names = {side.whole.tensor for both in sides for side in both}
        if not all(name in work.weights for name in names):
            return
        if not all(self._alike(name, work) for name in names):
            fewer = narrowed(self.axes, attention, work.weights, self.reference)
            if fewer is None:
                return
            work.weights |= fewer
        if attention.heads is not None or attention.copies is not None:
            self._match_heads(attention, work)
        heads = attention.size[0]
        for inside in sides:
            spots = [side.whole for side in inside]
            if not any(spot.tensor in self.free for spot in spots):
                self._solve_inside(inside, work, heads)
                continue
            fit = Fit([(spots[0], False), (spots[1], True)], heads, orthogonal=False)
            first = begun(fit, work.weights, self.reference, self.free)
            if first is None:
                self._solve_inside(inside, work, heads)
            else:
                self._turn_inside(fit, first, work)
            turns = refined(fit, work.weights, self.reference, self.free)
            self._turn_inside(fit, turns, work)

    def _match_heads(self, attention: Attention, work: Work) -> None:
        """Put heads into the reference's order, by what nothing inside of them changes."""
        heads, copies = attention.size
        cosines = np.zeros((heads * copies, heads * copies))
        for inside in attention.insides:
            theirs, mine = (
                unit_rows(_products(inside.sides, source, attention.size))
                for source in (self.reference, work.weights)
            )
            cosines += theirs @ mine.T
        order = in_groups(cosines, heads) if copies > 1 else assigned(cosines)
        rows = np.arange(len(order))
        found = float(cosines[rows, order].mean() / len(attention.insides))
        number = attention.copies if attention.heads is None else attention.heads
        work.likeness[number or 0] = found
        self._reorder_heads(attention, order, work)

    def _turn_inside(self, fit: Fit, turns: Sequence[tuple[Matrix, Matrix]], work: Work) -> None:
        for spot, second in fit.sides:
            tensor = work.weights[spot.tensor]
            blocks = spot.rows(tensor).reshape(fit.heads, -1, spot.rows(tensor).shape[1])
            rows = np.stack([turns[h][second] @ blocks[h] for h in range(fit.heads)])
            work.weights[spot.tensor] = spot.with_rows(tensor, rows.reshape(-1, rows.shape[-1]))

    def _reorder_heads(self, attention: Attention, order: NDArray[np.int64], work: Work) -> None:
        """Heads with their copies where a tensor has both, heads alone elsewhere."""
        axes, (_, copies) = self.axes, attention.size
        outer = None if attention.heads is None else axes.axes[attention.heads]
        inner = None if attention.copies is None else axes.axes[attention.copies]
        if outer is None:
            both = [] if inner is None else spots_of(axes, inner)
        else:
            both = [] if inner is None else crossed(axes, outer, inner)
        moved = [(spot, order) for spot in both]
        held = {
            (spot.tensor, spot.dimension, int(at)) for spot in both for at in spot.positions.flat
        }
        alone = order[::copies] // copies
        for spot in [] if outer is None else spots_of(axes, outer):
            if (spot.tensor, spot.dimension, int(spot.positions.flat[0])) not in held:
                moved.append((spot, alone))
        for spot, by in moved:
            if spot.tensor in work.weights and self._fits(spot, work.weights):
                tensor = work.weights[spot.tensor]
                work.weights[spot.tensor] = spot.with_rows(tensor, spot.rows(tensor)[by])

    def _solve_inside(self, inside: tuple[Side, Side], work: Work, heads: int) -> None:
        spots = [side.whole for side in inside]
        trust = [self._trust(spot, work) for spot in spots]
        mine = [_blocks(spot, work.weights, heads) for spot in spots]
        theirs = [_blocks(spot, self.reference, heads) for spot in spots]
        for head in range(heads):
            pairs = [(mine[side][head], theirs[side][head]) for side in (0, 1)]
            back, forward = mixture(pairs, [True, False], trust)
            mine[0][head] = back @ mine[0][head]
            mine[1][head] = forward.T @ mine[1][head]
        for spot, blocks in zip(spots, mine, strict=True):
            tensor = work.weights[spot.tensor]
            work.weights[spot.tensor] = spot.with_rows(
                tensor, blocks.reshape(len(spot.positions), -1)
            )

    def _solve_pairs(self, pairs: Axis, work: Work) -> None:
        """Turn and stretch pairs that positions rotate: q by z, k by z/|z|², head by head."""
        both = sides_of(pairs)
        heads = [axis for axis in self.axes.axes if "batched" in axis.traits]
        found = None if both is None else pairs_of(self.axes, both, pairs.size, heads)
        if found is None or any(not self._known(one.tensor, work) for one, _ in found):
            return
        marked = [one.tensor for one, _ in found if one.tensor in self.free]
        for _ in range(PAIR_ROUNDS if marked else 1):
            z = np.zeros(len(found[0][0].positions), complex)
            logs = np.zeros(len(z))
            for number, (one, two) in enumerate(found):
                mine = _complex(one, two, work.weights)
                theirs = _complex(one, two, work.targets)
                product = (theirs.conj() * mine).sum(1)
                power = np.maximum(np.square(np.abs(theirs)).sum(1), _TINY)
                z += product / power
                logs += (-1) ** number * np.log(np.maximum(np.abs(product) / power, _TINY)) / 2
            if "negated" in pairs.traits:  # they are normed: nothing else is free
                z, logs = np.where(z.real < 0, -1.0, 1.0) + 0j, np.zeros(len(z))
            turn = z / np.maximum(np.abs(z), _TINY)
            for number, (one, two) in enumerate(found):
                back = turn.conj() * np.exp(-((-1) ** number) * logs)
                rows = _complex(one, two, work.weights) * back[:, None]
                tensor = one.with_rows(work.weights[one.tensor], rows.real)
                work.weights[one.tensor] = two.with_rows(tensor, rows.imag)
            self._free_directions(work, marked)

    def _known(self, name: str, work: Work) -> bool:
        return name in work.weights and self._alike(name, work)


def aligner(
    axes: Axes,
    tensors: Mapping[str, Matrix],
    marked: Collection[str] = (),
    free: Mapping[str, Free] | None = None,
) -> Aligner:
    """An aligner to the network that has these tensors and these (proved) axes."""
    on: dict[str, set[int]] = {}
    for number, axis in enumerate(axes.axes):
        for place in axis.places:
            on.setdefault(place.tensor, set()).add(number)
    units = tuple(_units(axes))
    scaled: dict[str, list[tuple[Unit, Spot]]] = {}
    for unit in units:
        for spot in unit.spots if _is_scaled(axes, unit) else ():
            scaled.setdefault(spot.tensor, []).append((unit, spot))
    return Aligner(
        axes,
        canonical(axes, tensors),
        units,
        tuple(attentions(axes)),
        {name: frozenset(numbers) for name, numbers in on.items()},
        frozenset(marked),
        free or {},
        scaled,
        frozenset(place.tensor for pairs in axes.pairs for place in pairs.places),
    )


def _is_scaled(axes: Axes, unit: Unit) -> bool:
    """Whether each row may be of any scale: behind a ReLU, or as a factor of a product.

    What is bent and multiplied with channels behind a ReLU is their gate, whose scale is its own.
    """
    numbers = unit.numbers if unit.normed else (unit.last,)
    traits = {trait for number in numbers for trait in axes.axes[number].traits}
    bent = _NOT_LINEAR - {"pointwise"} if "product" in traits else _NOT_LINEAR
    free = "rectified" in traits and not traits & bent
    return unit.kind == "permute" and (free or unit.either_sign)


def _units(axes: Axes) -> list[Unit]:
    """Axes that are solved on their own, and pairs of groups and their insides."""
    found, paired = [], set[int]()
    normed = [n for n, axis in enumerate(axes.axes) if "group norm" in axis.traits]
    for outer in normed:
        for inner in normed:
            if outer == inner or {outer, inner} & paired:
                continue
            axis, other = axes.axes[outer], axes.axes[inner]
            spots = crossed(axes, axis, other)
            together = len(spots) == len(axis.places) == len(other.places)
            if together and _is_outer(spots[0], axis, other):
                size = axis.size * other.size
                pair = Unit((outer, inner), "permute", size, axis.size, False, True, tuple(spots))
                found.append(pair)
                paired |= {outer, inner}
    for unit in grouped(axes):
        if not paired & {unit.last}:
            found.append(unit)
            paired |= set(unit.numbers)
    within = {number for attention in attentions(axes) for number in attention.numbers}
    for number, axis in enumerate(axes.axes):
        kind = _kind_alone(axis)
        if number not in paired | within and kind is not None:
            sign, turns = "product" in axis.traits, number in normed
            spots = spots_of(axes, axis)
            groups = axis.size if turns and "alone" in axis.traits else 1  # a norm for each channel
            found.append(Unit((number,), kind, axis.size, groups, sign, turns, tuple(spots)))
    return found


def grouped(axes: Axes) -> list[Unit]:
    """Both sides of convolutions in groups: in each group another order is as good.

    What is inside a group on one side is reordered there alone, and the groups on both.
    """
    found = []
    for outer, axis in enumerate(axes.axes):
        if "grouped" not in axis.traits or axis.kind != "permute":
            continue
        everywhere = spots_of(axes, axis)
        sides = {n: _inside_groups(axes, axis, other) for n, other in enumerate(axes.axes)}
        for number, spots in sides.items():
            around = tuple(e for e in everywhere if e[:2] not in _with_groups(spots))
            if spots:
                size = axis.size * axes.axes[number].size
                pair = (outer, number)
                unit = Unit(pair, "permute", size, axis.size, False, False, spots, around)
                found.append(unit)
    return found


def _with_groups(spots: Sequence[Spot]) -> set[tuple[str, int]]:
    """Where groups move with rows: of a convolution in groups those of its outputs do."""
    return {(spot.tensor, 0 if spot.groups > 1 else spot.dimension) for spot in spots}


def _inside_groups(axes: Axes, groups: Axis, axis: Axis) -> tuple[Spot, ...]:
    """Where an axis is inside each of the groups, by group and index; none if elsewhere too."""
    if axis.kind != "permute" or axis is groups:
        return ()
    spots = crossed(axes, groups, axis)
    met = {(spot.tensor, spot.dimension) for spot in spots}
    wide = groups.size * axis.size
    for place in axis.places:
        if (place.tensor, place.dimension) in met:
            continue
        alone = place[1:] == (1, 0, 1, ())  # all inputs of one group
        outputs = [p for p in groups.places if (p.tensor, p.dimension) == (place.tensor, 0)]
        blocks = [p.offset == 0 and p.stride == prod(n for n, _ in p.repeats) for p in outputs]
        if not alone or blocks != [True] or not spots:
            return ()
        spots.append(Spot(place.tensor, 1, np.arange(wide)[:, None], True, groups.size))
    return tuple(spots)


def _kind_alone(axis: Axis) -> str | None:
    """As what an axis is solved that is in no attention; None: it is not.

    Heads of another kind (experts, say) are reordered; what lies between linear layers is mixed.
    """
    if axis.kind != "inner":
        return axis.kind
    if "batched" in axis.traits:
        return "permute"
    whole = all(not place.repeats for place in axis.places)
    return "invertible" if whole and "bilinear" not in axis.traits else None


def _is_outer(spot: Spot, axis: Axis, other: Axis) -> bool:
    """Whether the channels of one group of a group norm are neighbours, `axis` being the groups."""
    table = spot.positions[:, 0].reshape(axis.size, other.size)
    return bool((np.abs(np.diff(table, axis=1)) <= np.abs(np.diff(table, axis=0)).min()).all())


def _complex(one: Spot, two: Spot, source: Weights) -> NDArray[np.complex128]:
    return one.rows(source[one.tensor]) + 1j * two.rows(source[two.tensor])


def _blocks(spot: Spot, source: Weights, count: int) -> Matrix:
    rows = spot.rows(source[spot.tensor])
    return rows.reshape(count, len(rows) // count, -1)


def _products(inside: tuple[Side, Side], source: Weights, size: tuple[int, int]) -> Matrix:
    """Of each head and copy, what its two sides make together: nothing inside it changes that."""
    heads, copies = size
    blocks = []
    for side in inside:
        if side.single is not None:
            blocks.append(_blocks(side.single, source, heads * copies))
        else:
            blocks.append(np.repeat(_blocks(side.whole, source, heads), copies, axis=0))
    return np.einsum("hdi,hdj->hij", *blocks).reshape(heads * copies, -1)


def _tells(directions: int, numbers: int) -> bool:
    return numbers - directions >= max(_TELLING, numbers // 2)


def _length(spot: Spot, reference: Weights) -> int:
    return int(reference[spot.tensor].shape[spot.dimension])


def _like_but_for(spot: Spot, mine: Matrix, theirs: Matrix) -> bool:
    others = [n for n in range(theirs.ndim) if n != spot.dimension]
    return mine.ndim == theirs.ndim and all(mine.shape[n] == theirs.shape[n] for n in others)


def _longer(unit: Unit, spots: Sequence[Spot], weights: Weights, reference: Weights) -> int:
    """How many rows the suspect has where it has more than the reference; else 0."""
    most = {len(spot.along(weights[spot.tensor]).positions) for spot in spots}
    whole = all(_length(spot, reference) == spot.positions.size for spot in spots)
    return max(most) if whole and len(most) == 1 and max(most) > unit.size else 0


def _assigned_in_groups(
    cosines: Matrix, turned: Matrix, groups: int
) -> tuple[Matrix, NDArray[np.int64]]:
    """The same where groups stay together, either of them negated in what is `turned`.

    Also returned is the sum of both matrices, with the sign that fits each pair of groups better.
    """
    inside = len(cosines) // groups
    if inside == 1:
        best = cosines + np.abs(turned)
        return best, assigned(best)
    best = np.zeros_like(cosines)
    for a in range(groups):
        for b in range(groups):
            block = np.s_[a * inside : (a + 1) * inside, b * inside : (b + 1) * inside]
            signs = (cosines[block] + turned[block], cosines[block] - turned[block])
            best[block] = max(signs, key=_best_sum)
    return best, in_groups(best, groups)


def _best_sum(cosines: Matrix) -> float:
    return float(cosines[np.arange(len(cosines)), assigned(cosines)].sum())


def _written(rows: Sequence[Matrix], size: int) -> Matrix:
    """Of a longer axis the directions that are written most: what else is read is always zero."""
    loud = [each / max(float(np.linalg.norm(each)), _TINY) for each in rows]
    values, vectors = np.linalg.eigh(sum(each @ each.T for each in loud))
    return np.asarray(vectors[:, np.argsort(-values)[:size]])


def _procrustes(pairs: Sequence[tuple[Matrix, Matrix]], trust: Sequence[float]) -> Matrix:
    """The rotation that turns rows of the suspect into the reference's: reference ≈ Rᵀ·suspect.

    Where the suspect has more of them, its columns are orthonormal and no more.
    """
    total = np.zeros((len(pairs[0][0]), len(pairs[0][1])))
    for (mine, theirs), weight in zip(pairs, trust, strict=True):
        length = float(np.linalg.norm(mine)) * float(np.linalg.norm(theirs))
        total += weight * mine @ theirs.T / max(length, _TINY)
    u, _, v = np.linalg.svd(total, full_matrices=False)
    return np.asarray(u @ v)


def _in_scale(
    pairs: Sequence[tuple[Matrix, Matrix]],
    written: Sequence[bool],
    trust: Sequence[float],
    scaled: Sequence[bool],
) -> tuple[Matrix, Matrix]:
    """As `mixture`, where columns of some are of any scale: that is fitted as well, in turns."""
    sure = [number for number, each in enumerate(scaled) if not each]
    chosen = sure or range(len(pairs))
    found = mixture(
        [pairs[n] for n in chosen], [written[n] for n in chosen], [trust[n] for n in chosen]
    )
    for _ in range(SCALINGS if any(scaled) else 0):
        there = []
        for (mine, theirs), each in zip(pairs, scaled, strict=True):
            placed = found[1].T @ mine
            power = np.maximum((placed * placed).sum(0), _TINY)
            there.append((mine * ((placed * theirs).sum(0) / power) if each else mine, theirs))
        found = mixture(there, written, trust)
    return found
