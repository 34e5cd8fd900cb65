"""What a probe will ask, settled before the first query, and in which order."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, final

import numpy as np
from numpy.typing import NDArray

from nnpassport.keys.chance import LOG10_ALPHA_UNCOMMITTED
from nnpassport.keys.context import TriggerShape
from nnpassport.keys.derive import stream
from nnpassport.keys.key import Key
from nnpassport.scheme import BadRecipeError, UnreadableDataError

if TYPE_CHECKING:
    from nnpassport.data.images import ImageSet


@final
@dataclass(frozen=True, slots=True)
class Terms:
    """What is settled before the first query.

    Attributes:
        budget: most queries, triggers and covers together; retries are not counted. None: for all
            triggers and their covers. The first triggers of the key are taken, so that there is
            nothing to choose.
        covers_per_trigger: ordinary images asked about for each trigger.
        log10_alpha: threshold on log₁₀ p, below 0.
        any_order: take the one-to-one map of what is answered to classes that fits best, and pay
            for all that there are: for a service whose classes have other names or another order.

    Raises:
        BadRecipeError: a number makes no sense.
    """

    budget: int | None = None
    covers_per_trigger: int = 1
    log10_alpha: float = LOG10_ALPHA_UNCOMMITTED
    any_order: bool = False

    def __post_init__(self) -> None:
        asks = self.budget is None or self.budget >= 1
        if not (asks and self.covers_per_trigger >= 0 and self.log10_alpha < 0):
            raise BadRecipeError(
                f"the terms are {self}; needed: a budget of at least 1 query, no fewer covers than "
                "0, and log10 of α below 0"
            )


class Plan(NamedTuple):
    """How many triggers and covers are asked about."""

    triggers: int
    covers: int


def settle(shape: TriggerShape, terms: Terms, cover: "ImageSet | None") -> Plan:
    """How many triggers and covers a run asks about.

    Raises:
        UnreadableDataError: the covers have another size than the triggers.
    """
    if cover is not None and tuple(cover.images.shape[1:]) != shape.size:
        raise UnreadableDataError(
            f"the covers are images of {tuple(cover.images.shape[1:])} and the triggers of "
            f"{shape.size}; needed: the same size, or everybody could tell them apart"
        )
    budget, each = terms.budget, terms.covers_per_trigger if cover is not None else 0
    available = len(cover) if cover is not None else 0
    triggers = shape.count if budget is None else min(shape.count, max(1, budget // (1 + each)))
    room = available if budget is None else min(available, budget - triggers)
    return Plan(triggers, min(each * triggers, room))


def asking_order(key: Key, plan: Plan, nonce: str, available: int) -> tuple[list[int], list[int]]:
    """In which order to ask the queries (triggers first, then covers), and which images cover.

    `available` is how many images there are to choose covers from. All of it is drawn from the
    key's secret and the run's nonce: the journal alone does not give it away, and a resumed run
    finds the same.
    """
    chosen = _shuffled(available, stream(key.seed, key.context, "probe covers", nonce))
    order = _shuffled(sum(plan), stream(key.seed, key.context, "probe order", nonce))
    return order, chosen[: plan.covers]


def places(order: Sequence[int]) -> list[int]:
    """When each query is asked: the inverse of an order."""
    return sorted(range(len(order)), key=order.__getitem__)


def query_images(
    key: Key, plan: Plan, cover: "ImageSet | None", chosen: Sequence[int]
) -> NDArray[np.uint8]:
    """The images of all queries (queries channels height width): triggers, then chosen covers."""
    triggers: NDArray[np.uint8] = key.trigger_arrays()[0][: plan.triggers]
    if cover is None or not chosen:
        return triggers
    covers: Any = cover.images[list(chosen)]
    return np.concatenate([triggers, covers.cpu().numpy()])


def _shuffled(count: int, draw: Callable[[int], bytes]) -> list[int]:
    # By sorting random words and not by a generator: those of torch may change between releases.
    words = draw(16 * count)
    return sorted(range(count), key=lambda i: words[16 * i : 16 * i + 16])
