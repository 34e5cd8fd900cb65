"""`config.json`: what a state dict does not say about its network.

It may come from anybody: it is strict JSON of bounded size, and reading it imports nothing.
"""

import hashlib
import json
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, final, get_origin, get_type_hints

from nnpassport.files.disk import brief, is_text, read_once, without_duplicates
from nnpassport.ground.lazy import load
from nnpassport.scheme import UnreadableModelError, UnsuitableModelError

if TYPE_CHECKING:
    from torch import nn

CONFIG_FILE = "config.json"
MAX_CONFIG_BYTES = 2**20
_LARGEST_SIDE = 65_536  # pixels
_WEIGHTS_DIGEST = "weights_sha256"
_SHA256 = re.compile("[0-9a-f]{64}")


@final
@dataclass(frozen=True, slots=True)
class ModelConfig:
    """What a state dict does not say about its network; the content of `config.json`.

    Attributes:
        architecture: a name in `ARCHITECTURES` of `nnpassport.embedding.network.models`, or
            "package.module:factory".
        arguments: keyword arguments of the architecture.
        classes: names of the classes, in the order of the outputs.
        input_size: channels, height and width of one image.
        mean: per channel, of pixels in [0, 1]; subtracted, and then divided by `std`.
        std: per channel, above 0.
        metrics: finite numbers, accuracies in [0, 1].
        notes: free text by title.

    Raises:
        UnsuitableModelError: a field has a type or a value that no model can have.
    """

    architecture: str
    arguments: Mapping[str, str | int | float | bool]
    classes: tuple[str, ...]
    input_size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    metrics: Mapping[str, float] = field(default_factory=dict)
    notes: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        channels = self.input_size[0] if self.input_size else 0
        demands = {
            "architecture": ("a name", self.architecture != "" and is_text(self.architecture)),
            "arguments": ("texts, finite numbers or booleans by name", _is_simple(self.arguments)),
            "classes": (
                "one text for each class",
                self.classes and all(map(is_text, self.classes)),
            ),
            "input_size": (
                f"channels, height and width in 1…{_LARGEST_SIDE}",
                len(self.input_size) == 3 and all(map(_is_side, self.input_size)),
            ),
            "mean": ("a number for each channel", _are_numbers(self.mean, channels)),
            "std": (
                "a number above 0 for each channel",
                _are_numbers(self.std, channels) and min(self.std) > 0,
            ),
            "metrics": (
                "finite numbers by name",
                _is_simple(self.metrics) and all(map(_is_number, self.metrics.values())),
            ),
            "notes": (
                "texts by title",
                _is_simple(self.notes) and all(map(is_text, self.notes.values())),
            ),
        }
        for name, (needed, satisfied) in demands.items():
            if not satisfied:
                given = repr(getattr(self, name))[:100]
                raise UnsuitableModelError(f"{name} is {given}, but it must be {needed}")

    def build(self, *, trusted_factory: str | None = None) -> "nn.Module":
        """A new network of this architecture, drawn from torch's global generator.

        A factory outside `nnpassport.embedding.network.models` is imported only if
        `trusted_factory` says the same "package.module:factory": a config may come from anybody,
        and importing is running.

        Raises:
            UnsuitableModelError: the architecture is unknown, not trusted or refuses its arguments.
        """
        build = load("nnpassport.embedding.network.models:build_from")
        made: nn.Module = build(self.architecture, self.arguments, trusted_factory)
        return made


def read_config(folder: Path) -> ModelConfig:
    """The config of a model folder. Nothing in it is imported or built.

    Raises:
        UnreadableModelError: missing, too large, not strict JSON, or a field is not as it must be.
    """
    return read_config_file(folder / CONFIG_FILE).config


def other_classes(one: Sequence[str], other: Sequence[str]) -> str | None:
    """How two lists of class names, each in the order of its indices, contradict one another.

    None if they do not. Spelling (case, blanks, underscores) counts for nothing, and a list that
    only counts from 0, as of labels that are numbers, names no class: it fits any but itself in
    another order.
    """
    if len(one) != len(other):
        return f"{len(one)} classes against {len(other)}"
    first, second = ([_plain(name) for name in names] for names in (one, other))
    counted = [str(index) for index in range(len(first))]
    moved = sorted(first) == sorted(second)
    if first == second or (counted in (first, second) and not moved):
        return None
    index = next(i for i, (a, b) in enumerate(zip(first, second, strict=True)) if a != b)
    how = "the same names in another order" if moved else "other names"
    return f"{how}: class {index} is {one[index]!r:.50} against {other[index]!r:.50}"


