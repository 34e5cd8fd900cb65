"""Model folders: exact round trips, all-or-nothing writes, and files that mean harm."""

import errno
import io
import json
import os
import pickle
import shutil
import struct
import sys
import zipfile
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from nnpassport.embedding.checkpoint import (
    load_model,
    load_suspect,
    load_training,
    save_model,
    save_training,
)
from nnpassport.embedding.network import models
from nnpassport.embedding.network.tensors import read_weights, require_finite, tensors_digest
from nnpassport.files import weights
from nnpassport.files.config import ModelConfig, config_bytes, read_config
from nnpassport.files.disk import sha256_of, write_atomically
from nnpassport.scheme import (
    UnreadableModelError,
    UnsuitableModelError,
    UnwritableOutputError,
)

CONFIG = ModelConfig(
    architecture="alexnet",
    arguments={"classes": 3, "width": 0.25, "norm": "group"},
    classes=("cat", "dog", "größer als 1 m"),
    input_size=(3, 32, 32),
    mean=(0.5, 0.5, 0.5),
    std=(0.2, 0.2, 0.2),
    metrics={"accuracy": 0.75},
    notes={"origin": "drawn\nat random"},
)
FUZZ = settings(
    max_examples=200,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@pytest.fixture
def model():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return CONFIG.build()


@pytest.fixture
def folder(tmp_path, model):
    save_model(tmp_path / "saved", model, CONFIG)
    return tmp_path / "saved"


def snapshot(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def header_file(path, header, body=b""):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + body)
    return path


def entry(shape, begin, end, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


# What is saved is what is loaded


def test_a_folder_loads_as_the_model_that_was_saved(folder, model):
    loaded = load_model(folder)
    assert loaded.config == CONFIG
    assert not loaded.model.training
    assert tensors_digest(loaded.model.state_dict()) == tensors_digest(model.state_dict())
    assert loaded.digests == {
        name: sha256_of(folder / name) for name in ("model.safetensors", "config.json")
    }


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_float_widths_keep_their_values(tmp_path, model, dtype):
    save_model(tmp_path, model.to(dtype), CONFIG)
    saved = read_weights(tmp_path).tensors
    assert {t.dtype for t in saved.values()} == {dtype}
    for name, tensor in load_model(tmp_path).model.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name].float())


def test_tied_and_strided_tensors_are_saved_in_full(tmp_path):
    net = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    net[1].weight = net[0].weight
    net.register_buffer("turned", torch.arange(6.0).reshape(2, 3).T)
    net.register_buffer("scalar", torch.tensor(7))
    net.register_buffer("secret", torch.ones(2), persistent=False)
    save_model(tmp_path, net, CONFIG)
    saved = read_weights(tmp_path).tensors
    assert sorted(saved) == ["0.weight", "1.weight", "scalar", "turned"]
    assert all(torch.equal(saved[name], net.state_dict()[name]) for name in saved)


def test_equal_content_gives_equal_bytes(folder, tmp_path, model):
    reordered = replace(CONFIG, arguments=dict(reversed(CONFIG.arguments.items())))
    save_model(tmp_path / "again", model, reordered)
    assert snapshot(tmp_path / "again") == snapshot(folder)


def test_loading_leaves_the_callers_random_numbers_alone(folder):
    before = torch.get_rng_state()
    load_model(folder)
    assert torch.equal(torch.get_rng_state(), before)


def test_saving_again_replaces_both_files_and_nothing_else(folder, model):
    (folder / "README").write_text("mine")
    with torch.no_grad():
        next(model.parameters()).add_(1)
    save_model(folder, model, replace(CONFIG, notes={"origin": "second"}))
    loaded = load_model(folder)
    assert loaded.config.notes == {"origin": "second"}
    assert tensors_digest(loaded.model.state_dict()) == tensors_digest(model.state_dict())
    assert sorted(p.name for p in folder.iterdir()) == [
        "README",
        "config.json",
        "model.safetensors",
    ]


