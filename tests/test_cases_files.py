"""Files as people have them: the owner's network is read in any packing; else the file is named.

A "no" is given only when what was read is what the network computes.
"""

import argparse
import datetime
import io
import itertools
import json
import math
import os
import pickle
import shutil
import struct
import warnings
import zipfile
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from constructed import marked, small_alexnet
from safetensors.torch import save_file
from torch import nn
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.optim.swa_utils import AveragedModel

import nnpassport
from nnpassport import verify
from nnpassport.data.images import ImageSet, Normalisation
from nnpassport.embedding.checkpoint import load_suspect, save_model
from nnpassport.embedding.schemes.passport import V1, V2
from nnpassport.files.config import ModelConfig, read_config
from nnpassport.files.gguf_blocks import FORMS
from nnpassport.files.pickles.torchfile import read_all_torch
from nnpassport.files.quantised import dequantise, restored
from nnpassport.files.suspect import Suspect
from nnpassport.files.weights import read_arrays, read_suspect
from nnpassport.scheme import FoldedNormsError, OwnershipError, UnreadableModelError
from nnpassport.verification.verdicts import Alignment, Options

EXAMPLE = torch.zeros(2, 1, 32, 32)


@pytest.fixture(scope="module")
def owner():
    """A released network, and its key."""
    rng = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (64, 1, 32, 32), generator=rng).to(torch.uint8)
    data = ImageSet(pixels, torch.arange(64) % 10, tuple("0123456789"), "noise")
    model = small_alexnet()
    key = V2.draw_key(model, EXAMPLE, seed=bytes(32))
    return marked(V2, model, key, data, Normalisation((0.5,), (0.5,))), key


def state_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def stranger():
    return small_alexnet(seed=5).state_dict()


# Integers and short floats


def by_row(values, weight):
    return values.view(-1, *[1] * (weight.dim() - 1))


def quantised(model, write):
    """The state dict with `write(name, weight)` in place of each layer's weight but the first's."""
    out = {}
    for name, tensor in state_of(model).items():
        whole = tensor.dim() < 2 or "features.0" in name
        out |= {name: tensor} if whole else write(name, tensor)
    return {name: tensor.contiguous() for name, tensor in out.items()}


def symmetric(weight):
    scale = weight.abs().flatten(1).amax(1) / 127
    return (weight / by_row(scale, weight)).round().to(torch.int8), scale


def affine(weight, low):
    """Integers from `low` on, each row's scale, and its zero point."""
    least, most = weight.flatten(1).amin(1).clamp(max=0), weight.flatten(1).amax(1).clamp(min=0)
    scale = (most - least) / 255
    zero = (low - least / scale).round()
    q = (weight / by_row(scale, weight) + by_row(zero, weight)).round()
    kind = torch.uint8 if low == 0 else torch.int8
    return q.clamp(low, low + 255).to(kind), scale, zero.to(kind)


def compressed_tensors(name, weight):
    q, scale, zero = affine(weight, -128)
    return {name: q, f"{name}_scale": scale[:, None], f"{name}_zero_point": zero[:, None]}


def plain_uint8(name, weight):
    q, scale, zero = affine(weight, 0)
    return {name: q, f"{name}_scale": scale, f"{name}_zero_point": zero}


def nncf(name, weight):
    q, scale, zero = affine(weight, 0)
    hook = f"__nncf_hooks.post_hooks.{name.replace('.', ':')}__0.0"
    beside = {"_scale": by_row(scale, weight).half(), "_zero_point": by_row(zero, weight)}
    return {name: q, **{f"{hook}.{what}": tensor for what, tensor in beside.items()}}


def bitsandbytes(name, weight):
    q, scale = symmetric(weight)
    return {name: q, name.replace("weight", "SCB"): scale * 127}


def quanto(name, weight):
    q, scale = symmetric(weight)
    return {f"{name}._data": q, f"{name}._scale": by_row(scale, weight)}


def per_tensor_float8(name, weight):
    scale = weight.abs().max() / 448
    return {name: (weight / scale).to(torch.float8_e4m3fn), f"{name}_scale": scale.reshape(1)}


def float8_in_blocks(name, weight):
    """Of square blocks, and the scale is called an inverse."""
    flat = weight.flatten(1)
    rows, columns = (math.ceil(side / 16) for side in flat.shape)
    padded = torch.zeros(rows * 16, columns * 16)
    padded[: len(flat), : flat.shape[1]] = flat
    scale = padded.view(rows, 16, columns, 16).abs().amax((1, 3)).clamp_min(1e-6) / 448
    wide = scale.repeat_interleave(16, 0).repeat_interleave(16, 1)
    q = (padded / wide)[: len(flat), : flat.shape[1]].reshape(weight.shape)
    return {name: q.to(torch.float8_e4m3fn), f"{name}_scale_inv": scale}


def float8_alone(name, weight):
    return {name: weight.to(torch.float8_e4m3fn)}


LAYOUTS = [
    compressed_tensors,
    plain_uint8,
    nncf,
    bitsandbytes,
    quanto,
    per_tensor_float8,
    float8_in_blocks,
    float8_alone,
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda each: each.__name__)
def test_integers_are_brought_back_to_weights(owner, layout, tmp_path):
    model, key = owner
    state = quantised(model, layout)
    for path in (tmp_path / "q.safetensors", tmp_path / "q.pt"):
        (save_file if path.suffix == ".safetensors" else torch.save)(state, path)
        found = verify(path, key)
        assert (found.accepted, found.matches) == (True, found.bits)
        read = read_suspect(path).arrays
        for name, weight in state_of(model).items():
            if weight.dim() > 1:
                error = np.abs(read[name].astype(np.float32) - weight.numpy()).max()
                assert error <= 0.07 * weight.abs().max(), name  # of a float of 8 bits: 1/16


def test_integers_that_nothing_explains_are_not_judged(owner, tmp_path):
    model, key = owner
    path = tmp_path / "bare.safetensors"
    save_file(quantised(model, lambda name, weight: {name: affine(weight, 0)[0]}), path)
    with pytest.raises(OwnershipError, match=r"holds uint8 numbers, and nothing beside it says"):
        verify(path, key)
    wrong = quantised(model, plain_uint8)
    wrong = {n: t[:3] if n.endswith("_scale") and len(t) > 3 else t for n, t in wrong.items()}
    save_file(wrong, path)
    with pytest.raises(OwnershipError, match=r"scales of shape \(3,\)"):
        verify(path, key)


def test_a_stranger_s_integers_are_a_no(owner, tmp_path):
    _, key = owner
    save_file(quantised(small_alexnet(seed=5), plain_uint8), tmp_path / "q.safetensors")
    assert not verify(tmp_path / "q.safetensors", key).accepted


