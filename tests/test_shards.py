"""Safetensors one tensor at a time: what is read, what is refused, and in how much memory."""

import json
import os
import re
import struct
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nnpassport.catalog import scheme_named
from nnpassport.embedding.network.equations import Geometry, read_bits
from nnpassport.embedding.network.tensors import ArraysOf, as_array, read_weights, tensors_digest
from nnpassport.embedding.schemes.signature import secret_of
from nnpassport.files import safetensors as shards
from nnpassport.files import weights
from nnpassport.files.arrays import arrays_digest
from nnpassport.files.disk import sha256_of
from nnpassport.files.safetensors import INDEX_FILE, open_shards
from nnpassport.files.weights import read_arrays, read_lazily
from nnpassport.keys.context import Context, LayerShape
from nnpassport.keys.counts import Reading
from nnpassport.keys.key import Key
from nnpassport.keys.keyfile import save_key
from nnpassport.keys.reading import read_passports
from nnpassport.scheme import UnreadableModelError, UnsuitableModelError
from nnpassport.verification import verdicts as verification
from nnpassport.verification.candidates import by_name, rivals

FUZZ = settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
LAYERS = 6
OUT, IN = 48, 32
EVERY_KIND = (
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
)


def key_of(*, layers=LAYERS, out=OUT, fan_in=IN, scheme="passport-v2", prefix="blocks", **more):
    shapes = tuple(
        LayerShape(f"{prefix}.{i}", (out, fan_in), (fan_in, 64), Geometry()) for i in range(layers)
    )
    return Key(bytes(range(32)), Context(scheme, "Alice", shapes, None, bytes(16)), **more)


def marked(key, *, dtype=torch.bfloat16, wrong=0):
    """A state dict in which every bit of the key is right, but for `wrong` of each layer."""
    rng = torch.Generator().manual_seed(0)
    state = {"embed.weight": torch.randn(7, 5, generator=rng).to(dtype), "steps": torch.tensor(3)}
    rows = torch.randn(*key.context.layers[0].weight, generator=rng) * 0.02
    for layer in key.context.layers:
        mean, signs = secret_of(key, layer)[:2]
        form = mean[0, 0].float()
        signs[:wrong] *= -1
        need = signs * (rows @ form).abs().clamp(min=0.05) - rows @ form
        state[f"{layer.name}.weight"] = (rows + need[:, None] * form / (form @ form)).to(dtype)
    return state


def save_sharded(folder, state, parts=3):
    """As the hub has it: shards that end in their number, and an index."""
    folder.mkdir(parents=True, exist_ok=True)
    names, homes = sorted(state), {}
    for part in range(parts):
        own = {name: state[name].contiguous() for name in names[part::parts]}
        file = f"model-{part + 1:05}-of-{parts:05}.safetensors"
        safetensors.torch.save_file(own, folder / file, metadata={"format": "pt"})
        homes |= dict.fromkeys(own, file)
    write_index(folder, homes)
    return folder


def write_index(folder, homes):
    document = {"metadata": {"total_size": 1}, "weight_map": homes}
    (folder / INDEX_FILE).write_text(json.dumps(document))


def homes_in(folder):
    return json.loads((folder / INDEX_FILE).read_text())["weight_map"]


def header_file(path, header, body=b""):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + body)
    return path