def test_the_digest_names_everything_it_depends_on():
    base = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor(3)}
    others = [
        {"a": torch.tensor([1.0, 2.0])},
        {"c": base["a"], "b": base["b"]},
        {"a": torch.tensor([2.0, 1.0]), "b": base["b"]},
        {"a": base["a"].view(1, 2), "b": base["b"]},
        {"a": base["a"].view(torch.int32), "b": base["b"]},
        {"a": base["a"].bfloat16(), "b": base["b"]},
        {"ab": base["a"], "": base["b"]},
        {},
    ]
    digests = {tensors_digest(tensors) for tensors in [base, *others]}
    assert len(digests) == 1 + len(others)
    strided = torch.tensor([[1.0, 9.0], [2.0, 9.0]])[:, 0]
    assert tensors_digest({"b": base["b"], "a": strided}) == tensors_digest(base)


def test_the_digest_is_the_documented_encoding():
    import hashlib

    def prefixed(part):
        return struct.pack("<Q", len(part)) + part

    expected = b"nnpassport tensors v1\0" + struct.pack("<Q", 1)
    for part in (b"w", b"torch.float32", struct.pack("<2Q", 1, 2), struct.pack("<2f", 1, -2)):
        expected += prefixed(part)
    digest = tensors_digest({"w": torch.tensor([[1.0, -2.0]])})
    assert digest == hashlib.sha256(expected).hexdigest()


# Whole or not at all


def failing(number, error=errno.ENOSPC):
    """A stand-in for an os function that fails at its `number`-th call and works otherwise."""

    def wrap(function):
        calls = iter(range(1, 1000))

        def call(*args, **kwargs):
            if next(calls) == number:
                raise OSError(error, os.strerror(error))
            return function(*args, **kwargs)

        return call

    return wrap


@pytest.mark.parametrize(
    ("function", "number", "error"),
    [
        ("fsync", 1, errno.ENOSPC),
        ("fsync", 2, errno.ENOSPC),
        ("fsync", 3, errno.EIO),
        ("replace", 1, errno.EROFS),
        ("replace", 2, errno.EACCES),
        ("replace", 3, errno.EIO),
        ("open", 1, errno.EACCES),
        ("open", 2, errno.ENOSPC),
        ("fdopen", 2, errno.EMFILE),
    ],
)
def test_a_failed_save_leaves_the_old_folder_bit_for_bit(
    folder, tmp_path, model, monkeypatch, function, number, error
):
    before = snapshot(folder)
    with torch.no_grad():
        next(model.parameters()).add_(1)
    for target in (folder, tmp_path / "new" / "deeper"):
        with monkeypatch.context() as patch:
            patch.setattr(os, function, failing(number, error)(getattr(os, function)))
            with pytest.raises(UnwritableOutputError, match=os.strerror(error)):
                save_model(target, model, replace(CONFIG, notes={}))
    assert snapshot(folder) == before
    assert not (tmp_path / "new").exists()