def test_four_bits_are_unpacked():
    """Written by hand, as the four tools' own documentation has it."""
    rng = np.random.default_rng(0)
    q = rng.integers(0, 16, (32, 64))  # out, in
    groups, zeros = 2, rng.integers(1, 16, (2, 32))
    scales = rng.uniform(0.5, 1, (groups, 32)).astype(np.float32)
    expected = (q - np.repeat(zeros, 32, 0).T) * np.repeat(scales, 32, 0).T

    def words(numbers, axis, order=range(8)):
        moved = np.moveaxis(numbers, axis, -1)
        moved = moved.reshape(*moved.shape[:-1], -1, 8)
        total = sum(moved[..., column].astype(np.uint32) << 4 * n for n, column in enumerate(order))
        return np.moveaxis(total, -1, axis).view(np.int32)

    gptq = {
        "a.qweight": words(q.T, 0),
        "a.qzeros": words(zeros - 1, 1),
        "a.scales": scales,
        "a.g_idx": np.repeat(np.arange(groups), 32).astype(np.int32),
    }
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    awq = {
        "a.qweight": words(q.T, 1, order),
        "a.qzeros": words(zeros, 1, order),
        "a.scales": scales,
    }
    packed = {
        "a.weight_packed": words(q, 1),
        "a.weight_scale": scales.T.copy(),
        "a.weight_shape": np.array([32, 64]),
    }
    table = rng.normal(size=16).astype(np.float32)
    flat = q.reshape(-1)
    largest = rng.uniform(1, 2, 32).astype(np.float32)
    said = json.dumps({"shape": [32, 64], "blocksize": 64}).encode()
    nf4 = {
        "a.weight": (flat[::2] << 4 | flat[1::2]).astype(np.uint8)[:, None],
        "a.weight.absmax": largest,
        "a.weight.quant_map": table,
        "a.weight.quant_state.bitsandbytes__nf4": np.frombuffer(said, np.uint8),
    }
    for written, weight in (
        (gptq, expected),
        (awq, expected),
        (packed, (q - 8) * np.repeat(scales.T, 32, 1)),
        (nf4, (table[flat] * np.repeat(largest, 64)).reshape(32, 64)),
    ):
        found = restored(written)
        assert not found.unknown
        np.testing.assert_allclose(found.arrays["a.weight"], weight, rtol=1e-6)


def test_scales_that_are_no_numbers_are_refused():
    with pytest.raises(ValueError, match="not finite"):
        dequantise(np.ones((2, 2), np.int8), np.float32(math.inf))


def quantised_by_torch(model):
    import torch.ao.quantization as q

    class Wrapped(nn.Module):
        def __init__(self, features):
            super().__init__()
            self.quant, self.features, self.dequant = q.QuantStub(), features, q.DeQuantStub()

        def forward(self, x):
            return self.dequant(self.features(self.quant(x)))

    wrapped = Wrapped(deepcopy(model).features).eval()
    wrapped.qconfig = q.get_default_qconfig("fbgemm")
    ready = q.prepare(wrapped)
    ready(torch.rand(8, 1, 32, 32))
    return ready, q.convert(ready)


@pytest.mark.skipif("fbgemm" not in torch.backends.quantized.supported_engines, reason="no fbgemm")
def test_tensors_that_pytorch_quantised_are_read(owner, tmp_path):
    model, key = owner
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for number, each in enumerate(quantised_by_torch(model)):
            torch.save(each.state_dict(), tmp_path / f"{number}.pt")
    for number in (0, 1):
        found = verify(tmp_path / f"{number}.pt", key)
        assert (found.accepted, found.matches) == (True, found.bits)


# Containers


def averaged(model):
    made = AveragedModel(model)
    made.update_parameters(model)
    return made.state_dict()


def in_part_parallel(model):
    made = deepcopy(model)
    made.features = nn.DataParallel(made.features)
    rate = torch.optim.SGD(made.parameters(), 0.1).state_dict()
    return {"epoch": 90, "arch": "alexnet", "state_dict": made.state_dict(), "optimizer": rate}


def changed(how):
    def make(model):
        made = deepcopy(model)
        for layer in made.modules():
            if isinstance(layer, nn.Conv2d):
                how(layer)
        return made.state_dict()

    return make


def odd_things_beside(model):
    return {
        **state_of(model),
        "buffer": torch.zeros(3, dtype=torch.complex64),
        "mask": torch.full((4, 4), -math.inf),
        "positions": torch.arange(5).expand(3, 5),
        "total_ops": torch.zeros(1),
        "note": "a text",
    }


