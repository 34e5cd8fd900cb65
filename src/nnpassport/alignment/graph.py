"""Hidden axes of a network from the graph in its ONNX file: which dimensions move together.

A graph says what a file of weights does not: which tensor reads what another writes. It is followed
node by node with a rule for each of the usual operations. Whatever meets another operation, the
graph's outputs or its inputs is outside, so a missing rule costs axes and not truth. Nothing is
run, so nothing is proved: the table says what the graph does if it is the graph that is run.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, final

from nnpassport.alignment.axes import Axes, Axis, Place
from nnpassport.files.onnx import OnnxGraph, OnnxNode

_ALONE = {
    *("Abs", "Cast", "Celu", "Clip", "Dropout", "Elu", "Erf", "Exp", "Gelu", "HardSigmoid"),
    *("HardSwish", "Identity", "LeakyRelu", "Mish", "Neg", "Relu", "Selu", "Sigmoid", "Softplus"),
    *("Softsign", "Sqrt", "Tanh"),
}
"""Each number by itself."""
_ONLY_SIZES = {"Shape", "Size"}
"""What these say of a tensor is the same in any order."""
_ONLY_FIRST = {"CastLike", "Expand"}
"""Of what else these take, only the kind of its numbers, or its size, plays a part."""


class _Held(NamedTuple):
    """Where an axis is in what a node puts out.

    Attributes:
        form: "channels" (dimension 1, places behind it), "features" (the last dimension), or "flat"
            (the last, and with it all places of each channel).
        rank: how many dimensions there are; 0 where that is not known.
    """

    axis: int
    form: str
    rank: int = 0

    @property
    def dimension(self) -> int:
        """Where the axis is, of so many dimensions."""
        return 1 if self.form == "channels" else self.rank - 1


@final
@dataclass(slots=True)
class _Found:
    """Axes as they are found: numbers that may turn out to be one, or to be outside."""

    shapes: dict[str, tuple[int, ...]]
    copies: set[str] = field(default_factory=set)
    parent: list[int] = field(default_factory=list)
    size: list[int] = field(default_factory=list)
    outside: set[int] = field(default_factory=set)
    places: dict[tuple[str, int], tuple[int, int]] = field(default_factory=dict)
    read: set[int] = field(default_factory=set)

    def root(self, axis: int) -> int:
        while self.parent[axis] != axis:
            axis = self.parent[axis]
        return axis

    def new(self, size: int) -> int:
        self.parent.append(len(self.parent))
        self.size.append(size)
        return len(self.parent) - 1

    def join(self, one: int, other: int) -> int:
        one, other = self.root(one), self.root(other)
        if one == other:
            return one
        if self.size[one] != self.size[other]:
            self.outside |= {one, other}
        self.parent[other] = one
        if other in self.outside:
            self.outside.add(one)
        if other in self.read:
            self.read.add(one)
        return one

    def rigid(self, held: _Held | None) -> None:
        if held is not None:
            self.outside.add(self.root(held.axis))

    def put(self, tensor: str, dimension: int, axis: int, repeats: int = 1) -> None:
        """The axis is in this dimension, each index so many times in a row."""
        length = self.shapes[tensor][dimension]
        if length != self.size[self.root(axis)] * repeats:
            self.outside.add(self.root(axis))
            return
        if tensor in self.copies:
            return
        before = self.places.setdefault((tensor, dimension), (axis, repeats))
        if before[1] != repeats:
            self.outside |= {self.root(before[0]), self.root(axis)}
        self.join(before[0], axis)


def axes_of_graph(graph: OnnxGraph) -> Axes:
    """The table of a graph's hidden axes, over the names that its tensors are read under."""
    found = _Found(dict(graph.shapes))
    held: dict[str, _Held] = {}
    same: dict[str, str] = {}
    for each in graph.nodes:
        node = each._replace(inputs=tuple(same.get(name, name) for name in each.inputs))
        if node.kind in _ONLY_SIZES or _is_copied(found, node, same):
            continue
        if node.kind in _ONLY_FIRST:
            node = node._replace(inputs=node.inputs[:1])
        taken = [held.get(name) for name in node.inputs]
        put_out = _follow(found, node, taken)
        if put_out is None:
            for one in taken:
                found.rigid(one)
        else:
            held[node.outputs[0]] = put_out
    for name in graph.outputs:
        found.rigid(held.get(name))
    return Axes(tuple(_axes(found, graph.named)), {}, {}, {}, {}, ())