def test_a_disk_that_fills_up_while_writing_is_no_loss(folder, model, monkeypatch):
    before = snapshot(folder)

    class Full(io.FileIO):
        def write(self, data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def fdopen(descriptor, mode):
        return io.BufferedWriter(Full(descriptor, mode))

    monkeypatch.setattr(os, "fdopen", fdopen)
    with pytest.raises(UnwritableOutputError):
        save_model(folder, model, replace(CONFIG, notes={}))
    assert snapshot(folder) == before


def test_an_interrupted_save_leaves_the_old_folder(folder, model, monkeypatch):
    before = snapshot(folder)
    really = os.replace

    def interrupted(source, target):
        if Path(target).name == "model.safetensors":
            raise KeyboardInterrupt
        really(source, target)

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_model(folder, model, replace(CONFIG, notes={}))
    assert snapshot(folder) == before


def test_a_path_under_a_file_cannot_be_written(tmp_path, model):
    (tmp_path / "file").write_bytes(b"mine")
    for target in (tmp_path / "file", tmp_path / "file" / "folder"):
        with pytest.raises(UnwritableOutputError, match="untouched"):
            save_model(target, model, CONFIG)
    with pytest.raises(UnwritableOutputError):
        write_atomically(tmp_path / "file" / "x", b"")
    assert snapshot(tmp_path) == {Path("file"): b"mine"}


def test_a_folder_in_the_place_of_a_file_is_left_alone(folder, model):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").mkdir()
    before = snapshot(folder)
    with pytest.raises(UnwritableOutputError):
        save_model(folder, model, replace(CONFIG, notes={}))
    assert snapshot(folder) == before


def test_a_model_that_could_not_be_read_back_is_not_saved(tmp_path, model):
    with torch.no_grad():
        model.features[0].weight[0, 0, 0, 0] = torch.nan
    with pytest.raises(UnsuitableModelError, match=r"features\.0\.weight"):
        save_model(tmp_path / "out", model, CONFIG)
    assert not (tmp_path / "out").exists()


def test_an_atomic_write_takes_bytes_or_a_writer_and_makes_folders(tmp_path):
    path = tmp_path / "a" / "b" / "key"
    write_atomically(path, b"one", mode=0o600)
    assert path.read_bytes() == b"one"
    if os.name == "posix":
        assert path.stat().st_mode & 0o777 == 0o600
    write_atomically(path, lambda file: file.write(b"two"))
    assert path.read_bytes() == b"two"
    with pytest.raises(ZeroDivisionError):
        write_atomically(path, lambda file: file.write(b"x" * (1 // 0)))
    assert snapshot(tmp_path) == {Path("a/b/key"): b"two"}


def test_a_link_at_the_path_is_replaced_and_not_followed(tmp_path):
    (tmp_path / "elsewhere").write_bytes(b"theirs")
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    write_atomically(tmp_path / "link", b"mine")
    assert (tmp_path / "elsewhere").read_bytes() == b"theirs"
    assert (tmp_path / "link").read_bytes() == b"mine"
    assert not (tmp_path / "link").is_symlink()


# Pickles


class Harm:
    """Unpickled without care, it makes a file."""

    def __init__(self, canary):
        self.canary = str(canary)

    def __reduce__(self):
        return open, (self.canary, "w")


def harmful_zip(path, canary):
    """A genuine torch archive whose pickle has been exchanged for a harmful one."""
    torch.save({"w": torch.ones(2)}, path)
    with zipfile.ZipFile(path) as archive:
        parts = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in parts.items():
            exchanged = name.endswith("data.pkl")
            archive.writestr(name, pickle.dumps({"w": Harm(canary)}, 2) if exchanged else data)


def harmful_pickle(path, canary):
    path.write_bytes(pickle.dumps(Harm(canary)))


def harmful_save(path, canary):
    torch.save({"state_dict": {"w": torch.ones(2)}, "extra": Harm(canary)}, path)


def harmful_legacy(path, canary):
    torch.save({"w": Harm(canary)}, path, _use_new_zipfile_serialization=False)


@pytest.mark.parametrize("make", [harmful_zip, harmful_pickle, harmful_save, harmful_legacy])
def test_a_malicious_pickle_runs_nothing(tmp_path, make):
    path, canary = tmp_path / "model.pt", tmp_path / "canary"
    make(path, canary)
    for read in (read_weights, load_training, lambda p: load_suspect(p, CONFIG)):
        if make is harmful_save and read is read_weights:
            # Beside the tensors it is left alone, or a line of code would make a copy unreadable.
            assert torch.equal(read(path).tensors["w"], torch.ones(2))
            continue
        with pytest.raises(UnreadableModelError, match=r"safetensors|training state|does not fit"):
            read(path)
    assert not canary.exists()


def test_the_malicious_pickles_would_run_if_they_were_trusted(tmp_path):
    canary = tmp_path / "canary"
    harmful_zip(tmp_path / "model.pt", canary)
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    loaded["w"].close()
    assert canary.exists()


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".ckpt"])
@pytest.mark.parametrize("wrap", [None, "state_dict", "model"])
def test_checkpoints_are_read_alone_or_wrapped(tmp_path, suffix, wrap):
    state = OrderedDict(w=nn.Parameter(torch.ones(2)), n=torch.tensor(3))
    torch.save({wrap: state, "epoch": 3} if wrap else state, tmp_path / f"x{suffix}")
    weights = read_weights(tmp_path / f"x{suffix}")
    assert tensors_digest(weights.tensors) == tensors_digest(state)
    assert not any(t.requires_grad for t in weights.tensors.values())
    assert weights.digests == {f"x{suffix}": sha256_of(tmp_path / f"x{suffix}")}


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ([torch.ones(2)], "list"),
        (torch.ones(2), "Tensor"),
        ({}, "empty dict"),
        ({"w": 3}, "str → int"),
        ({3: torch.ones(2)}, "int → Tensor"),
        ({"state_dict": {"w": torch.ones(1)}, "model": {"w": torch.zeros(1)}}, "str → dict"),
    ],
)
def test_what_is_no_state_dict_is_refused_by_its_types(tmp_path, content, named):
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(UnreadableModelError, match=named):
        read_weights(tmp_path / "x.pt")


