"""Weights out of an ONNX file from anybody. Nothing in it is run, and no ONNX library is needed.

An ONNX file is a protobuf message: ModelProto → GraphProto → TensorProto, NodeProto. Only the
fields that say something of weights are looked at, straight from the wire format: a parser that
builds the whole message would let a file of empty nodes take many times its size in memory.
"""

import hashlib
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, final

import numpy as np

from nnpassport.files.arrays import BFLOAT16, Array, is_finite
from nnpassport.files.disk import brief, is_in_hub_cache, is_text, read_once
from nnpassport.scheme import UnreadableModelError

ONNX = ".onnx"
MAX_ONNX_BYTES = 2**31  # protobuf's own limit; larger networks keep their numbers in a file beside
_MOST_FIELDS = 5_000_000
_MOST_TENSORS = 100_000
_MOST_AXES = 8
_MOST_LISTED_BYTES = 2**27  # numbers that are not stored raw take up to thirty times the memory

# What to keep of each message, by the number of the field in `onnx.proto`.
_MODEL = {7: "graph", 25: "functions"}
_GRAPH = {1: "nodes", 5: "tensors", 12: "outputs"}
_FUNCTION = {1: "name", 5: "outputs", 7: "nodes"}
_VALUE = {1: "name"}
_NODE = {1: "inputs", 2: "outputs", 3: "name", 4: "kind", 5: "attributes", 9: "metadata"}
_ATTRIBUTE = {1: "name", 3: "integer", 5: "tensor", 6: "graph", 8: "integers", 11: "graphs"}
_PAIR = {1: "key", 2: "value"}
_TENSOR = {
    1: "dims",
    2: "type",
    3: "segment",
    4: "floats",
    5: "int32s",
    7: "int64s",
    8: "name",
    9: "raw",
    10: "doubles",
    13: "outside",
    14: "location",
}
# How each type is stored raw, and the field of those that are not; bfloat16 has no name in numpy.
_TYPES = {
    1: ("<f4", "floats"),
    11: ("<f8", "doubles"),
    10: ("<f2", "int32s"),
    16: ("<i2", "int32s"),
    2: ("|u1", "int32s"),
    3: ("|i1", "int32s"),
    6: ("<i4", "int32s"),
    7: ("<i8", "int64s"),
    9: ("|b1", "int32s"),
}
_BFLOAT16, _INT64 = 16, 7
_SETTINGS = {"axes", "keepdims", "pads", "perm", "value_int", "value_ints"}
_MOVING = {"Cast", "Flatten", "Identity", "Reshape", "Squeeze", "Unsqueeze"}
_FEW, _FEW_BYTES = 32, 320  # whole numbers, and bytes of them, that are looked at
_OUTSIDE = 1
_DEEPEST = 20  # graphs in nodes of graphs

_LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul", "ConvInteger", "MatMulInteger")
_QUANTISED, _TURNED = "_quantized", "_Transposed"  # what onnxruntime's quantiser adds to names


class OnnxWeights(NamedTuple):
    """Arrays by name, and SHA-256 (hex) of each file that they came from, by name."""

    arrays: dict[str, Array]
    digests: dict[str, str]


class OnnxNode(NamedTuple):
    """A node of a graph, as far as it says where dimensions go.

    Attributes:
        groups: of a convolution.
        transposed: whether a product's second matrix is (out in).
        flattens: whether all dimensions but the first become one.
        numbers: the whole numbers that say what it does with dimensions: axes of a reduction, a
            permutation, a padding. None where there are none, or where the graph computes them.
        keeps: whether a reduction keeps its dimensions, with a size of 1.
    """

    kind: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    groups: int
    transposed: bool
    flattens: bool
    numbers: tuple[int, ...] | None = None
    keeps: bool = True


class OnnxGraph(NamedTuple):
    """A graph in the order of its nodes, and the shapes of its tensors.

    Attributes:
        named: tensors that `read_onnx` has under another name: that, and whether turned.
    """

    nodes: tuple[OnnxNode, ...]
    outputs: tuple[str, ...]
    shapes: Mapping[str, tuple[int, ...]]
    named: Mapping[str, tuple[str, bool]]


class _Node(NamedTuple):
    inputs: list[str]
    outputs: list[str]
    name: str
    kind: str
    transposed: bool
    axis: int
    groups: int
    across: bool
    scopes: list[str]
    constant: memoryview | None
    inner: "list[_Graph]"
    settings: dict[str, tuple[int, ...]]