def _is_copied(found: _Found, node: OnnxNode, same: dict[str, str]) -> bool:
    """Whether a node passes a tensor of the file on, under another name.

    A matrix is then the same one, wherever it is used. Of vectors exporters keep one of those that
    are equal, zeros say, for layers that have nothing to do with each other: they tie nothing.
    """
    if node.kind != "Identity" or node.inputs[0] not in found.shapes or not node.outputs:
        return False
    shape = found.shapes[node.inputs[0]]
    if len(shape) > 1:
        same[node.outputs[0]] = node.inputs[0]
    else:
        found.shapes[node.outputs[0]] = shape
        found.copies.add(node.outputs[0])
    return True


def _follow(found: _Found, node: OnnxNode, taken: Sequence[_Held | None]) -> _Held | None:
    """The axis in a node's output; None if there is none, and its inputs are outside then."""
    if not node.inputs or not node.outputs:
        return None
    if node.kind in _ALONE:
        return taken[0]
    rule = _RULES.get(node.kind)
    return None if rule is None else rule(found, node, taken)


def _pooled(found: _Found, node: OnnxNode, taken: Sequence[_Held | None]) -> _Held | None:
    return taken[0] if taken[0] is not None and taken[0].form == "channels" else None


def _flattened(found: _Found, node: OnnxNode, taken: Sequence[_Held | None]) -> _Held | None:
    first = taken[0]
    if first is None or not node.flattens:
        return None
    if first.form == "features" and first.rank == 2:
        return first
    return _Held(first.axis, "flat", 2) if first.form == "channels" else None


def _reduced(found: _Found, node: OnnxNode, taken: Sequence[_Held | None]) -> _Held | None:
    """Means and the like over dimensions that the axis is not in, or such dimensions dropped."""
    first = taken[0]
    if first is None or first.form == "flat" or not first.rank or not node.numbers:
        return None
    gone = {number % first.rank for number in node.numbers}
    if gone & {0, first.dimension}:
        return None
    if node.kind != "Squeeze" and node.keeps:
        return first
    return _moved(first, [n for n in range(first.rank) if n not in gone])


def _turned(found: _Found, node: OnnxNode, taken: Sequence[_Held | None]) -> _Held | None:
    first = taken[0]
    if first is None or first.form == "flat" or node.numbers is None:
        return None
    right = sorted(node.numbers) == list(range(first.rank)) and node.numbers[:1] == (0,)
    return _moved(first, node.numbers) if right else None


def _moved(held: _Held, dimensions: Sequence[int]) -> _Held | None:
    """The axis where only these dimensions are left, in this order."""
    place, rank = list(dimensions).index(held.dimension), len(dimensions)
    if place == rank - 1:
        return _Held(held.axis, "features", rank)
    return _Held(held.axis, "channels", rank) if place == 1 else None


def _padded(found: _Found, node: OnnxNode, taken: Sequence[_Held | None]) -> _Held | None:
    """Along other dimensions alone: so much before, and so much behind."""
    first = taken[0]
    if first is None or first.form == "flat" or len(node.numbers or ()) != 2 * first.rank:
        return None
    pads = node.numbers or ()
    here = {0, first.dimension}
    along = [pads[n] for n in range(len(pads)) if n % first.rank in here]
    return None if any(along) else first


def _convolved(found: _Found, node: OnnxNode, inputs: Sequence[_Held | None]) -> _Held | None:
    taken = inputs[0]
    weight = node.inputs[1] if len(node.inputs) > 1 else ""
    shape = found.shapes.get(weight, ())
    if len(shape) < 3:
        return None
    channels = taken is not None and taken.form == "channels"
    if node.groups == 1:
        axis = found.new(shape[0])
        if taken is not None and channels:
            found.put(weight, 1, taken.axis)
            found.read.add(found.root(taken.axis))
        else:
            found.rigid(taken)
    elif taken is not None and channels and shape[0] == node.groups and shape[1] == 1:
        axis = taken.axis  # each channel by itself
    else:
        return None
    found.put(weight, 0, axis)
    _put_vector(found, node, 2, axis)
    return _Held(axis, "channels", len(shape))


def _fused(found: _Found, node: OnnxNode, taken: Sequence[_Held | None]) -> _Held | None:
    """As onnxruntime fuses: a convolution, what is added to it, and a function of the sum."""
    made = _convolved(found, node, taken)
    if made is None or len(node.inputs) < 4 or not node.inputs[3]:
        return made
    added = taken[3]
    if added is None or added.form != "channels":
        found.rigid(made)
        return None
    return made._replace(axis=found.join(made.axis, added.axis))