@pytest.mark.parametrize(
    "tensor",
    [
        torch.ones(1).expand(1000, 1000),
        torch.ones(3, device="meta"),
        torch.eye(3).to_sparse(),
        torch.ones(2, dtype=torch.complex64),
        torch.ones((1,) * 12),
    ],
    ids=["expanded", "meta", "sparse", "complex", "axes"],
)
def test_a_tensor_that_is_not_what_it_seems_is_refused(tmp_path, tensor):
    torch.save({"w": tensor}, tmp_path / "x.pt")
    with pytest.raises(UnreadableModelError, match="'w'"):
        read_weights(tmp_path / "x.pt")


def test_a_decompression_bomb_is_refused_before_it_is_opened(tmp_path, monkeypatch):
    path = tmp_path / "x.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({}, 2))
        archive.writestr("archive/data/0", bytes(10**7))
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("it was opened"))
    with pytest.raises(UnreadableModelError, match="bomb"):
        read_weights(path)


def test_truncated_checkpoints_are_unreadable(tmp_path):
    torch.save({"w": torch.ones(100)}, tmp_path / "whole.pt")
    data = (tmp_path / "whole.pt").read_bytes()
    for size in (1, 4, 30, len(data) // 2, len(data) - 1):
        (tmp_path / "x.pt").write_bytes(data[:size])
        with pytest.raises(UnreadableModelError):
            read_weights(tmp_path / "x.pt")


# safetensors


@pytest.mark.parametrize(
    ("header", "body"),
    [
        ({"a": entry([2], 0, 8), "b": entry([2], 4, 12)}, bytes(12)),
        ({"a": entry([2], 0, 8)}, bytes(4)),
        ({"a": entry([2], 0, 8)}, bytes(16)),
        ({"a": entry([3], 0, 8)}, bytes(8)),
        ({"a": entry([2], 8, 0)}, bytes(8)),
        ({"a": entry([2**62, 4], 0, 8)}, bytes(8)),
        ({"a": entry([-2], 0, 8)}, bytes(8)),
        ({"a": entry([2], 0, 8, "F31")}, bytes(8)),
        ({"a": entry([8], 0, 8, "F8_E4M3")}, bytes(8)),
        ({"a": entry([1], 0, 8, "C64")}, bytes(8)),
        ({"a": entry([1] * 1000, 0, 4)}, bytes(4)),
        ({"\x1b[31m": entry([1], 0, 4)}, bytes(4)),
        (b"[" * 100_000, b""),
        (b'{"a":' * 100_000, b""),
        (b"\xff\xfe", b""),
        (b"", b""),
    ],
)
def test_a_header_that_lies_is_refused(tmp_path, header, body):
    path = header_file(tmp_path / "x.safetensors", header, body)
    with pytest.raises(UnreadableModelError) as caught:
        read_weights(path)
    assert "\x1b" not in str(caught.value)


@pytest.mark.parametrize("declared", [10 * 10**9, 2**63, 2**64 - 1, 101_000_000])
def test_a_header_larger_than_the_file_is_refused_before_parsing(tmp_path, monkeypatch, declared):
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", declared) + b"{}")
    monkeypatch.setattr(safetensors.torch, "load", lambda _: pytest.fail("it was parsed"))
    with pytest.raises(UnreadableModelError, match=f"{declared} bytes in a file of 10"):
        read_weights(path)


def test_truncation_anywhere_is_noticed(folder):
    path = folder / "model.safetensors"
    data = path.read_bytes()
    for size in (1, 7, 8, 100, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:size])
        with pytest.raises(UnreadableModelError):
            load_model(folder)


def test_a_flipped_bit_changes_the_digest_or_is_refused(folder):
    path = folder / "model.safetensors"
    data, genuine = path.read_bytes(), read_weights(path)
    for position in range(0, len(data), len(data) // 97):
        path.write_bytes(data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :])
        try:
            read = read_weights(path)
        except UnreadableModelError:
            continue
        assert read.digests != genuine.digests
        assert tensors_digest(read.tensors) != tensors_digest(genuine.tensors)


