"""AlexNet as the paper trains it on 32-pixel images, and its ImageNet form."""

from torch import Tensor, nn

from nnpassport.embedding.network.models.norms import (
    NORMS,
    check_choice,
    check_sizes,
    convolution,
    initialise,
    scaled,
)

STEMS = ("cifar", "imagenet")


class AlexNet(nn.Module):
    """Five convolutions, each followed by a norm and a ReLU, and a classifier.

    Convolutions sit at `features.0`, `.4`, `.8`, `.11` and `.14`, their norms one further, whatever
    the norm and the stem: the paper's passport layers are always `features.8`, `.11` and `.14`
    (384 + 256 + 256 = 896 channels). "cifar" takes 32-pixel images and has one linear layer;
    "imagenet" takes 224-pixel images and has dropout and three.

    Raises:
        ValueError: an argument is not one of the allowed values.
    """

    def __init__(
        self,
        classes: int = 10,
        *,
        norm: str = "batch",
        stem: str = "cifar",
        channels: int = 3,
        width: float = 1.0,
    ) -> None:
        super().__init__()
        check_choice("norm", norm, NORMS)
        check_choice("stem", stem, STEMS)
        check_sizes(classes=classes, channels=channels, width=width)
        large = stem == "imagenet"
        pool = 3 if large else 2
        first = {"stride": 4, "padding": 2} if large else {"stride": 1, "padding": 2}
        widths = [scaled(each, width) for each in (64, 192, 384, 256, 256)]

        def block(index: int, inputs: int, kernel: int, **geometry: int) -> list[nn.Module]:
            outputs = widths[index]
            return [
                convolution(inputs, outputs, kernel, norm=norm, **geometry),
                NORMS[norm](outputs),
                nn.ReLU(inplace=True),
            ]

        self.features = nn.Sequential(
            *block(0, channels, 11 if large else 5, **first),
            nn.MaxPool2d(pool, stride=2),
            *block(1, widths[0], 5, padding=2),
            nn.MaxPool2d(pool, stride=2),
            *block(2, widths[1], 3, padding=1),
            *block(3, widths[2], 3, padding=1),
            *block(4, widths[3], 3, padding=1),
            nn.MaxPool2d(pool, stride=2),
        )
        self.pool = nn.AdaptiveAvgPool2d(6) if large else nn.Identity()
        self.classifier = _classifier(widths[4], classes, scaled(4096, width) if large else None)
        initialise(self)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (batch classes) of normalised images (batch channels height width)."""
        return self.classifier(self.pool(self.features(images)).flatten(1))


def _classifier(inputs: int, classes: int, hidden: int | None) -> nn.Module:
    if hidden is None:
        return nn.Linear(inputs * 4 * 4, classes)
    return nn.Sequential(
        nn.Dropout(),
        nn.Linear(inputs * 6 * 6, hidden),
        nn.ReLU(inplace=True),
        nn.Dropout(),
        nn.Linear(hidden, hidden),
        nn.ReLU(inplace=True),
        nn.Linear(hidden, classes),
    )


alexnet = AlexNet
"""The paper's; `width` scales every hidden layer, in whole multiples of 16 channels."""