def entry(shape, begin, end, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def verdict_of(path, key, **options):
    return verification.verify(path, key, options=verification.Options(**options))


# What is read


@pytest.mark.parametrize("dtype", EVERY_KIND)
def test_every_kind_of_number_is_read_as_the_library_reads_it(tmp_path, dtype):
    numbers = torch.arange(24).reshape(2, 3, 4) % 2
    state = {"a": numbers.to(dtype), "none": torch.zeros(0, 3, dtype=dtype), "one": torch.ones(())}
    safetensors.torch.save_file(state, tmp_path / "x.safetensors")
    read = open_shards(tmp_path / "x.safetensors")
    assert arrays_digest(dict(read)) == tensors_digest(state)
    assert read.bytes == sum(each.nbytes for each in state.values())


def test_numbers_are_turned_round_where_the_machine_has_them_the_other_way(tmp_path, monkeypatch):
    safetensors.torch.save_file(
        {"a": torch.tensor([1, 256], dtype=torch.int32)}, tmp_path / "x.safetensors"
    )
    read = open_shards(tmp_path / "x.safetensors")
    monkeypatch.setattr(shards.sys, "byteorder", "big")
    assert read["a"].tolist() == [2**24, 2**16]


def test_what_is_known_without_reading_is_names_shapes_and_kinds(tmp_path, monkeypatch):
    state = marked(key_of())
    save_sharded(tmp_path, state)
    read = open_shards(tmp_path / INDEX_FILE)
    monkeypatch.setattr(shards, "_fill", lambda *_: pytest.fail("it was read"))
    assert {n: (t.shape, t.dtype) for n, t in read.described().items()} == {
        n: (tuple(t.shape), as_array(t).dtype) for n, t in state.items()
    }
    assert "embed.weight" in read
    assert "blocks.9.weight" not in read
    assert len(read) == len(state)
    assert set(read) == set(state)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_shards_one_file_and_a_state_dict_have_one_verdict(tmp_path, dtype):
    key = key_of()
    state = marked(key, dtype=dtype, wrong=3)
    save_sharded(tmp_path / "sharded", state)
    (tmp_path / "whole").mkdir()
    safetensors.torch.save_file(state, tmp_path / "whole" / "model.safetensors")
    v = Reading.by(read_passports, key)
    counts = v(ArraysOf(state))
    assert counts.matches == LAYERS * (OUT - 3)
    expected = v.verdict(by_name(counts, rivals(ArraysOf(state), key)))  # layers of one shape
    for path in ("sharded", f"sharded/{INDEX_FILE}", "whole", "whole/model.safetensors"):
        verdict = verdict_of(tmp_path / path, key)
        assert {**verdict.as_dict(), "digests": {}} == {**expected.as_dict(), "digests": {}}
        files = {name: tmp_path / path.split("/")[0] / name for name in verdict.digests}
        assert verdict.digests == {name: sha256_of(file) for name, file in files.items()}
    assert len(verdict_of(tmp_path / "sharded", key).digests) == 4


def test_read_as_a_whole_shards_are_the_same_tensors_under_the_same_digests(tmp_path, monkeypatch):
    state = marked(key_of())
    whole = read_weights(save_sharded(tmp_path / "sharded", state))
    assert tensors_digest(whole.tensors) == tensors_digest(state)
    assert whole.digests == open_shards(tmp_path / "sharded" / INDEX_FILE).digests()
    safetensors.torch.save_file(state, tmp_path / "x.safetensors")
    lazily = read_lazily(tmp_path / "x.safetensors")
    assert lazily.digests() == read_weights(tmp_path / "x.safetensors").digests
    monkeypatch.setattr(weights, "MAX_MODEL_BYTES", 1000)
    with pytest.raises(UnreadableModelError, match=r"at most 1000 are read; needed: .*`verify`"):
        read_weights(tmp_path / "sharded")


def test_a_single_file_goes_before_an_index_and_an_index_before_a_pickle(tmp_path):
    folder, state = tmp_path / "all", marked(key_of())
    save_sharded(folder, state)
    torch.save({"w": torch.ones(1)}, folder / "pytorch_model.bin")
    assert INDEX_FILE in read_weights(folder).digests
    assert INDEX_FILE in read_lazily(folder).digests()
    safetensors.torch.save_file({"w": torch.ones(1)}, folder / "model.safetensors")
    assert list(read_weights(folder)) == list(read_weights(folder / "model.safetensors"))
    assert list(read_lazily(folder)) == ["w"]


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_prefixes_of_wrappers_are_taken_off(tmp_path, prefix):
    key = key_of()
    state = {prefix + name: tensor for name, tensor in marked(key).items()}
    assert verdict_of(save_sharded(tmp_path, state), key).matches == LAYERS * OUT


@pytest.mark.parametrize("name", ["passport-v1", "uchida", "lora"])
def test_other_schemes_read_the_same_off_shards(tmp_path, name):
    key = key_of()
    if name == "passport-v1":
        key = key_of(scheme=name)
    else:
        shapes = key.context.layers[:1] if name == "uchida" else key.context.layers
        bits = IN if name == "uchida" else OUT
        shapes = tuple(s._replace(passport=(IN, 1), bits=bits) for s in shapes)
        key = Key(key.seed, Context(name, "Alice", shapes, None, bytes(16)))
    state = marked(key_of())
    if name == "lora":
        state |= {
            "blocks.0.lora_A.weight": torch.rand(4, IN),
            "blocks.0.lora_B.weight": torch.rand(OUT, 4),
        }
    save_sharded(tmp_path, state)
    expected = scheme_named(name).verify(state, key)
    assert verdict_of(tmp_path, key).matches == expected.matches


def test_large_layers_are_widened_in_parts_and_read_the_same(monkeypatch):
    key = key_of(layers=1, out=50, fan_in=30)
    (layer,) = key.context.layers
    weight = marked(key)["blocks.0.weight"]
    patch, signs = secret_of(key, layer)[:2]
    monkeypatch.setattr("nnpassport.embedding.network.equations._WIDENED", 70)
    assert read_bits(weight, patch).tolist() == signs.tolist()
    weight[7] = 0
    assert read_bits(weight, patch)[7] == 0


# What is refused


def test_nan_in_a_layer_that_is_read_is_found_and_elsewhere_stops_nothing(tmp_path):
    key = key_of()
    state = marked(key)
    state["embed.weight"][0, 0] = torch.nan
    assert verdict_of(save_sharded(tmp_path, state), key).matches == LAYERS * OUT
    state["blocks.4.weight"][3, 3] = -torch.inf
    save_sharded(tmp_path, state)
    found = verdict_of(tmp_path, key)  # another tensor of that shape is read in its place
    assert found.candidates["taken"]["blocks.4"] != "blocks.4.weight"
    assert (LAYERS - 1) * OUT <= found.matches < LAYERS * OUT
    for layer in key.context.layers:
        state[f"{layer.name}.weight"][0, 0] = torch.nan
    state["a"] = torch.zeros(1)
    save_sharded(tmp_path, state)
    with pytest.raises(UnreadableModelError, match=r"'blocks.\d.weight' holds NaN or Inf"):
        verdict_of(tmp_path, key)


def test_other_shapes_and_missing_layers_are_refused_before_anything_is_read(tmp_path, monkeypatch):
    key = key_of()
    state = marked(key)
    monkeypatch.setattr(shards, "finite_fault", lambda *_: pytest.fail("it was read"))
    wide = {**state, "blocks.5.weight": torch.zeros(4 * OUT, IN)}
    with pytest.raises(UnsuitableModelError, match=r"blocks.5.weight has shape \(192, 32\)"):
        verdict_of(save_sharded(tmp_path / "wide", wide), key)
    del state["blocks.2.weight"]
    with pytest.raises(UnsuitableModelError, match=r"no blocks.2.weight.*this one has: blocks.0"):
        verdict_of(save_sharded(tmp_path / "less", state), key)


def test_files_that_change_meanwhile_are_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    safetensors.torch.save_file({"a": torch.ones(4)}, path)
    data = path.read_bytes()

    def rewritten():
        times = os.stat(path)
        path.write_bytes(data[:-4] + struct.pack("<f", 2.0))
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))

    def replaced():
        (tmp_path / "new").write_bytes(data)
        (tmp_path / "new").rename(path)

    for change in (rewritten, replaced, lambda: path.write_bytes(data[:-1]), path.unlink):
        path.write_bytes(data)
        opened = open_shards(path)
        assert opened["a"].sum() == 4
        change()
        for use in (partial(opened.__getitem__, "a"), opened.digests):
            with pytest.raises(UnreadableModelError, match=r"changed while|cannot be read"):
                use()


