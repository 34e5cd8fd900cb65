"""Data sets in the forms that people have them in, each read to the same pictures and classes."""

import io
import json
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from pyarrow import feather, ipc, parquet

from nnpassport.data.images import read_images, read_images_skipping
from nnpassport.data.stream import open_stream
from nnpassport.scheme import UnreadableDataError

SHADES = (10, 90, 200)
NAMES = ("ant", "bee", "cat")


def png(number):
    """A picture of 8 pixels a side, whose shade tells its class."""
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (SHADES[number % 3],) * 3).save(file, "PNG")
    return file.getvalue()


def struct(count=6):
    return [{"bytes": png(number), "path": f"{number}.png"} for number in range(count)]


def check(data, classes=("0", "1", "2"), count=6):
    assert data.classes == tuple(classes)
    assert data.labels.tolist() == [number % 3 for number in range(count)]
    assert data.images[:, 0, 0, 0].tolist() == [SHADES[number % 3] for number in range(count)]


def hub_features(column, names):
    """The metadata that `datasets` writes into its files."""
    features = {column: {"names": list(names), "_type": "ClassLabel"}}
    return {b"huggingface": json.dumps({"info": {"features": features}}).encode()}


# Tables


@pytest.mark.parametrize(
    "columns",
    [
        ("img", "label"),  # cifar10 on the hub
        ("img", "fine_label", "coarse_label"),  # cifar100
        ("image", "labels"),  # flowers
        ("jpg", "cls"),
        ("anything", "target"),  # the one column that holds pictures
    ],
)
def test_the_hubs_own_columns_are_found(tmp_path, columns):
    image, label, *others = columns
    labels = {label: [number % 3 for number in range(6)], **{name: [0] * 6 for name in others}}
    table = pa.table({image: struct(), **labels})
    path = tmp_path / "train.parquet"
    parquet.write_table(table.replace_schema_metadata(hub_features(label, NAMES)), path)
    check(read_images(path), NAMES)
    stream = open_stream(path)
    assert stream.classes == NAMES
    assert len(stream) == 6


def test_columns_that_cannot_be_told_are_asked_for(tmp_path):
    path = tmp_path / "two.parquet"
    given = {"left": struct(), "right": struct(), "kind": [number % 3 for number in range(6)]}
    parquet.write_table(pa.table(given), path)
    complaint = "no column of pictures by a usual name; its columns are: left, right, kind"
    with pytest.raises(UnreadableDataError, match=complaint) as caught:
        read_images(path)
    assert "--image-column" in str(caught.value)
    with pytest.raises(UnreadableDataError, match="no column of labels by a usual name"):
        read_images(path, image_column="left")
    check(read_images(path, image_column="right", label_column="kind"))


def test_a_column_that_was_named_is_never_replaced(tmp_path):
    path = tmp_path / "one.parquet"
    parquet.write_table(pa.table({"image": struct(), "label": [0, 1, 2] * 2}), path)
    with pytest.raises(UnreadableDataError, match="no column 'img'"):
        read_images(path, image_column="img")


def saved(folder, names=NAMES):
    """A folder as `Dataset.save_to_disk` writes it."""
    folder.mkdir(parents=True)
    table = pa.table({"image": struct(), "label": [0, 1, 2] * 2})
    with ipc.new_stream(str(folder / "data-00000-of-00001.arrow"), table.schema) as writer:
        writer.write_table(table, max_chunksize=4)
    features = {"label": {"names": list(names), "_type": "ClassLabel"}}
    (folder / "dataset_info.json").write_text(json.dumps({"features": features}))
    (folder / "state.json").write_text("{}")


