"""A mark on a low-rank adapter: V2's signature, read from the product ΔW = (α/r)·B·A.

    γ_i = ⟨ΔW_i, X_i⟩ = (α/r)·B_i·(A X_i),    R = Σ_i max(γ0 − γ_i·b_i, 0)

W is frozen, so passports go through what is trained, ΔW. Why it is made as it is:

**The product, not its factors.** (B·M, M⁻¹·A) is the same adapter for every invertible M. A mark on
A or on B would be gone at no cost; ΔW does not change, and no γ with it.

**A passport for each channel.** With one X for all channels, as in V2, γ = ΔW·X asks for one
direction, so the mark becomes one singular component of ΔW, and a thief has but r to try: dropping
the right one left half of the bits. Where each channel has its own X_i (one position, from the same
streams as Uchida's projections), the mark needs all r components that the task needs.

**No private branch.** It would run on γ·(ΔW x) + β. Random signs of γ ask the same A and B for two
contrary updates of a network that is frozen, and a passport that works can be solved for by
anybody: what an accuracy under the passport proves is not worth a second forward.

**The base is bound.** A merged W is read as W − W0. Whoever chooses W0 afterwards makes that read
anything, so a key's nonce is a digest of the base's host weights, number for number, and what is
taken off is what was committed to: not even what lies below its last bit can be chosen.

The bits are uniform and derived apart from X. Given any ΔW, of whatever rank, that was not trained
on them, each matches with probability ½ independently of all others: that the rows of ΔW depend on
one another changes nothing, and the p-value is exact.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, final

from jaxtyping import Float
from torch import Tensor, nn

from nnpassport.embedding.network.equations import geometry_of, sign_loss
from nnpassport.embedding.network.outputs import Example
from nnpassport.embedding.network.survey import Site, Survey, choose_provable
from nnpassport.embedding.network.tensors import as_array
from nnpassport.embedding.schemes import mark
from nnpassport.embedding.schemes.engine import Carriers, Mark, Secret
from nnpassport.keys.adapters import base_digest, committed
from nnpassport.keys.context import LayerShape
from nnpassport.keys.geometry import Geometry
from nnpassport.keys.key import Key
from nnpassport.keys.reading import check_pair, unwrapped_name
from nnpassport.scheme import UnsuitableModelError


class Pair(NamedTuple):
    """A low-rank pair: ΔW is `scale`·B·A, A flattened as a filter of the host layer is."""

    a: Float[Tensor, "rank fan_in"]
    b: Float[Tensor, "out rank"]
    scale: float = 1.0

    def read(self, rows: Float[Tensor, "out fan_in"]) -> Float[Tensor, " out"]:
        """γ_i = ⟨ΔW_i, X_i⟩, without making ΔW: a file from anybody may pose as a huge one."""
        return self.scale * (self.b * (rows @ self.a.T)).sum(1)


@final
@dataclass(frozen=True, slots=True)
class Lora(Mark):
    """The mark of an adapter; `LORA` below is the only one. The module says how it works.

    Its `parts` are empty, so no attack that forges keys applies to it. The published rule is that
    of passports.

    Attributes:
        name: as in keys and on the command line.
        sign_weight: λ_r of equation 1.
        margin: γ0 of equation 5, in units of γ.
    """

    name: str = "lora"
    sign_weight: float = 0.1
    margin: float = 0.1

    def carriers(
        self, model: nn.Module, example: Example, layers: Sequence[str] | None
    ) -> Carriers:
        """Layers that the adapter changes, and the digest of the base below it.

        `layers` are patterns as in `survey.choose`, on the names that the network has without the
        adapter; by default the last third of them, or more where a verdict needs them. The network
        is not run.

        Raises:
            UnsuitableModelError: peft's adapter is not there, not on the layers named, or has too
                few channels to be proved.
        """
        sites = choose_provable(model, _survey(model), layers, bits=mark.PROVABLE)
        shapes = tuple(_shape_of(site) for site in sites)
        if layers is None:
            mark.check_can_be_proved(self.name, shapes, mark.PROVABLE)
        bases = {site.name: as_array(_base(site.layer)) for site in sites}
        return Carriers(shapes, nonce=base_digest(bases))

    def check(self, model: nn.Module, key: Key, example: Example) -> None:
        """Refuse a key for another adapter or base.

        Raises:
            UnsuitableModelError: it is one.
        """
        layers = adapted(model)
        for shape in key.context.layers:
            if shape.name not in layers:
                raise UnsuitableModelError(
                    f"the network has no adapter on {shape.name}, which the key was made for; it "
                    f"has them on: {', '.join(list(layers)[:40]) or 'no layer'}"
                )
            pair = pair_of(layers[shape.name])
            check_pair(pair.a.shape, pair.b.shape, shape)
        committed({s.name: as_array(_base(layers[s.name])) for s in key.context.layers}, key)

    def hosts(self, model: nn.Module, layers: Sequence[LayerShape]) -> list[Any]:
        """The pair of each layer."""
        there = adapted(model)
        return [pair_of(there[layer.name]) for layer in layers]

    def signals(self, host: Pair, secret: Secret, /) -> Float[Tensor, " bits"]:
        """γ of one layer; gradients flow to A and B."""
        return host.read(secret.rows)

    def term(
        self, signals: Float[Tensor, " bits"], signs: Float[Tensor, " bits"]
    ) -> Float[Tensor, ""]:
        """λ_r·R."""
        return self.sign_weight * sign_loss(signals, signs, margin=self.margin)


LORA = Lora()


def adapted(model: nn.Module) -> dict[str, Any]:
    """LoRA layers (peft's) in a network, by the name that the host layer has without adapter.

    Raises:
        UnsuitableModelError: peft is not installed.
    """
    try:
        from peft.tuners.lora import LoraLayer  # noqa: PLC0415
    except ImportError as error:
        raise UnsuitableModelError(
            f"marking an adapter needs peft ({error}): pip install peft; to verify one does not"
        ) from error
    modules: dict[str, Any] = {unwrapped_name(name): m for name, m in model.named_modules()}
    layers = {name: m for name, m in modules.items() if isinstance(m, LoraLayer)}
    return {name: layer for name, layer in layers.items() if layer.lora_A}  # no embeddings


def pair_of(layer: Any) -> Pair:
    """The pair of the one adapter that is active in a LoRA layer of peft's.

    Raises:
        UnsuitableModelError: none or several are active, or its scale is not positive.
    """
    a, b = _matrices(layer)
    scale = float(layer.scaling[_active(layer)])
    if scale <= 0:
        raise UnsuitableModelError(
            f"the adapter's scale α/r is {scale}, and what it adds is its product times that; "
            "needed: a positive lora_alpha"
        )
    return Pair(a.flatten(1), b.flatten(1), scale)


def _survey(model: nn.Module) -> Survey:
    layers = adapted(model)
    if not layers:
        raise UnsuitableModelError(
            f"{type(model).__name__} carries no LoRA adapter, which this mark goes into; give what "
            "peft's get_peft_model returns, or take a scheme for whole networks"
        )
    sites, refused = {}, {}
    for name, layer in layers.items():
        host = layer.get_base_layer()
        try:
            geometry = geometry_of(host)
        except TypeError as error:
            refused[name] = str(error)
            continue
        if geometry.groups != 1:
            refused[name] = "its convolution is grouped"
        else:
            sites[name] = Site(name, layer, None, geometry, (), 1)
    return Survey(sites, refused)


def _shape_of(site: Site) -> LayerShape:
    a, b = _matrices(site.layer)
    out, axes, fan_in = len(b), site.geometry.axes, tuple(a.shape[1:])
    # ΔW_i is read as it is, however its layer slides.
    geometry = Geometry(
        (1,) * axes, ((0, 0),) * axes, (1,) * axes, transposed=site.geometry.transposed
    )
    return LayerShape(site.name, (out, *fan_in), fan_in if axes else (*fan_in, 1), geometry, out)


def _active(layer: Any) -> str:
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    if len(names) != 1:
        raise UnsuitableModelError(
            f"{len(names)} adapters are active on one layer ({', '.join(names)}), and a mark goes "
            "into one; call set_adapter with the one to mark"
        )
    return str(names[0])


def _matrices(layer: Any) -> tuple[Tensor, Tensor]:
    name = _active(layer)
    return layer.lora_A[name].weight, layer.lora_B[name].weight


def _base(layer: Any) -> Tensor:
    return layer.get_base_layer().weight