def test_a_file_that_ends_early_while_it_is_read_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "x.safetensors"
    safetensors.torch.save_file({"a": torch.ones(4)}, path)
    opened = open_shards(path)
    monkeypatch.setattr(shards, "_check_same", lambda *_: None)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UnreadableModelError, match="changed while"):
        opened["a"]


def test_limits_are_on_files_together_and_on_one_tensor(tmp_path, monkeypatch):
    save_sharded(tmp_path, marked(key_of()))
    sizes = [path.stat().st_size for path in tmp_path.glob("*.safetensors")]
    open_shards(tmp_path / INDEX_FILE, limit=sum(sizes))
    with pytest.raises(UnreadableModelError, match=f"stands for {sum(sizes)} bytes, but at most"):
        open_shards(tmp_path / INDEX_FILE, limit=sum(sizes) - 1)
    monkeypatch.setattr(shards, "MAX_TENSOR_BYTES", 100)
    with pytest.raises(UnreadableModelError, match="at most 100 are read of one"):
        open_shards(tmp_path / INDEX_FILE)["blocks.0.weight"]


def test_a_file_that_is_large_only_by_its_length_is_refused_at_once(tmp_path):
    path = header_file(tmp_path / "model.safetensors", {"blocks.0.weight": entry([2], 0, 8)})
    os.truncate(path, 2**40 + 1)
    with pytest.raises(UnreadableModelError, match=f"at most {2**40}"):
        verdict_of(path, key_of())
    os.truncate(path, 2**39)
    with pytest.raises(UnreadableModelError, match="its tensors end at byte"):
        verdict_of(path, key_of())