def test_folders_that_datasets_saved_are_read(tmp_path):
    saved(tmp_path / "one")
    check(read_images(tmp_path / "one"), NAMES)
    check(read_images(tmp_path / "one" / "data-00000-of-00001.arrow"), NAMES)
    for split in ("train", "test"):
        saved(tmp_path / "both" / split)
    (tmp_path / "both" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    check(read_images(tmp_path / "both", split="train"), NAMES)
    with pytest.raises(UnreadableDataError, match="splits test, train and none was chosen"):
        read_images(tmp_path / "both")


def test_feather_files_are_read_and_damaged_ones_named(tmp_path):
    path = tmp_path / "pictures.feather"
    feather.write_feather(pa.table({"image": struct(), "label": [0, 1, 2] * 2}), str(path))
    check(read_images(path))
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(
        UnreadableDataError, match=r"pictures\.feather is not a readable Arrow file"
    ):
        read_images(path)


# Archives


def archive(path, samples, mode="w"):
    """A tar of the samples' files, (name, content)."""
    with tarfile.open(path, mode) as tar:
        for name, content in samples:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def shard(first, count, label=lambda number: ("cls", str(number % 3).encode())):
    for number in range(first, first + count):
        extension, content = label(number)
        yield f"./{number:05d}.png", png(number)
        yield f"./{number:05d}.{extension}", content


def named(number):
    return "cls", NAMES[number % 3].encode()


def in_json(number):
    return "json", json.dumps({"label": number % 3, "caption": "an animal"}).encode()


@pytest.mark.parametrize(
    ("label", "classes"),
    [
        (lambda number: ("cls", str(number % 3).encode()), ("0", "1", "2")),
        (named, NAMES),
        (in_json, ("0", "1", "2")),
    ],
)
def test_webdataset_archives_are_read(tmp_path, label, classes):
    archive(tmp_path / "train-000000.tar", shard(0, 3, label))
    archive(tmp_path / "train-000001.tar", shard(3, 3, label))
    check(read_images(tmp_path), classes)
    check(read_images(tmp_path / "train-*.tar"), classes)
    check(read_images(tmp_path / "train-{000000..000001}.tar"), classes)
    with pytest.raises(UnreadableDataError, match=r"1 are not there, such as .*000002"):
        read_images(tmp_path / "train-{000000..000002}.tar")


def test_archives_that_cannot_be_used_are_refused_by_name(tmp_path):
    packed = tmp_path / "packed.tar"
    archive(packed, shard(0, 6), "w:gz")
    with pytest.raises(UnreadableDataError, match=r"packed\.tar is not a readable tar.*gunzip"):
        read_images(packed)
    whole = tmp_path / "whole.tar"
    archive(whole, shard(0, 6))
    content = whole.read_bytes()
    for kept in (1500, 3072, 3500, 5632):  # in a header, between members, in a picture
        whole.write_bytes(content[:kept])
        with pytest.raises(UnreadableDataError, match=r"whole\.tar is not a readable tar"):
            read_images(whole)
    archive(tmp_path / "notes.tar", [("a.txt", b"1"), ("b.txt", b"2")])
    with pytest.raises(UnreadableDataError, match="hold no pictures"):
        read_images(tmp_path / "notes.tar")
    both = [
        ("a.png", png(0)),
        ("a.jpg", png(1)),
        ("a.cls", b"0"),
        ("b.png", png(1)),
        ("b.cls", b"1"),
    ]
    archive(tmp_path / "both.tar", both)
    with pytest.raises(UnreadableDataError, match="sample 'a' has pictures png, jpg"):
        read_images(tmp_path / "both.tar")
    assert len(read_images(tmp_path / "both.tar", image_column="png")) == 2


def test_a_sample_without_a_class_is_named(tmp_path):
    archive(tmp_path / "some.tar", [*shard(0, 6), ("./00006.png", png(6))])
    with pytest.raises(UnreadableDataError, match=r"00006\.png cannot be used.*no label"):
        read_images(tmp_path / "some.tar")
    data, skipped = read_images_skipping(tmp_path / "some.tar")
    check(data)
    assert len(skipped) == 1


# Lists


@pytest.mark.parametrize(
    ("head", "line", "classes"),
    [
        ("file_name,label", "{0}.png,{1}", ("0", "1", "2")),
        ("id;breed;class", "{0};x;{2}", NAMES),  # no extension, another separator
        ("Image\tLabel", "img/{0}.png\t{2}", NAMES),
    ],
)
def test_tables_of_text_list_pictures(tmp_path, head, line, classes):
    (tmp_path / "img").mkdir()
    for number in range(6):
        for folder in (tmp_path, tmp_path / "img"):
            (folder / f"{number}.png").write_bytes(png(number))
    lines = [line.format(number, number % 3, NAMES[number % 3]) for number in range(6)]
    (tmp_path / "metadata.csv").write_text("\ufeff" + "\n".join([head, *lines, ""]), "utf-8")
    check(read_images(tmp_path), classes)
    check(read_images(tmp_path / "metadata.csv"), classes)


def test_lists_that_cannot_be_used_say_why(tmp_path):
    path = tmp_path / "list.csv"
    path.write_text("a,b\n0.png,1\n")
    with pytest.raises(UnreadableDataError, match=r"columns a, b, and which.*--image-column"):
        read_images(path)
    path.write_text("file,label\n0.png\n")
    with pytest.raises(UnreadableDataError, match="1 columns and the first one 2"):
        read_images(path)
    path.write_text("file,label\n0.png,ant\n1.png,bee\n")
    with pytest.raises(UnreadableDataError, match=r"0\.png cannot be used"):
        read_images(path)
    path.write_bytes(b"file,label\n\xff\xfe,1\n")
    with pytest.raises(UnreadableDataError, match="cannot be read as CSV"):
        read_images(path)


# CIFAR as its authors give it


def cifar(folder, *, hundred=False):
    """A small binary version; returns its pixels and classes, training and test."""
    folder.mkdir(parents=True)
    rng, stored = np.random.default_rng(0), {}
    files = ["train.bin", "test.bin"] if hundred else ["data_batch_1.bin", "data_batch_2.bin"]
    files += [] if hundred else ["test_batch.bin"]
    for file in files:
        pixels = rng.integers(0, 256, (20, 3, 32, 32), dtype=np.uint8)
        labels = np.arange(20) * (5 if hundred else 1) % (100 if hundred else 10)
        front = np.stack([labels // 5, labels], 1) if hundred else labels[:, None]
        rows = np.concatenate([front.astype(np.uint8), pixels.reshape(20, -1)], 1)
        (folder / file).write_bytes(rows.tobytes())
        stored[file] = pixels, labels
    names = "fine_label_names.txt" if hundred else "batches.meta.txt"
    count = 100 if hundred else 10
    (folder / names).write_text("".join(f"class {number}\n" for number in range(count)) + "\n")
    return stored


@pytest.mark.parametrize("hundred", [False, True])
def test_cifar_is_read_as_its_authors_give_it(tmp_path, hundred):
    inner = "cifar-100-binary" if hundred else "cifar-10-batches-bin"
    stored = cifar(tmp_path / "data" / inner, hundred=hundred)
    test = "test.bin" if hundred else "test_batch.bin"
    with tarfile.open(tmp_path / "cifar-10(0)-binary.tar.gz", "w:gz") as tar:
        tar.add(tmp_path / "data" / inner, inner)
    archived = tmp_path / ("cifar-100-binary.tar.gz" if hundred else "cifar-10-binary.tar.gz")
    (tmp_path / "cifar-10(0)-binary.tar.gz").rename(archived)
    for source in (tmp_path / "data" / inner, tmp_path / "data", archived):
        data = read_images(source, split="test")
        assert (data.images.numpy() == stored[test][0]).all()
        assert (data.labels.numpy() == stored[test][1]).all()
        assert data.classes[3] == "class 3"
        train = read_images(source, split="train")
        assert (train.images[:20].numpy() == next(iter(stored.values()))[0]).all()
        assert len(train) == (20 if hundred else 40)
        with pytest.raises(UnreadableDataError, match="splits train, test and none was chosen"):
            read_images(source)
    one = read_images(tmp_path / "data" / inner / test)
    assert (one.images.numpy() == stored[test][0]).all()


def test_a_damaged_file_of_cifar_is_named(tmp_path):
    cifar(tmp_path / "c")
    path = tmp_path / "c" / "test_batch.bin"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UnreadableDataError, match=r"test_batch\.bin has 61459 bytes.*rows of 3073"):
        read_images(tmp_path / "c", split="test")
    path.write_bytes(bytes([77]) + bytes(3072))
    with pytest.raises(UnreadableDataError, match="a class 77; needed: below 10"):
        read_images(tmp_path / "c", split="test")
    (tmp_path / "cifar-10-binary.tar.gz").write_bytes(b"\x1f\x8b junk")
    with pytest.raises(UnreadableDataError, match="not a readable archive"):
        read_images(tmp_path / "cifar-10-binary.tar.gz", split="test")


def python_2(value):
    """A pickle of protocol 2 as Python 2 wrote it: texts are bytes, and so are an array's."""

    def text(content):
        size = len(content)
        return (b"U" + bytes([size]) if size < 256 else b"T" + size.to_bytes(4, "little")) + content

    def written(each):
        if isinstance(each, dict):
            return b"}(" + b"".join(text(k) + written(v) for k, v in each.items()) + b"u"
        if isinstance(each, list):
            return b"](" + b"".join(map(written, each)) + b"e"
        if isinstance(each, bytes):
            return text(each)
        if isinstance(each, int):
            return b"J" + each.to_bytes(4, "little")
        kind = b"cnumpy\ndtype\n(U\x02u1K\x00K\x01tR(K\x03U\x01|NNNJ\xff\xff\xff\xffK\x00tb"
        made = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tU\x01btR"
        shape = b"(" + b"".join(map(written, each.shape)) + b"t"
        return made + b"(K\x01" + shape + kind + b"\x89" + text(each.tobytes()) + b"tb"

    return b"\x80\x02" + written(value) + b"."


def as_python_3(protocol):
    return lambda value: pickle.dumps(value, protocol=protocol)


def cifar_in_pickles(folder, dump, *, hundred=False):
    """A small Python version; returns its pixels and classes by file."""
    folder.mkdir(parents=True)
    rng, stored = np.random.default_rng(0), {}
    names = ["train", "test"] if hundred else ["data_batch_1", "data_batch_2", "test_batch"]
    for file in names:
        pixels = rng.integers(0, 256, (20, 3072), dtype=np.uint8)
        labels = [n * (5 if hundred else 1) % (100 if hundred else 10) for n in range(20)]
        beside = {b"coarse_labels": [n // 5 for n in labels]} if hundred else {}
        batch = {
            b"batch_label": b"a batch",
            **beside,
            b"fine_labels" if hundred else b"labels": labels,
            b"data": pixels,
            b"filenames": [b"a_%d.png" % n for n in range(20)],
        }
        (folder / file).write_bytes(dump(batch))
        stored[file] = pixels.reshape(20, 3, 32, 32), np.array(labels)
    count, prefix = (100, b"fine_") if hundred else (10, b"")
    meta = {prefix + b"label_names": [b"class %d" % n for n in range(count)]}
    (folder / ("meta" if hundred else "batches.meta")).write_bytes(dump(meta))
    return stored


@pytest.mark.parametrize("hundred", [False, True])
@pytest.mark.parametrize("dump", [python_2, *map(as_python_3, range(6))])
def test_cifar_for_python_is_read_and_nothing_of_its_pickles_runs(tmp_path, dump, hundred):
    inner = "cifar-100-python" if hundred else "cifar-10-batches-py"
    stored = cifar_in_pickles(tmp_path / "data" / inner, dump, hundred=hundred)
    test = "test" if hundred else "test_batch"
    archived = tmp_path / ("cifar-100-python.tar.gz" if hundred else "cifar-10-python.tar.gz")
    with tarfile.open(archived, "w:gz") as tar:
        tar.add(tmp_path / "data" / inner, inner)
    for source in (tmp_path / "data" / inner, tmp_path / "data", archived):
        data = read_images(source, split="test")
        assert (data.images.numpy() == stored[test][0]).all()
        assert (data.labels.numpy() == stored[test][1]).all()
        assert data.classes[3] == "class 3"
        assert len(read_images(source, split="train")) == (20 if hundred else 40)
        with pytest.raises(UnreadableDataError, match="splits train, test and none was chosen"):
            read_images(source)
    one = read_images(tmp_path / "data" / inner / test)
    assert (one.images.numpy() == stored[test][0]).all()


class Evil:
    def __reduce__(self):
        return (Path.write_text, (Path("ran"), "it ran"))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"junk",
        b"\x80\x02}q\x00.",
        b"\x80\x02]" + b"]" * 100_000 + b".",
        b"\x80\x02U\xff",
        b"\x80\x02}r\xff\xff\xff\x7f.",
        b"\x80\x02tttt.",
        pickle.dumps([1]),
        pickle.dumps({b"data": Evil(), b"labels": [1]}),
        pickle.dumps({b"data": np.zeros((2, 3072)), b"labels": [0, 1]}),
        pickle.dumps({b"data": np.zeros((2, 3072), np.uint8), b"labels": [0]}),
        pickle.dumps({b"data": np.zeros((2, 3071), np.uint8), b"labels": [0, 1]}),
        pickle.dumps({b"data": np.zeros((2, 3072), np.uint8), b"labels": [0, 10]}),
        pickle.dumps({b"data": np.zeros((2, 3072), np.uint8), b"labels": [0, "a"]}),
        pickle.dumps({b"data": np.zeros((0, 3072), np.uint8), b"labels": []}),
        pickle.dumps({b"data": np.zeros((2, 3072), np.uint8), b"labels": [0, 1]})[:-20],
    ],
)
def test_a_pickle_that_is_none_of_cifars_is_named_and_never_run(tmp_path, content, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "test_batch").write_bytes(content)
    with pytest.raises(UnreadableDataError, match="test_batch"):
        read_images(tmp_path / "test_batch")
    assert not Path("ran").exists()


# Folders


@pytest.mark.parametrize("names", [("Train", "Test"), ("train", "val"), ("dev", "eval", "train")])
def test_splits_are_never_taken_for_classes(tmp_path, names):
    for name in names:
        for kind in NAMES:
            (tmp_path / name / kind).mkdir(parents=True)
            (tmp_path / name / kind / "0.png").write_bytes(png(NAMES.index(kind)))
    with pytest.raises(UnreadableDataError, match="none was chosen; choose one with --split"):
        read_images(tmp_path)
    check(read_images(tmp_path / names[0]), NAMES, count=3)
    check(read_images(tmp_path, split=names[0]), NAMES, count=3)


def test_a_folder_too_high_is_said(tmp_path):
    for kind in NAMES:
        (tmp_path / "set" / "inner" / kind).mkdir(parents=True)
        (tmp_path / "set" / "inner" / kind / "0.png").write_bytes(png(NAMES.index(kind)))
    with pytest.raises(UnreadableDataError, match="one folder, inner, and folders in that"):
        read_images(tmp_path / "set")


# Pictures


@pytest.mark.parametrize(("top", "expected"), [(255, 255), (4095, 255), (65535, 255), (1000, 62)])
def test_grey_of_sixteen_bits_is_scaled_by_the_bits_in_use(tmp_path, top, expected):
    for kind in NAMES:
        (tmp_path / kind).mkdir()
        levels = np.linspace(0, top, 64).round().astype(np.uint16).reshape(8, 8)
        Image.fromarray(levels).save(tmp_path / kind / "0.png")
    data = read_images(tmp_path, channels=1)
    assert int(data.images.max()) == expected
    assert int(data.images.min()) == 0


# The command line


@pytest.mark.parametrize("form", ["hub", "csv", "tar"])
def test_the_command_trains_on_what_people_have_and_says_what_it_read(tmp_path, call, form):
    source = tmp_path / form
    source.mkdir()
    if form == "hub":
        table = pa.table({"img": struct(24), "fine_label": [0, 1, 2] * 8, "coarse_label": [0] * 24})
        table = table.replace_schema_metadata(hub_features("fine_label", NAMES))
        parquet.write_table(table, source / "train.parquet")
    elif form == "csv":
        lines = [f"{number}.png,{NAMES[number % 3]}" for number in range(24)]
        for number in range(24):
            (source / f"{number}.png").write_bytes(png(number))
        (source / "metadata.csv").write_text("\n".join(["file_name,label", *lines]))
    else:
        archive(source / "train-0.tar", shard(0, 24, named))
    small = ("--model", "resnet18", "--norm", "batch", "--set", "width=0.125", "--size", 16)
    few = ("--epochs", 1, "--batch", 8, "--no-augment", "--validation", 0.25)
    code, _, err = call("train", "--data", source, *small, *few, "-o", tmp_path / "out")
    assert code == 0, err
    assert f"{form}: 24 images in 3 classes: ant, bee, cat" in " ".join(err.split())


def test_gaps_and_what_was_left_out_are_said(tmp_path, call):
    labels = [1000 * (1 + number % 3) for number in range(24)]
    pictures = [*struct(23), {"bytes": b"junk", "path": "23.png"}]
    parquet.write_table(pa.table({"pic": pictures, "kind": labels}), tmp_path / "gaps.parquet")
    small = ("--model", "resnet18", "--norm", "batch", "--set", "width=0.125", "--size", 16)
    few = ("--epochs", 1, "--batch", 8, "--validation", 0.25, "-o", tmp_path / "out")
    given = ("train", "--data", tmp_path / "gaps.parquet", *small, *few)
    code, _, err = call(*given, "--label-column", "kind")
    assert code == 2
    assert "23.png" in err
    assert "--skip-corrupt" in err
    code, _, err = call(*given, "--label-column", "kind", "--skip-corrupt")
    said = " ".join(err.split())
    assert "23 images in 3,001 classes" in said
    assert "2,998 of these classes have no image" in said
    assert "left out: gaps.parquet row 23 (23.png)" in said
    assert code == 0, err


# Data sets in Python


def numbers_of(index):
    rng = np.random.default_rng(index)
    return rng.integers(0, 256, (20, 20, 3), dtype=np.uint8)


class Pairs(torch.utils.data.Dataset):
    """A data set of PyTorch; `make` gives the picture from its pixels."""

    classes = ("ant", "bee", "cat")

    def __init__(self, make):
        self.make = make

    def __len__(self):
        return 12

    def __getitem__(self, index):
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self.make(numbers_of(index)), index % 3


def as_floats(pixels):
    return torch.from_numpy(pixels).permute(2, 0, 1) / 255


MAKERS = {
    "Pillow": Image.fromarray,
    "numpy": lambda pixels: pixels,
    "uint8 tensor": lambda pixels: torch.from_numpy(pixels).permute(2, 0, 1),
    "ToTensor": as_floats,
}


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("form", ["set", "subset", "loader", "mappings", "generator"])
def test_any_data_set_of_pytorch_is_read(name, form):
    pairs = Pairs(MAKERS[name])
    forms = {
        "set": pairs,
        "subset": torch.utils.data.Subset(pairs, range(12)),
        "loader": torch.utils.data.DataLoader(pairs, batch_size=5),
        "mappings": [dict(zip(("img", "fine_label"), each, strict=True)) for each in pairs],
        "generator": ((each, label) for each, label in pairs),
    }
    if form == "loader" and name == "Pillow":
        pytest.skip("PyTorch's own loader refuses these")
    data = read_images(forms[form])
    expected = np.stack([numbers_of(index).transpose(2, 0, 1) for index in range(12)])
    assert np.array_equal(data.images.numpy(), expected)
    assert data.labels.tolist() == [0, 1, 2] * 4
    assert data.classes == (pairs.classes if form in {"set", "subset", "loader"} else tuple("012"))
    assert read_images([*pairs], size=8, channels=1).images.shape == (12, 1, 8, 8)


@pytest.mark.parametrize(
    ("items", "said"),
    [
        ([(as_floats(numbers_of(0)) * 4 - 2, 0)], r"run from -2 to 2.*leave out Normalize"),
        ([(numbers_of(0).astype(np.int64), 0)], "it is int64"),
        ([(numbers_of(0), np.ones(3))], "label 0 is float64"),
        ([(numbers_of(0), 0), (numbers_of(1)[:9], 1)], "pictures differ"),
        ([{"photo": 1, "kind": 2}], "photo, kind, and which is the picture"),
        ([numbers_of(0)], r"needed: \(picture, label\)"),
        ([], "gives no picture"),
    ],
)
def test_data_sets_that_cannot_be_used_say_why(items, said):
    with pytest.raises(UnreadableDataError, match=said):
        read_images(items)


def test_a_label_beyond_a_data_set_s_classes_is_named():
    pairs = Pairs(lambda pixels: pixels)
    pairs.classes = ("ant", "bee")
    with pytest.raises(UnreadableDataError, match="label 2 is none of its 2 classes"):
        read_images(pairs)


def test_the_command_takes_data_from_code_of_one_s_own(tmp_path, call, monkeypatch):
    (tmp_path / "mydata.py").write_text(
        "import numpy as np\n"
        "def pictures(split='train'):\n"
        "    rng = np.random.default_rng(0)\n"
        "    count = 24 if split == 'train' else 6\n"
        "    return [(rng.integers(0, 99, (20, 20, 3), np.uint8), i % 3) for i in range(count)]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    small = ("--model", "resnet18", "--norm", "batch", "--set", "width=0.125", "--size", 16)
    given = (
        "train",
        *small,
        "--epochs",
        1,
        "--batch",
        8,
        "--validation",
        0.25,
        "-o",
        tmp_path / "net",
    )
    test = ("--test", "factory:mydata:pictures", "--test-split", "test")
    code, _, err = call(*given, "--data", "factory:mydata:pictures", *test)
    assert code == 0, err
    assert "24 images in 3 classes" in err
    assert "6 images in 3 classes" in err
    code, _, err = call(*given, "--data", "factory:mydata:nothing")
    assert code == 2
    assert "try: package.module:function" in " ".join(err.split())