class _Graph(NamedTuple):
    """A graph, one in a node, or a function; tensors are initialisers and constants."""

    name: str
    nodes: list[_Node]
    tensors: dict[str, Mapping[str, list[Any]]]
    outputs: list[str]


class _Stored(NamedTuple):
    dims: tuple[int, ...]
    type: int
    found: Mapping[str, list[Any]]


def read_onnx(path: Path, limit: int) -> OnnxWeights:
    """The initialisers and constants of an ONNX file that its outputs depend on, by name.

    Numbers in a file beside it are read as well, `limit` bytes of them at most. The exporters of
    PyTorch lose the names of weights that they fold or transpose: those of a layer whose node still
    says which module it was are there under the module's name too, as PyTorch stores them, and
    weights that onnxruntime quantised are there under the name they had, as numbers again.
    What no node takes on the way to an output is left out: it can have any name and any numbers.
    (A graph without outputs computes nothing, and is taken for a list of tensors.)
    Types that no weight has are left out too, and so are constants with Inf in them that no layer
    multiplies by, such as masks.

    Raises:
        UnreadableModelError: missing, corrupt, hostile or too large.
    """
    data = read_once(path, MAX_ONNX_BYTES)
    digests = {path.name: hashlib.sha256(data).hexdigest()}
    try:
        nodes, stored = _graph(memoryview(data))
        beside = _read_beside(path, stored.values(), limit)
        tensors = {name: _tensor(each, beside) for name, each in stored.items()}
    except (ValueError, OverflowError, RuntimeError, MemoryError) as error:
        if isinstance(error, UnreadableModelError):
            raise
        raise UnreadableModelError(
            f"{path} is not a sound ONNX file ({brief(error)}); needed: a complete file as "
            "`torch.onnx.export` or `onnx.save` writes it; copy it again"
        ) from error
    digests |= {name: hashlib.sha256(content).hexdigest() for name, content in beside.items()}
    tensors |= _dequantised(nodes, tensors)
    tensors |= _by_module(nodes, tensors)
    tensors |= _biases(nodes, tensors)
    weights = {node.inputs[1] for node in nodes if node.kind in _LAYERS and len(node.inputs) > 1}
    kept = {
        n: t for n, t in tensors.items() if n.endswith(".weight") or n in weights or is_finite(t)
    }
    return OnnxWeights(kept, digests)


# The wire format


def read_graph(path: Path) -> OnnxGraph:
    """What the graph in an ONNX file does with its tensors; none of their numbers is read.

    Raises:
        UnreadableModelError: missing, corrupt, hostile or too large.
    """
    data = read_once(path, MAX_ONNX_BYTES)
    try:
        walk = _Walk()
        model = walk.message(memoryview(data), _MODEL)
        whole = _parsed(walk, _only(model["graph"], memoryview(b"")), _GRAPH, 0)
        shapes = {name: _dims(each["dims"]) for name, each in whole.tensors.items()}
        pairs = {name for name, shape in shapes.items() if shape == (2,)}
        joined = [each for each in whole.nodes if each.kind == "Concat" and len(each.inputs) == 2]
        pairs |= {name for each in joined for name in each.outputs}
        known = _known_numbers(whole)
    except (ValueError, OverflowError, RuntimeError, MemoryError) as error:
        raise UnreadableModelError(
            f"the graph of {path} cannot be read ({brief(error)}); needed: a complete ONNX file"
        ) from error
    nodes = tuple(
        OnnxNode(
            "" if each.across else each.kind,
            tuple(each.inputs),
            tuple(each.outputs),
            each.groups,
            each.transposed,
            each.axis == 1 if each.kind == "Flatten" else set(each.inputs[1:]) <= pairs,
            _numbers_of(each, known),
            each.settings.get("keepdims", (1,)) != (0,),
        )
        for each in whole.nodes
    )
    return OnnxGraph(nodes, tuple(whole.outputs), shapes, _lost(whole.nodes, shapes))


