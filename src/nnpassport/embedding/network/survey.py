"""Find the layers of a network that can carry a passport, by watching it run."""

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode

from nnpassport.embedding.network.equations import HOSTS, filters, geometry_of, is_matrix
from nnpassport.embedding.network.layers import Branch, on_branch, passport_norms
from nnpassport.embedding.network.modes import hooked
from nnpassport.embedding.network.outputs import Example, call, tensors_in
from nnpassport.keys.geometry import Geometry
from nnpassport.scheme import UnsuitableModelError

# The paper's choice for its networks, by the name of the class. [Fan19, sect. 4]
PAPER_LAYERS: Mapping[str, tuple[str, ...]] = {
    "AlexNet": ("features.8", "features.11", "features.14"),
    "ResNet": ("layer4.*",),
}

_HARM = 0.02  # of a layer's output
_SPREAD = 3  # layers, at least, that share the bits

_NORMS = (
    nn.modules.batchnorm._NormBase,  # batch, sync-batch and instance norm have no public base
    nn.GroupNorm,
    nn.LayerNorm,
    nn.RMSNorm,
)


_ACTIVATIONS = frozenset(
    {
        *("relu", "relu_", "relu6", "leaky_relu", "prelu", "rrelu", "elu", "selu", "celu", "gelu"),
        *("silu", "mish", "softplus", "sigmoid", "tanh", "hardswish", "hardsigmoid", "hardtanh"),
    }
)


class Site(NamedTuple):
    """A layer that can carry a passport.

    Attributes:
        name: dotted name of the layer, as in `named_modules`.
        norm: dotted name of the norm that its output feeds, or None: the layer stands alone.
        activation: what its output feeds where it stands alone, such as "gelu"; or None.
        space: spatial shape of the layer's input; () for a Linear.
        channel_axis: where the output's channels are: 1 after a convolution, −1 after a Linear.
    """

    name: str
    layer: nn.Module
    norm: str | None
    geometry: Geometry
    space: tuple[int, ...]
    channel_axis: int
    activation: str | None = None


class Survey(NamedTuple):
    """The layers that can carry a passport, in the order they run, and why the others cannot."""

    sites: dict[str, Site]
    refused: dict[str, str]


def survey(model: nn.Module, example: Example) -> Survey:
    """Find the layers of `model` that can carry a passport by watching it run on `example`.

    A norm is paired with the layer whose output tensor it receives, whatever the two are called.
    The model is run in evaluation mode without gradients and left as it was.

    Raises:
        UnsuitableModelError: the network is wrapped (compiled, data-parallel, sharded).
    """
    refuse_wrapped(model)
    watched = _watch(model, example)
    sites: dict[str, Site] = {}
    refused: dict[str, str] = {}
    for name, layer in model.named_modules():
        if not _is_host(layer):
            continue
        reason = _refusal(name, layer, watched)
        if reason is not None:
            refused[name] = reason
            continue
        run = watched.layers[name][0]
        sites[name] = Site(
            name,
            layer,
            watched.pairs.get(name, [None])[0],
            geometry_of(layer),
            run.space if _is_convolution(layer) else (),
            1 if _is_convolution(layer) else -1,
            watched.activations.get(name),
        )
    order = {name: i for i, name in enumerate(watched.layers)}
    return Survey(dict(sorted(sites.items(), key=lambda item: order[item[0]])), refused)


