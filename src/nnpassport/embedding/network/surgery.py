"""Put passports into a network that is already built, and take them out again.

    insert → present / withhold / run_both → fold → remove

The network's own class knows nothing of it: norms are wrapped where they stand, and after `remove`
the network is bit for bit what it was. Everything is checked before anything is touched. Which
layers are suitable is `survey`'s business, where two branches part is `fork`'s.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from nnpassport.embedding.network.equations import filters
from nnpassport.embedding.network.fork import fork_of, set_fork, unhook
from nnpassport.embedding.network.inserted import Inserted
from nnpassport.embedding.network.layers import (
    Branch,
    BranchNorm,
    PassportNorm,
    Running,
    on_branch,
    passport_norms,
    replace_module,
    running_in,
    set_branch,
)
from nnpassport.embedding.network.outputs import Example, call
from nnpassport.embedding.network.survey import Site, choose, survey
from nnpassport.scheme import UnsuitableModelError


class Secret(NamedTuple):
    """What one layer needs of a key: m(P) of its passport (2 groups fan_in), signs (out).

    Where each channel has a passport of its own, `mean_patch` is (2 out fan_in) with gains and bits
    in it, the signs are ones, and `carries` (out) says which channels have one.
    """

    mean_patch: Tensor
    signs: Tensor
    carries: Tensor | None = None


def insert(
    model: nn.Module,
    secrets: Mapping[str, Secret],
    example: Example,
    *,
    two_branches: bool,
) -> Inserted:
    """Wrap, in place, the norms after the named layers so that they can run on passports.

    The passports are withheld at first: the model computes what it did. With `two_branches` (V2,
    V3) the private branch gets batch-norm statistics of its own, and the fork is found and proved.

    Raises:
        UnsuitableModelError: a layer cannot carry its secret, the model does not run with it
            wrapped, or the two branches cannot run in one forward; the model is as it was.
    """
    wrap(model, secrets, example, two_branches=two_branches)
    return Inserted(model, fork_of(model, example) if two_branches else None)


def wrap(
    model: nn.Module,
    secrets: Mapping[str, Secret],
    example: Example,
    *,
    two_branches: bool,
) -> None:
    """As `insert`, for those who do not ask what the fork costs: to count it takes longer."""
    if passport_norms(model):
        raise UnsuitableModelError(
            f"{type(model).__name__} carries passports already; call remove() before inserting"
        )
    sites = _sites_for(model, secrets, example)
    running = Running()
    for name, site in sites.items():
        norm_name = site.norm or site.name
        wrapped = PassportNorm(
            site.layer,
            model.get_submodule(norm_name),
            secrets[name].mean_patch,
            secrets[name].signs,
            carries=secrets[name].carries,
            channel_axis=site.channel_axis,
            own_statistics=two_branches,
            running=running,
        )
        wrapped.train(model.get_submodule(norm_name).training)
        replace_module(model, norm_name, wrapped)
    try:
        _check_runs(model, list(sites), example)
        if two_branches:
            set_fork(model, example)
    except BaseException:
        remove(model)
        raise


def _sites_for(
    model: nn.Module, secrets: Mapping[str, Secret], example: Example
) -> dict[str, Site]:
    """The layers that a key names, by name, each of the shape that it was drawn for."""
    found = survey(model, example)
    sites = {s.name: s for s in choose(model, found, list(secrets))}
    for name, site in sites.items():
        if name not in secrets:
            raise UnsuitableModelError(
                f"the key names {', '.join(secrets)}, and {name!r} is inside one of them; needed: "
                f"the layers themselves; suitable layers of this model: {', '.join(found.sites)}"
            )
        _check_shape(site, secrets[name])
    return sites


def remove(model: nn.Module) -> None:
    """Take all passports out again, in place: the modules and keys the model had before."""
    norms = {
        name: m for name, m in model.named_modules() if isinstance(m, PassportNorm | BranchNorm)
    }
    unhook(model)
    for running in running_in(model):
        running.removed = True
    for name, norm in norms.items():
        replace_module(model, name, norm.norm)


def plain_state(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What of a marked network's state dict its plain network has, under the plain one's names."""
    inner = {f"{n}." for n, m in model.named_modules() if isinstance(m, PassportNorm | BranchNorm)}
    plain: dict[str, Tensor] = {}
    for name, value in state.items():
        home = max((each for each in inner if name.startswith(each)), key=len, default=None)
        if home is None:
            plain[name] = value
        elif name.startswith(f"{home}norm."):
            plain[home + name.removeprefix(f"{home}norm.")] = value
    return plain