BAD_HEADERS = {
    "overlap": ({"a": entry([2], 0, 8), "b": entry([2], 4, 12)}, 12),
    "same place": ({"a": entry([2], 0, 8), "b": entry([2], 0, 8)}, 8),
    "gap": ({"a": entry([1], 0, 4), "b": entry([1], 8, 12)}, 12),
    "late start": ({"a": entry([1], 4, 8)}, 8),
    "past the end": ({"a": entry([2], 0, 8)}, 4),
    "short of the end": ({"a": entry([2], 0, 8)}, 16),
    "shape": ({"a": entry([3], 0, 8)}, 8),
    "backwards": ({"a": entry([2], 8, 0)}, 8),
    "enormous": ({"a": entry([2**62, 4], 0, 8)}, 8),
    "enormous and empty": ({"a": entry([2**62, 4, 0], 0, 0)}, 0),
    "negative side": ({"a": entry([-2], 0, 8)}, 8),
    "negative offset": ({"a": entry([2], -8, 0)}, 8),
    "side that is a float": ({"a": entry([2.0], 0, 8)}, 8),
    "side that is a truth": ({"a": entry([True], 0, 4)}, 4),
    "offset that is a text": ({"a": entry([1], "0", 4)}, 4),
    "three offsets": ({"a": {**entry([1], 0, 4), "data_offsets": [0, 4, 4]}}, 4),
    "no offsets": ({"a": {"dtype": "F32", "shape": [1]}}, 4),
    "more fields": ({"a": {**entry([1], 0, 4), "file": "/etc/passwd"}}, 4),
    "kind that is a list": ({"a": entry([1], 0, 4, ["F32"])}, 4),
    "axes": ({"a": entry([1] * 65, 0, 4)}, 4),
    "backwards, of a kind unknown": ({"a": entry([1], 4, 0, "F8_E4M3")}, 4),
    "metadata": ({"__metadata__": {"n": 1}, "a": entry([1], 0, 4)}, 4),
    "twice": (b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{}}', 4),
    "list": (b"[]", 0),
    "deep": (b'{"a":' + b"[" * 100_000, 0),
    "infinite": (b'{"a":Infinity}', 0),
    "no text": (b'{"\xff":1}', 0),
    "leading space": (b" {}", 0),
    "long number": (b'{"a":' + b"9" * 10_000 + b"}", 0),
    "nothing": (b"", 0),
    "commas": (b'{"a":[' + b"1," * 2**21 + b"1]}", 0),
    "entries": (b'{"a":[' + b"{}," * 100_001 + b"]}", 0),
}


