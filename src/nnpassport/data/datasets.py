"""Data sets of PyTorch, of the hub's library, or of one's own code: anything that gives pictures.

An item is (picture, label, …) or a mapping with usual names. A picture is one of Pillow's, uint8
numbers in either order of the axes, or floats from 0 to 1. What is normalised is no picture any
more.
"""

import importlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from PIL import Image

from nnpassport.data.cache import Table
from nnpassport.data.decoding import Pixels, Progress, Wanted, alike, fitted
from nnpassport.data.source import LABELS, Asked, classes_of, index_of
from nnpassport.files.disk import brief
from nnpassport.scheme import UnreadableDataError

PICTURES = ("image", "img", "jpg", "png", "picture", "pixel_values", "x")
_SLACK = 1e-3  # beyond 0 and 1: what interpolation leaves


def made_by(name: str, split: str | None) -> Any:
    """What a function of the caller's own gives, "package.module:function", called with the split.

    Its code is run: the name must be the caller's word and no file's.

    Raises:
        UnreadableDataError: there is no such function, or it fails.
    """
    module, colon, function = name.partition(":")
    try:
        if not colon:
            raise ValueError("it has no colon")
        make: Callable[..., Any] = getattr(importlib.import_module(module), function)
        return make() if split is None else make(split)
    except Exception as error:  # it is anybody's code
        given = "" if split is None else repr(split)
        raise UnreadableDataError(
            f"{function or 'the function'}({given}) of {name!r} cannot be called "
            f"({type(error).__name__}: {brief(error)}); needed: package.module:function, which "
            "gives a data set of pictures and labels, and takes the split if one is chosen"
        ) from error


def read_dataset(
    dataset: Any, wanted: Wanted, asked: Asked, progress: Progress | None = None
) -> Table:
    """All pictures and labels that a data set or loader gives, once, in its order.

    Raises:
        UnreadableDataError: it gives none, or something that is no labelled picture.
    """
    name = type(dataset).__name__
    images, labels = list[Pixels](), list[Any]()
    total = _length(dataset)
    for index, (picture, label) in enumerate(_items(dataset, asked, name)):
        try:
            images.append(fitted(_picture(picture), wanted))
        except (ValueError, TypeError) as error:
            raise UnreadableDataError(
                f"{name}: picture {index} cannot be used ({brief(error)}); needed: one of "
                "Pillow's, uint8 numbers (height width channels) or (channels height width), or "
                "floats from 0 to 1; leave out Normalize, which is done later"
            ) from error
        alike([images[0].shape, images[-1].shape], name)
        labels.append(_label(label, index, name))
        if progress is not None:
            progress(index + 1, max(total, index + 1))
    if not images:
        raise UnreadableDataError(f"{name} gives no picture; needed: at least one of each class")
    named = _classes(dataset) or classes_of(iter(labels), name)
    index_by = {each: place for place, each in enumerate(named)}
    indices = [index_of(label, index_by) for label in labels]
    if None in indices:
        raise UnreadableDataError(
            f"{name}: label {labels[indices.index(None)]!r:.50} is none of its {len(named)} "
            f"classes; needed: class indices below {len(named)}, or names of classes"
        )
    return Table(np.stack(images), np.array(indices, np.int64), named)


def _items(dataset: Any, asked: Asked, name: str) -> Iterator[tuple[Any, Any]]:
    for item in _each(dataset):
        picture, label = _pair(item, asked, name)
        if _is_batch(picture, label):
            yield from zip(picture, label, strict=True)
        else:
            yield picture, label


def _each(dataset: Any) -> Iterator[Any]:
    """By index where it has a length and no iterator: old iteration would not know the end."""
    if hasattr(dataset, "__iter__"):
        return iter(dataset)
    return (dataset[index] for index in range(_length(dataset)))


def _length(dataset: Any) -> int:
    try:
        return len(dataset)
    except TypeError:
        return 0


def _pair(item: Any, asked: Asked, name: str) -> tuple[Any, Any]:
    if isinstance(item, Mapping):
        pictures = (asked.image,) if asked.image else PICTURES
        labels = (asked.label,) if asked.label else LABELS
        found = [next((n for n in some if n in item), None) for some in (pictures, labels)]
        if None not in found:
            return item[found[0]], item[found[1]]
        there = ", ".join(map(str, item))
        raise UnreadableDataError(
            f"{name} gives {there:.200}, and which is the picture and which the class cannot be "
            "told; needed: image and label, or name them (--image-column, --label-column; in "
            "Python image_column=, label_column=)"
        )
    if isinstance(item, tuple | list) and len(item) >= 2:
        return item[0], item[1]
    raise UnreadableDataError(
        f"{name} gives {type(item).__name__}; needed: (picture, label), or a mapping with both"
    )


def _is_batch(picture: Any, label: Any) -> bool:
    return getattr(picture, "ndim", 0) == 4 and getattr(label, "ndim", 1) == 1


def _picture(picture: Any) -> Image.Image:
    if isinstance(picture, Image.Image):
        return picture
    numbers = np.asarray(picture)
    if numbers.dtype.kind == "f":
        low, high = float(numbers.min(initial=0)), float(numbers.max(initial=0))
        if not -_SLACK <= low <= high <= 1 + _SLACK:
            raise ValueError(f"its numbers run from {low:.3g} to {high:.3g}")
        numbers = np.round(numbers.clip(0, 1) * 255).astype(np.uint8)
    if numbers.dtype != np.uint8 or numbers.ndim not in {2, 3}:
        raise ValueError(f"it is {numbers.dtype} of shape {numbers.shape}")
    if numbers.ndim == 3 and numbers.shape[0] in {1, 3} and numbers.shape[2] not in {1, 3}:
        numbers = numbers.transpose(1, 2, 0)
    if numbers.ndim == 3 and numbers.shape[2] not in {1, 3}:
        raise ValueError(f"it is of shape {numbers.shape}")
    grey = numbers.ndim == 3 and numbers.shape[2] == 1
    return Image.fromarray(np.ascontiguousarray(numbers[..., 0] if grey else numbers))


def _label(label: Any, index: int, name: str) -> int | str:
    if isinstance(label, str):
        return label
    value = np.asarray(label)
    if value.size != 1 or value.dtype.kind not in "iub":
        raise UnreadableDataError(
            f"{name}: label {index} is {value.dtype} of shape {value.shape}; needed: one class "
            "index or the name of a class"
        )
    return int(value.reshape(-1)[0])


def _classes(dataset: Any) -> tuple[str, ...] | None:
    """The names that torchvision's data sets, or the hub's, have of their classes."""
    for _ in range(8):  # subsets and loaders, of one another
        names = getattr(dataset, "classes", None)
        if names is None:
            features = getattr(dataset, "features", None)
            labels = features if isinstance(features, Mapping) else {}
            names = next((labels[n].names for n in LABELS if hasattr(labels.get(n), "names")), None)
        if names:
            return tuple(map(str, names))
        dataset = getattr(dataset, "dataset", None)
    return None