@FUZZ
@given(st.data())
def test_mutated_safetensors_are_read_or_refused(tmp_path, data):
    tensors = {"a": torch.ones(2, 2), "b": torch.ones(3, dtype=torch.int64)}
    original = bytearray(safetensors.torch.save(tensors))
    count = data.draw(st.integers(1, 6))
    for _ in range(count):
        original[data.draw(st.integers(0, len(original) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / "x.safetensors"
    path.write_bytes(bytes(original))
    try:
        require_finite(read_weights(path).tensors)
    except UnreadableModelError as error:
        assert len(str(error)) < 2_000  # noqa: PT017


@FUZZ
@given(
    st.dictionaries(
        st.text(max_size=5),
        st.fixed_dictionaries(
            {
                "dtype": st.sampled_from(
                    ["F32", "F16", "BF16", "I64", "BOOL", "F4", "F8_E8M0", "?"]
                ),
                "shape": st.lists(st.integers(-1, 2**64), max_size=4) | st.just([2]),
                "data_offsets": st.lists(st.integers(0, 16), min_size=2, max_size=2),
            }
        ),
        max_size=3,
    ),
    st.binary(max_size=16),
)
def test_invented_safetensors_are_read_or_refused(tmp_path, header, body):
    path = header_file(tmp_path / "x.safetensors", header, body)
    try:
        read_weights(path)
    except UnreadableModelError as error:
        assert len(str(error)) < 2_000  # noqa: PT017


# NaN, Inf and other defects


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_one_number_that_is_not_finite_is_found_and_named(tmp_path, value, dtype):
    hidden = torch.zeros(100, dtype=dtype)
    hidden[57] = value
    safetensors.torch.save_file(
        {"fine": torch.ones(3), "hidden": hidden}, tmp_path / "x.safetensors"
    )
    with pytest.raises(UnreadableModelError, match="'hidden' holds NaN or Inf"):
        read_weights(tmp_path / "x.safetensors")
    with pytest.raises(UnreadableModelError, match="'hidden'"):
        require_finite({"hidden": hidden})


def test_integers_and_empty_tensors_are_finite():
    require_finite({"n": torch.arange(3), "none": torch.ones(0, 3), "b": torch.tensor(True)})


def test_a_number_too_large_for_the_architecture_is_refused(folder):
    state = {name: t.double() for name, t in read_weights(folder).tensors.items()}
    state["features.0.weight"][0, 0, 0, 0] = 1e300
    safetensors.torch.save_file(state, folder / "model.safetensors")
    (folder / "config.json").write_bytes(config_bytes(CONFIG))  # it would name other weights
    with pytest.raises(UnreadableModelError, match=r"features\.0\.weight"):
        load_model(folder)


def test_missing_files_folders_pipes_and_loops_are_named(tmp_path):
    (tmp_path / "empty.safetensors").touch()
    (tmp_path / "folder.safetensors").mkdir()
    (tmp_path / "loop.safetensors").symlink_to(tmp_path / "loop.safetensors")
    (tmp_path / "dangling.safetensors").symlink_to(tmp_path / "nowhere")
    (tmp_path / "text.txt").write_text("hello")
    cases = {
        "missing.safetensors": "cannot be read",
        "empty.safetensors": "is empty",
        "folder.safetensors": "holds 0 files",
        "loop.safetensors": "cannot be read",
        "dangling.safetensors": "cannot be read",
        "text.txt": "neither a folder nor a model file",
        "missing": "cannot be read",
    }
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe.safetensors")
        cases["pipe.safetensors"] = "not a regular file"
    for name, words in cases.items():
        with pytest.raises(UnreadableModelError, match=words):
            read_weights(tmp_path / name)
    with pytest.raises(UnreadableModelError, match="cannot be read"):
        sha256_of(tmp_path)


def test_a_link_to_a_regular_file_is_read_as_in_a_hub_cache(folder, tmp_path):
    snapshot = tmp_path / "models--a--b" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    shutil.copytree(folder, tmp_path / "models--a--b" / "blobs")
    for name in ("model.safetensors", "config.json"):
        (snapshot / name).symlink_to(f"../../blobs/{name}")
    assert load_model(snapshot).digests == load_model(folder).digests


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_link_out_of_a_folder_is_not_followed(folder, tmp_path, name):
    """Nor where the folder it leads to only has the name of a cache's."""
    for home in (tmp_path / "given", tmp_path / "snapshots" / "abc"):
        shutil.copytree(folder, home)
        (home / name).unlink()
        (home / name).symlink_to(folder / name)
        with pytest.raises(UnreadableModelError, match="link to somewhere outside"):
            load_suspect(home)
    (tmp_path / "blobs").symlink_to(folder)
    (home / name).unlink()
    (home / name).symlink_to(f"../../blobs/{name}")
    with pytest.raises(UnreadableModelError, match="link to somewhere outside"):
        load_model(home)


def test_size_limits_are_checked_before_reading(folder, monkeypatch):
    monkeypatch.setattr(weights, "MAX_MODEL_BYTES", 1000)
    with pytest.raises(UnreadableModelError, match="at most 1000"):
        read_weights(folder)
    torch.save({"w": torch.ones(1000)}, folder / "x.pt")
    monkeypatch.setattr(weights, "MAX_PICKLE_BYTES", 1000)
    with pytest.raises(UnreadableModelError, match="at most 1000"):
        read_weights(folder / "x.pt")


def test_a_folder_prefers_safetensors_and_refuses_to_guess(tmp_path):
    torch.save({"w": torch.ones(1)}, tmp_path / "a.pt")
    assert list(read_weights(tmp_path).digests) == ["a.pt"]
    torch.save({"w": torch.ones(1)}, tmp_path / "b.pt")
    with pytest.raises(UnreadableModelError, match="2 files of weights"):
        read_weights(tmp_path)
    torch.save({"w": torch.ones(1)}, tmp_path / "pytorch_model.bin")
    assert list(read_weights(tmp_path).digests) == ["pytorch_model.bin"]
    safetensors.torch.save_file({"w": torch.ones(1)}, tmp_path / "model.safetensors")
    assert list(read_weights(tmp_path).digests) == ["model.safetensors"]


# Suspects


def test_a_suspect_folder_says_its_own_architecture(folder):
    other = replace(CONFIG, architecture="resnet18", arguments={})
    assert load_suspect(folder, other).config == CONFIG
    assert set(load_suspect(folder).digests) == {"config.json", "model.safetensors"}


def test_a_bare_file_takes_the_architecture_of_the_reference(folder):
    path = folder / "model.safetensors"
    assert load_suspect(path, CONFIG).digests == {path.name: sha256_of(path)}
    with pytest.raises(UnreadableModelError, match="does not say which architecture"):
        load_suspect(path)


def test_a_suspect_of_an_unknown_architecture_is_tried_as_the_reference(folder, model):
    save_model(folder, model, replace(CONFIG, architecture="their.code:net"))
    assert load_suspect(folder, CONFIG).config == CONFIG
    assert set(load_suspect(folder, CONFIG).digests) == {"config.json", "model.safetensors"}


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."]
)
def test_prefixes_of_parallel_and_compiled_models_are_dropped(tmp_path, model, prefix):
    state = {prefix + name: tensor for name, tensor in model.state_dict().items()}
    torch.save(state, tmp_path / "x.pt")
    loaded = load_suspect(tmp_path / "x.pt", CONFIG)
    assert tensors_digest(loaded.model.state_dict()) == tensors_digest(model.state_dict())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s.pop("features.0.weight"), "1 missing: features.0.weight"),
        (
            lambda s: s.update({"features.0.bias": torch.ones(16)}),
            "1 unexpected: 'features.0.bias'",
        ),
        (
            lambda s: s.update({"features.0.weight": torch.ones(2, 2)}),
            r"1 of another shape: features.0.weight \(2, 2\) instead of \(16, 3, 5, 5\)",
        ),
        (
            lambda s: s.update({k: v.long() for k, v in s.items() if k == "features.1.bias"}),
            "integer instead of",
        ),
        (lambda s: s.clear() or s.update(w=torch.ones(1)), "missing: .*, …; needed"),
    ],
)
def test_weights_that_do_not_fit_are_listed(tmp_path, model, change, words):
    state = dict(model.state_dict())
    change(state)
    torch.save(state, tmp_path / "x.pt")
    with pytest.raises(UnreadableModelError, match=words):
        load_suspect(tmp_path / "x.pt", CONFIG)


