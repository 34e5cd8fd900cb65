"""DeepSigns in white box: bits in what a network makes of secret pictures.

[Rou19] Rouhani, Chen, Koushanfar: DeepSigns, ASPLOS 2019 (arXiv 1804.00750), and the authors' code,
github.com/Bitadr/DeepSigns.

*White box.* There, activations of a layer are taken for a mixture of Gaussians, one for each class.
Some training images of a few classes are the key (1 % of these), and bits are read off the means μ
of their activations through a random projection A: b̂ = [σ(μ·A) > ½]. Training adds
λ₁·(Σ‖μ_i − f_i‖² − Σ‖μ_i − μ_j‖²), which pulls activations to their centre and centres apart, and
λ₂·CE(b, σ(μ·A)). The mark is found if no bit is wrong.

Here, pictures are in the key as they are, in groups of 16; each group is of one class, which the
key does not say. Bits and projection are derived from the seed and the digest of the pictures, so
that Binomial(n, ½) is exact although the owner chose the pictures. What is ours beside that:

- A row of the projection for each bit of each group, where the paper has one A for all of them.
- The centres are the means of the key's pictures themselves, in every step: there is nothing to
  train but the network, and V reads what E has pulled. A step sees whole groups, in turn.
- Of the first term, the quotient: the difference has no lower bound.
- Rows and means are divided by their lengths before σ. No sign depends on it, and λ₂ means the same
  in every layer.

Activations are taken where a layer receives them, by default the last linear one: these are of the
last hidden layer, as in the authors' demonstration, behind norm and nonlinearity. So whatever norms
take out, such as the scale or the sign of filters in front of them, changes no bit. Moved channels
do: they cannot be put back, since the mark is not in the weights. V runs in evaluation mode on
fixed pictures, and the mean does not depend on how they are batched.

The paper's black box is in `deepsigns_blackbox`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, final

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from nnpassport.data.images import ImageSet, Normalisation
from nnpassport.embedding.network.equations import HOSTS, filters, geometry_of, is_matrix
from nnpassport.embedding.network.layers import Branch, on_branch
from nnpassport.embedding.network.modes import hooked
from nnpassport.embedding.network.outputs import Example, call, part_of, tensors_in, unwrapped
from nnpassport.embedding.network.survey import refuse_wrapped
from nnpassport.embedding.network.tensors import as_array
from nnpassport.embedding.schemes import mark
from nnpassport.embedding.schemes.engine import Carriers, Mark, Step
from nnpassport.embedding.schemes.pictures import generator_of, shuffled
from nnpassport.embedding.schemes.seen import listening
from nnpassport.embedding.schemes.triggered import with_pictures
from nnpassport.embedding.schemes.triggers import (
    mixing,
    taking,
    trigger_batch,
    trigger_shape,
)
from nnpassport.embedding.schemes.uchida import cross_entropy
from nnpassport.keys.context import LayerShape
from nnpassport.keys.counts import Counts, counted
from nnpassport.keys.derive import triggers_of
from nnpassport.keys.key import Key
from nnpassport.keys.validity import GROUP
from nnpassport.scheme import (
    BadRecipeError,
    Batch,
    Part,
    UnreadableDataError,
    UnreadableKeyError,
    UnsuitableModelError,
)

SHARPNESS = 4.0
"""By which √features·cos(row, mean) is multiplied before σ; unmarked it is about normal, σ = 1."""


@final
@dataclass(frozen=True, slots=True)
class DeepSigns(Mark):
    """Bits b = [A·μ > 0], μ the mean activations of a group of secret pictures.          [Rou19]

    Attributes:
        name: as in keys and on the command line.
        groups: of pictures, each of 16 of one class.
        bits: in the mean of each group.
        groups_per_step: how many groups each training step sees beside its images.
        clustering: λ₁, factor on the spread of activations within groups over that of their means.
        strength: λ₂, factor on the sum of cross-entropies over the bits that the step sees.
        threshold: share of the bits that must match by the published rule.
    """

    name: str
    groups: int = 8
    bits: int = 32
    groups_per_step: int = 2
    clustering: float = 0.01
    strength: float = 0.01
    threshold: float = 1.0

    def __post_init__(self) -> None:
        if min(self.groups, self.bits) < 1 or not 1 <= self.groups_per_step <= self.groups:
            raise BadRecipeError(
                f"{self.groups} groups of {self.bits} bits, {self.groups_per_step} of them a step; "
                "needed: at least one of each, and no more groups a step than there are"
            )

    # Nobody is asked for the classes of the pictures, so they are no trigger set.
    reads_weights = False
    parts = frozenset({"activations"})

    def carriers(
        self, model: nn.Module, example: Example, layers: Sequence[str] | None
    ) -> Carriers:
        """Pictures, which `prepared` chooses, and one layer: the bits are in what it receives.

        By default it is the last linear layer (or the last convolution of a network without any).

        Raises:
            UnsuitableModelError: not one layer, or the network takes no images.
        """
        shape = _carrier(self.name, model, example, layers, self.groups * self.bits)
        return Carriers((shape,), trigger_shape(self.groups * GROUP, model, example))

    def prepared(self, key: Key, model: nn.Module, data: ImageSet, normalise: Normalisation) -> Key:
        """The key with its pictures; the network is not asked.

        Raises:
            UnreadableDataError: there are too few images of one class each.
            UnreadableKeyError: they have another size than the key's pictures.
        """
        if key.trigger_images is not None:
            return key
        return with_pictures(key, data.images[_grouped(key, data)])

    def check(self, model: nn.Module, key: Key, example: Example) -> None:
        """Refuse a key for another network, or one that has no pictures yet."""
        mark.check_has_pictures(key)
        mark.check_triggers(key, model, example)
        layout = _layout(key)
        heard = _heard(model, example).get(layout.layer.name)
        _activations([] if heard is None else [heard], layout.layer)

    def steps_of(
        self, key: Key, steps: int, normalise: Normalisation | None
    ) -> Callable[[nn.Module, Batch], Step]:
        """The network on images and pictures, whose answers are part of no loss.

        It adds λ₁·(spread of activations within groups ÷ between).
        """
        mark.check_has_pictures(key)
        layout, count = _layout(key), self.groups_per_step * GROUP
        mix = mixing(trigger_batch(key, normalise), count)

        def run(model: nn.Module, batch: Batch) -> Step:
            nonlocal layout
            images = len(tensors_in(batch.images)[0])
            shown = mix(batch._replace(labels=torch.zeros(images)))
            with listening(unwrapped(model).get_submodule(layout.layer.name)) as heard:
                output = part_of(call(model, shown.images), 0, images)
            features = _activations(heard, layout.layer)[images:]
            layout = layout.to(features.device)
            groups = _groups_of(batch.step, count, batch.part, len(layout.rows))
            # Full precision even under autocast, as for passports.
            with torch.autocast(features.device.type, enabled=False):
                heard_of = _heard_of(features.float(), groups, layout)
            clustering = self.clustering * heard_of.clustering
            return Step(((output, batch.labels),), heard_of.signals, heard_of.signs, clustering)

        return run

    def term(
        self, signals: Float[Tensor, " bits"], signs: Float[Tensor, " bits"]
    ) -> Float[Tensor, ""]:
        """λ₂·Σ BCE(σ(A·μ), b)."""
        return self.strength * cross_entropy(signals, signs)

    def observe(self, model: nn.Module, key: Key, normalise: Normalisation) -> Counts:
        """Derived bits match an independent network as Binomial(n, ½): exact.

        The network is run in evaluation mode, and is left as it was.

        Raises:
            UnsuitableModelError: the layer is missing or receives something of another shape.
            UnreadableKeyError: the key has no pictures yet.
        """
        (layer,) = key.context.layers
        return counted(
            "bits of mean activations", key, layer, as_array(read_out(model, key, normalise))
        )


def read_out(model: nn.Module, key: Key, normalise: Normalisation) -> Float[Tensor, " bits"]:
    """A·μ of every group, in float64; its signs are the bits.

    Raises:
        UnsuitableModelError: the layer is missing or receives something of another shape.
        UnreadableKeyError: the key has no pictures yet.
    """
    # Group by group: in float64 the projection takes three times what it is kept in.
    pairs = zip(_layout(key).rows, group_means(model, key, normalise), strict=True)
    return torch.cat([rows.double() @ mean for rows, mean in pairs])


def group_means(
    model: nn.Module, key: Key, normalise: Normalisation
) -> Float[Tensor, "groups features"]:
    """μ: mean activations of each group of the key's pictures, in float64 on the CPU.

    The network is run in evaluation mode, group by group, and is left as it was.

    Raises:
        UnsuitableModelError: the layer is missing or receives something of another shape.
        UnreadableKeyError: the key has no pictures yet.
    """
    mark.check_has_pictures(key)
    layer = _layout(key).layer
    like = next(model.parameters())
    means = []
    for pictures in key.trigger_set()[0].split(GROUP):
        with taking(key):
            heard = _heard(model, normalise(pictures.to(like.device)).to(like.dtype))
        received = heard.get(layer.name)
        activations = _activations([] if received is None else [received], layer)
        means.append(activations.cpu().double().mean(0))
    return torch.stack(means)


class _Layout(NamedTuple):
    """What a key says of its bits, by group."""

    layer: LayerShape
    rows: Float[Tensor, "groups bits features"]
    signs: Float[Tensor, "groups bits"]

    def to(self, device: torch.device) -> "_Layout":
        return self._replace(rows=self.rows.to(device), signs=self.signs.to(device))


class _Heard(NamedTuple):
    """What a step's pictures say of the bits, and how their activations lie together."""

    clustering: Float[Tensor, ""]
    signals: Float[Tensor, " bits"]
    signs: Float[Tensor, " bits"]