CONTAINERS = {
    "teacher": lambda m: {"model": stranger(), "teacher": state_of(m), "epoch": 3},
    "an average beside": lambda m: {"state_dict": stranger(), "state_dict_ema": state_of(m)},
    "averaged": averaged,
    "averaged, in a container": lambda m: {"model_ema": averaged(m), "epoch": 1},
    "in part parallel": in_part_parallel,
    "weight norm, as it was": changed(weight_norm),
    "weight norm": changed(parametrizations.weight_norm),
    "spectral norm, as it was": changed(spectral_norm),
    "spectral norm": changed(parametrizations.spectral_norm),
    "pruned by a mask": changed(lambda each: prune.l1_unstructured(each, "weight", amount=0.3)),
    "nested": lambda m: {"net_g": {"params_ema": state_of(m), "params": stranger()}},
    "in a list": lambda m: [state_of(m)],
    "in a tuple of a dictionary": lambda m: {"nets": (stranger(), state_of(m))},
    "a whole module": deepcopy,
    "a whole module in a container": lambda m: {"model": deepcopy(m), "epoch": 3},
    "arguments and dates beside": lambda m: {
        "args": argparse.Namespace(rate=0.1),
        "model": state_of(m),
        "date": datetime.datetime(2026, 1, 1),
        "path": Path("x"),
        "loss": np.float64(3.0),
    },
    "odd things beside": odd_things_beside,
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", CONTAINERS)
def test_every_network_of_a_container_is_read(owner, name, tmp_path):
    model, key = owner
    torch.save(CONTAINERS[name](model), tmp_path / "suspect.pt")
    found = verify(tmp_path / "suspect.pt", key)
    assert (found.accepted, found.matches) == (True, found.bits)


def test_13_the_verdict_says_which_of_a_file_s_networks_it_read(owner, tmp_path):
    model, key = owner
    torch.save(CONTAINERS["teacher"](model), tmp_path / "two.pt")
    assert "those under 'teacher'" in verify(tmp_path / "two.pt", key).reason


def in_order(model, *axes):
    """Kernels with their axes in this order, and matrices turned."""
    return {
        name: tensor.permute(axes).contiguous() if tensor.dim() == len(axes) else tensor.t().clone()
        for name, tensor in state_of(model).items()
        if tensor.dim() > 1
    }


@pytest.mark.parametrize("axes", [(2, 3, 1, 0), (0, 2, 3, 1)], ids=["TensorFlow", "MLX"])
def test_30_kernels_in_the_order_of_another_framework_are_read(owner, axes, tmp_path):
    model, key = owner
    for network, accepted in ((model, True), (small_alexnet(seed=5), False)):
        torch.save(in_order(network, *axes), tmp_path / "turned.pt")
        if accepted:
            assert verify(tmp_path / "turned.pt", key).accepted
        else:
            with pytest.raises(OwnershipError, match="none has the mark"):
                verify(tmp_path / "turned.pt", key)


def test_30_a_square_matrix_that_is_turned_is_read(tmp_path):
    """Under its own name and of its own shape: GPT-2's Conv1D is a Linear of others."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 4))
    key = V2.draw_key(model, torch.zeros(2, 128), seed=bytes(32), layers=["0"])
    weight = model[0].weight.data
    form, signs = V2.forms(key)["0"].flatten().float(), key.layer_signs("0").float()
    weight += (signs * 0.1 - weight @ form)[:, None] * form / form.square().sum()
    for state in (model.state_dict(), {"0.weight": weight.t().contiguous()}):
        torch.save(state, tmp_path / "own.pt")
        assert verify(tmp_path / "own.pt", key).matches == 128
    torch.save({"0.weight": torch.randn(128, 128)}, tmp_path / "other.pt")
    assert not verify(tmp_path / "other.pt", key).accepted


def test_a_container_of_strangers_is_none_of_ours(owner, tmp_path):
    """Under the key's own names that is a no; under others it could have been moved."""
    _, key = owner
    other, path = small_alexnet(seed=6), tmp_path / "suspect.pt"
    torch.save(CONTAINERS["teacher"](other), path)
    assert not verify(path, key).accepted
    for name in ("nested", "a whole module in a container"):
        torch.save(CONTAINERS[name](other), path)
        with pytest.raises(OwnershipError, match="none has the mark"):
            verify(path, key)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_an_archive_of_torchscript_is_read_and_none_of_its_code_run(owner, tmp_path):
    model, key = owner
    torch.jit.save(torch.jit.script(model), tmp_path / "script.pt")
    found = verify(tmp_path / "script.pt", key)
    assert (found.accepted, found.matches) == (True, found.bits)


@pytest.mark.filterwarnings("ignore")
def test_14_an_exported_program_is_read(owner, tmp_path):
    model, key = owner
    torch.export.save(torch.export.export(model, (EXAMPLE,)), tmp_path / "program.pt2")
    found = verify(tmp_path / "program.pt2", key)
    assert (found.accepted, found.matches) == (True, found.bits)
    read = read_suspect(tmp_path / "program.pt2").arrays
    for name, tensor in state_of(model).items():
        assert np.array_equal(read[name], tensor.numpy()), name


@pytest.mark.parametrize(
    "config",
    [
        b"[" * 100_000,
        b'{"config": []}',
        b'{"config": {"a": 1}}',
        b'{"config": {"a": {"path_name": "x", "tensor_meta": {}}}}',
        b'{"config": {"a": {"path_name": "w", "tensor_meta": {"dtype": 7, "sizes": [{"as_int": 9}],'
        b'"strides": [{"as_int": 1}], "storage_offset": {"as_int": 0}}}}}',
    ],
)
def test_14_an_exported_program_that_lies_is_refused(config, tmp_path):
    with zipfile.ZipFile(tmp_path / "x.pt2", "w") as archive:
        archive.writestr("x/data/weights/w", bytes(16))
        archive.writestr("x/data/weights/model_weights_config.json", config)
    with pytest.raises(UnreadableModelError):
        read_suspect(tmp_path / "x.pt2")


def test_one_s_own_network_is_a_state_dict_still(owner, tmp_path):
    """What a claim commits to is not what somebody chose among several."""
    torch.save({"model": deepcopy(owner[0])}, tmp_path / "own.pt")
    with pytest.raises(UnreadableModelError, match="a state dict maps names to tensors"):
        read_arrays(tmp_path / "own.pt")


# What a file is, whatever it is called


def test_a_file_is_what_its_content_is(owner, tmp_path):
    model, key = owner
    state = {name: tensor.contiguous() for name, tensor in state_of(model).items()}
    for name in ("a.ckpt", "a.bin", "a.pt", "a.weights", "a"):
        save_file(state, tmp_path / name)
        assert verify(tmp_path / name, key).accepted
    for name in ("a.safetensors", "a.pth.tar", "checkpoint"):
        torch.save(state, tmp_path / name)
        assert verify(tmp_path / name, key).accepted
    np.savez(tmp_path / "a.npz", **{name: tensor.numpy() for name, tensor in state.items()})
    found = verify(tmp_path / "a.npz", key)
    assert (found.accepted, found.matches) == (True, found.bits)
    np.savez_compressed(tmp_path / "b.npz", **{n: tensor.numpy() for n, tensor in state.items()})
    assert verify(tmp_path / "b.npz", key).accepted


def test_an_archive_that_was_packed_again_is_read_and_one_unpacked_is_named(owner, tmp_path):
    model, key = owner
    torch.save(state_of(model), tmp_path / "ok.pth")
    with zipfile.ZipFile(tmp_path / "ok.pth") as archive:
        archive.extractall(tmp_path / "unpacked")
    inside = tmp_path / "unpacked"
    with zipfile.ZipFile(tmp_path / "again.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        for part in sorted(each for each in inside.rglob("*") if each.is_file()):
            archive.write(part, part.relative_to(inside))
    assert verify(tmp_path / "again.pth", key).accepted
    with pytest.raises(UnreadableModelError, match=r"an archive of torch\.save that was unpacked"):
        verify(inside / "ok", key)


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0d71\nsize 19332096\n"
NO_WEIGHTS = {
    "onnxruntime's own format": b"\x18\0\0\0ORTM" + bytes(600),
    "Git LFS": LFS,
    "a web page": b"<!DOCTYPE html><html><title>Virus scan warning</title></html>",
    "is empty": b"",
    "JSON": b'{"architectures": ["AlexNet"]}',
    "gzip": b"\x1f\x8b\x08\x00" + bytes(60),
    "no sound GGUF": b"GGUF\2\0\0\0" + b"\xff" * 60,
    "HDF5": b"\x89HDF\r\n\x1a\n" + bytes(60),
}


@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ".onnx", ".npz"])
@pytest.mark.parametrize("what", NO_WEIGHTS)
def test_what_is_no_file_of_weights_is_named(owner, what, suffix, tmp_path):
    path = tmp_path / f"suspect{suffix}"
    path.write_bytes(NO_WEIGHTS[what])
    with pytest.raises(UnreadableModelError, match=what) as refused:
        verify(path, owner[1])
    assert "needed: " in str(refused.value)
    assert "weights_only" not in str(refused.value)