def test_a_suspect_of_another_architecture_is_refused_shortly(folder):
    other = replace(CONFIG, architecture="resnet50", arguments={})
    with pytest.raises(UnreadableModelError, match="does not fit 'resnet50'") as caught:
        load_suspect(folder / "model.safetensors", other)
    assert len(str(caught.value)) < 2_000


@pytest.mark.parametrize(
    "arguments",
    [
        {"classes": 2**40},
        {"classes": -1},
        {"classes": "3"},
        {"classes": True},
        {"width": 1e9},
        {"width": 16, "classes": 100_000},
        {"norm": "__import__"},
        {"unheard_of": 1},
    ],
)
def test_a_config_cannot_ask_for_a_network_its_weights_do_not_fill(folder, arguments):
    config = json.loads((folder / "config.json").read_text())
    config["arguments"] = arguments
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnreadableModelError):
        load_suspect(folder)


def test_memory_is_taken_only_once_the_shapes_fit(folder, monkeypatch):
    devices, build = [], models.build

    def watched(architecture, **arguments):
        devices.append(torch.empty(0).device.type)
        return build(architecture, **arguments)

    monkeypatch.setattr(models, "build", watched)
    with pytest.raises(UnreadableModelError, match="does not fit"):
        load_suspect(folder / "model.safetensors", replace(CONFIG, arguments={"classes": 4}))
    assert devices == ["meta"]
    load_suspect(folder)
    assert devices == ["meta", "meta", "cpu"]


