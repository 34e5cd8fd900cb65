"""Residual networks under torchvision's attribute names, so that its weights load.

[He16] He, Zhang, Ren, Sun: Deep Residual Learning for Image Recognition, CVPR 2016.
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

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
RESIDUALS = ("standard", "relu-before-addition")


class Style(NamedTuple):
    """What every block of one network has in common."""

    norm: str
    residual: str

    def last(self) -> nn.Module:
        """What a branch ends with before the addition: nothing, or the ReLU of the paper's code."""
        return nn.Identity() if self.residual == "standard" else nn.ReLU(inplace=True)


class BasicBlock(nn.Module):
    """Two 3×3 convolutions and a shortcut around them."""

    expansion = 1

    def __init__(self, inputs: int, planes: int, stride: int, style: Style) -> None:
        super().__init__()
        norm = style.norm
        self.conv1 = convolution(inputs, planes, 3, norm=norm, stride=stride, padding=1)
        self.bn1 = NORMS[norm](planes)
        self.conv2 = convolution(planes, planes, 3, norm=norm, padding=1)
        self.bn2 = NORMS[norm](planes)
        self.relu = nn.ReLU(inplace=True)
        self.last = style.last()
        self.downsample = _shortcut(inputs, planes, stride, style)

    def forward(self, x: Tensor) -> Tensor:
        """The block applied to x."""
        branch = self.relu(self.bn1(self.conv1(x)))
        branch = self.last(self.bn2(self.conv2(branch)))
        return self.relu(branch + self.downsample(x))


class Bottleneck(nn.Module):
    """1×1, 3×3 (which strides, as in torchvision) and 1×1 convolutions and a shortcut."""

    expansion = 4

    def __init__(self, inputs: int, planes: int, stride: int, style: Style) -> None:
        super().__init__()
        norm, outputs = style.norm, planes * self.expansion
        self.conv1 = convolution(inputs, planes, 1, norm=norm)
        self.bn1 = NORMS[norm](planes)
        self.conv2 = convolution(planes, planes, 3, norm=norm, stride=stride, padding=1)
        self.bn2 = NORMS[norm](planes)
        self.conv3 = convolution(planes, outputs, 1, norm=norm)
        self.bn3 = NORMS[norm](outputs)
        self.relu = nn.ReLU(inplace=True)
        self.last = style.last()
        self.downsample = _shortcut(inputs, outputs, stride, style)

    def forward(self, x: Tensor) -> Tensor:
        """The block applied to x."""
        branch = self.relu(self.bn1(self.conv1(x)))
        branch = self.relu(self.bn2(self.conv2(branch)))
        branch = self.last(self.bn3(self.conv3(branch)))
        return self.relu(branch + self.downsample(x))


def _shortcut(inputs: int, outputs: int, stride: int, style: Style) -> nn.Module:
    if stride == 1 and inputs == outputs:
        return nn.Identity()
    return nn.Sequential(
        convolution(inputs, outputs, 1, norm=style.norm, stride=stride),
        NORMS[style.norm](outputs),
        style.last(),
    )


class ResNet(nn.Module):
    """A stem, four stages of residual blocks, a global average and one linear layer.

    Takes images of any size of at least 32 pixels. `stem` is "cifar" (3×3, stride 1, no pool) or
    "imagenet" (7×7, stride 2, max-pool). `residual` is "standard" [He16] or
    "relu-before-addition": a ReLU also ends each branch before the addition, as in the code that
    was published with the paper (and not in the paper).

    Raises:
        ValueError: an argument is not one of the allowed values.
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        depths: Sequence[int],
        classes: int = 10,
        *,
        norm: str = "batch",
        stem: str = "cifar",
        residual: str = "standard",
        channels: int = 3,
        width: float = 1.0,
    ) -> None:
        super().__init__()
        check_choice("norm", norm, NORMS)
        check_choice("stem", stem, STEMS)
        check_choice("residual", residual, RESIDUALS)
        check_sizes(classes=classes, channels=channels, width=width)
        style = Style(norm, residual)
        planes = [scaled(each, width) for each in (64, 128, 256, 512)]
        outputs = [each * block.expansion for each in planes]
        large = stem == "imagenet"
        self.conv1 = convolution(
            channels,
            planes[0],
            7 if large else 3,
            norm=norm,
            stride=2 if large else 1,
            padding=3 if large else 1,
        )
        self.bn1 = NORMS[norm](planes[0])
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1) if large else nn.Identity()

        def stage(index: int, inputs: int, stride: int) -> nn.Sequential:
            blocks = [block(inputs, planes[index], stride, style)]
            for _ in range(1, depths[index]):
                blocks.append(block(outputs[index], planes[index], 1, style))
            return nn.Sequential(*blocks)

        self.layer1 = stage(0, planes[0], 1)
        self.layer2 = stage(1, outputs[0], 2)
        self.layer3 = stage(2, outputs[1], 2)
        self.layer4 = stage(3, outputs[2], 2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(outputs[3], classes)
        initialise(self)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (batch classes) of normalised images (batch channels height width)."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(self.avgpool(x).flatten(1))


resnet18 = partial(ResNet, BasicBlock, (2, 2, 2, 2))
"""Eight basic blocks. The paper's passport layers are all of `layer4`: 2560 channels."""
resnet50 = partial(ResNet, Bottleneck, (3, 4, 6, 3))
"""Sixteen bottleneck blocks."""
