"""The paper's own passports: random tensors, and activations of images in a plain network.

They are chosen and not derived, so a key made of them has no p-value; they are here so that the
paper's experiments can be repeated and its attacks measured. [Fan19, sect. 3.1]
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from nnpassport.embedding.network.modes import evaluated, hooked
from nnpassport.keys.key import Key
from nnpassport.scheme import UnsuitableModelError

Passports = Mapping[str, Tensor]


def with_passports(
    key: Key, passports: Passports, rng: torch.Generator, *, keep_bits: bool = False
) -> Key:
    """The same key on other passports, (2 in *space) by layer, with bits drawn from `rng`.

    `keep_bits` keeps the key's own (derived, or spelling its text) instead.
    """
    context = key.context
    layers = tuple(
        layer._replace(passport=tuple(passports[layer.name].shape[1:])) for layer in context.layers
    )
    if keep_bits:
        signs = {layer.name: key.layer_signs(layer.name) for layer in context.layers}
    else:
        signs = {layer.name: random_signs(layer.length, rng) for layer in context.layers}
    tensors = {name: passport.detach().cpu().float() for name, passport in passports.items()}
    return replace(
        key, context=replace(context, layers=layers), text=None, passports=tensors, signs=signs
    )


def random_signs(channels: int, rng: torch.Generator) -> Float[Tensor, " channels"]:
    """Independent fair bits, ±1."""
    return torch.randint(2, (channels,), generator=rng).float() * 2 - 1


def random_passports(key: Key, rng: torch.Generator) -> dict[str, Tensor]:
    """Uniform on (−1, 1), as large as the key's own passports: the paper's "random" mode."""
    return {
        layer.name: torch.rand((2, *layer.passport), generator=rng) * 2 - 1
        for layer in key.context.layers
    }


def image_passports(
    plain: nn.Module,
    layers: Sequence[str],
    image_gamma: Float[Tensor, "1 channel *size"],
    image_beta: Float[Tensor, "1 channel *size"],
) -> dict[str, Tensor]:
    """What one image for γ and one for β look like on their way into each layer."""
    gamma = layer_inputs(plain, layers, image_gamma)
    beta = layer_inputs(plain, layers, image_beta)
    return {name: torch.cat([gamma[name], beta[name]]) for name in gamma}


def shuffled_passports(
    plain: nn.Module,
    layers: Sequence[str],
    images_gamma: Float[Tensor, "images channel *size"],
    images_beta: Float[Tensor, "images channel *size"],
    rng: torch.Generator,
    *,
    batch_statistics: bool = False,
) -> dict[str, Tensor]:
    """Activations of several images, their channels shuffled and mixed across the images.

    Channel slot s takes a channel of image s mod n that this image has not given before; the paper
    uses n = 20 images for γ and 20 others for β. Draw them from training data: the paper's code
    takes test images, which then select and score the network too. `batch_statistics` runs the
    plain network in training mode, as that code does by oversight; its statistics are restored.
    """
    gamma = layer_inputs(plain, layers, images_gamma, batch_statistics=batch_statistics)
    beta = layer_inputs(plain, layers, images_beta, batch_statistics=batch_statistics)
    return {
        name: torch.stack([_shuffled(gamma[name], rng), _shuffled(beta[name], rng)])
        for name in gamma
    }


def layer_inputs(
    plain: nn.Module,
    layers: Sequence[str],
    images: Float[Tensor, "images channel *size"],
    *,
    batch_statistics: bool = False,
) -> dict[str, Tensor]:
    """Inputs (images in *space) of the named layers of `plain`, which is left as it was.

    Raises:
        UnsuitableModelError: the network has no such layer.
    """
    modules = dict(plain.named_modules())
    missing = [name for name in layers if name not in modules]
    if missing:
        raise UnsuitableModelError(
            f"the plain network has no layer {missing[0]!r}; needed: a network of the same "
            f"architecture as the one to protect; its layers: {', '.join(filter(None, modules))}"
        )
    inputs: dict[str, Tensor] = {}
    state = {name: value.clone() for name, value in plain.state_dict().items()}
    handles = [modules[name].register_forward_pre_hook(_note(name, inputs)) for name in layers]
    try:
        with hooked(*handles), evaluated(plain), torch.no_grad():
            plain.train(batch_statistics)
            plain(images)
    finally:
        plain.load_state_dict(state)
    return {name: _positions_last(inputs[name], modules[name]) for name in layers}


def _note(name: str, inputs: dict[str, Tensor]) -> Callable[..., None]:
    def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
        inputs[name] = args[0].detach().clone()

    return hook


def _positions_last(values: Tensor, layer: nn.Module) -> Tensor:
    if not isinstance(layer, nn.Linear):
        return values
    # A Linear's passport is (in positions); its input is (batch in) or (batch positions in).
    return values.unsqueeze(-1) if values.dim() == 2 else values.flatten(1, -2).transpose(1, 2)


def _shuffled(activations: Tensor, rng: torch.Generator) -> Tensor:
    images, channels = activations.shape[:2]
    orders = [torch.randperm(channels, generator=rng) for _ in range(images)]
    return torch.stack(
        [activations[s % images, orders[s % images][s // images]] for s in range(channels)]
    )