@pytest.fixture
def canary_module(tmp_path, monkeypatch):
    """A module on the path that leaves a file when it is imported."""
    (tmp_path / "library").mkdir()
    canary = tmp_path / "canary"
    (tmp_path / "library" / "canary_factory.py").write_text(
        "import pathlib\nfrom torch import nn\n"
        f"pathlib.Path({str(canary)!r}).touch()\n"
        "def tiny(size=2):\n    return nn.Linear(size, size)\n"
    )
    monkeypatch.syspath_prepend(tmp_path / "library")
    yield canary
    sys.modules.pop("canary_factory", None)


def test_a_config_can_not_make_anything_be_imported(tmp_path, canary_module):
    spec = "canary_factory:tiny"
    config = replace(CONFIG, architecture=spec, arguments={"size": 2})
    save_model(tmp_path / "suspect", nn.Linear(2, 2), config)
    read_config(tmp_path / "suspect")
    attempts = [
        lambda: load_model(tmp_path / "suspect"),
        lambda: load_model(tmp_path / "suspect", trusted_factory="my.own:factory"),
        lambda: load_suspect(tmp_path / "suspect"),
        lambda: load_suspect(tmp_path / "suspect", trusted_factory=spec),
        lambda: load_suspect(tmp_path / "suspect", CONFIG, trusted_factory=spec),
        lambda: load_suspect(tmp_path / "suspect", config),
    ]
    for attempt in attempts:
        with pytest.raises(UnreadableModelError):
            attempt()
    with pytest.raises(UnsuitableModelError, match="trusted_factory"):
        config.build()
    assert not canary_module.exists()
    assert "canary_factory" not in sys.modules


def test_a_factory_that_the_caller_vouches_for_is_built(tmp_path, canary_module):
    spec = "canary_factory:tiny"
    config = replace(CONFIG, architecture=spec, arguments={"size": 2})
    save_model(tmp_path / "own", nn.Linear(2, 2), config)
    assert load_model(tmp_path / "own", trusted_factory=spec).config == config
    weights = tmp_path / "own" / "model.safetensors"
    assert load_suspect(weights, config, trusted_factory=spec).model.in_features == 2
    assert canary_module.exists()