def _layout(key: Key) -> _Layout:
    """The projection and the bits of each group, in the order of the pictures.

    Raises:
        UnreadableKeyError: pictures or bits are no whole number of groups.
    """
    count, layers = triggers_of(key.context).count, key.context.layers
    groups = count // GROUP
    bits = layers[0].length if len(layers) == 1 else 0
    if count % GROUP or not bits or bits % groups:
        raise UnreadableKeyError(
            f"the key of {key.context.scheme} has {count} pictures and {bits} bits in "
            f"{len(layers)} layers; needed: groups of {GROUP} pictures, as many bits in each, and "
            "one layer; draw a key with this scheme's draw_key"
        )
    rows = key.layer_projection(layers[0].name).unflatten(0, (groups, -1))
    return _Layout(layers[0], rows, key.layer_signs(layers[0].name).unflatten(0, (groups, -1)))


def _grouped(key: Key, data: ImageSet) -> Int64[Tensor, " pictures"]:
    """Places of the key's pictures among the images, group after group, drawn by its secret.

    Groups take the classes in turn, as far as each has images.
    """
    groups, order = triggers_of(key.context).count // GROUP, shuffled(key, data)
    classes = generator_of(key, "carrier-classes").permutation(len(data.classes)).tolist()
    labels = data.labels.cpu()[order]
    places = [order[labels == each].split(GROUP) for each in classes]
    rounds = range(max(len(each) for each in places))
    found = [each[turn] for turn in rounds for each in places if len(each) > turn]
    whole = [each for each in found if len(each) == GROUP]
    if len(whole) < groups:
        raise UnreadableDataError(
            f"{data.name} has images for {len(whole)} groups of {GROUP} of one class, and the key "
            f"has {groups}; needed: one for each; give more images, or set fewer groups"
        )
    return torch.cat(whole[:groups])


