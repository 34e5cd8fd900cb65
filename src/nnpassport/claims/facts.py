"""What a claim commits to of the owner's network that its weights do not say.

A probe and F need to know how images become numbers, of what size they are and what the classes are
called. A suspect must not choose any of it, and neither must a claimant once the answers are known.
"""

import hashlib
import math
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from nnpassport.files.config import (
    CONFIG_FILE,
    MAX_CONFIG_BYTES,
    ModelConfig,
    read_config_file,
)
from nnpassport.files.disk import read_once
from nnpassport.scheme import UnsuitableModelError

LARGEST_SIDE = 65_536  # pixels
_HEX = frozenset("0123456789abcdef")


class Facts(NamedTuple):
    """Facts about the owner's network.

    Attributes:
        config: SHA-256 (hex) of the bytes of its `config.json`.
        classes: names of the classes, in the order of the outputs.
        input_size: channels, height and width of one image.
        mean: per channel, of pixels in [0, 1]; subtracted, and then divided by `std`.
        std: per channel, above 0.
    """

    config: str
    classes: tuple[str, ...]
    input_size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def fault(self) -> tuple[str, str] | None:
        """What is given and what is needed where these are no facts of any network, or None."""
        known = isinstance(self.config, str) and len(self.config) == 64
        if not (known and _HEX.issuperset(self.config)):
            return f"the digest {self.config!a:.80} of a config", "64 hex digits"
        named = all(isinstance(name, str) and name.isprintable() for name in self.classes)
        if not (self.classes and named):
            return "classes without names, or with names of other characters", "printable names"
        sides = [type(side) is int and 1 <= side <= LARGEST_SIDE for side in self.input_size]
        if len(sides) != 3 or not all(sides):
            return f"the input size {self.input_size!r:.80}", f"three numbers in 1…{LARGEST_SIDE}"
        numbers = [*self.mean, *self.std]
        counts = {len(self.mean), len(self.std)} == {self.input_size[0]}
        finite = all(type(number) is float and math.isfinite(number) for number in numbers)
        if not (counts and finite and min(self.std) > 0):
            return "a mean or std that is none", "a number for each channel, std above 0"
        return None

    def as_json(self) -> dict[str, Any]:
        """As it stands in a claim: numbers are texts, the shortest that read back as the same."""
        return {
            **self._asdict(),
            "mean": [repr(number) for number in self.mean],
            "std": [repr(number) for number in self.std],
        }

    def put_into(self, config: ModelConfig) -> ModelConfig:
        """The config with these facts in place of its own."""
        return replace(
            config,
            classes=self.classes,
            input_size=self.input_size,
            mean=self.mean,
            std=self.std,
        )

    def differs_from(self, config: ModelConfig) -> list[str]:
        """Which facts are others in `config`, by name."""
        return [
            name
            for name in ("classes", "input_size", "mean", "std")
            if tuple(getattr(config, name)) != getattr(self, name)
        ]


def facts_from(document: Any) -> Facts:
    """The facts in a claim; `as_json` of it is `document`, or that is not one of ours.

    Raises:
        KeyError, TypeError, ValueError: it is not.
    """
    return Facts(
        config=document["config"],
        classes=tuple(document["classes"]),
        input_size=tuple(document["input_size"]),
        mean=tuple(map(float, document["mean"])),
        std=tuple(map(float, document["std"])),
    )


def facts_of(folder: Path) -> Facts:
    """The facts of the network in a model folder.

    Raises:
        UnreadableModelError: its config is missing or cannot be read.
    """
    found = read_config_file(folder / CONFIG_FILE)
    config = found.config
    numbers = [tuple(map(float, each)) for each in (config.mean, config.std)]
    return Facts(found.digest, config.classes, config.input_size, *numbers)


def check_config(folder: Path, facts: Facts | None) -> None:
    """Refuse a config, said to be the owner's, that is not the one a claim commits to.

    Raises:
        UnreadableModelError: there is none, or it is too large.
        UnsuitableModelError: the claim commits to another.
    """
    if facts is None:
        return
    digest = hashlib.sha256(read_once(folder / CONFIG_FILE, MAX_CONFIG_BYTES)).hexdigest()
    if digest != facts.config:
        raise UnsuitableModelError(
            f"the config of {folder} is not the one that the claim commits to; needed: the folder "
            "that `claim new --reference` was given, as it was"
        )
