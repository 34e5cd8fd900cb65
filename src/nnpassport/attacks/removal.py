"""Removal by training on: fine-tuning, transfer, fine-pruning, overwriting.

Each leaves the network that it was given as it was, and returns a changed copy in evaluation mode,
whose parameters require gradients where the originals do. What needs no data is in `perturbation`,
what needs only answers in `extraction`.

[Adi18] Adi, Baum, Cisse, Pinkas, Keshet: Turning Your Weakness Into a Strength: Watermarking Deep
        Neural Networks by Backdooring, USENIX Security 2018.
[Liu18] Liu, Dolan-Gavitt, Garg: Fine-Pruning: Defending Against Backdooring Attacks on Deep Neural
        Networks, RAID 2018.
"""

from collections.abc import Iterable, Mapping
from copy import deepcopy
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn

from nnpassport.attacks.outcome import Attacked, stopwatch
from nnpassport.attacks.perturbation import check_share, convolutions, least, silence
from nnpassport.data.images import ImageSet, Normalisation, evaluation_batches
from nnpassport.data.imageset import generator_for
from nnpassport.embedding.network.modes import hooked
from nnpassport.embedding.train.loop import Journal, Objective, Outcome, Recipe, classification, fit
from nnpassport.keys.key import Key
from nnpassport.scheme import BadRecipeError, Batch, UnsuitableModelError

TRANSFER = Recipe(epochs=50, batch=64, rate=0.01, schedule="constant")
"""The paper's transfer to another task: SGD with momentum 0.9 and weight decay 5e-4.

How long is not in the paper; 50 epochs stand in a file published with it, which its code ignores.
"""


class Form(NamedTuple):
    """What a fine-tuning keeps and what it trains.

    Attributes:
        new_head: the last linear layer starts anew ("RT" in the name), or is kept ("FT").
        whole: all layers are trained ("AL"), or the last linear one only ("LL").
    """

    new_head: bool
    whole: bool


FORMS: Mapping[str, Form] = {
    "ftll": Form(new_head=False, whole=False),
    "ftal": Form(new_head=False, whole=True),
    "rtll": Form(new_head=True, whole=False),
    "rtal": Form(new_head=True, whole=True),
}
"""The four forms of [Adi18]; the paper's transfer is RTAL."""


def fine_tune(
    model: nn.Module,
    data: ImageSet,
    recipe: Recipe = TRANSFER,
    *,
    normalise: Normalisation,
    form: str = "rtal",
    journal: Journal | None = None,
) -> Attacked:
    """Train on, for another task or once more for the same one.                          [Adi18]

    `form` is a key of `FORMS`. A new head has one output for each of `data.classes`. Where only the
    head is trained, the rest runs in evaluation mode: neither its weights nor its running
    statistics move.

    Raises:
        UnsuitableModelError: there is no head, or `form` keeps it and it has another number of
            outputs than `data` has classes.
        BadRecipeError: `form` is unknown.
    """
    stop = stopwatch("W, D")
    if form not in FORMS:
        raise BadRecipeError(f"form {form!r} is unknown; it is one of: {', '.join(FORMS)}")
    new_head, whole = FORMS[form]
    tuned = deepcopy(model)
    if new_head:
        _start_over(_head(tuned), len(data.classes), generator_for("new head", recipe.seed))
    else:
        _check_head(model, data)
    how = classification if whole else _classification_above
    trained = tuned.parameters() if whole else _head(tuned).parameters()
    train(tuned, trained, how, data, recipe, normalise=normalise, journal=journal)
    return Attacked(tuned, stop(len(data), recipe.epochs))


def fine_prune(
    model: nn.Module, data: ImageSet, recipe: Recipe, *, normalise: Normalisation, share: float
) -> Attacked:
    """Silence what clean images do not use, then fine-tune the rest.                      [Liu18]

    A backdoor is thought to sit in channels that clean images leave idle. Of the last convolution's
    channels the `share`, in [0, 1], goes whose output, after its norm and a ReLU, has the smallest
    mean over `data`. They stay silent while all else is trained with its head kept (FTAL). The
    original raises the share until accuracy falls; here it is given.

    Raises:
        BadRecipeError: `share` is not in [0, 1].
        UnsuitableModelError: there is no convolution before the last layer, or no head with one
            output for each class of `data`.
    """
    stop = stopwatch("W, D")
    check_share(share)
    _check_head(model, data)
    pruned = deepcopy(model).eval()
    example = normalise(data.images[:2]).to(next(pruned.parameters()))
    site = convolutions(pruned, example)[-1]
    last = site.layer if site.norm is None else pruned.get_submodule(site.norm)
    idle = least(_activity(pruned, last, data, normalise), share)
    silence(pruned, site, idle)

    def keep_silent(_module: nn.Module, _arguments: Any, output: Tensor) -> Tensor:
        return output.masked_fill(idle.view(-1, *[1] * (output.dim() - 2)).to(output.device), 0)

    # Where no ReLU follows at once, as in a residual branch, the shift would learn its way back.
    with hooked(last.register_forward_hook(keep_silent)):
        train(pruned, pruned.parameters(), classification, data, recipe, normalise=normalise)
    return Attacked(pruned, stop(len(data), recipe.epochs))