def _carrier(
    scheme: str, model: nn.Module, example: Example, layers: Sequence[str] | None, bits: int
) -> LayerShape:
    """The layer off whose input `bits` bits are read: the named one, or the last linear one.

    Raises:
        UnsuitableModelError: not one layer that runs, once.
    """
    refuse_wrapped(model)
    heard = _heard(model, example)
    modules = {name: model.get_submodule(name) for name in heard}
    if layers is None:
        linear = [name for name, module in modules.items() if geometry_of(module).axes == 0]
        chosen = (linear or list(modules))[-1:]
    else:
        chosen = [name for name in modules if name in set(layers)]
    if len(chosen) != 1 or len(set(layers or chosen)) != 1:
        raise UnsuitableModelError(
            f"{scheme} reads bits off what one layer receives, and {len(chosen)} were found; "
            f"needed: the name of one: {', '.join(modules) or 'none runs exactly once'}"
        )
    (name,) = chosen
    geometry = geometry_of(modules[name])
    weight = tuple(filters(modules[name].get_parameter("weight"), geometry).shape)
    inputs = heard[name]
    received = tuple(inputs.shape[1:]) if geometry.axes else (inputs.shape[-1], 1)
    return LayerShape(name, weight, received, geometry, bits)


def _heard(model: nn.Module, example: Example) -> dict[str, Tensor]:
    """What each layer receives that runs exactly once on `example`, in the order they run.

    In evaluation mode and without gradients; the network is left as it was.
    """
    heard: dict[str, list[Tensor]] = {}
    network = unwrapped(model)
    layers = {n: m for n, m in network.named_modules() if isinstance(m, HOSTS) or is_matrix(m)}

    def noting(name: str) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            heard.setdefault(name, []).append(next(iter((*args, *kwargs.values()))).detach())

        return hook

    handles = [
        layer.register_forward_pre_hook(noting(name), with_kwargs=True)
        for name, layer in layers.items()
    ]
    with hooked(*handles), torch.no_grad(), on_branch(network, Branch.PUBLIC):
        call(network, example)
    return {name: found[0] for name, found in heard.items() if len(found) == 1}