def test_half_a_file_and_a_pipe_are_refused(owner, tmp_path):
    torch.save(state_of(owner[0]), tmp_path / "ok.pth")
    data = (tmp_path / "ok.pth").read_bytes()
    (tmp_path / "cut.pth").write_bytes(data[: len(data) // 2])
    os.mkfifo(tmp_path / "pipe.pth")
    for name in ("cut.pth", "pipe.pth"):
        with pytest.raises(UnreadableModelError, match=r"needed|give the file"):
            verify(tmp_path / name, owner[1])


def test_pickled_objects_in_an_archive_of_numpy_s_are_left_alone(owner, tmp_path):
    class Evil:
        def __reduce__(self):
            return (shutil.rmtree, (str(tmp_path / "kept"),))

    (tmp_path / "kept").mkdir()
    np.savez(tmp_path / "evil.npz", a=np.array([Evil()], dtype=object))
    (tmp_path / "evil.pkl").write_bytes(pickle.dumps(Evil()))
    for name in ("evil.npz", "evil.pkl"):
        with pytest.raises(OwnershipError):
            verify(tmp_path / name, owner[1])
    assert (tmp_path / "kept").is_dir()


# Norms folded into the layers before them


def fused(model):
    """As `torch.nn.utils.fusion` leaves a network: biases in place of batch norms."""
    made = deepcopy(model).eval()
    for parent in list(made.modules()):
        children = list(parent.named_children())
        for (one, layer), (other, norm) in itertools.pairwise(children):
            if isinstance(layer, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                setattr(parent, one, fuse_conv_bn_eval(layer, norm))
                setattr(parent, other, nn.Identity())
    return made


@pytest.fixture(scope="module")
def grafted(tmp_path_factory):
    """A network whose norms' scales have the bits' signs, as grafting leaves it; key and folder."""
    torch.manual_seed(0)
    model = small_alexnet()
    key = V2.draw_key(model, EXAMPLE, seed=bytes(32))
    ready = nnpassport.mark(model, key, EXAMPLE)
    ready.graft(torch.randn(64, 1, 32, 32))
    released = ready.released().eval()
    folder = tmp_path_factory.mktemp("grafted")
    arguments = {"classes": 10, "norm": "batch", "width": 0.25, "channels": 1}
    names = tuple("0123456789")
    save_model(
        folder, released, ModelConfig("alexnet", arguments, names, (1, 32, 32), (0.5,), (0.5,))
    )
    return released, key, folder


@pytest.mark.parametrize("container", ["safetensors", "pt", "module"])
def test_09_folded_norms_are_no_ground_for_a_no(grafted, container, tmp_path):
    released, key, folder = grafted
    assert V2.verify(released.state_dict(), key).accepted
    made, path = fused(released), tmp_path / f"fused.{container}"
    x = torch.randn(4, 1, 32, 32)
    torch.testing.assert_close(made(x), released(x), atol=1e-3, rtol=1e-3)
    if container == "safetensors":
        save_file({name: each.contiguous() for name, each in made.state_dict().items()}, path)
    else:
        torch.save(made if container == "module" else made.state_dict(), path)
    with pytest.raises(FoldedNormsError, match=r"folded into features.*verify --align FOLDER"):
        verify(path, key)
    found = verify(path, key, options=Options(alignment=Alignment(folder)))
    assert (found.accepted, found.matches) == (True, found.bits)
    torch.testing.assert_close(
        load_suspect(path, read_config(folder)).model(x), released(x), atol=1e-3, rtol=1e-3
    )


def test_36_folded_norms_of_v1_are_no_ground_for_a_no_either(tmp_path):
    model = small_alexnet()
    key = V1.draw_key(model, EXAMPLE, seed=bytes(32))
    ready = nnpassport.mark(model, key, EXAMPLE)
    ready.graft(torch.randn(64, 1, 32, 32))
    torch.save(fused(ready.released()).state_dict(), tmp_path / "fused.pt")
    with pytest.raises(FoldedNormsError, match="folded into features"):
        verify(tmp_path / "fused.pt", key)


def test_a_folded_network_with_passports_of_channels_is_read_as_it_is(tmp_path):
    """γ is in the filters, and the bits are the signs of both together."""
    plain, inputs = small_alexnet(), torch.randn(64, 1, 32, 32)
    key = V2.draw_key(plain, EXAMPLE, seed=bytes(32), seen=inputs)
    ready = nnpassport.mark(plain, key, EXAMPLE)
    ready.graft(inputs)
    made = fused(ready.released())
    torch.save(made.state_dict(), tmp_path / "fused.pt")
    found = verify(tmp_path / "fused.pt", key)
    assert (found.accepted, found.matches) == (True, found.bits)
    assert "norms are folded into" in found.reason
    torch.save(fused(small_alexnet(seed=5)).state_dict(), tmp_path / "other.pt")
    with pytest.raises(FoldedNormsError):
        verify(tmp_path / "other.pt", key)


def test_biases_alone_are_no_folded_norms(owner, tmp_path):
    """A stranger's network with its norms in place, or a key's layers that never had one: no."""
    _, key = owner
    state = {**stranger(), **{f"{n}.bias": torch.ones(64) for n in ("features.8",)}}
    torch.save(state, tmp_path / "other.pt")
    assert not verify(tmp_path / "other.pt", key).accepted


# ONNX as quantisers write it


def test_06_a_bias_of_integers_is_a_bias(tmp_path):
    """As onnxruntime's quantiser writes it: int32, dequantised under the bias's own name."""
    onnx = pytest.importorskip("onnx")
    from onnx import helper, numpy_helper

    weight, bias = np.eye(4, 6, dtype=np.float32), np.arange(4, dtype=np.int32)
    stored = {
        "0.weight": weight,
        "0.bias_quantized": bias,
        "0.bias_quantized_scale": np.full(1, 0.5, np.float32),
        "0.bias_quantized_zero_point": np.zeros(1, np.int32),
    }
    tensors = [numpy_helper.from_array(each, name) for name, each in stored.items()]
    nodes = [
        helper.make_node("DequantizeLinear", [*stored][1:], ["0.bias"]),
        helper.make_node("Gemm", ["x", "0.weight", "0.bias"], ["y"], name="/0/Gemm", transB=1),
    ]
    x, y = (helper.make_tensor_value_info(name, 1, None) for name in "xy")
    onnx.save(
        helper.make_model(helper.make_graph(nodes, "g", [x], [y], tensors)), tmp_path / "q.onnx"
    )
    assert np.array_equal(read_suspect(tmp_path / "q.onnx").arrays["0.bias"], bias * 0.5)


@pytest.mark.parametrize("named", [True, False], ids=["onnxruntime's names", "other names"])
def test_06_scales_of_square_kernels_lie_along_the_axis_that_their_node_names(named, tmp_path):
    onnx = pytest.importorskip("onnx")
    from onnx import helper, numpy_helper

    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(128, 128, 3), nn.ReLU(), nn.Conv2d(128, 4, 3))
    key = V2.draw_key(model, torch.zeros(2, 128, 8, 8), seed=bytes(32), layers=["0"])
    weight = model[0].weight.data
    form, signs = V2.forms(key)["0"].flatten().float(), key.layer_signs("0").float()
    weight += ((signs - weight.flatten(1) @ form)[:, None] * form / form.square().sum()).view(
        weight.shape
    )
    scale = weight.abs().amax((1, 2, 3)) / 127
    q = (weight / scale.view(-1, 1, 1, 1)).round().to(torch.int8)
    base = "0.weight" if named else "onnx::w"
    stored = {
        f"{base}_quantized": q,
        f"{base}_scale": scale,
        f"{base}_zero_point": torch.zeros(128, dtype=torch.int8),
    }
    tensors = [numpy_helper.from_array(each.numpy(), name) for name, each in stored.items()]
    made = f"{base}_DequantizeLinear_Output"
    nodes = [
        helper.make_node("DequantizeLinear", [*stored], [made], axis=0),
        helper.make_node("Conv", ["x", made], ["y"], name="/0/Conv"),
    ]
    x, y = (helper.make_tensor_value_info(name, 1, None) for name in "xy")
    graph = helper.make_graph(nodes, "g", [x], [y], tensors)
    onnx.save(helper.make_model(graph), tmp_path / "q.onnx")
    found = verify(tmp_path / "q.onnx", key)
    assert (found.accepted, found.matches) == (True, 128)


# Shards, and folders of them


def shards_of(state, suffix):
    """Two halves by file name, and the index that has both."""
    names = sorted(state)
    parts = names[: len(names) // 2], names[len(names) // 2 :]
    files = [f"model-0000{n}-of-00002{suffix}" for n in (1, 2)]
    content = {
        file: {name: state[name].contiguous() for name in part}
        for file, part in zip(files, parts, strict=True)
    }
    return content, {name: file for file, part in content.items() for name in part}


def with_shards(folder, content, homes):
    folder.mkdir()
    suffix = ".safetensors" if next(iter(content)).endswith(".safetensors") else ".bin"
    for file, part in content.items():
        (save_file if suffix == ".safetensors" else torch.save)(part, folder / file)
    index = "model.safetensors" if suffix == ".safetensors" else "pytorch_model.bin"
    (folder / f"{index}.index.json").write_text(json.dumps({"weight_map": homes}))
    return folder


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_15_shards_are_read_by_the_index_as_loaders_do(owner, suffix, tmp_path):
    model, key = owner
    content, homes = shards_of(state_of(model), suffix)
    one, two = content
    other, bits = f"model-overlay{suffix}", key.context.layers[0].name + ".weight"
    home = homes[bits]
    worthless = torch.zeros_like(content[home][bits])
    cases = {
        "as it was": (content, homes, None),
        "an overlay": (
            {
                **content,
                home: {**content[home], bits: worthless},
                other: {bits: content[home][bits]},
            },
            {**homes, bits: other},
            f"has it in {other}",
        ),
        "one more": ({**content, two: {**content[two], "mtp": worthless}}, homes, "has it nowhere"),
        "one less": (content, {**homes, "lm_head.weight": one}, f"is not in {one}"),
    }
    for name, (files, index, said) in cases.items():
        folder = with_shards(tmp_path / name, files, index)
        found = verify(folder, key)
        assert (found.accepted, found.matches) == (True, found.bits), name
        assert said is None or said in found.reason
    (tmp_path / "as it was" / two).unlink()
    with pytest.raises(UnreadableModelError, match="No such file"):
        verify(tmp_path / "as it was", key)


def test_15_one_s_own_shards_agree_with_their_index(owner, tmp_path):
    content, homes = shards_of(state_of(owner[0]), ".bin")
    folder = with_shards(tmp_path / "own", content, homes)
    assert read_arrays(folder).arrays.keys() == state_of(owner[0]).keys()
    folder = with_shards(tmp_path / "more", content, {**homes, "x.weight": next(iter(content))})
    with pytest.raises(UnreadableModelError, match=r"'x.weight' is not in"):
        read_arrays(folder)
    evil = with_shards(tmp_path / "evil", content, {**homes, "x.weight": "../own/x.bin"})
    with pytest.raises(UnreadableModelError, match="is not the name of a"):
        verify(evil, owner[1])


def test_28_the_folder_of_a_training_by_deepspeed_is_read(owner, tmp_path):
    model, key = owner
    deep = tmp_path / "global_step10"
    deep.mkdir()
    said = {"module": state_of(model), "ds_config": {}, "global_steps": 10, "optimizer": None}
    torch.save(said, deep / "mp_rank_00_model_states.pt")
    torch.save({"optimizer_state_dict": {}}, deep / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    assert verify(deep, key).accepted


def in_pieces(folder, state, ranks=3, about=lambda metadata: metadata):
    """What torch.distributed.checkpoint writes of tensors whose rows are spread over ranks."""
    folder.mkdir()
    files = {f"__{rank}_0.distcp": b"" for rank in range(ranks)}
    tensors, places = {}, {}
    for name, tensor in state.items():
        chunks, at = [], 0
        for file, part in zip(files, tensor.split(-(-len(tensor) // ranks)), strict=False):
            offsets = torch.Size([at, *[0] * (tensor.ndim - 1)])
            chunks.append(ChunkStorageMetadata(offsets, part.shape))
            saved = io.BytesIO()
            torch.save(part.clone(), saved)
            index = MetadataIndex(name, offsets, index=len(chunks) - 1)
            places[index] = _StorageInfo(file, len(files[file]), len(saved.getvalue()))
            files[file] += saved.getvalue()
            at += len(part)
        properties = TensorProperties.create_from_tensor(tensor)
        tensors[name] = TensorStorageMetadata(properties, tensor.shape, chunks)
    metadata = about(Metadata(tensors, storage_data=places))
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    for file, content in files.items():
        (folder / file).write_bytes(content)
    return folder


@pytest.mark.filterwarnings("ignore")  # of torch's own about processes
def test_28_what_one_process_of_torch_distributed_wrote_is_read(owner, tmp_path):
    model, key = owner
    torch.distributed.checkpoint.save(
        {"model": state_of(model), "step": 7}, checkpoint_id=tmp_path / "dcp"
    )
    found = verify(tmp_path / "dcp", key)
    assert (found.accepted, found.matches) == (True, found.bits)
    assert read_arrays(tmp_path / "dcp").digests.keys() == {".metadata", "__0_0.distcp"}


def test_28_tensors_in_pieces_of_many_processes_are_put_together(owner, tmp_path):
    model, key = owner
    state = {name: each for name, each in state_of(model).items() if each.ndim}
    folder = in_pieces(tmp_path / "three", state)
    read = read_arrays(folder).arrays
    assert read.keys() == state.keys()
    assert all(np.array_equal(read[name], each.numpy()) for name, each in state.items())
    found = verify(folder, key)
    assert (found.accepted, found.matches) == (True, found.bits)


def test_28_hostile_folders_of_torch_distributed_are_refused(owner, tmp_path):
    state = {name: each for name, each in state_of(owner[0]).items() if each.ndim}

    def changed(change):
        def about(metadata):
            change(metadata)
            return metadata

        return about

    def of_first(**fields):
        def change(metadata):
            index = next(iter(metadata.storage_data))
            metadata.storage_data[index] = replace(metadata.storage_data[index], **fields)

        return changed(change)

    def larger(metadata):
        first = next(iter(metadata.state_dict_metadata))
        metadata.state_dict_metadata[first].size = torch.Size([2**40, 3, 11, 11])

    bad = {
        "leaves": (of_first(relative_path="../secret"), "is not the name of a file"),
        "absent": (of_first(relative_path="__9_0.distcp"), "No such file"),
        "beyond": (of_first(length=2**60), "overlap"),
        "negative": (of_first(offset=-1), "leaves"),
        "another": (lambda _: Inert(), "Inert"),
    }
    for name, (about, said) in bad.items():
        folder = in_pieces(tmp_path / name, state, about=about)
        with pytest.raises(UnreadableModelError, match=said):
            read_suspect(folder)
    folder = in_pieces(tmp_path / "larger", state, about=changed(larger))
    found = read_suspect(folder)
    assert [*found.left_out] == [next(iter(state))]
    (tmp_path / "nothing").mkdir()
    (tmp_path / "nothing" / ".metadata").write_bytes(b"x")
    with pytest.raises(UnreadableModelError, match=r"torch\.distributed.*dcp_to_torch"):
        verify(tmp_path / "nothing", owner[1])


class Inert:
    """An object of a class that no checkpoint has."""


def test_13_the_network_that_is_meant_can_be_named(owner, tmp_path):
    """As `--entry` does: what is beside it is no candidate, and nothing is paid for it."""
    model, key = owner
    teacher = {"ema": state_of(model), "step": 3}
    torch.save({"model": stranger(), "teacher": teacher}, tmp_path / "two.pt")
    found = verify(Suspect(tmp_path / "two.pt", "teacher.ema"), key)
    assert (found.accepted, found.matches) == (True, found.bits)
    assert found.log10_p_value < verify(tmp_path / "two.pt", key).log10_p_value
    assert not verify(Suspect(tmp_path / "two.pt", "model"), key).accepted
    told = r"nothing under 'student'; needed: one of 'model', 'model.classifier'.*'teacher.ema'"
    with pytest.raises(UnreadableModelError, match=told):
        verify(Suspect(tmp_path / "two.pt", "student"), key)
    flat = {f"net_g.{name}": each for name, each in state_of(model).items()}
    save_file({**flat, **{f"net_d.{n}": each for n, each in stranger().items()}}, tmp_path / "gan")
    assert verify(Suspect(tmp_path / "gan", "net_g"), key).accepted
    assert not verify(Suspect(tmp_path / "gan", "net_d"), key).accepted


def test_13_tensors_that_two_networks_share_are_in_both(owner, tmp_path):
    model, key = owner
    state = state_of(model)
    torch.save(
        {"model": state, "best": dict(state), "state_dict": stranger()}, tmp_path / "shared.pt"
    )
    for entry in ("model", "best"):
        assert verify(Suspect(tmp_path / "shared.pt", entry), key).accepted


# Arrays of NumPy in pickles


@pytest.mark.parametrize("protocol", [0, 2, 3, 4, 5])
def test_a_pickle_of_numpy_s_arrays_is_read(owner, tmp_path, protocol):
    """As Detectron2's and Flax's are: in a plain pickle, and in the archives of torch."""
    model, key = owner
    arrays = {name: each.numpy() for name, each in state_of(model).items()}
    model_s = {"model": arrays, "__author__": "somebody", "matching_heuristics": True}
    (tmp_path / "model.pkl").write_bytes(pickle.dumps(model_s, protocol))
    found = verify(tmp_path / "model.pkl", key)
    assert (found.accepted, found.matches) == (True, found.bits)
    if protocol >= 2:
        torch.save(model_s, tmp_path / "model.pth", pickle_protocol=protocol)
        found = verify(tmp_path / "model.pth", key)
        assert (found.accepted, found.matches) == (True, found.bits)


def test_numpy_s_arrays_are_read_in_any_kind_and_order(tmp_path):
    whole = np.arange(24.0).reshape(2, 3, 4)
    kinds = ("f2", "f4", "f8", ">f4", ">f8", "i1", "<i4", ">i8", "u2", "c8", ">c16", "?")
    arrays = {kind: whole.astype(kind) for kind in kinds}
    arrays |= {
        "columns first": np.asfortranarray(whole),
        "turned": whole.T,
        "part": whole[:, ::2, 1:3],
        "bfloat16": whole.astype(np.float32).astype(ml_dtypes.bfloat16),
        "a number": np.array(3.0),
        "empty": np.empty((0, 3)),
    }
    for protocol in (0, 2, 4, 5):
        read, _ = read_all_torch(pickle.dumps(arrays, protocol), tmp_path / "all.pkl")
        assert read.keys() == arrays.keys()
        for name, each in arrays.items():
            assert np.array_equal(read[name], each), (protocol, name)
            assert read[name].dtype == each.dtype.newbyteorder("="), (protocol, name)
    old = b"\x80\x02}U\x01w" + _of_python_2(arrays["f4"]) + b"s."
    assert np.array_equal(read_all_torch(old, tmp_path / "old.pkl")[0]["w"], arrays["f4"])


def _of_python_2(array):
    """The instructions that Python 2 writes of an array (protocol 2), its numbers as `str`."""
    raw = array.tobytes()
    shape = b"(" + b"".join(b"K" + bytes([side]) for side in array.shape) + b"t"
    least = b"J\xff\xff\xff\xff"  # -1
    kind = b"cnumpy\ndtype\nU\x02f4K\x00K\x01\x87R(K\x03U\x01<NNN" + least + least + b"K\x00tb"
    made = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
    return made + b"(K\x01" + shape + kind + b"\x89T" + struct.pack("<I", len(raw)) + raw + b"tb"


def test_an_array_that_poses_as_larger_than_its_bytes_is_left_out(tmp_path):
    sound = pickle.dumps({"w": np.ones((2, 3), np.float32), "x": np.ones(2)}, 4)
    (tmp_path / "posing.pkl").write_bytes(sound.replace(b"K\x02K\x03\x86", b"K\x02K\x7f\x86"))
    read = read_suspect(tmp_path / "posing.pkl")
    assert [*read.arrays] == ["x"]
    assert "does not hold all its numbers" in read.left_out["w"]


# GGUF


def gguf(tensors, kind):
    """A file by the published layout; `tensors` are matrices, all in this kind of blocks."""
    head, body = b"", b""

    def text(name):
        return struct.pack("<Q", len(name)) + name.encode()

    facts = text("llama.attention.head_count") + struct.pack("<II", 4, 8)
    facts += text("tokens") + struct.pack("<IIQ", 9, 8, 2) + text("a") + text("b")
    for name, (sides, stored, own) in tensors.items():
        head += text(name) + struct.pack(f"<I{len(sides)}Q", len(sides), *reversed(sides))
        head += struct.pack("<IQ", kind if own is None else own, len(body))
        body += stored + bytes(-len(stored) % 32)
    start = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), 2) + facts + head
    return start + bytes(-len(start) % 32) + body


def blocks(kind, weight):
    """The numbers (out in) in blocks of 32, and what these stand for."""
    rows = weight.reshape(-1, 32)
    low, high = rows.min(1, keepdims=True), rows.max(1, keepdims=True)
    most = np.abs(rows).max(1, keepdims=True)
    top = {2: 7, 3: 15, 6: 15, 7: 31, 8: 127}[kind]
    shifted = kind in (3, 7)
    d = ((high - low) / top if shifted else most / top).astype(np.float16)
    m = low.astype(np.float16)
    wide = d.astype(np.float32)
    q = np.round((rows - m) / wide) if shifted else np.round(rows / wide)
    stands = q * wide + m.astype(np.float32) if shifted else q * wide
    parts = [d.view(np.uint8)] + ([m.view(np.uint8)] if shifted else [])
    if kind == 8:
        return np.hstack([*parts, q.astype(np.int8).view(np.uint8)]).tobytes(), stands
    u = (q + {2: 8, 3: 0, 6: 16, 7: 0}[kind]).astype(np.uint8)
    if kind in (6, 7):
        parts.append(np.packbits(u >> 4, axis=1, bitorder="little"))
    return np.hstack([*parts, (u & 15)[:, :16] | (u & 15)[:, 16:] << 4]).tobytes(), stands


@pytest.fixture(scope="module")
def matrix():
    """A marked matrix of 128 by 96, and its key."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(96, 128), nn.ReLU(), nn.Linear(128, 4))
    key = V2.draw_key(model, torch.zeros(2, 96), seed=bytes(32), layers=["0"])
    weight = model[0].weight.data
    form, signs = V2.forms(key)["0"].flatten().float(), key.layer_signs("0").float()
    weight += (signs - weight @ form)[:, None] * form / form.square().sum()
    return weight.numpy(), key


@pytest.mark.parametrize("kind", [0, 1, 30, 2, 3, 6, 7, 8])
def test_23_a_network_of_llama_cpp_is_read(matrix, kind, tmp_path):
    weight, key = matrix
    if kind in (2, 3, 6, 7, 8):
        stored, stands = blocks(kind, weight)
    else:
        made = {0: torch.float32, 1: torch.float16, 30: torch.bfloat16}[kind]
        short = torch.from_numpy(weight).to(made)
        stored, stands = bytes(short.view(torch.uint8).numpy()), short.float().numpy()
    tensors = {"blk.0.ffn_gate.weight": (weight.shape, stored, None), "odd": ((32,), bytes(64), 99)}
    path = tmp_path / "net.gguf"
    path.write_bytes(gguf(tensors, kind))
    read = read_suspect(path)
    assert "kind 99" in read.left_out["odd"]
    found = read.arrays["blk.0.ffn_gate.weight"].astype(np.float32)
    np.testing.assert_allclose(found, stands.reshape(weight.shape), rtol=1e-6)
    assert verify(path, key).accepted


def number_by_number(kind, block):
    """The 256 numbers of one block, each by itself, as the published structures lay them out."""

    def half(at):
        return float(np.frombuffer(bytes(block[at : at + 2]), "<f2")[0])

    def six(packed, j):
        if j < 4:
            return packed[j] & 63, packed[j + 4] & 63
        low = packed[j + 4]
        return low & 15 | packed[j - 4] >> 6 << 4, low >> 4 | packed[j] >> 6 << 4

    block, out = [int(byte) for byte in block], []
    for i in range(256):
        far, near = i // 128, i % 128
        if kind == "Q2_K":
            q = block[16 + 32 * far + near % 32] >> 2 * (near // 32) & 3
            s = block[i // 16]
            out.append(half(80) * (s & 15) * q - half(82) * (s >> 4))
        elif kind == "Q3_K":
            q = block[32 + 32 * far + near % 32] >> 2 * (near // 32) & 3
            q -= 0 if block[i % 32] >> i // 32 & 1 else 4
            j = i // 16
            low = block[96 + j % 8] >> 4 * (j // 8) & 15
            s = (low | (block[104 + j % 4] >> 2 * (j // 4) & 3) << 4) - 32
            out.append(half(108) * s * q)
        elif kind in ("Q4_K", "Q5_K"):
            begin = 16 if kind == "Q4_K" else 48
            q = block[begin + 32 * (i // 64) + i % 32] >> 4 * (i // 32 % 2) & 15
            q += 16 * (block[16 + i % 32] >> i // 32 & 1) if kind == "Q5_K" else 0
            s, t = six(block[4:16], i // 32)
            out.append(half(0) * s * q - half(2) * t)
        else:
            q = block[64 * far + near % 64] >> 4 * (near // 64) & 15
            q |= (block[128 + 32 * far + near % 32] >> 2 * (near // 32) & 3) << 4
            s = (block[192 + i // 16] ^ 128) - 128
            out.append(half(208) * s * (q - 32))
    return out


@pytest.mark.parametrize("form", [each for each in FORMS.values() if each.numbers == 256])
def test_23_blocks_of_256_numbers_are_read_as_they_are_laid_out(form):
    rng = np.random.default_rng(form.size)
    blocks = rng.integers(0, 256, (3, form.size)).astype(np.uint8)
    halves = {84: (80, 82), 110: (108,), 144: (0, 2), 176: (0, 2), 210: (208,)}[form.size]
    for at in halves:
        numbers = rng.normal(size=(3, 1)).astype("<f2")
        blocks[:, at : at + 2] = numbers.view(np.uint8)
    found = form.read(blocks)
    assert found.shape == (3, 256)
    for read, block in zip(found, blocks, strict=True):
        np.testing.assert_allclose(read, number_by_number(form.name, block), rtol=1e-5, atol=1e-5)


def test_23_a_network_in_blocks_of_256_numbers_is_read(matrix, tmp_path):
    weight, key = matrix
    wide = np.hstack([weight, np.zeros((128, 160), np.float32)])
    rows = wide.reshape(-1, 16, 16)
    scale = np.abs(rows).max(2) / 31
    d = scale.max(1, keepdims=True).astype(np.float16) / np.float16(100)
    s = np.round(scale / d.astype(np.float32)).astype(np.int8)
    step = d.astype(np.float32) * s
    q = np.round(rows / np.where(step, step, 1)[..., None]).clip(-32, 31).reshape(-1, 256) + 32
    q = q.astype(np.uint8).reshape(-1, 2, 4, 32)
    low = q[:, :, :2] & 15 | (q[:, :, 2:] & 15) << 4
    high = sum(q[:, :, part] >> 4 << 2 * part for part in range(4))
    count = len(q)
    stored = np.hstack(
        [low.reshape(count, -1), high.reshape(count, -1), s.view(np.uint8), d.view(np.uint8)]
    )
    path = tmp_path / "net.gguf"
    path.write_bytes(gguf({"blk.0.ffn_gate.weight": (wide.shape, stored.tobytes(), None)}, 14))
    found = read_suspect(path).arrays["blk.0.ffn_gate.weight"]
    assert np.abs(found - wide).max() < 0.05 * np.abs(wide).max()
    narrow = found[:, :96]
    assert verify(_as_file(tmp_path, narrow), key).accepted


def _as_file(folder, weight):
    save_file({"0.weight": torch.from_numpy(weight.copy())}, folder / "narrow.safetensors")
    return folder / "narrow.safetensors"


def test_23_a_llama_s_queries_are_put_back_in_the_order_of_the_hub(matrix, tmp_path):
    weight, key = matrix
    paired = weight.reshape(8, 2, 8, 96).swapaxes(1, 2)  # of 8 heads of 16 rows
    tensors = {
        "blk.0.attn_q.weight": (weight.shape, paired.tobytes(), None),
        "blk.0.attn_v.weight": (weight.shape, np.zeros_like(weight).tobytes(), None),
    }
    path = tmp_path / "net.gguf"
    path.write_bytes(gguf(tensors, 0))
    assert np.array_equal(read_suspect(path).arrays["blk.0.attn_q.weight"], weight)
    assert verify(path, key).accepted


def test_23_no_size_in_a_header_is_believed(matrix, tmp_path):
    weight, _ = matrix
    whole = gguf({"a.weight": (weight.shape, weight.tobytes(), None)}, 0)
    rng, path, outcomes = np.random.default_rng(0), tmp_path / "net.gguf", {True: 0, False: 0}
    for _ in range(300):
        spoiled = bytearray(whole)
        for place in rng.integers(4, 400, 1):
            spoiled[place] = rng.integers(0, 256)
        path.write_bytes(
            spoiled[: rng.integers(100, len(whole) + 1)] if rng.random() < 0.3 else spoiled
        )
        try:
            read_suspect(path)
        except UnreadableModelError:
            outcomes[False] += 1
        else:
            outcomes[True] += 1
    assert min(outcomes.values()) > 10


# Adapters as other tools name them


@pytest.fixture(scope="module")
def adapter():
    """Pairs of two layers by layer, A and B, and the key whose bits are in their products."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    model = nn.ModuleDict({"blocks": body})
    model.forward = body.forward
    made = peft.get_peft_model(model, peft.LoraConfig(r=64, target_modules=["0", "2"]))
    key = nnpassport.LORA.draw_key(made, layers=["blocks.0", "blocks.2"], seed=bytes(32))
    pairs = {}
    for layer in ("blocks.0", "blocks.2"):
        rows = key.layer_projection(layer).float()
        delta = key.layer_signs(layer).float()[:, None] * rows
        pairs[layer] = torch.eye(64), delta.contiguous()
    return pairs, key


TOOLS = {
    "peft": ("base_model.model.{}", "lora_A", "lora_B", False),
    "diffusers": ("transformer.{}", "lora_A", "lora_B", False),
    "ComfyUI": ("diffusion_model.{}", "lora_A", "lora_B", False),
    "kohya": ("lora_unet_{}", "lora_down", "lora_up", True),
}


@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize("sign", [1, -1])
def test_26_an_adapter_is_read_under_the_names_of_other_tools(adapter, tool, sign, tmp_path):
    pairs, key = adapter
    form, down, up, alpha = TOOLS[tool]
    state = {}
    for layer, (a, b) in pairs.items():
        name = form.format(layer.replace(".", "_") if alpha else layer)
        state |= {f"{name}.{down}.weight": a.clone(), f"{name}.{up}.weight": sign * b}
        state |= {f"{name}.alpha": torch.tensor(sign * 8.0)} if alpha else {}
    save_file({name: each.contiguous() for name, each in state.items()}, tmp_path / "a.safetensors")
    found = verify(tmp_path / "a.safetensors", key)
    right = sign == 1 or alpha  # kohya's α has the sign
    assert (found.accepted, found.matches) == (right, 128 if right else 0)


def test_26_an_adapter_alone_is_told_from_a_network(adapter, owner, tmp_path):
    pairs, _ = adapter
    state = {f"base_model.model.{layer}.lora_A.weight": a for layer, (a, _) in pairs.items()}
    save_file({name: each.clone() for name, each in state.items()}, tmp_path / "a.safetensors")
    with pytest.raises(OwnershipError, match=r"this is an adapter .* and no network"):
        verify(tmp_path / "a.safetensors", owner[1])