def _multiplied(found: _Found, node: OnnxNode, taken: Sequence[_Held | None]) -> _Held | None:
    weight = node.inputs[1] if len(node.inputs) > 1 else ""
    shape, first = found.shapes.get(weight, ()), taken[0]
    if len(shape) != 2 or node.inputs[0] in found.shapes:
        return None
    reads = 1 if node.transposed else 0
    if first is not None and first.form in {"features", "flat"}:
        size = found.size[found.root(first.axis)]
        repeats = shape[reads] // size if first.form == "flat" else 1
        found.put(weight, reads, first.axis, max(1, repeats))
        found.read.add(found.root(first.axis))
    else:
        found.rigid(first)
    axis = found.new(shape[1 - reads])
    found.put(weight, 1 - reads, axis)
    _put_vector(found, node, 2, axis)
    rank = 2 if node.kind != "MatMul" or first is None else first.rank
    return _Held(axis, "features", rank if first is not None or node.kind != "MatMul" else 0)


def _normed(found: _Found, node: OnnxNode, inputs: Sequence[_Held | None]) -> _Held | None:
    taken = inputs[0]
    if taken is None:
        return None
    flat = taken.form == "features" and taken.rank == 2  # dimension 1 is the last
    wanted = "channels" if node.kind == "BatchNormalization" and not flat else "features"
    if taken.form != wanted:
        return None
    for place in range(1, len(node.inputs)):
        _put_vector(found, node, place, taken.axis)
    return taken


def _combined(found: _Found, node: OnnxNode, taken: Sequence[_Held | None]) -> _Held | None:
    """Two activations number by number, or one and a vector along its axis."""
    there = [each for each in taken if each is not None]
    if not there or len({each.form for each in there}) > 1 or there[0].form == "flat":
        return None
    axis, ranks = there[0].axis, {each.rank for each in there}
    rank = ranks.pop() if len(ranks) == 1 else 0
    if there[0].form == "channels" and not rank:
        return None
    for name, each in zip(node.inputs, taken, strict=True):
        shape = found.shapes.get(name)
        if each is not None:
            axis = found.join(axis, each.axis)
        elif shape is None:
            return None  # what is no tensor of the file has no axis that is known
        elif (dimension := _along(shape, there[0]._replace(rank=rank))) is not None:
            found.put(name, dimension, axis)
        elif max(shape, default=1) > 1:
            return None
    return _Held(axis, there[0].form, rank)


def _along(shape: tuple[int, ...], held: _Held) -> int | None:
    """Which dimension of a vector of numbers lies along the axis, if it is one."""
    long = [n for n, side in enumerate(shape) if side > 1]
    if len(long) != 1:
        return None
    (dimension,) = long
    behind = len(shape) - 1 - dimension
    return dimension if behind == (held.rank - 2 if held.form == "channels" else 0) else None


def _put_vector(found: _Found, node: OnnxNode, place: int, axis: int) -> None:
    if place < len(node.inputs) and len(found.shapes.get(node.inputs[place], ())) == 1:
        found.put(node.inputs[place], 0, axis)


def _axes(found: _Found, named: Mapping[str, tuple[str, bool]]) -> Iterable[Axis]:
    """Those that are inside, the largest first, over the names that tensors are read under."""
    places: dict[int, list[Place]] = {}
    for (tensor, dimension), (axis, repeats) in found.places.items():
        name, turned = named.get(tensor, (tensor, False))
        at = 1 - dimension if turned else dimension
        inner = ((repeats, 1),) if repeats > 1 else ()
        places.setdefault(found.root(axis), []).append(Place(name, at, 0, repeats, inner))
    roots = {found.root(axis) for axis in found.outside}
    read = {found.root(axis) for axis in found.read}
    inside = [axis for axis in places if axis in read and axis not in roots]
    for axis in sorted(inside, key=lambda n: -found.size[n]):
        yield Axis(found.size[axis], "permute", (), tuple(places[axis]))


_Rule = Callable[[_Found, OnnxNode, Sequence[_Held | None]], _Held | None]
_RULES: Mapping[str, _Rule] = {
    "Conv": _convolved,
    "FusedConv": _fused,
    **dict.fromkeys(("FusedGemm", "Gemm", "MatMul"), _multiplied),
    **dict.fromkeys(("ReduceMax", "ReduceMean", "ReduceSum", "Squeeze"), _reduced),
    "Transpose": _turned,
    "Pad": _padded,
    "Flatten": _flattened,
    "Reshape": _flattened,
    "BatchNormalization": _normed,
    "LayerNormalization": _normed,
    **dict.fromkeys(("AveragePool", "GlobalAveragePool", "GlobalMaxPool", "MaxPool"), _pooled),
    **dict.fromkeys(("Add", "Div", "Max", "Min", "Mul", "Pow", "PRelu", "Sub", "Sum"), _combined),
}
