"""Adapter folders of peft: what their config says of a low-rank pair that its numbers do not.

A pair (B, A) stands for (α/r)·B·A. How large the scale is never matters to signs; whether it is
negative does, and a thief may write −α and −B for what the owner wrote as α and B.
"""

import hashlib
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nnpassport.files.arrays import Array
from nnpassport.files.disk import brief, read_once, without_duplicates
from nnpassport.scheme import UnreadableModelError

ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
CONFIG_FILE = "adapter_config.json"
MAX_CONFIG_BYTES = 2**20

_B = re.compile(r"(.+)\.lora_B(?:\.[^.]+)?\.weight")
_PLAIN_NAME = re.compile(r"[\w.]+")


def with_signed_scale(
    tensors: Mapping[str, Array], folder: Path
) -> tuple[dict[str, Array], dict[str, str]]:
    """The tensors with the sign of α in every B, and SHA-256 (hex) of the config by its name.

    α is `lora_alpha`, or what `alpha_pattern` says for a layer. Without a config the scale is taken
    to be positive, as all that peft makes by itself are.

    Raises:
        UnreadableModelError: the config is too large, not strict JSON, of another kind of adapter
            than LoRA, or has a negative α for layers that only a regular expression tells: one
            from anybody is not run.
    """
    path = folder / CONFIG_FILE
    if not path.exists():
        return dict(tensors), {}
    data = read_once(path, MAX_CONFIG_BYTES)
    try:
        usual, patterns = _alphas(json.loads(data, object_pairs_hook=without_duplicates))
    except (ValueError, RecursionError) as error:
        raise UnreadableModelError(
            f"{path} is not the config of a LoRA adapter ({brief(error)}); needed: the file that "
            "peft's `save_pretrained` wrote; the weights file can be given without it"
        ) from error
    signed = {}
    for name, tensor in tensors.items():
        pair = _B.fullmatch(name)
        alpha = 1.0 if pair is None else _alpha_of(pair[1], usual, patterns)
        signed[name] = tensor if alpha > 0 else tensor * math.copysign(bool(alpha), alpha)
    return signed, {CONFIG_FILE: hashlib.sha256(data).hexdigest()}


def _alphas(config: Any) -> tuple[float, dict[str, float]]:
    """`lora_alpha`, and `alpha_pattern` as far as it has to be looked at."""
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise ValueError("its peft_type is not LORA")
    patterns = config.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        raise ValueError("alpha_pattern is not an object")
    numbers = [config.get("lora_alpha"), *patterns.values()]
    if not all(type(n) in (int, float) and abs(n) < math.inf for n in numbers):
        raise ValueError("an α is not a finite number")
    if all(n > 0 for n in numbers):
        return 1.0, {}
    if odd := [name for name in patterns if not _PLAIN_NAME.fullmatch(name)]:
        raise ValueError(f"α is not positive everywhere, and {odd[0][:80]!r} is not a plain name")
    return float(numbers[0]), {name: float(alpha) for name, alpha in patterns.items()}


def _alpha_of(layer: str, usual: float, patterns: Mapping[str, float]) -> float:
    return next((alpha for name, alpha in patterns.items() if _ends_in(layer, name)), usual)


def _ends_in(layer: str, name: str) -> bool:
    """As peft has it: the layer's name, or its end after a dot; a dot in `name` is any letter."""
    end = layer[-len(name) :]
    alike = all(wanted in {".", letter} for wanted, letter in zip(name, end, strict=False))
    before = layer[: -len(name)]
    return len(end) == len(name) and alike and (not before or before.endswith("."))