def _lost(
    nodes: Iterable[_Node], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[str, bool]]:
    """Weights that are under their module's name, as `_by_module` puts them there."""
    found: dict[str, tuple[str, bool]] = {}
    homes: dict[str, set[str]] = {}
    for node in nodes:
        if node.kind not in _LAYERS or len(node.inputs) < 2:
            continue
        source, name = node.inputs[1], f"{_module_of(node)}.weight"
        lost = "." not in source or source.startswith("onnx::")
        if not lost or name == ".weight" or name in shapes or len(shapes.get(source, ())) < 2:
            continue
        homes.setdefault(name, set()).add(source)
        product = node.kind == "MatMul" or (node.kind == "Gemm" and not node.transposed)
        found[source] = (name, product and len(shapes[source]) == 2)
    return {source: each for source, each in found.items() if len(homes[each[0]]) == 1}


@final
class _Walk:
    """Goes through messages field by field, and gives up on a file of too many."""

    def __init__(self) -> None:
        self._left = _MOST_FIELDS

    def message(self, message: memoryview | int, wanted: Mapping[int, str]) -> dict[str, list[Any]]:
        """The values of the wanted fields: an int of a varint, a view of anything else."""
        if isinstance(message, int):
            raise ValueError("a number where a message is needed")
        found: dict[str, list[Any]] = {name: [] for name in wanted.values()}
        for number, value in self._fields(message):
            if number in wanted:
                found[wanted[number]].append(value)
        return found

    def _fields(self, message: memoryview) -> Iterator[tuple[int, int | memoryview]]:
        place = 0
        while place < len(message):
            self._left -= 1
            if self._left < 0:
                raise ValueError(f"more than {_MOST_FIELDS} fields")
            key, place = _varint(message, place)
            value: int | memoryview
            if key & 7 == 0:
                value, place = _varint(message, place)
            else:
                size, place = _size(message, place, key & 7)
                value, place = message[place : place + size], place + size
                if len(value) != size:
                    raise ValueError("it ends in the middle of a field")
            yield key >> 3, value


def _size(message: memoryview, place: int, wire: int) -> tuple[int, int]:
    if wire == 2:
        return _varint(message, place)
    if wire in (1, 5):
        return (8 if wire == 1 else 4), place
    raise ValueError(f"there is no wire type {wire} in it")


