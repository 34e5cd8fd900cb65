"""Axes out of an ONNX graph: what is inside, and what meets the outside or another operation."""

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper, save
from safetensors.numpy import save_file

from nnpassport.alignment.graph import axes_of_graph
from nnpassport.files.onnx import read_graph, read_onnx
from nnpassport.scheme import UnreadableModelError
from nnpassport.verification.compare import compare
from nnpassport.verification.lineage import Outcome, open_network


def written(path, nodes, tensors, outputs=("y",)):
    """An ONNX file of these nodes: (kind, inputs, output, attributes)."""
    made = [helper.make_node(k, i.split(), o.split(), **a) for k, i, o, a in nodes]
    graph = helper.make_graph(
        made,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, None)],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        [numpy_helper.from_array(value, name) for name, value in tensors.items()],
    )
    save(helper.make_model(graph), path)
    return path


def drawn(shapes, seed=0):
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def found(path):
    """Axes of the file: size, and where they are."""
    axes = axes_of_graph(read_graph(path)).axes
    return {
        (axis.size, frozenset((p.tensor, p.dimension, p.stride) for p in axis.places))
        for axis in axes
    }


PLAIN = {"transB": 1}
MLP = [
    ("Gemm", "x a.weight a.bias", "1", PLAIN),
    ("Relu", "1", "2", {}),
    ("Gemm", "2 b.weight b.bias", "3", PLAIN),
    ("Gelu", "3", "4", {}),
    ("Gemm", "4 c.weight", "y", PLAIN),
]
SHAPES = {"a.weight": (24, 7), "a.bias": (24,), "b.weight": (16, 24), "b.bias": (16,)}
SHAPES |= {"c.weight": (10, 16)}
FIRST = (24, frozenset({("a.weight", 0, 1), ("a.bias", 0, 1), ("b.weight", 1, 1)}))
SECOND = (16, frozenset({("b.weight", 0, 1), ("b.bias", 0, 1), ("c.weight", 1, 1)}))


def test_what_one_layer_writes_and_the_next_reads_is_one_axis(tmp_path):
    """Inputs and classes are none."""
    assert found(written(tmp_path / "m.onnx", MLP, drawn(SHAPES))) == {FIRST, SECOND}


def test_what_is_put_out_or_meets_another_operation_is_outside(tmp_path):
    path = written(tmp_path / "m.onnx", MLP, drawn(SHAPES), outputs=("y", "2"))
    assert found(path) == {SECOND}
    other = [*MLP[:3], ("Softmax", "3", "4", {}), MLP[4]]
    assert found(written(path, other, drawn(SHAPES))) == {FIRST}
    assert found(written(path, [*MLP, ("Softmax", "2", "z", {})], drawn(SHAPES))) == {SECOND}
    sizes = [*MLP, ("Shape", "2", "z", {})]
    assert found(written(path, sizes, drawn(SHAPES))) == {FIRST, SECOND}


def test_a_turned_product_is_read_the_other_way(tmp_path):
    shapes = {"a": (7, 24), "b": (24, 10)}
    nodes = [("MatMul", "x a", "1", {}), ("Tanh", "1", "2", {}), ("MatMul", "2 b", "y", {})]
    path = written(tmp_path / "m.onnx", nodes, drawn(shapes))
    assert found(path) == {(24, frozenset({("a", 1, 1), ("b", 0, 1)}))}
    across = [("Gemm", "x a", "1", {}), ("Gemm", "1 b", "y", {"transA": 1})]
    assert found(written(path, across, drawn(shapes))) == set()


