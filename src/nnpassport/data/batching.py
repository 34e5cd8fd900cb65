"""The batches that training and evaluation see.

Pixels stay uint8 until they are on the device that computes. Everything random is a pure function
of (seed, epoch, step), so a run that was interrupted goes on bit for bit where it stopped.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, cast, final, runtime_checkable

import torch
from jaxtyping import Int64
from torch import Tensor
from torch.nn import functional as F

from nnpassport.data.imageset import ImageSet, Normalisation, generator_for
from nnpassport.scheme import WHOLE, BadRecipeError, Batch, Part


@runtime_checkable
class Images(Protocol):
    """What can be trained and measured on: an `ImageSet` in memory, or an `ImageStream`."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names."""
        ...

    def __len__(self) -> int: ...

    def digest(self) -> str:
        """What identifies the set, for a run that is resumed."""
        ...

    def require_classes(self, least: int = 2) -> "Images":
        """The set, once it is known to have images of so many classes."""
        ...

    def sample(self, count: int, *, seed: int) -> ImageSet:
        """A random choice of `count` of the images, in memory."""
        ...

    def split(self, fraction: float, *, seed: int) -> "tuple[Images, Images]":
        """Training and validation set."""
        ...


@runtime_checkable
class Streamed(Images, Protocol):
    """One that cuts its batches itself; see the functions of the same names."""

    def batches(
        self,
        normalise: Normalisation,
        *,
        size: int,
        seed: int,
        epoch: int,
        start: int = 0,
        augment: "Augment | None" = None,
        device: torch.device | str = "cpu",
        part: Part = WHOLE,
    ) -> Iterator[Batch]:
        """One epoch's batches from its step `start` on."""
        ...

    def evaluation_batches(
        self,
        normalise: Normalisation,
        size: int,
        *,
        device: torch.device | str = "cpu",
        part: Part = WHOLE,
    ) -> Iterator[Batch]:
        """All images in their own order."""
        ...


_AHEAD = 64  # steps whose augmentation is drawn at once: one copy to the device for all of them


@final
@dataclass(frozen=True, slots=True)
class Augment:
    """Random crop after padding with `pad` black pixels, and a mirror image half of the time."""

    pad: int = 4
    flip: bool = True

    def __post_init__(self) -> None:
        if self.pad < 0:
            raise BadRecipeError(f"pad is {self.pad}; needed: 0 or more pixels")

    def __call__(self, pixels: Tensor, generator: torch.Generator) -> Tensor:
        """uint8 (batch channels height width) of the same shape, each image moved on its own.

        `generator` is one of the CPU whatever device the images are on, so that every device sees
        the same augmentation.
        """
        return self.moved(pixels, moved_to(self.draw(len(pixels), generator), pixels.device))

    def draw(self, count: int, generator: torch.Generator) -> Int64[Tensor, "3 count"]:
        """For each image the crop's top and left edge, and whether it is mirrored, 0 or 1."""
        offsets = torch.randint(0, 2 * self.pad + 1, (2, count), generator=generator)
        mirrored = torch.randint(0, 2, (1, count), generator=generator)
        return torch.cat([offsets, mirrored * self.flip])

    def moved(self, pixels: Tensor, drawn: Int64[Tensor, "3 count"]) -> Tensor:
        """The images moved as `drawn` says, which is on their device."""
        count, _, height, width = pixels.shape
        top, left, mirrored = drawn
        windows = F.pad(pixels, (self.pad,) * 4).unfold(2, height, 1).unfold(3, width, 1)
        cropped = windows[torch.arange(count, device=pixels.device), :, top, left]
        return torch.where(mirrored.bool()[:, None, None, None], cropped.flip(3), cropped)