def choose(model: nn.Module, found: Survey, patterns: Sequence[str] | None = None) -> list[Site]:
    """The sites that `patterns` name, in the order they run.

    A pattern is a layer's dotted name, a prefix of it, or has wildcards: "features.8", "layer4",
    "layer4.*". None is the paper's choice for its networks; for others it is the last third of the
    sites that a norm or an activation follows, or of all sites where there is no such.

    Raises:
        UnsuitableModelError: a pattern names no suitable layer, or the model has none.
    """
    names = list(found.sites)
    if not names:
        raise UnsuitableModelError(
            f"{type(model).__name__} has no layer that can carry a passport; needed: a "
            f"convolution or Linear before the last layer{_because(found.refused)}"
        )
    if patterns is not None and not patterns:
        raise UnsuitableModelError(
            "no layer was named, and a passport needs at least one; suitable layers of this "
            f"model: {', '.join(names)}"
        )
    if patterns is None:
        patterns = PAPER_LAYERS.get(type(model).__name__, ())
        if not all(any(_matches(n, p) for n in names) for p in patterns) or not patterns:
            followed = [s for s in found.sites.values() if s.norm or s.activation]
            sites = followed or list(found.sites.values())
            return sites[-max(1, len(sites) // 3) :]
    for pattern in patterns:
        if not any(_matches(name, pattern) for name in names):
            refused = {n: r for n, r in found.refused.items() if _matches(n, pattern)}
            raise UnsuitableModelError(
                f"layer {pattern!r} cannot carry a passport"
                f"{_because(refused) or ': no layer of that name ran'}; "
                f"suitable layers of this model: {', '.join(names)}"
            )
    return [s for s in found.sites.values() if any(_matches(s.name, p) for p in patterns)]


def choose_provable(
    model: nn.Module, found: Survey, patterns: Sequence[str] | None, *, bits: int
) -> list[Site]:
    """As `choose`; where its own choice has fewer than `bits`, also the layers before, from behind.

    Raises:
        UnsuitableModelError: as `choose`.
    """
    sites = choose(model, found, patterns)
    if patterns is None:
        names, count = {site.name for site in sites}, sum(map(_channels, sites))
        for site in reversed(found.sites.values()):
            if count < bits and site.name not in names:
                names.add(site.name)
                count += _channels(site)
        sites = [site for site in found.sites.values() if site.name in names]
    return sites


def predicted_harm(site: Site) -> float:
    """Share of a layer's output that a passport for each channel will change, in mean squares.

    γ and β are two conditions on a filter of n numbers. Met with the least change, in the metric of
    what the layer sees with a floor as high as its mean, they cost about 2/n of what filter and
    floor put out together; that is 4/n where the filter lies as the inputs do.
    """
    weight = filters(site.layer.get_parameter("weight"), site.geometry)
    return min(1.0, 4 / weight[0].numel())


def choose_enough(
    model: nn.Module, found: Survey, patterns: Sequence[str] | None, *, bits: int
) -> list[Site]:
    """As `choose`, for passports of channels: by default enough bits, and not whole layers' worth.

    The paper's choice for its networks. In others: layers that a norm or an activation follows, by
    quarters of the depth in turn, so that taking one block out does not end the mark; of each
    quarter the one that is harmed least, until there are `bits`, of which a layer counts at most
    a third. Layers whose filters have few numbers are taken where the others do not have as
    many.

    Raises:
        UnsuitableModelError: as `choose`.
    """
    default = choose(model, found, patterns)  # first, for its refusals
    if not _is_spread(model, patterns):
        return default
    sites = [s for s in found.sites.values() if s.norm or s.activation] or [*found.sites.values()]
    limit, most = _HARM, -(-bits // _SPREAD)
    gentle = [s for s in sites if predicted_harm(s) <= limit]
    while sum(map(_channels, gentle)) < bits and len(gentle) < len(sites):
        limit *= 2
        gentle = [s for s in sites if predicted_harm(s) <= limit]
    quarters = [gentle[len(gentle) * q // 4 : len(gentle) * (q + 1) // 4] for q in range(4)]
    turns = [sorted(each, key=predicted_harm) for each in quarters]
    taken: set[str] = set()
    count = 0
    for turn in range(max(map(len, turns))):
        for quarter in turns:
            if count < bits and turn < len(quarter):
                taken.add(quarter[turn].name)
                count += min(most, _channels(quarter[turn]))
    return [site for site in gentle if site.name in taken]


def shares(
    model: nn.Module, sites: Sequence[Site], patterns: Sequence[str] | None, *, bits: int
) -> dict[str, int]:
    """How many bits each of the sites that `choose_enough` chose carries at most.

    All that it has where its owner or the paper named it; else a third of `bits`, or as much more
    as it takes to have them all.
    """
    have = {site.name: _channels(site) for site in sites}
    if not _is_spread(model, patterns):
        return have
    most = -(-bits // _SPREAD)
    while sum(min(most, each) for each in have.values()) < min(bits, sum(have.values())):
        most *= 2
    return {name: min(most, each) for name, each in have.items()}


def _is_spread(model: nn.Module, patterns: Sequence[str] | None) -> bool:
    return patterns is None and type(model).__name__ not in PAPER_LAYERS


def _channels(site: Site) -> int:
    host: Any = site.layer
    if hasattr(host, "get_base_layer"):  # peft's
        host = host.get_base_layer()
    return len(filters(host.get_parameter("weight"), site.geometry))


def refuse_wrapped(model: nn.Module) -> None:
    """Refuse a network that is compiled, data-parallel or sharded already.

    Raises:
        UnsuitableModelError: naming what to do first.
    """
    kinds = {base.__name__ for base in type(model).__mro__}
    inside = {
        "OptimizedModule": "model._orig_mod (what torch.compile was given)",
        "DistributedDataParallel": "model.module",
        "DataParallel": "model.module",
        "FullyShardedDataParallel": "the network before it was sharded",
        "FSDPModule": "the network before fully_shard",
    }
    for kind, network in inside.items():
        if kind in kinds:
            raise UnsuitableModelError(
                f"the network is wrapped in {kind}, and passports go into the network itself; give "
                f"{network}, insert there, and wrap it afterwards"
            )


def refuse_lossy_wrapper(model: nn.Module, *, one_branch: bool) -> None:
    """Refuse a wrapper through which a marked network would not train as it does alone.

    Raises:
        UnsuitableModelError: naming what to wrap it in instead.
    """
    kinds = {base.__name__ for base in type(model).__mro__}
    given = f"the network is wrapped in {type(model).__name__}"
    if kinds & {"FullyShardedDataParallel", "DataParallel"}:
        raise UnsuitableModelError(
            f"{given}, which takes the weights away that passports run through; use "
            "torch.distributed.fsdp.fully_shard or DistributedDataParallel"
        )
    if "DistributedDataParallel" in kinds and one_branch:
        waits = not (model.find_unused_parameters or model.static_graph)
        if waits and any(p.requires_grad for p in _replaced(model)):
            raise UnsuitableModelError(
                f"{given} that waits for the gradient of every parameter, and with V1 the norms' "
                "own weights and biases have none; pass it find_unused_parameters=True"
            )


def _replaced(model: nn.Module) -> list[nn.Parameter]:
    """The parameters for which a presented passport stands in."""
    norms = [norm for norm in passport_norms(model).values() if norm.norm is not norm.layer]
    return [p for norm in norms for n, p in norm.norm.named_parameters() if n in {"weight", "bias"}]


class _Run(NamedTuple):
    output: Tensor
    version: int
    space: tuple[int, ...]


class _Watched(NamedTuple):
    layers: dict[str, list[_Run]]  # every call of every layer, in order of the first
    pairs: dict[str, list[str]]  # layer -> the norms that receive its output
    norms: dict[str, list[nn.Module]]  # norm -> itself, once for every time that it ran
    named: set[str]  # layers and norms that were called with named or with several arguments
    strange: set[str]  # layers that put out something else than one tensor
    activations: dict[str, str]  # layer -> the activation that receives its output
    output: Any


def _watch(model: nn.Module, example: Example) -> _Watched:
    watched = _Watched({}, {}, {}, set(), set(), {}, None)
    handles = []
    for name, module in model.named_modules():
        if _is_norm(module):
            hook = _before_norm(name, watched)
            handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        elif _is_host(module):
            hook = _after_layer(name, watched)
            handles.append(module.register_forward_hook(hook, with_kwargs=True))
        elif type(module).__name__.endswith("Activation"):  # Hugging Face's, made of several steps
            handles.append(module.register_forward_pre_hook(_before_activation(watched)))
    try:
        with (
            hooked(*handles),
            torch.no_grad(),
            on_branch(model, Branch.PUBLIC),
            _Activations(watched),
        ):
            output = call(model, example)
    except RuntimeError as error:  # torch's own, for shapes that do not meet
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in tensors_in(example))
        raise UnsuitableModelError(
            f"{type(model).__name__} does not run on inputs of shape {shapes} ({error!s:.200}); "
            "needed: inputs of the size that it was made for"
        ) from error
    return watched._replace(output=output)


def _after_layer(name: str, watched: _Watched) -> Callable[..., None]:
    def hook(
        _module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any
    ) -> None:
        x = _received(name, args, kwargs, watched)
        if not isinstance(output, Tensor):
            watched.strange.add(name)
            return
        run = _Run(output, output._version, tuple(x.shape[2:]))
        watched.layers.setdefault(name, []).append(run)

    return hook


def _before_norm(name: str, watched: _Watched) -> Callable[..., None]:
    def hook(norm: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        x = _received(name, args, kwargs, watched)
        watched.norms.setdefault(name, []).append(norm)
        for layer in _makers_of(x, watched):
            watched.pairs.setdefault(layer, []).append(name)

    return hook


def _before_activation(watched: _Watched) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
        kind = type(module).__name__.removesuffix("Activation").lower()
        for layer in _makers_of(args[0], watched) if args else []:
            watched.activations.setdefault(layer, kind)

    return hook


def _makers_of(x: Tensor, watched: _Watched) -> list[str]:
    """The layers whose output is `x`, unchanged."""
    # The version tells conv → norm from conv → relu(inplace) → norm, where the tensor object is the
    # same and its content is not.
    return [
        layer
        for layer, runs in watched.layers.items()
        if any(r.output is x and r.version == x._version for r in runs)
    ]


class _Activations(TorchFunctionMode):
    """Notes which layers' outputs go straight into an activation, module or function."""

    def __init__(self, watched: _Watched) -> None:
        super().__init__()
        self.watched = watched

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        name = getattr(func, "__name__", "")
        if name in _ACTIVATIONS and args and isinstance(args[0], Tensor):
            for layer in _makers_of(args[0], self.watched):
                self.watched.activations.setdefault(layer, name.rstrip("_"))
        return func(*args, **(kwargs or {}))


def _received(
    name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], watched: _Watched
) -> Tensor:
    if kwargs or len(args) > 1:
        watched.named.add(name)
    return next(iter((*args, *kwargs.values())))


def _refusal(name: str, layer: nn.Module, watched: _Watched) -> str | None:
    """Why a layer cannot carry a passport, or None if it can."""
    runs = watched.layers.get(name, [])
    norms = watched.pairs.get(name, [])
    own = any(run.output is tensor for run in runs for tensor in tensors_in(watched.output))
    kinds = dict.fromkeys(norms)
    again = max((len(watched.norms[norm]) for norm in kinds), default=len(runs))
    stray = [n for n in kinds if not _over_channels(watched.norms[n][0], layer, runs[0].output)]
    reasons = {
        "its weight is computed (a parametrization, or pruning)": "weight" not in layer._parameters,
        "its output is not one tensor": name in watched.strange,
        "it did not run": not runs,
        "its output is the network's own": own,
        # A log-softmax or a squeeze may follow: then the output is another tensor.
        "it is the last layer to run": not norms and name == next(reversed(watched.layers), None),
        f"its output feeds {len(kinds)} norms: {', '.join(kinds)}": len(kinds) > 1,
        f"its norm ran {again} times in one forward, and the layer {len(runs)}": (
            bool(norms) and not len(norms) == len(runs) == again
        ),
        f"its norm {', '.join(stray)} does not scale the layer's channels one by one": bool(stray),
        "it or its norm is called with named arguments, or several": bool(
            {name, *kinds} & watched.named
        ),
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def _over_channels(norm: nn.Module, layer: nn.Module, output: Tensor) -> bool:
    """Whether the norm's weight is one factor for every channel of the layer, found by trying."""
    axis = 1 if _is_convolution(layer) else output.dim() - 1
    weight = getattr(norm, "weight", None)
    if weight is None:  # nothing to try
        if isinstance(norm, nn.LayerNorm | nn.RMSNorm):
            return axis == output.dim() - 1 and norm.normalized_shape == (output.shape[-1],)
        return _is_convolution(layer) or output.dim() == 2
    if weight.dim() != 1 or len(weight) != output.shape[axis]:
        return False
    # Of both signs, since γ is; and in full precision, where a norm of half precision would round.
    factors = torch.linspace(-1.5, 1.5, len(weight) + 1)[1:].to(weight.device)
    bare = _without_children(norm)
    try:
        plain, scaled = (_normalised(bare, output, w) for w in (torch.ones_like(factors), factors))
    except Exception:  # the user's own code may raise anything, or need more than its input
        return False
    shape = [1] * output.dim()
    shape[axis] = -1
    return plain.shape == output.shape and torch.allclose(
        scaled, plain * factors.view(shape).to(plain), rtol=1e-3, atol=1e-5
    )


def _without_children(norm: nn.Module) -> nn.Module:
    """The norm without what some have in one module with it: timm's `BatchNormAct2d`, its `act`."""
    if not norm._modules:
        return norm
    bare = deepcopy(norm)
    for name in bare._modules:
        bare._modules[name] = nn.Identity()
    return bare


def _normalised(norm: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
    """What the norm makes of x with this weight and without bias, in single precision at least."""

    def wide(tensor: Tensor) -> Tensor:
        wider = torch.promote_types(tensor.dtype, torch.float32)
        return tensor.to(wider) if tensor.is_floating_point() else tensor

    state = {name: wide(t) for name, t in [*norm.named_parameters(), *norm.named_buffers()]}
    state["weight"] = weight.to(state["weight"])
    if "bias" in state:
        state["bias"] = torch.zeros_like(state["bias"])
    with torch.no_grad(), on_branch(norm, Branch.PUBLIC):
        return functional_call(norm, state, (wide(x),))


def _is_convolution(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.conv._ConvNd)


def _is_host(module: nn.Module) -> bool:
    return isinstance(module, HOSTS) or is_matrix(module)


def _is_norm(module: nn.Module) -> bool:
    if isinstance(module, _NORMS):
        return True
    # A norm of somebody's own, such as the RMS norms of language models; `_over_channels` tries it.
    weight = module._parameters.get("weight")
    return (
        "norm" in type(module).__name__.lower()
        and not module._modules
        and weight is not None
        and weight.dim() == 1
    )


def _matches(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or name.startswith(f"{pattern}.")


def _because(refused: Mapping[str, str]) -> str:
    return "".join(f"; {name}: {reason}" for name, reason in list(refused.items())[:5])
