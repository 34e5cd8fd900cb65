"""Images in memory, how they are normalised, and where their randomness comes from."""

import functools
import hashlib
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor
from torch.nn import functional as F

from nnpassport.scheme import UnreadableDataError

_CHUNK = 2_048  # images that are floats at the same time


@final
@dataclass(frozen=True, slots=True, eq=False)
class ImageSet:
    """Labelled images of one size.

    Attributes:
        images: uint8 (images channels height width), values 0 to 255.
        labels: int64 (images,), indices into `classes`.
        classes: class names.
        name: what to call the set in messages and reports; not part of its content.

    Raises:
        UnreadableDataError: the tensors do not fit together.
    """

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    name: str = "images"

    def __post_init__(self) -> None:
        images, labels = self.images, self.labels
        if images.dtype != torch.uint8 or images.dim() != 4:
            raise UnreadableDataError(
                f"{self.name}: images are {images.dtype} {tuple(images.shape)}; "
                "needed: torch.uint8 (images, channels, height, width)"
            )
        if labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
            raise UnreadableDataError(
                f"{self.name}: labels are {labels.dtype} {tuple(labels.shape)}; "
                f"needed: torch.int64 ({len(images)},), one for each image"
            )
        if images.numel() == 0:
            raise UnreadableDataError(
                f"{self.name}: no pixels, shape {tuple(images.shape)}; needed: at least one image"
            )
        low, high = (int(each) for each in labels.aminmax())
        if low < 0 or high >= len(self.classes):
            raise UnreadableDataError(
                f"{self.name}: labels run from {low} to {high}; "
                f"needed: 0 to {len(self.classes) - 1}, indices of its {len(self.classes)} classes"
            )

    def __len__(self) -> int:
        return len(self.images)

    def require_classes(self, least: int = 2) -> "ImageSet":
        """This set, once it is known to have images of at least `least` classes.

        Raises:
            UnreadableDataError: it has fewer, and nothing can be learnt or measured on it.
        """
        present = self.labels.unique().numel()
        if present < least:
            raise UnreadableDataError(
                f"{self.name} has images of {present} class; needs at least "
                f"{'two' if least == 2 else least} classes: "
                "check the labels, or add images of other classes"
            )
        return self

    def to(self, device: torch.device | str) -> "ImageSet":
        """The same set with its tensors on `device`, still uint8."""
        return replace(self, images=self.images.to(device), labels=self.labels.to(device))

    def subset(self, indices: Tensor) -> "ImageSet":
        """The images at `indices`, in that order."""
        chosen = indices.to(self.images.device)
        return replace(self, images=self.images.index_select(0, chosen), labels=self.labels[chosen])

    def split(self, fraction: float, *, seed: int) -> tuple["ImageSet", "ImageSet"]:
        """Training and validation set: a random `fraction` of the images goes to validation.

        The same seed gives the same split on every machine.

        Raises:
            UnreadableDataError: one of the two would be empty.
        """
        held_out = round(fraction * len(self))
        if not 0 < held_out < len(self):
            raise UnreadableDataError(
                f"{self.name} has {len(self)} images and a fraction of {fraction} was asked for "
                "validation; needed: at least one image on either side"
            )
        order = torch.randperm(len(self), generator=generator_for("split", seed))
        return self.subset(order[held_out:].sort()[0]), self.subset(order[:held_out].sort()[0])

    def at_most(self, count: int | None, *, seed: int) -> "ImageSet":
        """A random choice of `count` of the images; all of them where there are no more, or None.

        Raises:
            UnreadableDataError: `count` is below 1.
        """
        if count is None or count >= len(self):
            return self
        if count < 1:
            raise UnreadableDataError(f"{count} images were asked for; needed: at least 1")
        order = torch.randperm(len(self), generator=generator_for("at most", seed))
        return self.subset(order[:count].sort()[0])

    def sample(self, count: int, *, seed: int) -> "ImageSet":
        """A random choice of `count` of the images, in random order; all where there are no more.

        Raises:
            UnreadableDataError: `count` is below 1.
        """
        if count < 1:
            raise UnreadableDataError(f"{count} images were asked for; needed: at least 1")
        order = torch.Generator().manual_seed(seed)
        return self.subset(torch.randperm(len(self), generator=order)[:count])

    def resized(self, size: int) -> "ImageSet":
        """The square in the middle of every image, scaled to `size` pixels (bicubic).

        Raises:
            UnreadableDataError: `size` is below 1.
        """
        if size < 1:
            raise UnreadableDataError(f"size is {size} pixels; needed: at least 1")
        height, width = self.images.shape[2:]
        if height == width == size:
            return self
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        middle = self.images[:, :, top : top + side, left : left + side]
        pieces = []
        for chunk in middle.split(_CHUNK):
            pixels = F.interpolate(chunk.float(), (size, size), mode="bicubic", antialias=True)
            pieces.append(pixels.round_().clamp_(0, 255).to(torch.uint8))
        return replace(self, images=torch.cat(pieces))

    def with_channels(self, channels: int) -> "ImageSet":
        """The same images in grey (1 channel, ITU-R 601 luma) or in colour (3, grey repeated).

        Raises:
            UnreadableDataError: there is no such conversion.
        """
        present = self.images.shape[1]
        if channels == present:
            return self
        if (present, channels) == (1, 3):
            return replace(self, images=self.images.expand(-1, 3, -1, -1).contiguous())
        if (present, channels) == (3, 1):
            red, green, blue = self.images.int().unbind(1)
            grey = (19595 * red + 38470 * green + 7471 * blue + 32768) >> 16
            return replace(self, images=grey.to(torch.uint8).unsqueeze(1))
        raise UnreadableDataError(
            f"{self.name} has {present} channels and {channels} were asked for; "
            "there are conversions between 1 and 3"
        )

    def digest(self) -> str:
        """SHA-256 of type, shape and values of images and labels, in hex; names play no part."""
        hashed = hashlib.sha256()
        for tensor in (self.images, self.labels):
            values = tensor.cpu().contiguous()
            hashed.update(f"{values.dtype} {tuple(values.shape)}\n".encode())
            hashed.update(values.numpy().astype(values.numpy().dtype.newbyteorder("<")).data)
        return hashed.hexdigest()