class Embeds(Protocol):
    """As much of a scheme as an attacker needs to put in a mark of his own."""

    def embed(
        self,
        model: nn.Module,
        key: Key,
        data: ImageSet,
        recipe: Recipe,
        *,
        normalise: Normalisation,
        trained: bool = False,
    ) -> object:
        """Train `model` in place until it carries `key`; `trained` says that it is already."""

    def released(self, model: nn.Module) -> nn.Module:
        """A plain copy of the marked network."""


def overwrite(
    model: nn.Module,
    scheme: Embeds,
    key: Key,
    data: ImageSet,
    recipe: Recipe,
    *,
    normalise: Normalisation,
    trained: bool = False,
) -> Attacked:
    """Embed a mark of the attacker's own with `scheme` and `key`, and release that network.

    With `trained` he starts from the network as it is: passports are grafted into it, and a recipe
    of no epochs does. It succeeds if the owner's mark is gone; that the attacker's is there proves
    nothing, since he can always train.
    """
    stop = stopwatch("W, D")
    marked = deepcopy(model).requires_grad_(True)
    scheme.embed(marked, key, data, recipe, normalise=normalise, trained=trained)
    released = scheme.released(marked).to(next(model.parameters()).device).eval()
    for name, parameter in model.named_parameters():
        released.get_parameter(name).requires_grad_(parameter.requires_grad)
    return Attacked(released, stop(len(data), recipe.epochs))


def with_head(model: nn.Module, original: nn.Module) -> nn.Module:
    """A copy of the attacked `model`, in evaluation mode, with the head of `original` plugged in.

    After a transfer the classes are others; the answers to the owner's triggers can be read with
    his own head only.                                                                     [Adi18]

    Raises:
        UnsuitableModelError: one of the two has no head, or they take other numbers of features.
    """
    plugged = deepcopy(model)
    head = _head(plugged)
    own = deepcopy(_head(original)).to(head.weight)
    if head.in_features != own.in_features:
        raise UnsuitableModelError(
            f"layer {last_linear(model)!r} takes {head.in_features} features and the original's "
            f"{last_linear(original)!r} takes {own.in_features}; needed: the same architecture"
        )
    head.weight, head.bias, head.out_features = own.weight, own.bias, own.out_features
    return plugged.eval()


def last_linear(model: nn.Module) -> str:
    """The head: dotted name of the last `nn.Linear` in the order of `named_modules`.

    Raises:
        UnsuitableModelError: there is none.
    """
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    if not names:
        raise UnsuitableModelError(
            f"{type(model).__name__} has no linear layer, and its head is the last one; "
            "needed: a network that ends in an nn.Linear"
        )
    return names[-1]


def train(
    model: nn.Module,
    parameters: Iterable[nn.Parameter],
    objective: Objective,
    data: ImageSet,
    recipe: Recipe,
    *,
    normalise: Normalisation,
    journal: Journal | None = None,
) -> None:
    """Train these parameters of `model` in place, frozen or not, and no others.

    Afterwards everything requires gradients as before; the network is in evaluation mode, and on
    the device where it was.
    """
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    device, chosen = before[0][0].device, {id(parameter) for parameter in parameters}
    for parameter, _ in before:
        parameter.requires_grad_(id(parameter) in chosen)
    fit(model, objective, data, recipe, normalise=normalise, journal=journal)
    model.to(device).eval()
    for parameter, required in before:
        parameter.requires_grad_(required)


def _classification_above(model: nn.Module, batch: Batch) -> Outcome:
    return classification(model.eval(), batch)  # every step: `fit` sets the mode in every epoch


def _head(model: nn.Module) -> nn.Linear:
    return cast(nn.Linear, model.get_submodule(last_linear(model)))


def _check_head(model: nn.Module, data: ImageSet) -> None:
    outputs, classes = _head(model).out_features, len(data.classes)
    if outputs != classes:
        raise UnsuitableModelError(
            f"layer {last_linear(model)!r} has {outputs} outputs and is kept, but {data.name} has "
            f"{classes} classes; for another task fine-tune in one of the forms "
            f"{', '.join(name for name, form in FORMS.items() if form.new_head)}"
        )


def _start_over(head: nn.Linear, classes: int, rng: torch.Generator) -> None:
    """Give `head` this many outputs and PyTorch's own initial values: uniform, ±1/√features."""
    bound = head.in_features**-0.5
    for name, old in list(head.named_parameters(recurse=False)):
        start = torch.empty(classes, *old.shape[1:]).uniform_(-bound, bound, generator=rng)
        setattr(head, name, nn.Parameter(start.to(old), requires_grad=old.requires_grad))
    head.out_features = classes


@torch.no_grad()
def _activity(
    model: nn.Module, layer: nn.Module, data: ImageSet, normalise: Normalisation
) -> Tensor:
    """Σ ReLU(output) of each of the layer's channels over all images and places."""
    sums: list[Tensor] = []

    def add(_module: nn.Module, _arguments: Any, output: Tensor) -> None:
        sums.append(output.relu().transpose(0, 1).flatten(1).sum(1))

    device = next(model.parameters()).device
    with hooked(layer.register_forward_hook(add)):
        for batch in evaluation_batches(data, normalise, 256, device=device):
            model(batch.images)
    return torch.stack(sums).sum(0)