def fold(model: nn.Module) -> None:
    """Write the passports' γ and β into the norms' own weight and bias, in place (V1's release).

    With the passports withheld or removed, the model then computes what it did while they were
    presented, at the plain network's cost. A layer without norm takes γ and β into its own weight.

    Raises:
        UnsuitableModelError: a layer has nowhere to fold to; the model is as it was.
    """
    norms = passport_norms(model)
    _check_foldable(norms)
    with torch.no_grad():
        for norm in norms.values():
            gamma, beta = norm.affine()
            weight, bias = norm.norm.get_parameter("weight"), norm.norm.get_parameter("bias")
            if norm.norm is norm.layer:
                weight.mul_(gamma.view(-1, *[1] * (weight.dim() - 1)))
                bias.mul_(gamma).add_(beta)
            else:
                weight.copy_(gamma)
                bias.copy_(beta)


def check_releasable(model: nn.Module) -> None:
    """Refuse passports that `fold` cannot take in, or not without losing the signature.

    Raises:
        UnsuitableModelError: a passport layer has no norm, or a norm without weight and bias.
    """
    norms = passport_norms(model)
    for name, norm in norms.items():
        if norm.norm is norm.layer:
            raise UnsuitableModelError(
                f"{name!r} is a layer without a norm; folded into its own weight, γ would be "
                "squared when it is read, and every sign lost; use scheme V2 or V3, or put a norm "
                "behind it"
            )
    _check_foldable(norms)


def withhold(model: nn.Module) -> None:
    """Run the public network from now on."""
    set_branch(model, Branch.PUBLIC)


def present(model: nn.Module) -> None:
    """Run the private network, on its passports, from now on."""
    set_branch(model, Branch.PRIVATE)


def run_both(model: nn.Module, private_share: float = 1.0) -> None:
    """Run public and private network in one forward: n images give 2·n outputs, public first.

    With a smaller `private_share`, in (0, 1], that share of the images alone, the last of them,
    has private outputs: `layers.private_count`.
    """
    set_branch(model, Branch.BOTH, private_share)


def _check_foldable(norms: Mapping[str, PassportNorm]) -> None:
    for name, norm in norms.items():
        if getattr(norm.norm, "bias", None) is None or getattr(norm.norm, "weight", None) is None:
            raise UnsuitableModelError(
                f"{name!r} is a {type(norm.norm).__name__} without weight and bias, so γ and β "
                "cannot be folded into it; use scheme V2 or V3, or a norm with affine=True"
            )


def _check_runs(model: nn.Module, names: Sequence[str], example: Example) -> None:
    try:
        for branch in (Branch.PUBLIC, Branch.PRIVATE):
            with torch.no_grad(), on_branch(model, branch):
                call(model, example)
    except Exception as error:
        raise UnsuitableModelError(
            f"{type(model).__name__} does not run with {', '.join(map(repr, names))} wrapped "
            f"({error!s:.200}): something else uses a layer's parts; name other layers, or, where "
            "it is PyTorch's own transformer, call torch.backends.mha.set_fastpath_enabled(False)"
        ) from error


def _check_shape(site: Site, secret: Secret) -> None:
    weight = filters(site.layer.get_parameter("weight"), site.geometry)
    groups = site.geometry.groups if secret.carries is None else len(weight)
    fits = secret.mean_patch.shape == (2, groups, weight[0].numel()) and len(secret.signs) == len(
        weight
    )
    if not fits:
        raise UnsuitableModelError(
            f"layer {site.name!r} has a weight of shape {tuple(weight.shape)} in {groups} group(s) "
            f"and the key was made for {len(secret.signs)} channels of "
            f"{tuple(secret.mean_patch.shape[1:])}; draw a key for this model"
        )