CNN = [
    ("Conv", "x a.weight", "1", {"kernel_shape": [3, 3]}),
    ("BatchNormalization", "1 n.weight n.bias n.mean n.var", "2", {}),
    ("Relu", "2", "3", {}),
    ("Conv", "3 b.weight b.bias", "4", {"kernel_shape": [3, 3]}),
    ("Add", "4 3", "5", {}),
    ("MaxPool", "5", "6", {"kernel_shape": [2, 2]}),
    ("Flatten", "6", "7", {}),
    ("Gemm", "7 c.weight", "y", PLAIN),
]
WIDE = {"a.weight": (16, 3, 3, 3), "b.weight": (16, 16, 3, 3), "b.bias": (16,)}
WIDE |= {"c.weight": (10, 64)} | {f"n.{name}": (16,) for name in ("weight", "bias", "mean", "var")}


def test_a_residual_stream_is_one_axis_and_a_flattened_one_has_its_places(tmp_path):
    ((size, places),) = found(written(tmp_path / "m.onnx", CNN, drawn(WIDE)))
    assert size == 16
    norms = {(f"n.{name}", 0, 1) for name in ("weight", "bias", "mean", "var")}
    convolutions = {("a.weight", 0, 1), ("b.weight", 0, 1), ("b.weight", 1, 1), ("b.bias", 0, 1)}
    assert places == norms | convolutions | {("c.weight", 1, 4)}


def test_channels_by_themselves_are_the_same_axis_and_groups_are_none(tmp_path):
    shapes = {"a": (16, 3, 1, 1), "d": (16, 1, 3, 3), "b": (8, 16, 1, 1), "c": (4, 8, 1, 1)}
    nodes = [
        ("Conv", "x a", "1", {}),
        ("Conv", "1 d", "2", {"group": 16}),
        ("Conv", "2 b", "3", {}),
        ("Conv", "3 c", "y", {}),
    ]
    path = written(tmp_path / "m.onnx", nodes, drawn(shapes))
    eight = (8, frozenset({("b", 0, 1), ("c", 1, 1)}))
    assert found(path) == {(16, frozenset({("a", 0, 1), ("d", 0, 1), ("b", 1, 1)})), eight}
    nodes[1] = ("Conv", "1 d", "2", {"group": 4})
    assert found(written(path, nodes, drawn({**shapes, "d": (16, 4, 3, 3)}))) == {eight}


def test_a_weight_that_is_used_twice_ties_its_axes(tmp_path):
    shapes = {"a": (16, 7), "b": (16, 16), "c": (10, 16)}
    nodes = [
        ("Gemm", "x a", "1", PLAIN),
        ("Gemm", "1 b", "2", PLAIN),
        ("Gemm", "2 b", "3", PLAIN),
        ("Gemm", "3 c", "y", PLAIN),
    ]
    ((_, places),) = found(written(tmp_path / "m.onnx", nodes, drawn(shapes)))
    assert places == {("a", 0, 1), ("b", 0, 1), ("b", 1, 1), ("c", 1, 1)}


@pytest.mark.parametrize(
    ("shape", "along"), [((16,), True), ((1, 16), True), ((1,), None), ((16, 1), False)]
)
def test_a_vector_is_along_the_axis_or_nothing_is_known(tmp_path, shape, along):
    shapes = {"a": (16, 7), "v": shape, "c": (10, 16)}
    nodes = [("Gemm", "x a", "1", PLAIN), ("Mul", "1 v", "2", {}), ("Gemm", "2 c", "y", PLAIN)]
    axes = found(written(tmp_path / "m.onnx", nodes, drawn(shapes)))
    assert bool(axes) is (along is not False)
    if along:
        assert any(name == "v" for _, places in axes for name, *_ in places)


def test_what_does_not_fit_together_is_outside(tmp_path):
    shapes = {"a": (16, 7), "b": (12, 17), "c": (10, 12)}
    nodes = [("Gemm", "x a", "1", PLAIN), ("Gemm", "1 b", "2", PLAIN), ("Gemm", "2 c", "y", PLAIN)]
    path = written(tmp_path / "m.onnx", nodes, drawn(shapes))
    assert found(path) == {(12, frozenset({("b", 0, 1), ("c", 1, 1)}))}


