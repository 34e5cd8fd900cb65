"""A network that carries a key, for training loops of your own."""

import warnings
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
from nnpassport.keys.reading import unwrapped_name
from nnpassport.scheme import Batch, OwnershipError, UnmarkedWarning, UnsuitableModelError

_IN = 0.9  # of the bits: with fewer the mark is not in


@final
class Marked:
    """A network and the key inserted into it; made by `mark`.

    Attributes:
        model: the network itself, trained in place; its optimiser is the caller's.
        fork: where V2 and V3 double the batch, and what a step costs; None for other schemes.
        step: how many losses were computed. V3 uses it to take turns through its triggers: save it
            with a checkpoint, and set it again to resume.
    """

    def __init__(
        self, model: nn.Module, key: Key, normalise: Normalisation | None, task: Task | None
    ) -> None:
        self.model = model
        self.fork: Fork | None = None
        self.step = 0
        self._key = key
        self._began = {name: each._version for name, each in _hosts(model, key).items()}
        self._looked = False
        self._running: nn.Module | None = None
        self._measured: Mapping[str, Tensor] = {}
        self._scheme = scheme_named(key.context.scheme)
        self._objective = self._scheme.objective(key, steps=1, normalise=normalise, task=task)

    def loss(
        self, inputs: Example, labels: Any, *, model: nn.Module | None = None
    ) -> Float[Tensor, ""]:
        """The whole of equation 1: task loss of every branch, triggers, sign loss.

        `inputs` are what the network takes: a tensor, a tuple of positional or a mapping of named
        inputs. `labels` are class indices (batch …), −100 where there is none, shares of the
        classes (batch classes …) as mixing makes them, or what `task` of `mark` takes. `model` is
        the wrapped network, for distributed or compiled training; None is the network itself.

        Raises:
            UnsuitableModelError: the loss or its gradients would not come through that wrapper; or
                a marked layer is frozen, and its bits are not in.
        """
        running = self.model if model is None else model
        if running is not self._running:
            one_branch = isinstance(self._scheme, Passport) and not self._scheme.two_branches
            refuse_lossy_wrapper(running, one_branch=one_branch)
            self._running = running
        outcome = self._objective(running, Batch(inputs, labels, self.step))
        self.step += 1
        self._measured = outcome.measures
        if not self._looked:
            self._look()
        return outcome.loss

    @property
    def measures(self) -> dict[str, float]:
        """For the last loss: the share of signature bits that match, and each branch's accuracy.

        For dense outputs the accuracy counts places that have a label; for shares, the class with
        the largest. With a loss of the caller's own, it is each branch's loss in place of its
        accuracy. Reading them waits for the device, so read them only in the steps that you log.
        """
        return {name: read_measure(value) for name, value in self._measured.items()}

    def graft(self, inputs: Example, *, limit: Limit = LIMIT) -> Mapping[str, Grafted]:
        """Put the passports into a trained network without training: see `schemes.graft`.

        `inputs` are a few hundred inputs that it was trained on, without labels. Afterwards every
        bit is right, and both branches compute about what the network did. With one passport for a
        whole layer this holds only where a batch norm follows; else the private branch has to be
        trained. For a network in the middle of its training allow any change: `limit=channels.ANY`.

        Raises:
            HarmfulGraftError: with passports of channels, more would change than `limit` allows.
            UnsuitableModelError: the scheme has no passports, or `graft` refuses the network or the
                inputs; the model is as it was.
        """
        return graft(self.model, inputs, limit=limit)

    def released(self) -> nn.Module:
        """The copy you publish, a plain network; see `Passport.released`.

        It warns (`UnmarkedWarning`) if the copy does not carry the mark, and how many bits it has.

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
        plain = self._scheme.released(self.model)
        self._warn_of_bits(plain)
        return plain

    def _look(self) -> None:
        """Refuse, at the first loss, layers that cannot learn their bits and do not have them."""
        self._looked = True
        frozen = _frozen(self.model, self._key)
        match = self._measured.get("sign_match")
        if frozen and match is not None and read_measure(match) < _IN:
            raise UnsuitableModelError(_why_frozen(frozen))

    def _warn_of_bits(self, plain: nn.Module) -> None:
        if not self._scheme.reads_weights or not self._key.context.layers:
            return
        try:
            found = self._scheme.verify(plain.state_dict(), self._key)
        except OwnershipError as error:
            unread = f"the mark of the network that is released cannot be read: {error}"
            warnings.warn(unread, UnmarkedWarning, stacklevel=3)
            return
        if found.marked or found.match_rate >= _IN:
            return
        hosts = _hosts(self.model, self._key)
        idle = [name for name, each in hosts.items() if self._began.get(name) == each._version]
        why = "train for longer (`measures` has the share of bits that match)"
        if idle:
            why = (
                f"the weights of {', '.join(idle[:5])} have not changed since `mark`: give the "
                "optimiser all parameters of the marked layers, and freeze none of them"
            )
        warnings.warn(
            f"the network that is released does not carry the mark, {found.matches} of "
            f"{found.bits} bits match: nobody could prove it to be yours; {why}",
            UnmarkedWarning,
            stacklevel=3,
        )


def mark(
    model: nn.Module,
    key: Key,
    example: Example,
    *,
    normalise: Normalisation | None = None,
    task: Task | None = None,
) -> Marked:
    """Insert `key` into `model`, in place, and return what a training loop needs.

    `example` is an input of the network, with all the inputs that training has. V3 needs
    `normalise`, because its triggers are kept as pixels. `task` is a loss of your own. It is called
    with the output of one branch and the labels, and its mean is taken; None is cross-entropy on
    the class scores. Triggers of V3 keep their class whatever the other labels are.

    Raises:
        UnsuitableModelError: the key was made for another network, the network is wrapped already,
            a marked layer is frozen, or V3 lacks `normalise`; the model is as it was.
    """
    if frozen := _frozen(model, key):
        raise UnsuitableModelError(_why_frozen(frozen))
    marked = Marked(model, key, normalise, task)  # first: its refusals must leave the model alone
    marked.fork = scheme_named(key.context.scheme).insert(model, key, example).fork
    return marked


def _hosts(model: nn.Module, key: Key) -> dict[str, nn.Parameter]:
    """What has to change of each of the key's layers for it to learn its bits, by the layer's name.

    A mark of adapters is in the adapters: their layers' own weights are frozen, and rightly so.
    """
    wanted, adapters = {layer.name for layer in key.context.layers}, key.context.scheme == "lora"
    found: dict[str, nn.Parameter] = {}
    for name, module in model.named_modules():
        if (plain := unwrapped_name(name)) not in wanted:
            continue
        for part, each in module.named_parameters():
            if each.dim() > 1 and (not adapters or "lora_" in part):
                found.setdefault(plain, each)
    return found


def _frozen(model: nn.Module, key: Key) -> list[str]:
    return [name for name, each in _hosts(model, key).items() if not each.requires_grad]


def _why_frozen(layers: list[str]) -> str:
    return (
        f"the weights of {', '.join(layers[:5])} are frozen (requires_grad is False), so training "
        "cannot put the mark into them; needed: requires_grad_(True) on them before `mark`, and "
        "until the bits are in. A network that is trained takes them by `graft`, without training: "
        "freeze it after that"
    )