@final
@dataclass(frozen=True, slots=True)
class Normalisation:
    """(x/255 − mean) / std, channel by channel; mean and std in units of the range 0 to 1."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.mean) != len(self.std) or not all(each > 0 for each in self.std):
            raise UnreadableDataError(
                f"mean is {self.mean} and std is {self.std}; "
                "needed: one of each for every channel, and every std above 0"
            )

    def __call__(self, pixels: Tensor) -> Tensor:
        """float32 (batch channels height width) of uint8 pixels, on the device they are on.

        Raises:
            UnreadableDataError: the images have another number of channels.
        """
        if pixels.shape[-3] != len(self.mean):
            raise UnreadableDataError(
                f"images have {pixels.shape[-3]} channels, but the normalisation has "
                f"{len(self.mean)}; read the images with channels={len(self.mean)}"
            )
        mean, std = _columns(self, pixels.device)
        if pixels.is_cpu and _has_channels_last(pixels):
            return _by_rows(pixels, mean, std)
        return torch.sub(pixels, mean).div_(std)

    @classmethod
    def measured(cls, data: ImageSet) -> "Normalisation":
        """Mean and standard deviation of every channel of `data`; a constant channel gets std 1."""
        pixels = data.images.transpose(0, 1).flatten(1)
        counts = torch.stack([channel.int().bincount(minlength=256) for channel in pixels]).double()
        values = torch.arange(256, dtype=torch.float64, device=counts.device) / 255
        share = counts / counts.sum(1, keepdim=True)
        mean = share @ values
        std = (share * (values - mean[:, None]) ** 2).sum(1).sqrt()
        std = torch.where(std > 0, std, torch.ones_like(std))
        return cls(tuple(mean.tolist()), tuple(std.tolist()))


CIFAR10 = Normalisation((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
"""What the paper's code of 2019 used; the std is the mean of the images' own, not the data's."""

IMAGENET = Normalisation((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""What torchvision's weights expect."""


def _has_channels_last(pixels: Tensor) -> bool:
    last = pixels.dim() == 4 and pixels.is_contiguous(memory_format=torch.channels_last)
    return last and not pixels.is_contiguous()


def _by_rows(pixels: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    # A CPU takes three times as long to go through mean and std anew for each pixel, as it must
    # where channels lie innermost; and a few images at a time stay in its cache between the two.
    count, channels, height, width = pixels.shape
    rows = pixels.permute(0, 2, 3, 1).reshape(count, height, width * channels)
    means, stds = (each.flatten().repeat(width) for each in (mean, std))
    normalised = torch.empty(rows.shape, device=pixels.device)
    for some, place in zip(rows.split(4), normalised.split(4), strict=True):
        torch.sub(some, means, out=place).div_(stds)
    return normalised.view(count, height, width, channels).permute(0, 3, 1, 2)


@functools.lru_cache(maxsize=32)
def _columns(normalisation: Normalisation, device: torch.device) -> tuple[Tensor, Tensor]:
    # Kept, because a copy to the device in every step would make the device wait. Not made in
    # inference mode: such tensors could not be used in training afterwards.
    with torch.inference_mode(False):
        mean, std = torch.tensor([normalisation.mean, normalisation.std], device=device) * 255
        return mean[:, None, None], std[:, None, None]


def generator_for(purpose: str, *numbers: int) -> torch.Generator:
    """The CPU generator for one purpose at one place: equal numbers give equal streams."""
    # A digest and not seed + step: neighbouring seeds must not share each other's streams.
    text = f"nnpassport {purpose} {' '.join(map(str, numbers))}"
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
    return torch.Generator().manual_seed(seed)
