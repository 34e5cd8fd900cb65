"""A mark in the order of hidden units: nothing is trained, and the network computes what it did.

Which hidden unit comes first says nothing about what a network does. So the owner puts the units of
every axis into an order that is derived from his seed, and releases that. Whoever copies it copies
the order, and tuning, noise, pruning and rounding leave it. The p-value is exact with no assumption
about anybody's training: the order was drawn by lot, by the owner, after all else was there.

Whoever permutes the units again erases it, at no cost. It stands beside a passport, never in its
place; `docs/threat-model.md` says what it is worth.
"""

import os
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import NamedTuple, final

import numpy as np
from torch import Tensor, nn

from nnpassport.alignment.axes import Axes
from nnpassport.alignment.reorder import reordered
from nnpassport.data.images import ImageSet, Normalisation
from nnpassport.embedding.axes import axes_of
from nnpassport.embedding.network.inserted import Inserted
from nnpassport.embedding.network.outputs import Example, call, logits_of
from nnpassport.embedding.network.tensors import as_array, as_tensor, tensors_digest
from nnpassport.embedding.schemes import mark
from nnpassport.embedding.schemes.engine import Carriers, Mark
from nnpassport.embedding.train.labels import mean_loss, plain_loss, share_right
from nnpassport.embedding.train.loop import Objective, Outcome, Task
from nnpassport.keys.chance import LOG10_ALPHA_COMMITTED, LOG10_ALPHA_UNCOMMITTED
from nnpassport.keys.context import Context, OrderForm
from nnpassport.keys.key import Key, sketch_digest
from nnpassport.keys.order import axes_in, form_of, log10_at_best, own_orders
from nnpassport.keys.ordered import chosen_axes, sketch_of
from nnpassport.scheme import Batch, OtherAnchorError, UnsuitableModelError


class _Traced(NamedTuple):
    axes: Axes
    model: nn.Module


@final
@dataclass(frozen=True)
class Order(Mark):
    """Units of every proved axis in an order of the key's.

    Attributes:
        threshold: share of the units that the plain rule asks for; the exact verdict needs fewer.
    """

    name: str
    threshold: float = 0.5

    parts = frozenset({"order"})

    def carriers(
        self, model: nn.Module, example: Example, layers: Sequence[str] | None
    ) -> Carriers:
        """No layers, but units of the whole network, whose axes are traced and proved.

        It is the key's anchor: as trained as it is to be.
        """
        return Carriers(network=_Traced(axes_of(deepcopy(model).eval(), example), model))

    def key_for(self, found: Carriers, *, owner: str, text: str | None, seed: bytes | None) -> Key:
        """A new key for this very network.

        Raises:
            UnsuitableModelError: so few units can be put into order that nothing would be proved.
        """
        secret = os.urandom(32) if seed is None else seed
        return self._bound(secret, mark.new_nonce(seed), owner, found.network)

    def prepared(self, key: Key, model: nn.Module, data: ImageSet, normalise: Normalisation) -> Key:
        """The key bound to `model`, the network that is to be put into order; all else drawn anew.

        Raises:
            UnsuitableModelError: as `key_for`.
        """
        mark.check_scheme(self.name, key)
        if tensors_digest(model.state_dict()) == key.context.anchor:
            return key
        example = normalise(data.sample(2, seed=0).images)
        found = self.carriers(model, example, None).network
        return self._bound(key.seed, key.context.nonce, key.context.owner, found)

    def _bound(self, seed: bytes, nonce: bytes, owner: str, traced: "_Traced") -> Key:
        axes, state = traced.axes, traced.model.state_dict()
        arrays, anchor = {n: as_array(each) for n, each in state.items()}, tensors_digest(state)
        chosen = chosen_axes(axes, arrays)
        if not chosen:
            raise _too_few("no axis with enough units")
        sketch = sketch_of(axes, chosen, arrays, anchor=anchor, nonce=nonce)
        form = OrderForm(axes.digest, sketch_digest(sketch), chosen)
        context = Context(self.name, owner, (), None, nonce, anchor=anchor, order=form)
        table = np.frombuffer(axes.to_bytes(), np.uint8)
        if (best := log10_at_best(context)) > LOG10_ALPHA_UNCOMMITTED:
            raise _too_few(f"{context.bits} units, which reach 10^{best:.1f} at best")
        return Key(seed, context, table=table, sketch=sketch)

    def insert(self, model: nn.Module, key: Key, example: Example) -> Inserted:
        """Put the key's anchor into its order, in place; leave a network that has the order.

        Raises:
            OtherAnchorError: it is another network.
        """
        mark.check_scheme(self.name, key)
        state = model.state_dict()
        if tensors_digest(state) != key.context.anchor:
            if not self.verify(state, key, log10_alpha=LOG10_ALPHA_COMMITTED).marked:
                raise OtherAnchorError(
                    "the network is neither the one that the key was drawn for nor in its order; "
                    "needed: the very weights that `key new --model FOLDER` was given, or a new key"
                )
            return Inserted(model)
        arrays = {name: as_array(each) for name, each in state.items()}
        moved = reordered(axes_in(key), arrays, own_orders(key))
        model.load_state_dict({name: as_tensor(each) for name, each in moved.items()})
        return Inserted(model)

    def objective(
        self,
        key: Key,
        *,
        steps: int,
        normalise: Normalisation | None = None,
        task: Task | None = None,
    ) -> Objective:
        """The task's loss and nothing else: an order stays while a network is trained."""
        form_of(key.context)

        def objective(model: nn.Module, batch: Batch) -> Outcome:
            output = call(model, batch.images)
            loss = mean_loss((task or plain_loss)(output, batch.labels))
            if task is not None:
                return Outcome(loss, {"task_loss": loss.detach()})
            return Outcome(loss, {"accuracy": share_right(logits_of(output), batch.labels)})

        return objective

    def forms(self, key: Key) -> Mapping[str, Tensor]:
        """None: whole rows are compared, and nothing is multiplied with them."""
        return {}


def _too_few(what: str) -> UnsuitableModelError:
    return UnsuitableModelError(
        f"the network has {what}, so its order would prove nothing; needed: hidden axes with more "
        "units, that a trace can follow (`claim axes` shows them); passports mark any layer"
    )


ORDER = Order("order")
"""Every axis of 12 units or more."""