# Configs


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        "[" * 100_000,
        '{"a":' * 100_000,
        '{"architecture": NaN}',
        config_bytes(CONFIG).replace(b"{", b'{"architecture": "resnet18",', 1),
        '{"architecture": "alexnet"}',
        "1" * 100_000,
        b"\xff\xfe{}",
    ],
)
def test_what_is_no_config_is_refused(tmp_path, text):
    (tmp_path / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UnreadableModelError, match=r"config\.json") as caught:
        read_config(tmp_path)
    assert len(str(caught.value)) < 1_000


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("architecture", 3),
        ("architecture", ""),
        ("architecture", "x" * 10_000),
        ("architecture", "\x1b[2J"),
        ("architecture", "\ud800"),
        ("arguments", []),
        ("arguments", {"classes": [1]}),
        ("arguments", {"classes": {"a": {}}}),
        ("arguments", {"classes": 1e400}),
        ("arguments", {"classes": 10**400}),
        ("classes", []),
        ("classes", "abc"),
        ("classes", [1, 2]),
        ("input_size", [3, 32]),
        ("input_size", [3, 32, 0]),
        ("input_size", [3, 32, 32.0]),
        ("input_size", [3, 32, True]),
        ("input_size", [[], [], []]),
        ("mean", [0.5]),
        ("mean", [0.5, 0.5, "0.5"]),
        ("std", [0.2, 0.2, 0.0]),
        ("std", [0.2, 0.2, None]),
        ("metrics", {"accuracy": "high"}),
        ("metrics", {"accuracy": True}),
        ("notes", {"a": 1}),
        ("unheard_of", 1),
    ],
)
def test_a_field_of_the_wrong_kind_is_refused_by_name(folder, field, value):
    config = json.loads((folder / "config.json").read_text())
    config[field] = value
    (folder / "config.json").write_text(json.dumps(config).replace("Infinity", "1e400"))
    with pytest.raises(UnreadableModelError, match=field) as caught:
        read_config(folder)
    assert len(str(caught.value)) < 1_000
    assert "\x1b" not in str(caught.value)


def test_a_config_has_a_size_limit(folder, model):
    large = replace(CONFIG, notes={str(n): "x" * 4_000 for n in range(300)})
    with pytest.raises(UnsuitableModelError, match="shorten"):
        save_model(folder, model, large)
    with (folder / "config.json").open("ab") as file:
        file.write(b" " * 2**20)
    with pytest.raises(UnreadableModelError, match="at most 1048576"):
        read_config(folder)


@FUZZ
@given(st.data())
def test_mutated_configs_are_read_or_refused(tmp_path, data):
    text = bytearray(config_bytes(CONFIG))
    count = data.draw(st.integers(1, 6))
    for _ in range(count):
        text[data.draw(st.integers(0, len(text) - 1))] = data.draw(st.integers(0, 255))
    (tmp_path / "config.json").write_bytes(bytes(text))
    try:
        read_config(tmp_path)
    except UnreadableModelError as error:
        assert len(str(error)) < 2_000  # noqa: PT017


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=5,
)


@FUZZ
@given(st.sampled_from(sorted(ModelConfig.__dataclass_fields__)), JSON)
def test_a_config_with_any_value_anywhere_is_read_or_refused(tmp_path, field, value):
    config = json.loads(config_bytes(CONFIG))
    config[field] = value
    (tmp_path / "config.json").write_text(json.dumps(config))
    try:
        read_config(tmp_path)
    except UnreadableModelError as error:
        assert len(str(error)) < 2_000  # noqa: PT017


# Training states


def test_a_training_state_comes_back_as_it_was(tmp_path, model):
    optimizer = {"state": {}, "param_groups": [{"lr": 0.1, "params": [0, 1], "foreach": None}]}
    state = {"model": model.state_dict(), "optimizer": optimizer, "step": 3}
    save_training(tmp_path / "run" / "training.pt", state)
    loaded = load_training(tmp_path / "run" / "training.pt")
    assert loaded["step"] == 3
    assert loaded["optimizer"] == state["optimizer"]
    assert tensors_digest(loaded["model"]) == tensors_digest(state["model"])


def test_a_failed_training_save_keeps_the_last_one(tmp_path, monkeypatch):
    path = tmp_path / "training.pt"
    save_training(path, {"step": 1})
    before = snapshot(tmp_path)
    with pytest.raises(UnwritableOutputError, match="cannot be loaded again"):
        save_training(path, {"step": 2, "stray": Harm(tmp_path / "canary")})
    monkeypatch.setattr(os, "fsync", failing(1)(os.fsync))
    with pytest.raises(UnwritableOutputError, match="No space left"):
        save_training(path, {"step": 2})
    assert snapshot(tmp_path) == before


def test_a_corrupt_training_state_comes_with_advice(tmp_path):
    path = tmp_path / "training.pt"
    save_training(path, {"step": 1, "w": torch.ones(100)})
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(UnreadableModelError, match="start again"):
        load_training(path)
    torch.save([1], path)
    with pytest.raises(UnreadableModelError, match="list"):
        load_training(path)
    with pytest.raises(UnreadableModelError, match="start again"):
        load_training(tmp_path / "missing.pt")