@pytest.mark.parametrize("fault", BAD_HEADERS)
def test_a_header_that_lies_is_refused(tmp_path, fault):
    header, size = BAD_HEADERS[fault]
    path = header_file(tmp_path / "x.safetensors", header, bytes(size))
    with pytest.raises(UnreadableModelError) as caught:
        open_shards(path)
    assert len(str(caught.value)) < 1_000
    assert "\x1b" not in str(caught.value)


UNFIT = {
    "kind": ({"x": entry([8], 4, 12, "F8_E8M0")}, "'x' is 'F8_E8M0'"),
    "axes": ({"x": entry([1] * 9, 4, 8)}, "'x' has 9 axes"),
    "name": ({"\x1b[31m": entry([1], 4, 8)}, "holds control characters"),
    "length": ({"n" * 5_000: entry([1], 4, 8)}, "is too long"),
    "half a letter": ({"\ud800": entry([1], 4, 8)}, "holds control characters"),
}


@pytest.mark.parametrize("kind", UNFIT)
def test_what_the_format_allows_and_no_layer_can_be_is_left_out(tmp_path, kind):
    others, why = UNFIT[kind]
    header = {"a": entry([1], 0, 4), **others}
    size = max(each["data_offsets"][1] for each in header.values())
    path = header_file(tmp_path / "x.safetensors", header, bytes(size))
    index = tmp_path / INDEX_FILE
    index.write_text(json.dumps({"weight_map": dict.fromkeys(header, "x.safetensors")}))
    for each in (path, index):
        found = open_shards(each)
        assert (list(found), list(found.left_out)) == (["a"], list(others))
        assert why in "".join(found.left_out.values())
        assert "\x1b" not in "".join(found.left_out.values())


@pytest.mark.parametrize("declared", [7, 2**25 + 1, 2**63, 2**64 - 1])
def test_a_header_larger_than_the_file_or_the_limit_is_not_read(tmp_path, declared):
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", declared) + b"{}")
    if declared == 2**25 + 1:
        os.truncate(path, 2**26)
    with pytest.raises(UnreadableModelError, match=f"declares a header of {declared} bytes"):
        open_shards(path)


@FUZZ
@given(
    st.dictionaries(
        st.text(max_size=3),
        st.fixed_dictionaries(
            {
                "dtype": st.sampled_from(["F32", "F16", "BF16", "I64", "BOOL", "F4", "?"]),
                "shape": st.lists(st.integers(-1, 3) | st.integers(2**61, 2**64), max_size=3)
                | st.sampled_from([[2], [1], [4]]),
                "data_offsets": st.sampled_from([[0, 4], [4, 8], [0, 8], [8, 16], [0, 2], [3, 3]])
                | st.lists(st.integers(0, 16), min_size=2, max_size=2),
            }
        ),
        max_size=3,
    ),
    st.sampled_from([0, 4, 8, 16]) | st.integers(0, 16),
)
def test_what_is_read_the_library_reads_the_same(tmp_path, header, size):
    path = header_file(tmp_path / "x.safetensors", header, bytes(size))
    try:
        found = open_shards(path)
        read = dict(found)
    except UnreadableModelError as error:
        assert len(str(error)) < 2_000  # noqa: PT017
        return
    try:
        whole = safetensors.safe_open(path, "pt")
    except safetensors.SafetensorError:
        assert found.left_out, "refused by the library for a tensor that we read"
        return
    assert set(whole.keys()) == read.keys() | found.left_out.keys()
    assert arrays_digest(read) == tensors_digest({name: whole.get_tensor(name) for name in read})


