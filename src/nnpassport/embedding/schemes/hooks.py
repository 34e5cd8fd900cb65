"""What a scheme may say for itself, and what holds where it says nothing.

Each member of `Hooks` is a question that `engine.Mark` asks of a scheme. Only `carriers` has no
answer of its own.
"""

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from typing import Any, NamedTuple, Protocol

from jaxtyping import Float
from torch import Tensor, nn

from nnpassport.data.images import ImageSet, Normalisation
from nnpassport.embedding.network.equations import filters
from nnpassport.embedding.network.inserted import Inserted
from nnpassport.embedding.network.layers import whole_weight
from nnpassport.embedding.network.outputs import Example
from nnpassport.embedding.network.tensors import ArraysOf
from nnpassport.embedding.schemes.step import Run, Secret, of_weights
from nnpassport.embedding.schemes.triggers import USUAL
from nnpassport.embedding.train.labels import share_right_with
from nnpassport.files.arrays import Array
from nnpassport.ground.progress import Listener
from nnpassport.keys.context import LayerShape, TriggerShape
from nnpassport.keys.counts import Counts, as_published
from nnpassport.keys.key import Key
from nnpassport.keys.reading import READERS, check_host
from nnpassport.scheme import Part, UnsuitableModelError, Verdict


class Carriers(NamedTuple):
    """What a key is drawn for: the layers whose bits it has, and the shape of its pictures.

    `nonce` binds the key to something else; None lets the operating system draw it. `metrics` are
    the directions that passports of channels lie in, by layer, and `anchor` is the digest of the
    network that the key is drawn for. `network` is what a scheme's own `key_for` takes of it.
    """

    layers: tuple[LayerShape, ...] = ()
    triggers: TriggerShape | None = None
    nonce: bytes | None = None
    metrics: Mapping[str, Any] | None = None
    anchor: str | None = None
    network: Any = None


