"""A network that carries a key, for training loops of your own."""

from typing import final

from jaxtyping import Float, Int64
from torch import Tensor, nn

from nnpassport.catalog import scheme_named
from nnpassport.data.images import Normalisation
from nnpassport.evidence.key import Key
from nnpassport.scheme import Batch


@final
class Marked:
    """A network and the key inserted into it; made by `mark`.

    Attributes:
        model: the network itself, trained in place; its optimiser is the caller's.
        step: how many losses were asked for; the trigger set of V3 takes turns by it. Save it with
            a checkpoint and set it again to resume.
        measures: of the last loss: share of signature bits that match, accuracy of each branch.
    """

    def __init__(self, model: nn.Module, key: Key, normalise: Normalisation | None) -> None:
        self.model = model
        self.step = 0
        self.measures: dict[str, float] = {}
        self._scheme = scheme_named(key.context.scheme)
        self._objective = self._scheme.objective(key, steps=1, normalise=normalise)

    def loss(
        self, images: Float[Tensor, "batch channel height width"], labels: Int64[Tensor, " batch"]
    ) -> Float[Tensor, ""]:
        """The whole of equation 1: task loss of every branch, triggers, sign loss."""
        outcome = self._objective(self.model, Batch(images, labels, self.step))
        self.step += 1
        self.measures = {name: value.item() for name, value in outcome.measures.items()}
        return outcome.loss

    def released(self) -> nn.Module:
        """A plain copy that may leave the house; see `Passport.released`."""
        return self._scheme.released(self.model)


def mark(
    model: nn.Module, key: Key, example: Tensor, *, normalise: Normalisation | None = None
) -> Marked:
    """Insert `key` into `model`, in place, and return what its training loop needs.

    `example` is an input the network runs on; `normalise` is needed by V3, whose triggers are kept
    as pixels.

    Raises:
        UnsuitableModelError: the key was made for another network, or V3 lacks `normalise`; the
            model is as it was.
    """
    marked = Marked(model, key, normalise)  # first: what it refuses must leave the model alone
    scheme_named(key.context.scheme).insert(model, key, example)
    return marked