def _varint(message: memoryview, place: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if place >= len(message):
            raise ValueError("it ends in the middle of a number")
        byte = message[place]
        place += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value & 2**64 - 1, place
    raise ValueError("a number of more than ten bytes")


def _only(values: Sequence[Any], default: Any) -> Any:
    # Protobuf would merge or overwrite: two readers could then see two networks in one file.
    if len(values) > 1:
        raise ValueError("a field that may be there once is there twice")
    return values[0] if values else default


def _number(values: Sequence[Any], default: int = 0) -> int:
    value = _only(values, default)
    if not isinstance(value, int):
        raise ValueError("a message where a number is needed")
    return value


def _text(value: memoryview | int) -> str:
    if isinstance(value, int):
        raise ValueError("a number where a text is needed")
    return bytes(value).decode()


# The graph


def _graph(data: memoryview) -> tuple[list[_Node], dict[str, _Stored]]:
    """The nodes and tensors that the outputs depend on, in functions and inner graphs too."""
    walk = _Walk()
    model = walk.message(data, _MODEL)
    whole = _parsed(walk, _only(model["graph"], data[:0]), _GRAPH, 0)
    functions: dict[str, list[_Graph]] = {}
    for message in model["functions"]:
        each = _parsed(walk, message, _FUNCTION, 0)
        functions.setdefault(each.name, []).append(each)
    every = [whole, *(each for several in functions.values() for each in several)]
    every += [inner for each in every for inner in _inside(each)]
    count = sum(len(each.tensors) for each in every)
    if not 0 < count <= _MOST_TENSORS:
        raise ValueError(f"{count} tensors; 1 to {_MOST_TENSORS} are read")
    needed: dict[int, set[str]] = {}
    _trace(whole, functions, needed)
    nodes: list[_Node] = []
    stored: dict[str, _Stored] = {}
    for graph in every:
        names = needed.get(id(graph), set())
        live = [node for node in graph.nodes if names & set(node.outputs)]
        if not whole.outputs:  # it computes nothing, and is no more than a list of tensors
            names, live = set(graph.tensors), graph.nodes
        nodes += live
        for name, found in graph.tensors.items():
            if (kind := _number(found["type"])) not in _TYPES or name not in names:
                continue
            free = name
            while free in stored:  # functions and inner graphs have names of their own
                free = f"{free}'"
            stored[free] = _Stored(_dims(found["dims"]), kind, found)
    return nodes, stored


def _parsed(walk: _Walk, message: memoryview, fields: Mapping[int, str], depth: int) -> _Graph:
    """A graph or a function."""
    if depth > _DEEPEST:
        raise ValueError(f"graphs in nodes of graphs, more than {_DEEPEST} deep")
    graph = walk.message(message, fields)
    outputs = graph["outputs"]
    if fields is _GRAPH:
        outputs = [_only(walk.message(each, _VALUE)["name"], memoryview(b"")) for each in outputs]
    nodes = [_node(walk, each, depth) for each in graph["nodes"]]
    messages = [("", each) for each in graph.get("tensors", [])]
    messages += [(n.outputs[0], n.constant) for n in nodes if n.constant is not None and n.outputs]
    tensors: dict[str, Mapping[str, list[Any]]] = {}
    for output, each in messages:
        found = walk.message(each, _TENSOR)
        name = output or _text(_only(found["name"], memoryview(b"")))
        if name in tensors or not is_text(name):
            raise ValueError(f"a tensor's name is there twice, or is no name: {ascii(name)[:100]}")
        tensors[name] = found
    name = "" if fields is _GRAPH else _text(_only(graph["name"], memoryview(b"")))
    return _Graph(name, nodes, tensors, [_text(each) for each in outputs])


def _inside(graph: _Graph) -> list[_Graph]:
    """The graphs in this one's nodes, and in theirs."""
    found = [inner for node in graph.nodes for inner in node.inner]
    return found + [each for inner in found for each in _inside(inner)]


def _trace(
    graph: _Graph, functions: Mapping[str, list[_Graph]], needed: dict[int, set[str]]
) -> set[str]:
    """The names around it that a graph's outputs depend on; in `needed`, its own, by graph.

    Of a node that calls a function all inputs count, whether the function takes them or not.
    """
    names = needed.setdefault(id(graph), set())
    makers = {output: node for node in graph.nodes for output in node.outputs}
    reached = list(graph.outputs)
    while reached:
        name = reached.pop()
        if name in names:
            continue
        names.add(name)
        if (node := makers.get(name)) is None:
            continue
        reached += node.inputs
        for inner in node.inner:
            reached += _trace(inner, functions, needed)
        for function in functions.get(node.kind, ()):
            if id(function) not in needed:
                _trace(function, functions, needed)
    return names - makers.keys() - graph.tensors.keys()


def _node(walk: _Walk, message: memoryview, depth: int) -> _Node:
    found = walk.message(message, _NODE)
    attributes = {}
    for each in found["attributes"]:
        attribute = walk.message(each, _ATTRIBUTE)
        attributes[_text(_only(attribute["name"], memoryview(b"")))] = attribute
    metadata = {}
    for each in found["metadata"]:
        pair = walk.message(each, _PAIR)
        key, value = (_text(_only(pair[part], memoryview(b""))) for part in ("key", "value"))
        metadata[key] = value
    kind = _text(_only(found["kind"], memoryview(b"")))
    constant = attributes.get("value") if kind == "Constant" else None
    return _Node(
        inputs=[_text(name) for name in found["inputs"]],
        outputs=[_text(name) for name in found["outputs"]],
        name=_text(_only(found["name"], memoryview(b""))),
        kind=kind,
        transposed=bool(_number(attributes.get("transB", {"integer": []})["integer"])),
        axis=_axis(attributes.get("axis")),
        groups=_number(attributes.get("group", {"integer": []})["integer"], 1),
        across=bool(_number(attributes.get("transA", {"integer": []})["integer"])),
        scopes=re.findall(r"'([^']*)'", metadata.get("pkg.torch.onnx.name_scopes", "")),
        constant=None if constant is None else _only(constant["tensor"], None),
        settings={
            name: tuple(map(_signed, _listed_in(attribute)))
            for name, attribute in attributes.items()
            if name in _SETTINGS
        },
        inner=[
            _parsed(walk, graph, _GRAPH, depth + 1)
            for attribute in attributes.values()
            for graph in (*attribute["graph"], *attribute["graphs"])
        ],
    )


def _axis(attribute: Mapping[str, list[Any]] | None) -> int:
    """Of a node's scales; 1 if it does not say, and counted from the end below zero."""
    return 1 if attribute is None else _signed(_number(attribute["integer"]))


def _signed(number: int) -> int:
    return number - 2**64 if number >= 2**63 else number


def _listed_in(attribute: Mapping[str, list[Any]]) -> Iterator[int]:
    """The number of an attribute, or its list of them."""
    for value in (*attribute["integer"], *attribute["integers"]):
        yield from [value] if isinstance(value, int) else _varints(value[:_FEW_BYTES]).tolist()


def _known_numbers(graph: _Graph) -> dict[str, tuple[int, ...]]:
    """Short lists of whole numbers that the graph has as constants, or moves about as they are."""
    known = {}
    for name, found in graph.tensors.items():
        if found["type"] == [_INT64] and math.prod(_dims(found["dims"])) <= _FEW:
            stored = _Stored(_dims(found["dims"]), _INT64, found)
            with suppress(ValueError):  # numbers in a file beside it, say
                known[name] = tuple(_tensor(stored, {}).reshape(-1).tolist())
    for node in graph.nodes:
        if not node.outputs:
            continue
        settings = node.settings.get("value_ints", node.settings.get("value_int"))
        if node.kind == "Constant" and settings is not None:
            known[node.outputs[0]] = settings
        elif node.kind in _MOVING and node.inputs and node.inputs[0] in known:
            known[node.outputs[0]] = known[node.inputs[0]]
        elif node.kind == "Concat" and all(name in known for name in node.inputs):
            joined = tuple(number for name in node.inputs for number in known[name])
            known[node.outputs[0]] = joined[:_FEW]
    return known


def _numbers_of(node: _Node, known: Mapping[str, tuple[int, ...]]) -> tuple[int, ...] | None:
    """Of a node that reduces, moves or pads dimensions: as an attribute, or as its second input."""
    for name in ("axes", "perm", "pads"):
        if name in node.settings:
            return node.settings[name]
    return known.get(node.inputs[1]) if len(node.inputs) > 1 else None


# Tensors


def _dims(values: Iterable[int | memoryview]) -> tuple[int, ...]:
    dims: list[int] = []
    for value in values:
        # No axis takes more than ten bytes; the rest need not be decoded to be too much.
        dims += [value] if isinstance(value, int) else _varints(value[:100]).tolist()
        if len(dims) > _MOST_AXES or any(size >= 2**63 for size in dims):
            raise ValueError(f"a tensor has more than {_MOST_AXES} axes or a negative one")
    return tuple(dims)


def _tensor(stored: _Stored, beside: Mapping[str, bytes]) -> Array:
    form, field = _TYPES[stored.type]
    kind, found = np.dtype(form), stored.found
    listed = [name for name in ("floats", "doubles", "int32s", "int64s") if found[name]]
    if found["segment"] or len(listed) + len(found["raw"]) > 1 or listed not in ([], [field]):
        raise ValueError("a tensor's numbers are in parts, there twice, or in the wrong field")
    if math.prod(max(size, 1) for size in stored.dims) >= 2**63:
        raise ValueError(f"a tensor of shape {stored.dims} is larger than any memory")
    count = math.prod(stored.dims)
    if _number(found["location"]) == _OUTSIDE:
        raw: Any = _slice(_place(found), count * kind.itemsize, beside)
    elif listed:
        raw = _listed(found[field], kind, field)
    else:
        raw = _only(found["raw"], memoryview(b""))
    if isinstance(raw, int) or len(raw) != count * kind.itemsize:
        raise ValueError(f"a tensor of shape {stored.dims} does not hold all its numbers")
    if kind == np.bool_:
        numbers = np.frombuffer(raw, np.uint8) != 0  # other bytes than 0 and 1 are no bool
    else:
        numbers = np.frombuffer(raw, kind).astype(kind.newbyteorder("="))
    return (numbers.view(BFLOAT16) if stored.type == _BFLOAT16 else numbers).reshape(stored.dims)


def _listed(values: Sequence[Any], kind: np.dtype[Any], field: str) -> bytes:
    if field in ("floats", "doubles"):
        return b"".join(bytes(value) for value in values if not isinstance(value, int))
    parts = [_varints(v) if isinstance(v, memoryview) else np.array([v], np.uint64) for v in values]
    low = np.concatenate(parts).astype(f"<u{kind.itemsize}")  # half precision is stored as its bits
    return low.tobytes()


def _varints(packed: memoryview) -> np.ndarray[Any, np.dtype[np.uint64]]:
    if len(packed) > _MOST_LISTED_BYTES:
        raise ValueError(
            f"a tensor lists {len(packed)} bytes of numbers, and at most {_MOST_LISTED_BYTES} are "
            "read; save it with raw_data"
        )
    data = np.frombuffer(packed, np.uint8)
    ends = np.flatnonzero(data < 128)
    if len(data) and (not len(ends) or ends[-1] != len(data) - 1):
        raise ValueError("it ends in the middle of a number")
    starts = np.concatenate([[0], ends[:-1] + 1]).astype(np.int64)[: len(ends)]
    sizes = ends - starts + 1
    if len(sizes) and sizes.max() > 10:
        raise ValueError("a number of more than ten bytes")
    values = np.zeros(len(ends), np.uint64)
    for byte in range(int(sizes.max()) if len(sizes) else 0):
        there = sizes > byte
        bits = (data[starts[there] + byte] & 127).astype(np.uint64)
        values[there] |= bits << np.uint64(7 * byte)
    return values


# Numbers in a file beside it


class _Place(NamedTuple):
    file: str
    offset: int
    length: int | None


def _place(found: Mapping[str, list[Any]]) -> _Place:
    walk, entries = _Walk(), {}
    for each in found["outside"]:
        pair = walk.message(each, _PAIR)
        key, value = (_text(_only(pair[part], memoryview(b""))) for part in ("key", "value"))
        entries[key] = value
    offset, length = entries.get("offset", "0"), entries.get("length")
    for number in (offset, length or "0"):
        if not re.fullmatch("[0-9]{1,18}", number):
            raise ValueError(f"{ascii(number)[:40]} is no place in a file")
    file = entries.get("location", "")
    return _Place(file, int(offset), None if length is None else int(length))


def _read_beside(path: Path, stored: Iterable[_Stored], limit: int) -> dict[str, bytes]:
    outside = [each.found for each in stored if _number(each.found["location"]) == _OUTSIDE]
    files: dict[str, bytes] = {}
    for name in sorted({_place(found).file for found in outside}):
        plain = is_text(name) and name not in ("", ".", "..") and not set(name) & set("/\\:\n\t")
        beside = path.parent / name
        if not plain or (beside.is_symlink() and not is_in_hub_cache(beside)):
            raise UnreadableModelError(
                f"{path} keeps numbers in {ascii(name)[:200]}, but only a plain file beside it is "
                "read, and no link; put it there, or save the network in one file"
            )
        files[name] = read_once(beside, limit)
        limit -= len(files[name])
    return files


def _slice(place: _Place, size: int, beside: Mapping[str, bytes]) -> memoryview:
    if place.length not in (None, size):
        raise ValueError(f"{place.length} bytes in {place.file} are not the {size} that are needed")
    return memoryview(beside[place.file])[place.offset : place.offset + size]


# Names that were lost


def _by_module(nodes: Iterable[_Node], tensors: Mapping[str, Array]) -> dict[str, Array]:
    """Weights whose names were lost, under those of the modules that their nodes stand for.

    A module that would get two different weights gets none.
    """
    found: dict[str, tuple[str, Array]] = {}
    ambiguous = set()
    for node in nodes:
        if node.kind not in _LAYERS or len(node.inputs) < 2:
            continue
        source = node.inputs[1].removesuffix(_QUANTISED)
        weight, name = tensors.get(source), f"{_module_of(node)}.weight"
        lost = "." not in source or source.startswith("onnx::")
        if weight is None or not lost or name == ".weight" or name in tensors or weight.ndim < 2:
            continue
        if name in found and found[name][0] != source:
            ambiguous.add(name)
        found[name] = (source, _as_stored(node, weight))
    return {name: weight for name, (_, weight) in found.items() if name not in ambiguous}


def _biases(nodes: Iterable[_Node], tensors: Mapping[str, Array]) -> dict[str, Array]:
    """Biases that a layer got when a norm was folded into it, under the layer's name."""
    found: dict[str, tuple[str, Array]] = {}
    ambiguous = set()
    for node in nodes:
        if node.kind not in ("Conv", "ConvTranspose") or len(node.inputs) < 3:
            continue
        weight, source = node.inputs[1], node.inputs[2]
        layer = weight.removesuffix(".weight") if "." in weight else _module_of(node)
        name, bias = f"{layer}.bias", tensors.get(source)
        if not layer or bias is None or bias.ndim != 1 or name in tensors:
            continue
        if name in found and found[name][0] != source:
            ambiguous.add(name)
        found[name] = (source, bias)
    return {name: bias for name, (_, bias) in found.items() if name not in ambiguous}


def _module_of(node: _Node) -> str:
    """Dotted name of the PyTorch module that a node was exported from, or "".

    The newer exporter writes it into the metadata: '', 'layer1', 'layer1.0', …, the operator. The
    older one into the node's name, "/layer1/layer1.0/conv1/Conv".
    """
    if node.scopes:
        is_layer = node.scopes[-1].startswith(("linear", "conv"))
        return node.scopes[-2] if is_layer and len(node.scopes) > 1 else ""
    if not node.name.startswith("/"):
        return ""
    parts: list[str] = []
    for part in node.name.split("/")[1:-1]:
        # Containers name their children in full, after their own last part.
        if parts and part.startswith(f"{parts[-1]}."):
            parts.pop()
        parts.append(part)
    return ".".join(parts)


def _as_stored(node: _Node, weight: Array) -> Array:
    """A weight (in out) of a product as PyTorch stores it, (out in); others as they are."""
    product = node.kind.startswith("MatMul") or (node.kind == "Gemm" and not node.transposed)
    return np.ascontiguousarray(weight.T) if product and weight.ndim == 2 else weight


def _dequantised(nodes: Sequence[_Node], tensors: Mapping[str, Array]) -> dict[str, Array]:
    """Weights w = (q − zero point) · scale: what nodes make of them, and what a name says.

    Those that onnxruntime's quantiser has renamed have their own names again. The axis that the
    scales are along is the node's; without a node it is the only one that has as many places.
    """
    found, axes = {}, {}
    used = {name for node in nodes if node.kind in _LAYERS for name in node.inputs[1:3]}
    left = 2 * sum(each.size for each in tensors.values())  # many nodes may name one tensor
    for node in nodes:
        if node.kind != "DequantizeLinear" or not 2 <= len(node.inputs) <= 3 or not node.outputs:
            continue
        numbers, scale = (tensors.get(name) for name in node.inputs[:2])
        zero = tensors.get(node.inputs[2]) if len(node.inputs) == 3 else None
        if numbers is None or scale is None or (zero is None and len(node.inputs) == 3):
            continue
        axes[node.inputs[0]], left = node.axis, left - numbers.size
        stored = node.inputs[0].removesuffix(_QUANTISED)
        by_name = stored != node.inputs[0] and f"{stored}_scale" in tensors  # as below
        if left < 0 or node.outputs[0] not in used or by_name:
            continue
        if (weight := _scaled(numbers, scale, zero, node.axis)) is not None:
            found[node.outputs[0]] = weight
    for stored, numbers in tensors.items():
        name = stored.removesuffix(_QUANTISED)
        scale, zero = tensors.get(f"{name}_scale"), tensors.get(f"{name}_zero_point")
        if name == stored or scale is None or zero is None:
            continue
        axis = axes.get(stored, _only_axis(numbers, scale))
        if axis is None or (weight := _scaled(numbers, scale, zero, axis)) is None:
            continue
        turned = name.endswith(_TURNED) and weight.ndim == 2
        found[name.removesuffix(_TURNED)] = np.ascontiguousarray(weight.T) if turned else weight
    return {name: weight for name, weight in found.items() if name not in tensors}


def _only_axis(numbers: Array, scale: Array) -> int | None:
    axes = [axis for axis, size in enumerate(numbers.shape) if size == scale.size]
    return axes[0] if len(axes) == 1 else 0 if scale.size == 1 else None


def _scaled(numbers: Array, scale: Array, zero: Array | None, axis: int) -> Array | None:
    """(q − zero) · scale: one for all, one for each place of the axis; None if they do not fit."""
    if zero is not None and zero.shape != scale.shape:
        return None
    shape = [1] * numbers.ndim
    if scale.size > 1:
        there = -numbers.ndim <= axis < numbers.ndim
        if not there or scale.size != numbers.shape[axis] or scale.ndim != 1:
            return None
        shape[axis] = -1
    wide = numbers.astype(np.float32)
    if zero is not None:
        wide -= zero.astype(np.float32).reshape(shape)
    return wide * scale.astype(np.float32).reshape(shape)