def moved_to(tensor: Tensor, device: torch.device | str) -> Tensor:
    """The tensor on the device; one with CUDA works on meanwhile, and the CPU does not wait."""
    if torch.device(device).type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def steps_per_epoch(images: int, size: int) -> int:
    """Whole batches in a set; a set that is smaller than one batch is one batch.

    Raises:
        BadRecipeError: the batch size is below 1.
    """
    if size < 1:
        raise BadRecipeError(f"batch size is {size}; needed: at least 1 image")
    return max(1, images // size)


def epoch_order(images: int, *, seed: int, epoch: int) -> Tensor:
    """The order in which an epoch visits the images: a permutation, int64 (images,)."""
    return torch.randperm(images, generator=generator_for("order", seed, epoch))


def batches(
    data: Images,
    normalise: Normalisation,
    *,
    size: int,
    seed: int,
    epoch: int,
    start: int = 0,
    augment: Augment | None = None,
    device: torch.device | str = "cpu",
    part: Part = WHOLE,
) -> Iterator[Batch]:
    """The batches of one epoch from its step `start` on, in channels-last memory on `device`.

    Each is a pure function of (seed, epoch, step): starting late gives the same batches. The last
    incomplete batch is left out, and `Batch.step` counts through all epochs. A `part` of several
    gets its own slice of each batch: the parts together are what one process would get.

    Raises:
        BadRecipeError: the batch size, `start` or `part` is out of range.
    """
    if not isinstance(data, ImageSet):
        return cast(Streamed, data).batches(
            normalise,
            size=size,
            seed=seed,
            epoch=epoch,
            start=start,
            augment=augment,
            device=device,
            part=part,
        )
    steps_from(start, len(data), size)
    slice_of(min(size, len(data)), part)  # refused now, and not at the first batch
    return _batches(data, normalise, size, seed, epoch, start, augment, torch.device(device), part)


def steps_from(start: int, images: int, size: int) -> range:
    """The steps of an epoch from `start` on.

    Raises:
        BadRecipeError: the epoch has no such step.
    """
    steps = steps_per_epoch(images, size)
    if not 0 <= start <= steps:
        raise BadRecipeError(
            f"start is step {start} of an epoch; needed: 0 to {steps}, the steps of {images} "
            f"images in batches of {size}"
        )
    return range(start, steps)


def slice_of(size: int, part: Part) -> slice:
    """Where a part's images are in a batch of `size`.

    Raises:
        BadRecipeError: the batch cannot be dealt out evenly, or there is no such part.
    """
    if size % part.of or not 0 <= part.index < part.of:
        raise BadRecipeError(
            f"a batch of {size} images cannot be shared by {part.of} processes (this is "
            f"{part.index}); needed: a batch size that their number divides, such as "
            f"{max(1, round(size / part.of)) * part.of}"
        )
    each = size // part.of
    return slice(part.index * each, (part.index + 1) * each)


def _batches(
    data: ImageSet,
    normalise: Normalisation,
    size: int,
    seed: int,
    epoch: int,
    start: int,
    augment: Augment | None,
    device: torch.device,
    part: Part,
) -> Iterator[Batch]:
    steps, mine = steps_per_epoch(len(data), size), slice_of(min(size, len(data)), part)
    order = moved_to(epoch_order(len(data), seed=seed, epoch=epoch), data.images.device)
    ahead: list[Tensor] = []
    for step in range(start, steps):
        whole = order[step * size : (step + 1) * size]
        chosen = whole[mine]
        pixels = moved_to(data.images.index_select(0, chosen), device)
        if augment is not None:
            coming = range(step, min(step + _AHEAD, steps))
            ahead = ahead or drawn_ahead(augment, len(whole), seed, epoch, coming, device)
            pixels = augment.moved(pixels, ahead.pop(0)[:, mine])
        yield Batch(
            normalise(pixels).contiguous(memory_format=torch.channels_last),
            moved_to(data.labels[chosen], device),
            epoch * steps + step,
            part,
        )


def drawn_ahead(
    augment: Augment, count: int, seed: int, epoch: int, steps: Sequence[int], device: torch.device
) -> list[Tensor]:
    """What `augment` draws for the `count` images of each of these steps, on the device."""
    drawn = [augment.draw(count, generator_for("augment", seed, epoch, step)) for step in steps]
    return [*moved_to(torch.stack(drawn), device)]


def evaluation_batches(
    data: Images,
    normalise: Normalisation,
    size: int,
    *,
    device: torch.device | str = "cpu",
    part: Part = WHOLE,
) -> Iterator[Batch]:
    """All images in their own order, the last batch as small as it comes; nothing is random.

    A `part` gets the batches index, index + of, and so on.

    Raises:
        BadRecipeError: the batch size is below 1.
    """
    if not isinstance(data, ImageSet):
        return cast(Streamed, data).evaluation_batches(normalise, size, device=device, part=part)
    steps_per_epoch(len(data), size)
    own = slice(part.index, None, part.of)
    pieces = zip(data.images.split(size)[own], data.labels.split(size)[own], strict=True)
    return (
        Batch(
            normalise(moved_to(pixels, device)).contiguous(memory_format=torch.channels_last),
            moved_to(labels, device),
            part.index + part.of * step,
        )
        for step, (pixels, labels) in enumerate(pieces)
    )