def test_compare_knows_the_axes_of_a_graph(tmp_path):
    """Hidden layers as wide as the classes: shapes alone leave that open, the graph does not."""
    shapes = {"a.weight": (32, 32), "b.weight": (32, 32), "c.weight": (32, 32)}
    nodes = [
        ("Gemm", "x a.weight", "1", PLAIN),
        ("Relu", "1", "2", {}),
        ("Gemm", "2 b.weight", "3", PLAIN),
        ("Relu", "3", "4", {}),
        ("Gemm", "4 c.weight", "y", PLAIN),
    ]
    mine, rng = drawn(shapes), np.random.default_rng(9)
    tuned = {n: v + 0.3 * rng.standard_normal(v.shape).astype(np.float32) for n, v in mine.items()}
    suspect = open_network(written(tmp_path / "s.onnx", nodes, tuned))
    save_file(mine, tmp_path / "mine.safetensors")
    save_file(tuned, tmp_path / "bare.safetensors")
    save_file(drawn(shapes, 5), tmp_path / "other.safetensors")
    there = {n: open_network(tmp_path / f"{n}.safetensors") for n in ("mine", "bare", "other")}
    assert compare(there["bare"], there["mine"]).outcome is Outcome.UNDECIDED
    related = compare(suspect, there["mine"])
    assert related.outcome is Outcome.RELATED
    assert related.order.how == "axes"
    assert related.aligned is None
    assert compare(suspect, there["other"]).outcome is Outcome.NONE


def test_a_name_that_an_exporter_lost_is_the_module_s(tmp_path):
    shapes = {"onnx::MatMul_9": (7, 24), "fc2.weight": (10, 24)}
    path = tmp_path / "m.onnx"
    nodes = [
        ("MatMul", "x onnx::MatMul_9", "1", {"name": "/fc1/MatMul"}),
        ("Gemm", "1 fc2.weight", "y", PLAIN),
    ]
    assert found(written(path, nodes, drawn(shapes))) == {
        (24, frozenset({("fc1.weight", 0, 1), ("fc2.weight", 1, 1)}))
    }
    assert read_onnx(path, 2**20).arrays["fc1.weight"].shape == (24, 7)


def test_what_is_no_graph_is_refused(tmp_path):
    (tmp_path / "m.onnx").write_bytes(b"\xff" * 50)
    with pytest.raises(UnreadableModelError, match="graph"):
        read_graph(tmp_path / "m.onnx")


# What other tools write


STEM = [
    ("Conv", "x a.weight a.bias", "1", {"kernel_shape": [3, 3]}),
    ("Relu", "1", "2", {}),
    ("Conv", "2 b.weight", "3", {"kernel_shape": [3, 3]}),
    ("Add", "3 2", "4", {}),
]
BLOCK = {"a.weight": (16, 3, 3, 3), "a.bias": (16,), "b.weight": (16, 16, 3, 3)}
HEAD = {"c.weight": (10, 16)}
STREAM = {("a.weight", 0, 1), ("a.bias", 0, 1), ("b.weight", 0, 1), ("b.weight", 1, 1)}
WHOLE = {(16, frozenset({*STREAM, ("c.weight", 1, 1)}))}
ENDS = {
    "pooled and flattened": [
        ("GlobalAveragePool", "4", "5", {}),
        ("Flatten", "5", "6", {}),
    ],
    "a mean whose axes are an attribute (to opset 17)": [
        ("ReduceMean", "4", "5", {"axes": [2, 3], "keepdims": 1}),
        ("Flatten", "5", "6", {}),
    ],
    "a mean that drops them": [("ReduceMean", "4", "6", {"axes": [-2, -1], "keepdims": 0})],
    "a mean whose axes are a tensor (from opset 18)": [
        ("ReduceMean", "4 places", "5", {}),
        ("Reshape", "5 two", "6", {}),
    ],
    "axes that another node passes on": [
        ("Reshape", "places one", "p", {}),
        ("ReduceMean", "4 p", "5", {"keepdims": 0}),
        ("Concat", "one ten", "q", {"axis": 0}),
        ("Reshape", "5 q", "6", {}),
    ],
    "squeezed": [("GlobalAveragePool", "4", "5", {}), ("Squeeze", "5 places", "6", {})],
    "channels last and back": [
        ("Transpose", "4", "t", {"perm": [0, 2, 3, 1]}),
        ("Relu", "t", "u", {}),
        ("Transpose", "u", "v", {"perm": [0, 3, 1, 2]}),
        ("Pad", "v pads", "w", {}),
        ("GlobalAveragePool", "w", "5", {}),
        ("Flatten", "5", "6", {}),
    ],
    "channels last to the end": [
        ("Transpose", "4", "t", {"perm": [0, 2, 3, 1]}),
        ("ReduceMean", "t", "6", {"axes": [1, 2], "keepdims": 0}),
    ],
    "with a constant of the activations' kind": [
        ("CastLike", "ten 4", "l", {}),
        ("GlobalAveragePool", "4", "5", {}),
        ("Flatten", "5", "6", {}),
    ],
}
NUMBERS = {"places": [2, 3], "two": [0, -1], "one": [-1], "ten": [10]}
NUMBERS["pads"] = [0, 0, 1, 1, 0, 0, 1, 1]


