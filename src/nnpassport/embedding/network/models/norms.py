"""What the architectures share: the choice of norm, widths, initial weights, argument checks."""

from collections.abc import Callable, Iterable, Mapping

from torch import nn

CHANNELS_PER_GROUP = 16

NORMS: Mapping[str, Callable[[int], nn.Module]] = {
    "batch": nn.BatchNorm2d,
    "group": lambda channels: nn.GroupNorm(channels // CHANNELS_PER_GROUP, channels),
    "layer": lambda channels: nn.GroupNorm(1, channels),
    "instance": lambda channels: nn.InstanceNorm2d(channels, affine=True),
    "none": lambda _: nn.Identity(),
}
"""Norms by name, made for a number of channels. "layer" averages over channels and space."""


def scaled(channels: int, width: float) -> int:
    """`channels` · `width`, rounded to a multiple of 16 (whole norm groups) and never below 16."""
    return max(1, round(channels * width / CHANNELS_PER_GROUP)) * CHANNELS_PER_GROUP


def convolution(
    inputs: int, outputs: int, kernel: int, *, norm: str, stride: int = 1, padding: int = 0
) -> nn.Conv2d:
    """A convolution that has a bias only where no norm follows to give it one."""
    return nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=padding, bias=norm == "none")


def initialise(model: nn.Module) -> None:
    """Every convolution: Kaiming normal, fan-out, ReLU gain, in place.

    The rest keeps PyTorch's own start: norms scale 1 and shift 0, linear layers uniform.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def check_choice(name: str, given: object, allowed: Iterable[str]) -> None:
    """Refuse a value that is not one of `allowed`.

    Raises:
        ValueError: it is not.
    """
    names = list(allowed)
    if given not in names:
        raise ValueError(f"{name} is {given!r}; allowed values: {', '.join(names)}")


def check_sizes(*, classes: object, channels: object, width: object) -> None:
    """Refuse sizes of the wrong type, or so large that building would exhaust the memory.

    They may come from somebody else's configuration file.

    Raises:
        ValueError: one of them is of the wrong type or out of range.
    """
    for name, given, most in (("classes", classes, 100_000), ("channels", channels, 1_024)):
        if type(given) is not int or not 1 <= given <= most:
            raise ValueError(f"{name} is {given!r}; needed: a whole number from 1 to {most}")
    if isinstance(width, bool) or not isinstance(width, int | float) or not 0 < width <= 16:
        raise ValueError(f"width is {width!r}; needed: a factor above 0 and at most 16")