@FUZZ
@given(st.integers(0, 10**6), st.integers(0, 7), st.booleans())
def test_a_flipped_bit_of_shards_or_index_changes_a_digest_or_is_refused(
    tmp_path, at, bit, of_index
):
    save_sharded(tmp_path, {"a": torch.ones(2), "b": torch.zeros(3), "c": torch.ones(1).long()})
    genuine = open_shards(tmp_path / INDEX_FILE).digests()
    path = tmp_path / (INDEX_FILE if of_index else "model-00002-of-00003.safetensors")
    data = bytearray(path.read_bytes())
    data[at % len(data)] ^= 1 << bit
    path.write_bytes(bytes(data))
    try:
        read = open_shards(tmp_path / INDEX_FILE)
        assert arrays_digest(dict(read))
    except UnreadableModelError as error:
        assert len(str(error)) < 2_000  # noqa: PT017
        return
    assert read.digests() != genuine


OUTSIDE = ["../x.safetensors", "/etc/x.safetensors", "a/x.safetensors", "..\\x.safetensors"]
OUTSIDE += ["c:x.safetensors", ".safetensors/..", "x.bin", "", 3, None, ["x"], "\x1b.safetensors"]


@pytest.mark.parametrize("home", OUTSIDE)
def test_an_index_that_points_elsewhere_is_refused_and_nothing_is_opened(
    tmp_path, monkeypatch, home
):
    folder = save_sharded(tmp_path / "inner", {"a": torch.ones(1), "b": torch.ones(1)}, parts=1)
    safetensors.torch.save_file({"b": torch.ones(1)}, tmp_path / "x.safetensors")
    write_index(folder, {**homes_in(folder), "b": home})
    monkeypatch.setattr(shards, "_places", lambda *_: pytest.fail("a shard was opened"))
    with pytest.raises(UnreadableModelError, match=r"is not the name of a .safetensors file"):
        open_shards(folder / INDEX_FILE)


@pytest.mark.parametrize(
    "index",
    [
        b"",
        b"{}",
        b"[]",
        b'{"weight_map":{}}',
        b'{"weight_map":[]}',
        b'{"weight_map":{"a":"x.safetensors","a":"y.safetensors"}}',
        b'{"weight_map":' + b"[" * 100_000,
        b'{"weight_map":{"a":"x.safetensors"}',
        b'{"weight_map":{' + b",".join(b'"%d":"a"' % n for n in range(100_001)) + b"}}",
    ],
)
def test_an_index_that_is_none_is_refused(tmp_path, index):
    (tmp_path / INDEX_FILE).write_bytes(index)
    with pytest.raises(UnreadableModelError, match=r"index.json (does not fit|is empty)"):
        open_shards(tmp_path / INDEX_FILE)


def test_the_index_decides_and_what_shards_say_otherwise_is_left_out(tmp_path):
    state = {name: torch.ones(1) for name in "abcd"}
    folder = save_sharded(tmp_path, state, parts=2)
    homes = homes_in(folder)
    first, second = dict.fromkeys(homes.values())
    cases = {
        "'e' is not in": ({**homes, "e": first}, set("abcd")),
        "'a' is in .*has it nowhere": ({n: h for n, h in homes.items() if n != "a"}, set("bcd")),
        "'a' is in .*has it in": ({**homes, "a": second}, set("bcd")),
    }
    for words, (wrong, read) in cases.items():
        write_index(folder, wrong)
        found = open_shards(folder / INDEX_FILE)
        assert set(found) == read
        assert any(re.search(words, why) for why in found.left_out.values())
        with pytest.raises(UnreadableModelError, match=words):  # of one's own all is right
            read_arrays(folder)
    write_index(folder, {**homes, "e": "model-00003-of-00002.safetensors"})
    with pytest.raises(UnreadableModelError, match="cannot be read"):
        open_shards(folder / INDEX_FILE)
    twice = {"a": torch.zeros(1), "c": torch.ones(1), "d": torch.ones(1)}
    safetensors.torch.save_file(twice, folder / second)
    write_index(folder, homes)
    found = open_shards(folder / INDEX_FILE)
    assert found["a"] == 1
    assert any("has it in" in why for why in found.left_out.values())


