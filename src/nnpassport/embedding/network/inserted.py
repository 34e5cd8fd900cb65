"""Passports that are in a network: what a training step needs of them, and nothing else."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from nnpassport.embedding.network.fork import Fork
from nnpassport.embedding.network.layers import Branch, passport_norms, running_in
from nnpassport.embedding.network.outputs import unwrapped


@final
class Inserted:
    """Passports in a network: their layers, what they run, and the γ and signs of a step.

    It looks through the network once, when it is made; a step then asks it and nothing else.

    Attributes:
        norms: the passport layers, by the dotted name of the norm they wrap.
        fork: where the batch is doubled for two branches, if `surgery.insert` said so.
    """

    def __init__(self, model: nn.Module, fork: Fork | None = None) -> None:
        self.norms, self.fork = passport_norms(model), fork
        self._running = running_in(model)

    @property
    def there(self) -> bool:
        """Whether there are passports, and none was taken out of the network again."""
        return bool(self.norms) and not any(each.removed for each in self._running)

    def run(self, branch: Branch, private_share: float = 1.0) -> None:
        """What the network computes from now on, as `set_branch` says."""
        for each in self._running:
            each.branch, each.private_share = branch, private_share

    @contextmanager
    def keeping(self) -> Iterator[None]:
        """Within this, `gammas` are those that a forward has computed, where it has.

        With its gradient, to compute them again would be twice the work that a passport costs.
        """
        for each in self._running:
            each.kept = {}
        try:
            yield
        finally:
            for each in self._running:
                each.kept = None

    def gammas(self) -> Float[Tensor, " bits"]:
        """γ of all passport layers, in their order, with gradients."""
        return torch.cat([norm.gamma for norm in self.norms.values()])

    def signs(self) -> Float[Tensor, " bits"]:
        """The sign that each of these should have, and 0 where it carries no bit."""
        return torch.cat([norm.wanted() for norm in self.norms.values()])


def found_once() -> Callable[[nn.Module], Inserted]:
    """Finds the passports in a network, and looks through it again only where it is another."""
    known: tuple[nn.Module, Inserted] | None = None

    def find(model: nn.Module) -> Inserted:
        nonlocal known
        network = unwrapped(model)
        if known is None or known[0] is not network or not known[1].there:
            known = network, Inserted(network)
        return known[1]

    return find