def _plain(name: str) -> str:
    folded = unicodedata.normalize("NFKC", name).casefold()
    return " ".join(folded.replace("_", " ").replace("-", " ").split())


class ConfigFile(NamedTuple):
    """What a `config.json` says.

    Attributes:
        digest: SHA-256 (hex) of the bytes that it was read from.
        weights: SHA-256 (hex) of the file of weights that it was written with, if it says so.
    """

    config: ModelConfig
    digest: str
    weights: str | None


def read_config_file(path: Path) -> ConfigFile:
    """The config in a `config.json`, and which weights it was saved with.

    Raises:
        UnreadableModelError: missing, too large, not strict JSON, or a field is not as it must be.
    """
    data = read_once(path, MAX_CONFIG_BYTES)
    try:
        values = json.loads(
            data.decode(), parse_constant=_refuse_constant, object_pairs_hook=without_duplicates
        )
        named = isinstance(values, dict) and _WEIGHTS_DIGEST in values
        weights = values.pop(_WEIGHTS_DIGEST) if named else None
        if named and not (isinstance(weights, str) and _SHA256.fullmatch(weights)):
            raise ValueError(f"{_WEIGHTS_DIGEST} is no SHA-256 in hex")
        config = _config_from(values)
    except (ValueError, RecursionError) as error:
        raise UnreadableModelError(
            f"{path} is not a model's config ({brief(error)}); needed: a JSON object as "
            "`save_model` writes it; a suspect's weights file can be given without its config"
        ) from error
    return ConfigFile(config, hashlib.sha256(data).hexdigest(), weights)


def config_bytes(config: ModelConfig, *, weights: str | None = None) -> bytes:
    """The content of `config.json`; equal configs give equal bytes.

    `weights` is SHA-256 (hex) of the file of weights that it belongs to.

    Raises:
        UnsuitableModelError: it would be larger than what is read back.
    """
    values = asdict(config) | ({} if weights is None else {_WEIGHTS_DIGEST: weights})
    data = json.dumps(values, indent=2, sort_keys=True, allow_nan=False).encode() + b"\n"
    if len(data) > MAX_CONFIG_BYTES:
        raise UnsuitableModelError(
            f"config takes {len(data)} bytes, but {CONFIG_FILE} may have {MAX_CONFIG_BYTES}; "
            "shorten the notes or the class names"
        )
    return data


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and type(value) is not bool and abs(value) < 1e300


def _is_side(value: object) -> bool:
    return type(value) is int and 1 <= value <= _LARGEST_SIDE


def _are_numbers(values: tuple[float, ...], count: object) -> bool:
    return len(values) == count and all(map(_is_number, values))


def _is_simple(values: Mapping[str, object]) -> bool:
    return all(
        is_text(name) and (is_text(value) or _is_number(value) or isinstance(value, bool))
        for name, value in values.items()
    )


def _refuse_constant(constant: str) -> float:
    raise ValueError(f"{constant} is not JSON")


def _config_from(values: object) -> ModelConfig:
    if not isinstance(values, dict):
        raise ValueError(f"it holds {type(values).__name__}, not an object")
    kinds = {name: get_origin(hint) or hint for name, hint in get_type_hints(ModelConfig).items()}
    if unknown := values.keys() - kinds.keys():
        raise ValueError(f"unknown field {min(unknown)[:100]!r}; known: {', '.join(kinds)}")
    optional = {"metrics", "notes"}
    if missing := kinds.keys() - values.keys() - optional:
        raise ValueError(f"missing field {min(missing)!r}")
    converted: dict[str, Any] = {}
    for name, value in values.items():
        json_kind = {str: str, tuple: list}.get(kinds[name], dict)
        if not isinstance(value, json_kind):
            raise ValueError(f"{name} is {type(value).__name__}, not {json_kind.__name__}")
        converted[name] = tuple(value) if isinstance(value, list) else value
    return ModelConfig(**converted)