def test_pipes_folders_and_loops_in_the_place_of_shards_are_named(tmp_path):
    folder = save_sharded(tmp_path, {"a": torch.ones(1)}, parts=1)
    shard = folder / "model-00001-of-00001.safetensors"
    makers = {
        "not a regular file": lambda: os.mkfifo(shard),
        "not a regular": shard.mkdir,
        "cannot be read": lambda: shard.symlink_to(shard),
        "is empty": shard.touch,
    }
    for words, make in makers.items():
        shard.rmdir() if shard.is_dir() else shard.unlink()
        make()
        with pytest.raises(UnreadableModelError, match=words):
            open_shards(folder / INDEX_FILE)


def test_links_to_regular_files_are_read_as_in_a_hub_cache(tmp_path):
    state = marked(key_of())
    folder = save_sharded(tmp_path / "blobs", state)
    snapshot = tmp_path / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    for path in folder.iterdir():
        (snapshot / path.name).symlink_to(path)
    linked = open_shards(snapshot / INDEX_FILE)
    assert linked.digests() == open_shards(folder / INDEX_FILE).digests()
    assert arrays_digest(dict(linked)) == tensors_digest(state)


def test_a_shard_that_is_a_link_out_of_the_folder_is_not_followed(tmp_path):
    folder = save_sharded(tmp_path / "folder", marked(key_of()))
    shard = sorted(folder.glob("*.safetensors"))[0]
    shard.rename(tmp_path / "elsewhere.safetensors")
    shard.symlink_to(tmp_path / "elsewhere.safetensors")
    with pytest.raises(UnreadableModelError, match="link to somewhere outside"):
        open_shards(folder / INDEX_FILE)


# In how much memory


PEAK = """
import sys, weakref
from pathlib import Path
import torch
def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("VmHWM"))) // 1024
"""
WIDEN = """
from nnpassport.embedding.network.equations import read_bits
layer = torch.ones(11008, 4096, dtype=torch.bfloat16)
patch = torch.ones(2, 1, 4096, dtype=torch.float64)
before = peak()
assert read_bits(layer, patch).sum() == 11008
print(peak() - before)
"""
VERIFY = """
from nnpassport import verification
from nnpassport.keys.keyfile import load_key
from nnpassport.files.safetensors import Shards
held, most = [], 0
def noted(self, name, inner=Shards.__getitem__):
    global most
    tensor = inner(self, name)
    held.append(weakref.ref(tensor))
    most = max(most, sum(each() is not None for each in held))
    return tensor
Shards.__getitem__ = noted
key = load_key(sys.argv[2])
before = peak()
verdict = verification.verify(Path(sys.argv[1]), key)
print(verdict.matches, verdict.bits, len(held), most, peak() - before)
"""


def told(program, *words):
    """The numbers that a program prints, in a process of its own."""
    command = [sys.executable, "-c", PEAK + program, *map(str, words)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return tuple(map(int, done.stdout.split()))


MEMORY_IS_TOLD = pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="memory is read from /proc"
)


@pytest.mark.slow
@MEMORY_IS_TOLD
def test_a_layer_of_a_large_transformer_is_never_widened_whole():
    """Its 90 MB would be 360 in float64."""
    assert told(WIDEN)[0] < 40  # MiB


@pytest.mark.slow
@MEMORY_IS_TOLD
def test_a_network_takes_the_memory_of_a_layer_and_only_the_keys_layers_are_read(tmp_path):
    """95 MB of layers of 6 MB, read by the ordinary function in a process of its own."""
    key = key_of(layers=15, out=1024, fan_in=3072)
    folder = save_sharded(tmp_path / "suspect", marked(key), parts=10)
    assert sum(path.stat().st_size for path in folder.iterdir()) > 90 * 10**6
    save_key(key, tmp_path / "a.key")
    matches, bits, read, most, grown = told(VERIFY, folder, tmp_path / "a.key")
    assert matches == bits == 15 * 1024
    assert (read, most) == (15, 1)
    assert grown < 60  # MiB