class Hooks(Protocol):
    """What differs from scheme to scheme; `protocol.Scheme` says what some of its members mean.

    Attributes:
        name: as in keys and on the command line.
        threshold: share of the bits that must match by the published rule.
        triggers: size of the trigger set; 0 is none.
        triggers_per_step: trigger images that each training step mixes into its batch. None is
            `triggers.USUAL`, or in a short training as many as show each trigger
            `triggers.TAUGHT` times, but no more than half as many as there are images.
        trigger_weight: λ_t of equation 1. None weighs a trigger like any other image of the step.
        teaching: for a trained network, the share in [0, 1] of the task's loss that imitates what
            the network answered before.
        reads_weights: whether V needs nothing but the weights.
    """

    __slots__ = ()

    name: str
    threshold: float = 1.0
    triggers: int = 0
    triggers_per_step: int | None = None
    trigger_weight: float | None = None
    teaching: float = 0.0
    reads_weights: bool = True

    @property
    def parts(self) -> frozenset[str]:
        """What of the mark forgers can aim at; here: nothing."""
        return frozenset()

    @abstractmethod
    def carriers(
        self, model: nn.Module, example: Example, layers: Sequence[str] | None
    ) -> Carriers:
        """What a key for this network is drawn for; `layers` are the caller's choice.

        Raises:
            UnsuitableModelError: the network, or a layer chosen, cannot carry the mark.
        """

    def prepared(self, key: Key, model: nn.Module, data: ImageSet, normalise: Normalisation) -> Key:
        """The key as it is: it takes nothing of a network or of images."""
        return key

    def check(self, model: nn.Module, key: Key, example: Example) -> None:
        """Refuse a key of this scheme that was made for another network: by its layers' shapes.

        Raises:
            UnsuitableModelError: it was.
        """
        weights = dict(model.named_parameters())
        for layer in key.context.layers:
            check_host(weights, layer)

    def hosts(self, model: nn.Module, layers: Sequence[LayerShape]) -> list[Any]:
        """What `signals` is given of each layer, with gradients: its filters (out fan_in *kernel).

        A tensor, or a tuple with one.
        """
        weights = [whole_weight(model.get_parameter(f"{each.name}.weight")) for each in layers]
        return [filters(w, each.geometry) for w, each in zip(weights, layers, strict=True)]

    def signals(self, host: Any, secret: Secret, /) -> Float[Tensor, " bits"]:
        """Numbers whose signs are the bits of one layer; gradients flow to `host`."""
        raise TypeError(f"{self.name} has no signals; needed: them, or an objective of its own")

    def put_in(self, model: nn.Module, key: Key, example: Example) -> Inserted:
        """Change `model`, in place, into what training runs, or leave it as it was; here: nothing.

        Raises:
            UnsuitableModelError: it cannot be; it is as it was.
        """
        return Inserted(model)

    def begin(
        self, model: nn.Module, shown: Callable[[int], Tensor], *, trained: bool, show: Listener
    ) -> None:
        """What is done once, in place, between `insert` and the first step; here: nothing.

        `shown` gives some of the images that it is trained on, as the network sees them.
        """
        return

    @property
    def shown_at_once(self) -> int:
        """Trigger images in each step."""
        if not self.triggers:
            return 0
        return USUAL if self.triggers_per_step is None else self.triggers_per_step

    def end(self, model: nn.Module, shown: Callable[[int], Tensor]) -> None:
        """What is done once, in place, after the last step of a training; here: nothing.

        `shown` is as in `begin`.
        """
        return

    def rest(self, model: nn.Module) -> None:
        """Leave a network that was trained computing what it is used for; here: it does."""
        return

    def presented(
        self, model: nn.Module, key: Key, data: ImageSet, normalise: Normalisation
    ) -> nn.Module:
        """A copy of a plain network, in evaluation mode, with `key` presented to it."""
        return deepcopy(model).eval()

    def steps_of(self, key: Key, steps: int, normalise: Normalisation | None) -> Run:
        """What each of a run's `steps` runs, and what it says of the bits; here: the network."""
        rows = self.forms(key)
        secrets = [Secret(e, rows[e.name], self.wanted(key, e)) for e in key.context.layers]
        return of_weights(secrets, self.hosts, self.signals)

    def rates(
        self, output: Any, labels: Any, part: Part, *, classes: bool
    ) -> Mapping[str, Float[Tensor, "2"]]:
        """How often a branch is right: here of images and triggers, if the task is `classes`."""
        count = self.shown_at_once
        return {"accuracy": share_right_with(output, labels, count)} if classes else {}

    def wanted(self, key: Key, layer: LayerShape) -> Float[Tensor, " bits"]:
        """Signs that a training step pulls the signals to: the key's own."""
        return key.layer_signs(layer.name)

    def term(
        self, signals: Float[Tensor, " bits"], signs: Float[Tensor, " bits"]
    ) -> Float[Tensor, ""]:
        """What a training step adds to the task's loss, on the bits of all layers."""
        raise TypeError(f"{self.name} has no term; needed: one, or an objective of its own")

    def read(self, weights: Mapping[str, Array], key: Key) -> Counts:
        """What V counts in weights: what `keys.reading.READERS` has for schemes of this name.

        One that is not in that table reads here. Other marks are not read from weights.

        Raises:
            UnsuitableModelError: it is another mark, or a layer is missing or of another shape.
        """
        if (reader := READERS.get(self.name)) is not None:
            return reader(weights, key)
        what, instead = "activations", "verify_network"
        if self.triggers:
            what, instead = "answers", "verify_answers"
        raise UnsuitableModelError(
            f"{self.name} marks a network's {what} and not its weights; "
            f"give the network itself and its images, and use {instead}"
        )

    def observe(self, model: nn.Module, key: Key, normalise: Normalisation) -> Counts:
        """What V counts of a network that can be run, unless by its answers: its weights' bits."""
        return self.read(ArraysOf(model.state_dict()), key)

    def forms(self, key: Key) -> Mapping[str, Tensor]:
        """By layer, what V multiplies a flattened filter with: a projection's rows."""
        if not self.reads_weights:
            return {}
        return {layer.name: key.layer_projection(layer.name) for layer in key.context.layers}

    def verify_as_published(self, verdict: Verdict) -> Verdict:
        """The paper's rule: `threshold` of the bits are read back."""
        return as_published(verdict, threshold=self.threshold)