def with_numbers(shapes, **others):
    wanted = {**NUMBERS, **others}
    return {**drawn(shapes), **{n: np.array(each, np.int64) for n, each in wanted.items()}}


@pytest.mark.parametrize("end", ENDS)
def test_a_residual_network_has_its_axis_however_its_end_is_written(tmp_path, end):
    nodes = [*STEM, *ENDS[end], ("Gemm", "6 c.weight", "y", PLAIN)]
    path = written(tmp_path / "m.onnx", nodes, with_numbers({**BLOCK, **HEAD}))
    assert found(path) == WHOLE


@pytest.mark.parametrize(
    "end",
    [
        [("ReduceMean", "4", "5", {"axes": [1], "keepdims": 0}), ("Flatten", "5", "6", {})],
        [("ReduceMean", "4", "5", {"axes": [0, 2, 3]}), ("Flatten", "5", "6", {})],
        [("ReduceMean", "4 x", "5", {}), ("Flatten", "5", "6", {})],  # nobody knows over what
        [("ReduceMean", "4", "5", {}), ("Flatten", "5", "6", {})],
        [("Transpose", "4", "5", {"perm": [0, 2, 1, 3]}), ("Flatten", "5", "6", {})],
        [("Transpose", "4", "5", {"perm": [1, 0, 2, 3]}), ("Flatten", "5", "6", {})],
        [("Pad", "4 wide", "5", {}), ("Flatten", "5", "6", {})],
        [("Pad", "4 x", "5", {}), ("Flatten", "5", "6", {})],
        [("Squeeze", "4", "5", {}), ("Flatten", "5", "6", {})],
    ],
)
def test_what_mixes_channels_or_may_do_so_is_outside(tmp_path, end):
    nodes = [*STEM, *end, ("Gemm", "6 c.weight", "y", PLAIN)]
    tensors = with_numbers({**BLOCK, **HEAD}, wide=[0, 8, 0, 0, 0, 8, 0, 0])
    assert found(written(tmp_path / "m.onnx", nodes, tensors)) == set()


def test_equal_vectors_that_an_exporter_keeps_once_tie_nothing(tmp_path):
    """Zeros for every bias: PyTorch's exporter passes one of them on by `Identity`."""
    shapes = {"a.weight": (16, 7), "zeros": (16,), "b.weight": (16, 16), "c.weight": (10, 16)}
    nodes = [
        ("Gemm", "x a.weight zeros", "1", PLAIN),
        ("Relu", "1", "2", {}),
        ("Identity", "zeros", "same", {}),
        ("Gemm", "2 b.weight same", "3", PLAIN),
        ("Add", "3 same", "4", {}),
        ("Gemm", "4 c.weight", "y", PLAIN),
    ]
    first = (16, frozenset({("a.weight", 0, 1), ("zeros", 0, 1), ("b.weight", 1, 1)}))
    second = (16, frozenset({("b.weight", 0, 1), ("c.weight", 1, 1)}))
    path = written(tmp_path / "m.onnx", nodes, drawn(shapes))
    assert found(path) == {first, second}
    nodes[2] = ("Identity", "b.weight", "same", {})
    nodes[3:5] = [("Gemm", "2 same", "3", PLAIN), ("Gemm", "3 b.weight", "4", PLAIN)]
    ((size, places),) = found(written(path, nodes, drawn(shapes)))  # a matrix ties what it serves
    assert (size, len(places)) == (16, 5)


