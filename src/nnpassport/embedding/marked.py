"""A network that carries a key, for training loops of your own."""

from collections.abc import Mapping
from typing import Any, final

from jaxtyping import Float
from torch import Tensor, nn

from nnpassport.catalog import scheme_named
from nnpassport.data.images import Normalisation
from nnpassport.embedding.network.fork import Fork
from nnpassport.embedding.network.outputs import Example
from nnpassport.embedding.network.survey import refuse_lossy_wrapper
from nnpassport.embedding.schemes.channels import LIMIT, Limit
from nnpassport.embedding.schemes.graft import Grafted, graft
from nnpassport.embedding.schemes.passport import Passport
from nnpassport.embedding.train.loop import Task, read_measure
from nnpassport.keys.key import Key
from nnpassport.scheme import Batch, UnsuitableModelError


@final
class Marked:
    """A network and the key inserted into it; made by `mark`.

    Attributes:
        model: the network itself, trained in place; its optimiser is the caller's.
        fork: where V2 and V3 double the batch, and what a step costs; None for other schemes.
        step: how many losses were asked for; the trigger set of V3 takes turns by it. Save it with
            a checkpoint and set it again to resume.
    """

    def __init__(
        self, model: nn.Module, key: Key, normalise: Normalisation | None, task: Task | None
    ) -> None:
        self.model = model
        self.fork: Fork | None = None
        self.step = 0
        self._measured: Mapping[str, Tensor] = {}
        self._scheme = scheme_named(key.context.scheme)
        self._objective = self._scheme.objective(key, steps=1, normalise=normalise, task=task)

    def loss(
        self, inputs: Example, labels: Any, *, model: nn.Module | None = None
    ) -> Float[Tensor, ""]:
        """The whole of equation 1: task loss of every branch, triggers, sign loss.

        `inputs` are what the network takes: a tensor, a tuple of positional or a mapping of named
        inputs. `labels` are class indices, or what `task` of `mark` takes. `model` is the network
        as it is wrapped by now, for distributed or compiled training; None is the network itself.

        Raises:
            UnsuitableModelError: the loss or its gradients would not come through that wrapper.
        """
        running = self.model if model is None else model
        one_branch = isinstance(self._scheme, Passport) and not self._scheme.two_branches
        refuse_lossy_wrapper(running, one_branch=one_branch)
        outcome = self._objective(running, Batch(inputs, labels, self.step))
        self.step += 1
        self._measured = outcome.measures
        return outcome.loss

    @property
    def measures(self) -> dict[str, float]:
        """Of the last loss: the share of signature bits that match, and each branch's accuracy.

        Where the task's loss is the caller's own, each branch's loss in place of its accuracy.
        Reading them waits for the device, so a loop that logs every tenth step waits in every
        tenth step alone.
        """
        return {name: read_measure(value) for name, value in self._measured.items()}

    def graft(self, inputs: Example, *, limit: Limit = LIMIT) -> Mapping[str, Grafted]:
        """Start from the trained weights that the network has: see `schemes.graft`.

        `inputs` are a few hundred of what it was trained on, without labels. Right after it every
        bit is right, and both branches compute about what the network did; with one passport for a
        whole layer only where a batch norm follows, else the private one is to be trained. A
        network in the middle of its training takes any change: `limit=channels.ANY`.

        Raises:
            HarmfulGraftError: with passports of channels, more changed than `limit` allows.
            UnsuitableModelError: the scheme has no passports, or `graft` refuses the network or the
                inputs; the model is as it was.
        """
        return graft(self.model, inputs, limit=limit)

    def released(self) -> nn.Module:
        """A plain copy that may leave the house; see `Passport.released`.

        Raises:
            UnsuitableModelError: the network is sharded over several processes.
        """
        kinds = {base.__name__ for each in self.model.modules() for base in type(each).__mro__}
        if "FSDPModule" in kinds:
            raise UnsuitableModelError(
                "the network is sharded (fully_shard), and no process has all of it; mark another "
                "one with the same key, load get_model_state_dict(…, full_state_dict=True) of "
                "torch.distributed.checkpoint.state_dict into it, and release that"
            )
        return self._scheme.released(self.model)


def mark(
    model: nn.Module,
    key: Key,
    example: Example,
    *,
    normalise: Normalisation | None = None,
    task: Task | None = None,
) -> Marked:
    """Insert `key` into `model`, in place, and return what its training loop needs.

    `example` is what the network runs on, with all the inputs that training has. `normalise` is
    needed by V3, whose triggers are kept as pixels. `task` is a loss of your own, called with the
    output of one branch and the labels; None is cross-entropy on the class scores.

    Raises:
        UnsuitableModelError: the key was made for another network, the network is wrapped already,
            or V3 lacks `normalise`; the model is as it was.
    """
    marked = Marked(model, key, normalise, task)  # first: its refusals must leave the model alone
    marked.fork = scheme_named(key.context.scheme).insert(model, key, example)
    return marked
