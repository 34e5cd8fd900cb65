"""E, F and V of a scheme, as a type; I, what attacks it, is in `nnpassport.attacks`."""

from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

from jaxtyping import Int64
from torch import Tensor, nn

from nnpassport.data.images import Images, ImageSet, Normalisation
from nnpassport.embedding.network.inserted import Inserted
from nnpassport.embedding.network.outputs import Example
from nnpassport.embedding.train.loop import Evaluation, History, Journal, Objective, Recipe, Task
from nnpassport.files.arrays import Array
from nnpassport.keys.counts import Counts
from nnpassport.keys.key import Key
from nnpassport.scheme import Verdict


@runtime_checkable
class Scheme(Protocol):
    """An ownership scheme: V = (E, F, V, I) without its attacks.           [Fan19, def. 1]

    Structural: a frozen dataclass with these members is a scheme. Most get them from `engine.Mark`,
    and say only what differs.
    """

    @property
    def name(self) -> str:
        """As in keys and on the command line."""

    @property
    def triggers(self) -> int:
        """Size of the trigger set; 0 is none, and then there is no black-box verification."""

    @property
    def reads_weights(self) -> bool:
        """Whether V needs nothing but the weights; if not, it needs the network's answers."""

    @property
    def parts(self) -> frozenset[str]:
        """What of a mark forgers can aim at: "passport", "projection", "triggers", "activations".

        An attack that forges one of them applies to the schemes that have it.
        """

    def draw_key(
        self,
        model: nn.Module,
        example: Example,
        *,
        owner: str = "unnamed",
        layers: Sequence[str] | None = None,
        text: str | None = None,
        seed: bytes | None = None,
    ) -> Key:
        """A key for a network of this shape, every secret in it derived from one seed."""

    def prepared(self, key: Key, model: nn.Module, data: ImageSet, normalise: Normalisation) -> Key:
        """The key with what it takes of a trained plain network and of images: its pictures.

        Most keys take nothing and are returned as they are, and so is one that has its pictures.
        """

    def insert(self, model: nn.Module, key: Key, example: Example) -> Inserted:
        """Prepare `model`, in place, for training with `objective`; refuse a key of another.

        What was put into it, if anything: layers, and where the batch is forked.
        """

    def objective(
        self,
        key: Key,
        *,
        steps: int,
        normalise: Normalisation | None = None,
        task: Task | None = None,
    ) -> Objective:
        """What a training step of a run of `steps` steps descends; `task` is the caller's loss."""

    def embed(
        self,
        model: nn.Module,
        key: Key,
        data: Images,
        recipe: Recipe,
        *,
        normalise: Normalisation,
        validation: Images | None = None,
        journal: Journal | None = None,
        trained: bool = False,
    ) -> History:
        """E: train `model` in place until it carries `key`; `trained` says that it is already."""

    def evaluation(self, data: Images, normalise: Normalisation) -> Evaluation:
        """What to measure of a network while it is being trained."""

    def fidelity(
        self, model: nn.Module, key: Key, data: ImageSet, normalise: Normalisation
    ) -> float:
        """F: accuracy in [0, 1] of a plain network when `key` is presented to it."""

    def read(self, weights: Mapping[str, Array], key: Key) -> Counts:
        """What V counts in a file of weights, in numpy; a mark that is not in them refuses."""

    def verify(
        self, weights: Mapping[str, Tensor], key: Key, *, log10_alpha: float = ...
    ) -> Verdict:
        """V in white box: does a network with these weights carry `key`?"""

    def verify_network(
        self,
        model: nn.Module,
        key: Key,
        normalise: Normalisation,
        *,
        log10_alpha: float = ...,
    ) -> Verdict:
        """V of a network that can be run, in evaluation mode: by whatever the scheme reads."""

    def forms(self, key: Key) -> Mapping[str, Tensor]:
        """By layer, what V multiplies a flattened filter with to read bits (forms columns)."""

    def verify_answers(
        self, answers: Int64[Tensor, " triggers"], key: Key, *, log10_alpha: float = ...
    ) -> Verdict:
        """V in black box: does a network that answers the triggers like this carry `key`?"""

    def verify_as_published(self, verdict: Verdict) -> Verdict:
        """The scheme's own rule, as its paper states it, on what V has read."""

    def released(self, model: nn.Module) -> nn.Module:
        """A plain copy of a trained network, that holds no secret."""