def test_what_onnxruntime_fuses_is_followed(tmp_path):
    nodes = [
        ("FusedConv", "x a.weight a.bias", "2", {}),
        ("FusedConv", "2 b.weight none 2", "4", {}),
        *ENDS["pooled and flattened"],
        ("FusedGemm", "6 c.weight", "y", PLAIN),
    ]
    shapes = {**BLOCK, **HEAD, "none": (16,)}
    ((size, places),) = found(written(tmp_path / "m.onnx", nodes, drawn(shapes)))
    assert size == 16
    assert places == {*STREAM, ("none", 0, 1), ("c.weight", 1, 1)}


def test_a_batch_norm_of_features_and_vectors_of_any_rank_are_along_the_axis(tmp_path):
    shapes = {"a": (16, 7), "b": (10, 16), **{f"n{n}": (16,) for n in range(4)}}
    nodes = [
        ("Gemm", "x a", "1", PLAIN),
        ("BatchNormalization", "1 n0 n1 n2 n3", "2", {}),
        ("Gemm", "2 b", "y", PLAIN),
    ]
    ((size, places),) = found(written(tmp_path / "m.onnx", nodes, drawn(shapes)))
    assert (size, len(places)) == (16, 6)
    line = {"a": (16, 3, 5), "v": (16, 1), "b": (8, 16, 5)}
    nodes = [("Conv", "x a", "1", {}), ("Mul", "1 v", "2", {}), ("Conv", "2 b", "y", {})]
    path = written(tmp_path / "m.onnx", nodes, drawn(line))
    assert found(path) == {(16, frozenset({("a", 0, 1), ("v", 0, 1), ("b", 1, 1)}))}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # exporters speak of their successors
@pytest.mark.parametrize("opset", [11, 13, 17, 18, "not optimised"])
def test_a_resnet_has_all_its_axes_as_every_exporter_writes_it(tmp_path, opset):
    """Twelve: four streams, and one inside each of eight blocks; norms folded in, or not."""
    import torch

    from nnpassport.embedding.checkpoint import save_model
    from nnpassport.embedding.network.models import build
    from nnpassport.embedding.publish.onnx import export_onnx
    from nnpassport.files.config import ModelConfig

    torch.manual_seed(0)
    arguments = {"classes": 10, "norm": "batch", "width": 0.25, "channels": 3}
    model, path = build("resnet18", **arguments), tmp_path / "m.onnx"
    model.train()(torch.randn(8, 3, 32, 32))
    model.eval()
    config = ModelConfig(
        "resnet18", arguments, tuple("0123456789"), (3, 32, 32), (0.5,) * 3, (1.0,) * 3
    )
    save_model(tmp_path / "net", model, config)
    example = torch.randn(2, 3, 32, 32)
    if opset == "not optimised":
        export_onnx(model, example, path)
    elif opset == 18:
        torch.onnx.export(model, (example,), str(path), dynamo=True, verbose=False)
    else:
        torch.onnx.export(model, (example,), str(path), dynamo=False, opset_version=opset)
    assert sorted(size for size, _ in found(path)) == [16] * 3 + [32] * 3 + [64] * 3 + [128] * 3
    related = compare(open_network(path), open_network(tmp_path / "net"))
    assert related.outcome is Outcome.RELATED
    assert related.order.how == "axes"
    assert related.order.log10_p < -1000