def _activations(heard: Sequence[Tensor], layer: LayerShape) -> Float[Tensor, "pictures features"]:
    """A vector for each picture: all that a convolution receives; of positions the mean.

    Raises:
        UnsuitableModelError: the layer did not run, or received something of another shape.
    """
    inputs, *space = layer.passport
    fits = False
    if len(heard) == 1:
        got = tuple(heard[0].shape[1:])
        fits = got == (inputs, *space) if layer.geometry.axes else got[-1:] == (inputs,)
    if not fits:
        given = f"{[tuple(each.shape) for each in heard]}" if heard else "nothing (does it run?)"
        raise UnsuitableModelError(
            f"layer {layer.name!r} receives {given}, and the key was made for {inputs} channels"
            f"{f' of {tuple(space)}' if layer.geometry.axes else ''}, once in a forward; needed: a "
            "network of the owner's architecture, not compiled"
        )
    if layer.geometry.axes or heard[0].dim() == 2:
        return heard[0].flatten(1)
    return heard[0].flatten(1, -2).mean(1)


def _groups_of(step: int, count: int, part: Part, groups: int) -> list[int]:
    """Which group each of the pictures that `mixed` shows this part of a step belongs to."""
    places = range(part.index, count, part.of)
    return [(step * count + place) % (groups * GROUP) // GROUP for place in places]


def _heard_of(
    features: Float[Tensor, "pictures features"], groups: Sequence[int], layout: _Layout
) -> _Heard:
    # Counted here and not on the device, which would be waited for.
    shown = sorted(set(groups))
    member = torch.tensor([shown.index(group) for group in groups]).to(features.device)
    sizes = torch.tensor([groups.count(group) for group in shown])[:, None].to(features.device)
    means = features.new_zeros(len(shown), features.shape[1]).index_add(0, member, features) / sizes
    rows, signs = (each[torch.tensor(shown).to(each.device)] for each in layout[1:])
    # Both of length one, so that the scale of activations decides nothing.
    read = torch.einsum("gbf,gf->gb", F.normalize(rows, dim=2), F.normalize(means, dim=1))
    sharp = SHARPNESS * features.shape[1] ** 0.5
    within = (features - means[member]).square().sum(1).mean()
    apart = (means - means.mean(0)).square().sum(1).mean()
    # One group alone has nothing to be kept apart from.
    clustering = within / apart.clamp(min=1e-6) if len(shown) > 1 else torch.zeros_like(within)
    return _Heard(clustering, (sharp * read).flatten(), signs.flatten())


DEEPSIGNS = DeepSigns("deepsigns")
"""256 bits: 2⁻¹⁰⁰ is reached with up to 46 of them lost."""
