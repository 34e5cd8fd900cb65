"""Follow one run of a network, dimension by dimension, and find what must move together.

Every operation that PyTorch carries out is seen by a dispatch mode, below modules and functions, so
that it does not matter how the network is written. An operation without a rule makes all that it
touches rigid: what is missed costs reach, never truth. `prove` tries every axis afterwards.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, final

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from nnpassport.alignment.axes import Axes, Axis, Norm, Place, Statistics
from nnpassport.embedding.network import factors
from nnpassport.embedding.network.factors import (
    INDEXED,
    Dimension,
    cut,
    extent,
    fix,
    fresh,
    leaves,
    mark,
    tie,
)
from nnpassport.embedding.network.modes import evaluated, plain_attention
from nnpassport.embedding.network.outputs import Example, call, logits_of


def trace(model: nn.Module, example: Example) -> Axes:
    """The axes of a network, as one run on `example` shows them; none is proved yet.

    The network is run in evaluation mode and left as it was.
    """
    with evaluated(model), torch.no_grad(), plain_attention():
        watched = _Trace(model)
        watched.fix_all(pytree.tree_leaves(example))
        with watched:
            output = call(model, example)
        outputs = [logits_of(output), *pytree.tree_leaves(output)]
        watched.fix_all([each for each in outputs if isinstance(each, Tensor)])
    return watched.table()


class _Origin(NamedTuple):
    """Where a tensor comes from.

    Attributes:
        parameter: whether it is made of parameters alone.
        of: the one parameter that it is a view of, if it is.
        norm: gain of the norm that it is the output of.
        written: weight of the layer that it is the output of, until something else is done to it.
        offset: what was added to that parameter; None: it was made something else of.
        normed: the same once that was divided by its own size, as a norm without a mean does.
    """

    parameter: bool = False
    of: str | None = None
    norm: str | None = None
    written: str | None = None
    offset: float | None = 0.0
    normed: str | None = None


class _Known(NamedTuple):
    dimensions: list[Dimension]
    origin: _Origin


class _Call(NamedTuple):
    """One operation: its arguments by their names in the schema, and its outputs."""

    name: str
    given: Mapping[str, Any]
    outputs: Sequence[Any]

    def shape(self, number: int = 0) -> tuple[int, ...]:
        return tuple(self.outputs[number].shape)


_SAME = {
    *("alias", "clone", "contiguous", "detach", "_to_copy", "to", "lift_fresh", "lift_fresh_copy"),
    *("dropout", "native_dropout", "neg", "positive"),
}
_RECTIFIED = {"relu"}
_POINTWISE = {
    *("abs", "bitwise_not", "ceil", "clamp", "clamp_max", "clamp_min", "cos", "elu", "erf", "exp"),
    *("floor", "gelu", "hardsigmoid", "hardswish", "hardtanh", "isinf", "isnan", "leaky_relu"),
    *("log", "log1p", "logical_not", "mish", "nan_to_num", "pow", "reciprocal", "round", "rsqrt"),
    *("sigmoid", "sign", "silu", "sin", "softplus", "sqrt", "square", "tanh", "tan", "expm1"),
}
_SQUARES = {"pow", "rsqrt", "square"}
_TOGETHER = {
    *("add", "bitwise_and", "bitwise_or", "copy", "div", "eq", "ge", "gt", "le", "logical_and"),
    *("logical_or", "lt", "masked_fill", "maximum", "minimum", "mul", "ne", "remainder", "rsub"),
    *("sub", "where", "addcmul", "addcdiv", "lerp", "fmod", "floor_divide"),
}
_REDUCED = {
    "all",
    "amax",
    "amin",
    "any",
    "argmax",
    "linalg_vector_norm",
    "max",
    "mean",
    "min",
    "prod",
    "std",
    "sum",
    "var",
}
_POOLED = {
    *("_adaptive_avg_pool2d", "adaptive_avg_pool2d", "avg_pool2d", "max_pool2d"),
    *("max_pool2d_with_indices", "upsample_bicubic2d", "upsample_bilinear2d", "upsample_nearest2d"),
    *("adaptive_avg_pool1d", "avg_pool1d", "max_pool1d", "max_pool1d_with_indices"),
    *("_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa", "adaptive_max_pool2d"),
}
_MADE = {
    *("arange", "empty", "empty_like", "eye", "full", "full_like", "new_empty", "new_full"),
    *("new_ones", "new_zeros", "ones", "ones_like", "rand", "randn", "scalar_tensor", "zeros"),
    *("zeros_like", "empty_strided", "new_empty_strided", "linspace", "bernoulli", "rand_like"),
}
_SPLIT = {"chunk", "split", "split_with_sizes", "unsafe_chunk", "unsafe_split"}
_SHIFTED = {"constant_pad_nd", "flip", "reflection_pad2d", "replication_pad2d", "roll"}
_STEPS = {"_log_softmax", "_safe_softmax", "_softmax", "cumsum", "log_softmax", "softmax"}


@final
class _Trace(TorchDispatchMode):
    """What is known of every tensor while the network runs."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._known: dict[int, _Known] = {}
        self._alive: list[Tensor] = []  # an id is a tensor's own only while it lives
        self._parameters: dict[str, Tensor] = {}
        self._reads: dict[str, set[tuple[int, str | None]]] = {}
        self._norms: dict[str, Norm] = {}
        self._statistics: dict[str, set[Statistics]] = {}
        self._gains: dict[str, set[str]] = {}
        self._behind: dict[str, set[str]] = {}  # by a norm's gain, what writes into the norm
        self._unknown: set[str] = set()
        self._tables: set[str] = set()  # looked up, as embeddings are
        self._ranked: list[Dimension] = []  # of which the largest were chosen, as experts are
        state = model.state_dict(keep_vars=True)
        buffers = dict(model.named_buffers(remove_duplicate=False))
        parameters = dict(model.named_parameters(remove_duplicate=False))
        for name, tensor in {**parameters, **buffers}.items():
            if id(tensor) not in self._known:
                # What a file does not hold cannot be reordered in it.
                self._note(
                    tensor, fresh(tensor.shape, rigid=name not in state), _Origin(True, name)
                )
            if name in state:
                self._parameters[name] = tensor

    def fix_all(self, tensors: Sequence[Any]) -> None:
        """Make rigid all that the outside sees."""
        for tensor in tensors:
            if isinstance(tensor, Tensor):
                for dimension in self._of(tensor).dimensions:
                    fix(dimension)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        given = {
            argument.name: args[number] if number < len(args) else kwargs.get(argument.name)
            for number, argument in enumerate(func._schema.arguments)
        }
        outputs = output if isinstance(output, tuple | list) else [output]
        if any(isinstance(each, Tensor) for each in outputs):
            name = func._schema.name.split("::")[1]
            plain = name[:-1] if name.endswith("_") and not name.startswith("__") else name
            self._see(_Call(plain, given, outputs), changed=func._schema.is_mutable)
        return output

    # -- what is known

    def _note(self, tensor: Tensor, dimensions: list[Dimension], origin: _Origin) -> None:
        self._alive.append(tensor)
        self._known[id(tensor)] = _Known(dimensions, origin)

    def _of(self, tensor: Tensor) -> _Known:
        if id(tensor) not in self._known:
            self._note(tensor, fresh(tensor.shape, rigid=True), _Origin())
        return self._known[id(tensor)]

    def _dimensions(self, tensor: Tensor) -> list[Dimension]:
        return self._of(tensor).dimensions

    def _see(self, seen: _Call, *, changed: bool) -> None:
        tensors = [each for each in pytree.tree_leaves(seen.given) if isinstance(each, Tensor)]
        known = [self._of(each) for each in tensors]
        parameter = bool(known) and all(each.origin.parameter for each in known)
        alone = parameter and len(known) == 1
        origin = _Origin(parameter, known[0].origin.of if alone else None, offset=None)
        found, origin = self._rule(seen, tensors, origin) or (self._gave_up(seen, tensors), origin)
        for number, tensor in enumerate(seen.outputs):
            if not isinstance(tensor, Tensor):
                continue
            dimensions = found[number] if number < len(found) else fresh(tensor.shape, rigid=True)
            if len(dimensions) != tensor.dim():
                dimensions = fresh(tensor.shape, rigid=True)
            there = self._known.get(id(tensor))
            if there is not None and there.origin.parameter and not changed:
                continue
            self._note(tensor, dimensions, origin if number == 0 or parameter else _Origin())

    def _gave_up(self, seen: _Call, tensors: Sequence[Tensor]) -> list[list[Dimension]]:
        self._unknown.add(seen.name)
        self.fix_all(tensors)
        return [
            fresh(each.shape, rigid=True) if isinstance(each, Tensor) else []
            for each in seen.outputs
        ]

    # -- rules

    def _rule(
        self, seen: _Call, tensors: Sequence[Tensor], origin: _Origin
    ) -> tuple[list[list[Dimension]], _Origin] | None:
        """Dimensions of every output, and where the first one comes from; None: no rule."""
        name = seen.name
        if name in _MADE:
            return [fresh(each.shape, rigid=True) for each in seen.outputs], origin
        if not tensors:
            return None
        if name in _SAME:
            return [self._dimensions(tensors[0])] * len(seen.outputs), self._of(tensors[0]).origin
        rules: list[Callable[[_Call, Sequence[Tensor], _Origin], Any]] = [
            *(self._pointwise, self._elementwise, self._viewed, self._contracted, self._convolved),
            *(self._normalised, self._reduced, self._looked_up, self._attended, self._pieced),
            *(self._reparametrised, self._repeated, self._routed),
        ]
        for rule in rules:
            found = rule(seen, tensors, origin)
            if found is not None:
                return found
        return None

    def _pointwise(self, seen: _Call, tensors: Sequence[Tensor], origin: _Origin) -> Any:
        name = seen.name
        dimensions = self._dimensions(tensors[0])
        if name in _STEPS and len(tensors) == 1:
            axis = int(seen.given["dim"])
            mark(dimensions[axis], "pointwise")
            if name == "cumsum":
                fix(dimensions[axis])
            return [dimensions], origin
        if name not in _RECTIFIED | _POINTWISE or len(tensors) > 1:
            return None
        trait = "rectified" if name in _RECTIFIED else "square" if name in _SQUARES else "pointwise"
        if not origin.parameter:
            for each in dimensions:
                mark(each, trait)
        return [dimensions], origin

    def _elementwise(self, seen: _Call, tensors: Sequence[Tensor], origin: _Origin) -> Any:
        if seen.name not in _TOGETHER:
            return None
        shape = seen.shape()
        found: list[Dimension] = [[] for _ in shape]
        for tensor in tensors:
            own = self._dimensions(tensor)
            for number, dimension in enumerate(own, len(shape) - len(own)):
                if not leaves(dimension):
                    continue
                if found[number]:
                    tie(found[number], dimension)
                else:
                    found[number] = dimension
        return [found], self._combined(seen, tensors, found, origin)

    def _combined(
        self, seen: _Call, tensors: Sequence[Tensor], found: list[Dimension], origin: _Origin
    ) -> _Origin:
        """Traits of what was combined, and where the result comes from."""
        computed = [each for each in tensors if not self._of(each).origin.parameter]
        parameters = [each for each in tensors if self._of(each).origin.parameter]
        if seen.name in {"mul", "div"} and len(computed) == 2:
            _mark_products([self._dimensions(each) for each in computed], found)
        if seen.name not in {"add", "sub", "mul", "div", "copy", "addcmul"}:
            for each in found:
                mark(each, "pointwise")
        if not computed and len(parameters) == 1:
            return origin._replace(offset=self._shifted(seen, parameters[0]))
        if seen.name in {"mul", "div"} and len(computed) == 2 and not parameters:
            return origin._replace(normed=self._divided(computed))
        if len(computed) != 1 or len(parameters) != 1:
            return origin
        was = self._of(computed[0]).origin
        if seen.name == "mul":
            return self._scaled(parameters[0], was, origin)
        if seen.name in {"add", "sub"}:  # a bias: the output of a layer it stays
            return origin._replace(written=was.written)
        return origin

    def _shifted(self, seen: _Call, parameter: Tensor) -> float | None:
        """What was added to a parameter so far; where nothing was, a factor is no matter."""
        was, other = self._of(parameter).origin.offset, seen.given.get("other")
        if was is None or not isinstance(other, int | float):
            return None
        if seen.name in {"add", "sub"}:
            by = float(other) * float(seen.given.get("alpha") or 1)
            return was + by if seen.name == "add" else was - by
        return 0.0 if seen.name in {"mul", "div"} and was == 0 else None

    def _divided(self, computed: Sequence[Tensor]) -> str | None:
        """The layer whose output is multiplied with one number for all that it writes."""
        for one, other in (computed, computed[::-1]):
            dimensions, factor = self._dimensions(one), self._dimensions(other)
            written = self._of(one).origin.written
            alone = one.dim() == other.dim() > 1 and not leaves(factor[-1])
            if written is None or not alone:
                continue
            kept = all(
                bool(leaves(a)) == bool(leaves(b))
                for a, b in zip(dimensions[:-1], factor[:-1], strict=True)
            )
            if kept and self._dimension_in(written, dimensions[-1]) is not None:
                return written
        return None

    def _scaled(self, parameter: Tensor, was: _Origin, origin: _Origin) -> _Origin:
        """A parameter multiplies what a layer wrote, or it is the gain of a norm."""
        known = self._of(parameter)
        for each in known.dimensions:
            mark(each, "gain")
        gain, offset = known.origin.of, known.origin.offset
        one = sum(1 for each in known.dimensions if leaves(each)) == 1
        if gain is None or offset is None or not one:
            return origin
        if was.written is not None:
            if not offset:
                self._gains.setdefault(was.written, set()).add(gain)
            return origin
        self._norms.setdefault(gain, Norm(None, centred=False, added=offset))
        if was.normed is not None:
            self._behind.setdefault(gain, set()).add(was.normed)
        return origin._replace(norm=gain)

    def _viewed(self, seen: _Call, tensors: Sequence[Tensor], origin: _Origin) -> Any:
        name, given = seen.name, seen.given
        own = self._dimensions(tensors[0])
        source = self._of(tensors[0]).origin
        if name in {"view", "_unsafe_view", "reshape", "unsqueeze", "squeeze", "flatten"}:
            found = factors.reshaped(own, seen.shape())
            return None if found is None else ([found], source)
        if name in {"t", "numpy_T"}:
            return [own[::-1]], source
        if name == "transpose":
            found = list(own)
            a, b = int(given["dim0"]), int(given["dim1"])
            found[a], found[b] = found[b], found[a]
            return [found], source
        if name == "permute":
            return [[own[axis] for axis in given["dims"]]], source
        if name == "expand":
            shape = seen.shape()
            found = [[] for _ in range(len(shape) - len(own))] + list(own)
            filled = [
                fresh((n,))[0] if n != 1 and not leaves(each) else each
                for each, n in zip(found, shape, strict=True)
            ]
            return [filled], source
        return None

    def _repeated(self, seen: _Call, tensors: Sequence[Tensor], origin: _Origin) -> Any:
        if seen.name != "repeat":
            return None
        times, own = [int(count) for count in seen.given["repeats"]], self._dimensions(tensors[0])
        own = [[] for _ in range(len(times) - len(own))] + list(own)
        around = fresh(times, rigid=True)
        found = [[*a, *each] for a, each in zip(around, own, strict=True)]
        return [found], self._of(tensors[0]).origin

    def _contracted(self, seen: _Call, tensors: Sequence[Tensor], origin: _Origin) -> Any:
        name, given = seen.name, seen.given
        if name not in {"mm", "bmm", "addmm", "baddbmm", "mv", "dot", "addmv", "linear"}:
            return None
        if name in {"mv", "dot", "addmv", "linear"}:
            return None
        added = name in {"addmm", "baddbmm"}
        a, b = (
            (given["mat1"], given["mat2"])
            if name == "addmm"
            else (
                (given["batch1"], given["batch2"])
                if name == "baddbmm"
                else (given["self"], given["mat2"])
            )
        )
        left, right = self._dimensions(a), self._dimensions(b)
        tie(left[-1], right[-2])
        if len(left) == 3:
            tie(left[0], right[0])
            mark(left[0], "batched")
        written = self._met(a, len(left) - 1, b, len(right) - 2)
        found = [*left[:-2], left[-2], right[-1]]
        if added:
            bias = self._dimensions(given["self"])
            for mine, theirs in zip(found[::-1], bias[::-1], strict=False):
                if leaves(theirs):
                    tie(mine, theirs)
        return [found], origin._replace(written=written)

    def _met(self, a: Tensor, axis_a: int, b: Tensor, axis_b: int) -> str | None:
        """Two tensors are contracted; returns the weight that writes the result, if any does."""
        mine, theirs = self._of(a), self._of(b)
        if not mine.origin.parameter and not theirs.origin.parameter:
            mark(mine.dimensions[axis_a], "bilinear")
            return None
        weight, axis, other = (b, axis_b, mine) if theirs.origin.parameter else (a, axis_a, theirs)
        name = self._of(weight).origin.of
        if name is None or other.origin.parameter:
            return None
        reader = self._dimension_in(name, self._dimensions(weight)[axis])
        if reader is not None:
            self._reads.setdefault(name, set()).add((reader, other.origin.norm))
        return name

    def _dimension_in(self, name: str, dimension: Dimension) -> int | None:
        """Which dimension of a parameter a dimension of its view is, or is a part of."""
        wanted = set(map(id, leaves(dimension)))
        tensor = self._parameters.get(name)
        if tensor is None:
            return None
        for number, own in enumerate(self._dimensions(tensor)):
            inside = {id(each) for each in _all_within(own)}
            if wanted and wanted <= inside:
                return number
        return None

    def _convolved(self, seen: _Call, tensors: Sequence[Tensor], origin: _Origin) -> Any:
        if seen.name not in {"convolution", "_convolution"}:
            return None
        given = seen.given
        x, weight, bias = given["input"], given["weight"], given["bias"]
        own, channels, groups = (
            self._dimensions(weight),
            self._dimensions(x)[1],
            int(given["groups"]),
        )
        if given["transposed"]:
            if groups > 1:
                return None
            tie(channels, own[0])
            out, reader = own[1], 0
        elif groups == 1:
            tie(channels, own[1])
            out, reader = own[0], 1
        else:
            inner, outer = (
                factors.Factor(extent(leaves(each)) // groups) for each in (channels, own[0])
            )
            shared = factors.Factor(groups)
            tie(channels, [shared, inner])
            tie(own[0], [shared, outer])
            if inner.size > 1:
                tie(own[1], [inner])
            mark([shared], "grouped")
            out, reader = own[0], 1
        name = self._of(weight).origin.of
        if name is not None and groups == 1:
            self._reads.setdefault(name, set()).add((reader, self._of(x).origin.norm))
        if bias is not None:
            tie(out, self._dimensions(bias)[0])
        found = [self._dimensions(x)[0], out, *fresh(seen.shape()[2:], rigid=True)]
        return [found], origin._replace(written=name)

    def _normalised(self, seen: _Call, tensors: Sequence[Tensor], origin: _Origin) -> Any:
        name, given = seen.name, seen.given
        if name == "native_layer_norm":
            return self._layer_norm(given, origin)
        if name == "native_group_norm":
            return self._group_norm(given, origin)
        if "batch_norm" not in name:
            return None
        own = self._dimensions(given["input"])
        names = ("weight", "bias", "running_mean", "running_var")
        there = {each: given.get(each) for each in names}
        for tensor in there.values():
            if tensor is not None:
                tie(own[1], self._dimensions(tensor)[0])
        if there["running_mean"] is None:  # statistics of the moment
            mark(own[1], "group norm")
            mark(own[1], "alone")
            return [own, [], []], origin
        mark(own[1], "batch norm")
        written = self._of(given["input"]).origin.written
        of = {n: None if t is None else self._of(t).origin.of for n, t in there.items()}
        if written is not None and of["running_mean"] and of["running_var"]:
            found = Statistics(
                of["weight"],
                of["bias"],
                of["running_mean"],
                of["running_var"],
                float(given.get("eps") or given.get("epsilon") or 0.0),
            )
            self._statistics.setdefault(written, set()).add(found)
        return [own, [], []], origin

    def _layer_norm(self, given: Mapping[str, Any], origin: _Origin) -> Any:
        own, count = self._dimensions(given["input"]), len(given["normalized_shape"])
        for tensor in (given["weight"], given["bias"]):
            if tensor is not None:
                for mine, theirs in zip(own[-count:], self._dimensions(tensor), strict=True):
                    tie(mine, theirs)
        for each in own[-count:]:
            mark(each, "layer norm")
        gain = None if given["weight"] is None else self._of(given["weight"]).origin.of
        if gain is not None:
            shift = None if given["bias"] is None else self._of(given["bias"]).origin.of
            self._norms[gain] = Norm(shift, centred=True)
            written = self._of(given["input"]).origin.written
            if written is not None:
                self._behind.setdefault(gain, set()).add(written)
        return [own, [], []], origin._replace(norm=gain)

    def _group_norm(self, given: Mapping[str, Any], origin: _Origin) -> Any:
        own, groups = list(self._dimensions(given["input"])), int(given["group"])
        for tensor in (given["weight"], given["bias"]):
            if tensor is not None:
                tie(own[1], self._dimensions(tensor)[0])
        inside = extent(leaves(own[1])) // groups
        if groups > 1 and inside > 1:
            tie(own[1], [factors.Factor(groups), factors.Factor(inside)])
        mark(own[1], "group norm")
        if groups > 1 and inside == 1:
            mark(own[1], "alone")
        return [own, [], []], origin

    def _routed(self, seen: _Call, tensors: Sequence[Tensor], origin: _Origin) -> Any:
        """What sends tokens to experts, and the products with the matrices of all of them.

        Which expert is which only the router says: it is tried whether both can be reordered.
        """
        given = seen.given
        if seen.name in {"topk", "sort", "histc"}:
            own = list(self._dimensions(tensors[0]))
            if seen.name == "histc":
                self.fix_all(tensors)
                return [fresh(seen.shape(), rigid=True)], origin
            axis = int(given["dim"] if given.get("dim") is not None else -1) % len(own)
            self._ranked.append(own[axis])
            mark(own[axis], "pointwise")
            own[axis] = fresh((seen.shape()[axis],), rigid=True)[0]
            return [own, own], origin
        if seen.name != "_grouped_mm" or given["mat2"].dim() != 3 or given["self"].dim() != 2:
            return None
        left, right = self._dimensions(given["self"]), self._dimensions(given["mat2"])
        router = next((e for e in self._ranked if extent(leaves(e)) == extent(right[0])), None)
        tie(right[0], router) if router is not None else fix(right[0])
        tie(left[1], right[1])
        written = self._met(given["self"], 1, given["mat2"], 1)
        return [[left[0], right[2]]], origin._replace(written=written)

    def _reparametrised(self, seen: _Call, tensors: Sequence[Tensor], origin: _Origin) -> Any:
        """A weight as its direction times its length, along one dimension: weight norm."""
        if seen.name != "_weight_norm_interface":
            return None
        direction, length = seen.given["v"], seen.given["g"]
        own, one = self._dimensions(direction), int(seen.given.get("dim") or 0)
        for mine, theirs in zip(own, self._dimensions(length), strict=True):
            if leaves(theirs):
                tie(mine, theirs)
        for number, each in enumerate(own):
            mark(each, "pointwise" if number == one else "square")
        return [own, self._dimensions(length)], origin._replace(of=self._of(direction).origin.of)

    def _reduced(self, seen: _Call, tensors: Sequence[Tensor], origin: _Origin) -> Any:
        if seen.name not in _REDUCED or len(tensors) > 1:
            return None
        own = self._dimensions(tensors[0])
        dims = seen.given.get("dim")
        chosen = range(len(own)) if dims is None else [dims] if isinstance(dims, int) else dims
        gone = {axis % len(own) for axis in chosen or range(len(own))} if own else set()
        for axis in gone:
            mark(own[axis], "fixed order" if seen.name == "argmax" else "reduced")
            if seen.name in {"argmax", "max", "min", "prod"} and len(seen.outputs) > 1:
                fix(own[axis])
        if seen.name not in {"mean", "sum"}:
            for number, each in enumerate(own):
                mark(each, "pointwise") if number not in gone else None
        kept = len(seen.shape()) == len(own)
        found = [[] if n in gone else each for n, each in enumerate(own) if kept or n not in gone]
        was = self._of(tensors[0]).origin
        keeps = all(not leaves(own[axis]) or axis < len(own) - 1 for axis in gone)
        return [found] * len(seen.outputs), origin._replace(norm=was.norm if keeps else None)

    def _looked_up(self, seen: _Call, tensors: Sequence[Tensor], origin: _Origin) -> Any:
        given = seen.given
        if seen.name == "embedding":
            weight, index = given["weight"], given["indices"]
            own = self._dimensions(weight)
            fix(own[0])
            self._tables.add(self._of(weight).origin.of or "")
            return [[*self._dimensions(index), own[1]]], _Origin()
        if seen.name == "index" and sum(each is not None for each in given["indices"]) == 1:
            axis = next(n for n, each in enumerate(given["indices"]) if each is not None)
            index = given["indices"][axis]
            if index.dtype in {torch.bool, torch.uint8}:
                return None
            own = self._dimensions(given["self"])
            fix(own[axis])
            found = [*own[:axis], *fresh(index.shape, rigid=True), *own[axis + 1 :]]
            return [found], self._of(given["self"]).origin
        if seen.name in _POOLED:
            own, spatial = self._dimensions(tensors[0]), 1 if "1d" in seen.name else 2
            shape = seen.shape()
            found = [*own[:-spatial], *fresh(shape[-spatial:], rigid=True)]
            if "max" in seen.name:
                mark(found[-spatial - 1], "rectified")
            return [found] * len(seen.outputs), origin
        return None

    def _attended(self, seen: _Call, tensors: Sequence[Tensor], origin: _Origin) -> Any:
        if not seen.name.startswith(("_scaled_dot_product", "scaled_dot_product")):
            return None
        query, key, value = (self._dimensions(seen.given[n]) for n in ("query", "key", "value"))
        for axis in (0, 1):
            several, one = (extent(leaves(each[axis])) for each in (query, key))
            if several == one:
                tie(query[axis], key[axis])
                tie(query[axis], value[axis])
            elif axis == 1 and several % one == 0:  # several heads of queries share keys
                tie(key[axis], value[axis])
                tie(query[axis], [*leaves(key[axis]), factors.Factor(several // one)])
            else:
                for each in (query, key, value):
                    fix(each[axis])
        tie(query[3], key[3])
        tie(key[2], value[2])
        mark(query[3], "bilinear")
        mark(query[1], "batched")
        mask = next(
            (seen.given[n] for n in ("attn_mask", "attn_bias") if seen.given.get(n) is not None),
            None,
        )
        if mask is not None:
            scores = [query[0], query[1], query[2], key[2]]
            for mine, theirs in zip(scores[::-1], self._dimensions(mask)[::-1], strict=False):
                if leaves(theirs):
                    tie(mine, theirs)
        return [[query[0], query[1], query[2], value[3]]], origin

    def _pieced(self, seen: _Call, tensors: Sequence[Tensor], origin: _Origin) -> Any:
        name = seen.name
        if name in {"cat", "stack"}:
            return (self._concatenated if name == "cat" else self._stacked)(seen, origin)
        own = list(self._dimensions(tensors[0]))
        source = self._of(tensors[0]).origin
        if name in {"slice", "narrow"}:
            return self._sliced(seen, tensors[0], own, source)
        if name in _SPLIT:
            axis = int(seen.given["dim"] or 0) % len(own)
            sizes = [each.shape[axis] for each in seen.outputs]
            pieces = cut(own[axis], sizes)
            return [[*own[:axis], piece, *own[axis + 1 :]] for piece in pieces], source
        if name in {"unbind", "select"}:
            axis = int(seen.given["dim"] or 0) % len(own)
            size = tensors[0].shape[axis]
            indices = range(size) if name == "unbind" else [int(seen.given["index"]) % size]
            return [factors.at_index(own, axis, index) for index in indices], source
        if name not in _SHIFTED:
            return None
        shape = seen.shape()
        for axis in seen.given.get("dims") or _resized(tensors[0].shape, shape):
            fix(own[axis])
            own[axis] = fresh((shape[axis],), rigid=True)[0]
        return [own], source

    def _concatenated(self, seen: _Call, origin: _Origin) -> Any:
        live = [each for each in seen.given["tensors"] if each.numel()]
        if not live:
            return None
        parts = [self._dimensions(each) for each in live]
        axis = int(seen.given["dim"] or 0) % len(parts[0])
        found = list(parts[0])
        for others in parts[1:]:
            for number, other in enumerate(others):
                if number != axis and leaves(other):
                    tie(found[number], other) if leaves(found[number]) else None
        found[axis] = factors.joined([each[axis] for each in parts])
        norms = {self._of(each).origin.norm for each in live}
        return [found], origin._replace(norm=norms.pop() if len(norms) == 1 else None)

    def _stacked(self, seen: _Call, origin: _Origin) -> Any:
        found, *rest = (list(self._dimensions(each)) for each in seen.given["tensors"])
        for others in rest:
            for number, other in enumerate(others):
                if leaves(other):
                    tie(found[number], other) if leaves(found[number]) else None
        axis = int(seen.given["dim"] or 0) % (len(found) + 1)
        found.insert(axis, fresh((1 + len(rest),), rigid=True)[0])
        return [found], origin

    def _sliced(self, seen: _Call, tensor: Tensor, own: list[Dimension], source: _Origin) -> Any:
        given = seen.given
        axis = int(given["dim"] or 0) % len(own)
        size, kept = tensor.shape[axis], seen.shape()[axis]
        start = int(given.get("start") or 0)
        start = max(0, start + size) if start < 0 else min(start, size)
        if kept == size:
            return [own], source
        if int(given.get("step") or 1) != 1 or kept == 0:
            fix(own[axis])
            own[axis] = fresh((kept,), rigid=True)[0]
            return [own], source
        sizes = [each for each in (start, kept, size - start - kept) if each]
        own[axis] = cut(own[axis], sizes)[1 if start else 0]
        return [own], source

    # -- the result

    def table(self) -> Axes:
        """Every factor that is not rigid and is in more than one place, with its places."""
        places: dict[int, list[Place]] = {}
        found: dict[int, factors.Factor] = {}
        for name, tensor in self._parameters.items():
            for number, dimension in enumerate(self._dimensions(tensor)):
                for factor, offset, stride, repeats in factors.placed(dimension):
                    found[id(factor)] = factor
                    place = Place(name, number, offset, stride, repeats)
                    places.setdefault(id(factor), []).append(place)
        axes = [
            Axis(
                factor.size, _kind(factor.traits), tuple(sorted(factor.traits)), tuple(places[key])
            )
            for key, factor in found.items()
            if not factor.rigid and INDEXED not in factor.traits and len(places[key]) > 1
        ]
        axes.sort(key=lambda axis: (-axis.size, axis.places))
        rotated = [
            Axis(size, "inner", ("rotated",), each)
            for key, factor in found.items()
            if factor.rigid and "bilinear" in factor.traits
            for size, each in _rotated(axes, factor.size, self._of_matrices(places[key]))
        ]
        kept = self._parameters.keys()  # of what no file holds a table says nothing
        return Axes(
            tuple(axes),
            reads={
                n: _one(u, tied=n in self._tables)
                for n, u in sorted(self._reads.items())
                if n in kept
            },
            norms={n: norm for n, norm in sorted(self._norms.items()) if n in kept},
            batch_norms={
                n: u.copy().pop()
                for n, u in sorted(self._statistics.items())
                if len(u) == 1 and n in kept
            },
            gains={
                n: u.copy().pop()
                for n, u in sorted({**self._unread(), **self._gains}.items())
                if len(u) == 1 and n in kept and u <= kept
            },
            unknown=tuple(sorted(self._unknown)),
            pairs=tuple(sorted(set(rotated), key=lambda axis: (axis.size, axis.places))),
        )

    def _unread(self) -> dict[str, set[str]]:
        """By a layer's weight, gains of norms behind it that no layer reads: they are its own."""
        read = {gain for uses in self._reads.values() for _, gain in uses}
        found: dict[str, set[str]] = {}
        for gain, writers in self._behind.items():
            if gain not in read and len(writers) == 1:
                found.setdefault(next(iter(writers)), set()).add(gain)
        return found

    def _of_matrices(self, places: Sequence[Place]) -> list[Place]:
        """Those of layers: norms of queries and keys have places as well."""
        layers = {_module(name) for name, tensor in self._parameters.items() if tensor.dim() > 1}
        return [place for place in places if _module(place.tensor) in layers]


def _rotated(
    axes: Sequence[Axis], size: int, places: Sequence[Place]
) -> Iterator[tuple[int, tuple[Place, ...]]]:
    """Pairs of one attention each: all layers are rotated by the same table.

    Queries and keys are those that have heads in common; or, where one key is there for all heads,
    that lie beside one another; or in one module.
    """
    by_heads = {
        tuple(sorted({place.tensor for place in axis.places}))
        for axis in axes
        if "batched" in axis.traits
    }
    in_a_home, in_a_module = (_together(places, home) for home in (_home, _module))
    found = set[str]()
    for several, fused in ((sorted(by_heads), False), (in_a_home, False), (in_a_module, True)):
        before = frozenset(found)
        for names in several:
            kept = [place for place in places if place.tensor in set(names) - before]
            pairs = list(_as_pairs(size, _queries_and_keys(kept, fused=fused)))
            found |= {place.tensor for _, each in pairs for place in each}
            yield from pairs


def _together(places: Sequence[Place], home: Callable[[str], str]) -> list[list[str]]:
    """Names of their tensors, those of one home in one list."""
    found: dict[str, set[str]] = {}
    for place in places:
        found.setdefault(home(place.tensor), set()).add(place.tensor)
    return [sorted(found[name]) for name in sorted(found)]


def _module(tensor: str) -> str:
    return tensor.rpartition(".")[0]


def _home(tensor: str) -> str:
    return _module(_module(tensor))


def _as_pairs(
    size: int, sides: Sequence[Sequence[Place]]
) -> Iterator[tuple[int, tuple[Place, ...]]]:
    """How the inside of heads may be pairs: first half with second, or neighbours with one another.

    Where the halves were told apart already, each side has two places. Which it is, `prove` says.
    """
    counts = {len(each) for each in sides}
    if counts == {2} and size > 1:
        yield size, tuple(place for each in sides for place in each)
    every = [each[0] for each in sides]
    if counts == {1} and size > 1 and all((2, each.stride // 2) in each.repeats for each in every):
        yield (
            size,
            tuple(
                place._replace(
                    offset=place.offset + at * place.stride // 2,
                    repeats=tuple(each for each in place.repeats if each != (2, place.stride // 2)),
                )
                for place in every
                for at in (0, 1)
            ),
        )
    half = size // 2
    if counts == {1} and size % 2 == 0 and half > 1:
        for far, step in ((half, 1), (1, 2)):
            yield (
                half,
                tuple(
                    place._replace(
                        offset=place.offset + at * place.stride, stride=place.stride * step
                    )
                    for place in every
                    for at in (0, far)
                ),
            )


def _queries_and_keys(places: Sequence[Place], *, fused: bool) -> list[list[Place]]:
    """By tensor its places; those of a `fused` tensor in halves, one of which is queries."""
    by_tensor: dict[str, list[Place]] = {}
    for place in places:
        by_tensor.setdefault(place.tensor, []).append(place)
    modules = {_module(name) for name in by_tensor}
    if len(modules) == 2:
        return list(by_tensor.values())
    several = [sorted(each, key=lambda place: place.offset) for each in by_tensor.values()]
    if not fused or len(modules) != 1 or any(len(each) % 2 for each in several):
        return []
    halves = [(each, len(each) // 2) for each in several]
    return [part for each, half in halves for part in (each[:half], each[half:])]


def _mark_products(owns: Sequence[list[Dimension]], found: list[Dimension]) -> None:
    """Mark the dimensions along which two computed tensors are multiplied with one another."""
    for back in range(1, len(found) + 1):
        if all(len(own) >= back and leaves(own[-back]) for own in owns):
            mark(found[-back], "product")


def _resized(before: Sequence[int], after: Sequence[int]) -> list[int]:
    return [axis for axis, size in enumerate(before) if size != after[axis]]


def _one(uses: set[tuple[int, str | None]], *, tied: bool) -> tuple[int, str | None]:
    """How a tensor is read, if in one way; otherwise without a norm. Tied: it also writes."""
    if len(uses) == 1 and not tied:
        return next(iter(uses))
    return min(axis for axis, _ in uses), None


def _kind(traits: set[str]) -> str:
    if "batched" in traits or traits <= {"bilinear"}:
        return "inner"
    if traits <= {"layer norm", "gain", "square", "reduced"} and traits & {"layer norm", "square"}:
        return "orthogonal"
    if traits <= {"batch norm", "reduced"} and "batch norm" in traits:
        return "invertible"
    return "permute"


def _all_within(dimension: Dimension) -> Iterator[factors.Factor]:
    """All leaves of a dimension, those of its parts and its variants as well."""
    for each in leaves(dimension):
        yield each
        for inner in each.parts or ():
            yield from _all_within(inner)
        for variant in each.variants or ():
            yield from _all_within([variant])
