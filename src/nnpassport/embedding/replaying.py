"""Run a stretch of a diary's training again, and see whether it ends where the diary says.

Nobody makes up a checkpoint that the training before it leads to: a network on the way between two
others, or somebody else's, is not where the steps end. That holds for the optimiser's state too: a
momentum can be chosen that carries any network to any other, so it is compared as the weights are,
and where a run begins there must be none.

On the processor of the run it ends with the same numbers. On another, numbers are rounded
otherwise, and training makes much of little: how much, of this stretch, is measured by running it
from weights that were moved by rounding. What ends as near as these is the same training.
"""

import json
import math
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, final

import torch
from torch import Tensor

from nnpassport.catalog import scheme_named, with_settings
from nnpassport.claims import diary as diaries
from nnpassport.claims.entries import Entry
from nnpassport.data.images import read_images
from nnpassport.embedding import owner
from nnpassport.embedding.checkpoint import load_model, load_training, save_training
from nnpassport.embedding.network import models
from nnpassport.embedding.network.tensors import read_weights, tensors_digest
from nnpassport.embedding.train.loop import Journal, Moment, Recipe
from nnpassport.files.config import ModelConfig, read_config
from nnpassport.files.disk import brief, sha256_of
from nnpassport.files.weights import WEIGHTS_FILE
from nnpassport.keys.key import Key
from nnpassport.scheme import (
    OwnershipError,
    UnreadableClaimError,
    UnreadableModelError,
    UnsuitableModelError,
)

TOLERANCE = 0.05
"""How far from the kept checkpoint a replay may always end, as a share of the way that was gone."""

FARTHEST = 0.5
"""How far at most: another network ends about as far off as the way is long, 0.87 at a right guess.

That is sin θ for a guess at an angle of θ = 60° to where the steps go.
"""

ROUNDINGS = 2
"""Runs from weights that were moved by rounding, to see how far that carries."""

MOST_ROUNDINGS = 10
"""As many where so few do not say that it is the same training: rounding may flip a maximum or not,
and one flip carries hundreds of times as far as none.
"""

TIMES = 3.0
"""So many times as far as these count as rounding."""

_ROUNDING = 2.0**-20
"""What sums of some hundred products differ by, in float32, where they are added otherwise."""


class Stretch(NamedTuple):
    """Two entries of one run with the state that each goes on from."""

    start: Entry
    end: Entry


@final
@dataclass(frozen=True, slots=True)
class Replayed:
    """What became of it.

    Attributes:
        steps: how many were run.
        equal: whether weights and optimiser ended bit for bit as kept.
        weights: how far the weights are from the kept ones, as a share of the way that was gone.
        optimiser: how far its state is from the kept one, as a share of its size.
        larger: how many times as large the kept optimiser's state is as the one found.
        rounding: how far rounding carries the weights, and the optimiser; 0 if they are equal.
        tolerance: up to which either counts as rounding whatever that is.
        fault: what is wrong beside that, or None.
    """

    start: int
    end: int
    steps: int
    equal: bool
    weights: float
    optimiser: float
    larger: float
    rounding: tuple[float, float]
    tolerance: float
    fault: str | None = None

    @property
    def allowed(self) -> float:
        """How far the weights may be off and still be the same training."""
        return min(FARTHEST, max(self.tolerance, TIMES * self.rounding[0]))

    @property
    def holds(self) -> bool | None:
        """Whether the stretch ends where the diary says; None: rounding carries too far to tell."""
        if self.fault is not None:
            return False
        if self.equal:
            return True
        # A momentum that carries a network elsewhere is no larger by rounding.
        as_large = 0.5 <= self.larger <= 2.0
        if self.optimiser > self.tolerance and not as_large:
            return False
        blurred = TIMES * self.rounding[1] > FARTHEST and as_large
        if self.optimiser > max(self.tolerance, TIMES * self.rounding[1]) and not blurred:
            return False
        if self.weights <= self.allowed:
            return True
        return None if TIMES * self.rounding[0] > FARTHEST else False

    @property
    def reason(self) -> str:
        """In words."""
        if self.fault is not None:
            return self.fault
        stretch = f"from entry {self.start} to entry {self.end} ({self.steps} steps)"
        if self.equal:
            return f"{stretch} the training runs again to the very same numbers"
        apart = (
            f"the weights end {100 * self.weights:.3g} % of the way from the kept ones, and the "
            f"optimiser {100 * self.optimiser:.3g} % of its size"
        )
        carried = f"rounding alone carries the weights {100 * self.rounding[0]:.3g} %"
        if self.holds:
            return f"{stretch} it runs again within rounding: {apart}; {carried}"
        if self.holds is None:
            return (
                f"{stretch} it cannot be told: {apart}, and {carried}; needed: a shorter stretch, "
                "or the processor that the run was on"
            )
        return (
            f"{stretch} it does not end where the diary says: {apart}, {carried}, and "
            f"{100 * self.allowed:.3g} % is allowed"
        )

    def as_dict(self) -> dict[str, Any]:
        """Everything as plain JSON values."""
        named = ("start", "end", "steps", "equal", "weights", "optimiser", "larger", "rounding")
        return {
            "holds": self.holds,
            "reason": self.reason,
            **{name: getattr(self, name) for name in named},
            "allowed": self.allowed,
        }


def stretches(folder: Path, entries: tuple[Entry, ...]) -> tuple[Stretch, ...]:
    """What of a diary can be run again: neighbours, of those that were kept with their state."""
    kept = [
        each
        for each in entries
        if each.facts.state is not None
        and (diaries.kept_in(folder, each.number) / diaries.STATE_FILE).exists()
    ]
    return tuple(
        Stretch(one, two)
        for one, two in pairwise(kept)
        if one.facts.configuration == two.facts.configuration
        and one.facts.step < two.facts.step
        and one.facts.data == two.facts.data
    )


def documented(folder: Path, entry: Entry) -> Mapping[str, Any]:
    """How the run of an entry was trained, as our trainer says it.

    Raises:
        UnreadableClaimError: the configuration is not there, is another, or is not one of ours.
    """
    digest = entry.facts.configuration
    try:
        document = {} if digest is None else json.loads(diaries.configuration(folder, digest))
        known = isinstance(document, dict) and isinstance(document.get("recipe"), dict)
        if known:
            Recipe(**document["recipe"])
    except (ValueError, TypeError, RecursionError):
        known = False
    if not known:
        raise UnreadableClaimError(
            f"entry {entry.number} does not say how it was trained as our trainer does, so it "
            "cannot be run again by it; run the stretch with the loop it is of, and compare with "
            "`compared`"
        )
    return document


def running_as(
    folder: Path,
    stretch: Stretch,
    data: str,
    *,
    split: str | None = None,
    validation: float = 0.05,
    key: Key | None = None,
    initial: Path | None = None,
    trusted_factory: str | None = None,
) -> Callable[[Journal], object]:
    """What trains as the run of this stretch did: `train`, or `embed` with the key.

    Raises:
        UnreadableClaimError: the diary does not say how it was trained.
        UnsuitableModelError: data, key or the network to start from are others than the run's.
    """
    document = documented(folder, stretch.start)
    config = _network(diaries.kept_in(folder, stretch.start.number), trusted_factory)
    recipe = Recipe(**document["recipe"])
    channels, size, _ = config.input_size
    images = read_images(data, split=split, size=size, channels=channels)
    sets = owner.divide(images, None, validation=validation, seed=recipe.seed)
    if sets.train.digest() != stretch.start.facts.data:
        raise UnsuitableModelError(
            "the images are not those that the diary names; needed: the same data, with the split "
            "and the held-out share that the run had"
        )
    weights = None if initial is None else read_weights(initial).tensors
    _check_begun(document, key, weights)
    written = folder / ".replayed"  # never: the run ends before it writes a network
    if key is None:
        return lambda journal: owner.train(
            written, config, sets, recipe, initial=weights, journal=journal
        )
    settings = document.get("settings") or {}
    chosen = with_settings(scheme_named(key.context.scheme), **settings)
    asked = Recipe(**document.get("asked", document["recipe"]))
    return lambda journal: owner.embed(
        written, config, key, sets, asked, scheme=chosen, initial=weights, journal=journal
    )


def _network(kept: Path, trusted_factory: str | None) -> ModelConfig:
    """The config of a kept network, once it is known to be safe to build."""
    config = read_config(kept)
    if config.architecture not in models.ARCHITECTURES and config.architecture != trusted_factory:
        raise UnsuitableModelError(
            f"the network is one of {config.architecture!r:.100}, which is code of somebody's; "
            "needed: --factory with that very name, if you want to run it"
        )
    load_model(kept, trusted_factory=trusted_factory)  # that it is no larger than its weights are
    return config


def _check_begun(
    document: Mapping[str, Any], key: Key | None, weights: Mapping[str, Tensor] | None
) -> None:
    """Refuse another network to start from than the run's, or a key where it had none."""
    begun = None if weights is None else tensors_digest(weights)
    scheme = document.get("scheme")
    if begun != document.get("initial") or (key is None) != (scheme is None):
        raise UnsuitableModelError(
            f"the run began at {document.get('initial') or 'no network'} and carried "
            f"{'a key of ' + str(scheme) if scheme else 'no key'}; needed: --init and --key to fit"
        )


def replay(
    folder: Path,
    stretch: Stretch,
    run: Callable[[Journal], object],
    *,
    tolerance: float = TOLERANCE,
) -> Replayed:
    """Run a stretch again.

    Args:
        folder: of the diary.
        stretch: one of `stretches`.
        run: trains as the diary says, with the journal that it is given: `owner.train`, say.
        tolerance: see `Replayed`.

    Raises:
        UnreadableClaimError: a kept file is not the one that its entry names.
        UnsuitableModelError: `run` ends without having come to the end of the stretch.
    """
    before, after = (_opened(folder, each) for each in stretch)
    if before.state["done"] == 0 and before.state["optimizer"].get("state"):
        fault = f"entry {stretch.start.number} begins a run with an optimiser that has been used"
        return _result(stretch, before, after, before, tolerance, fault=fault)
    kept = diaries.kept_in(folder, stretch.start.number) / diaries.STATE_FILE
    watch = _run(stretch, run, lambda path: shutil.copyfile(kept, path))
    if watch.begun != stretch.start.facts.checkpoint:
        fault = f"the state kept with entry {stretch.start.number} is of another network"
        return _result(stretch, before, after, before, tolerance, fault=fault)
    found = _ended(watch, stretch)
    once = _result(stretch, before, after, found, tolerance)
    if once.equal:
        return once
    for number in range(MOST_ROUNDINGS):
        if number >= ROUNDINGS and once.holds:
            break
        state = _rounded(before.state, number)
        again = _ended(_run(stretch, run, partial(save_training, state=state)), stretch)
        moved = _result(stretch, before, found, again, tolerance)
        weights, optimiser = once.rounding
        once = replace(
            once, rounding=(max(weights, moved.weights), max(optimiser, moved.optimiser))
        )
    return once


def _run(
    stretch: Stretch, run: Callable[[Journal], object], state_into: Callable[[Path], object]
) -> "_Watch":
    """Run the stretch from a state that is written into a path."""
    watch = _Watch(stretch.start.facts.step, stretch.end.facts.step)
    with tempfile.TemporaryDirectory(prefix="nnpassport-replay-") as temporary:
        at = Path(temporary)
        state_into(at / "training.pt")
        try:
            run(Journal(at, resume=True, checkpoint_every=math.inf, diary=watch))
        except _ReachedError:
            pass
        except OwnershipError:
            raise
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise UnreadableClaimError(
                f"the state kept with entry {stretch.start.number} cannot be gone on from "
                f"({type(error).__name__}: {brief(error)}); needed: the file that was kept"
            ) from error
    return watch


def _ended(watch: "_Watch", stretch: Stretch) -> "_Held":
    """What a run came to.

    Raises:
        UnsuitableModelError: it ended before the stretch does.
    """
    if watch.found is None:
        raise UnsuitableModelError(
            f"the run ended before step {stretch.end.facts.step}, where the stretch ends; needed: "
            "the recipe that the diary names"
        )
    return watch.found


def _rounded(state: Mapping[str, Any], number: int) -> dict[str, Any]:
    """The state with its weights moved by about as much as rounding moves them."""
    rng = torch.Generator().manual_seed(number)
    moved = {
        name: value * (1 + _ROUNDING * torch.randn(value.shape, generator=rng).to(value.dtype))
        if value.is_floating_point()
        else value
        for name, value in state["model"].items()
    }
    return {**state, "model": moved}


def compared(
    start: Mapping[str, Tensor], end: Mapping[str, Tensor], found: Mapping[str, Tensor]
) -> float:
    """How far weights that a stretch ended with are from those kept, as a share of the way.

    For loops of others, which run a stretch themselves. Counters and other integers have to be
    equal, or it is infinite.
    """
    if start.keys() != end.keys() or found.keys() != end.keys():
        return math.inf
    gone = missed = 0.0
    for name, there in end.items():
        if there.shape != found[name].shape or there.shape != start[name].shape:
            return math.inf
        if not there.is_floating_point():
            if not torch.equal(there, found[name]):
                return math.inf
            continue
        wide = there.double()
        gone += float((wide - start[name].double()).square().sum())
        missed += float((wide - found[name].double()).square().sum())
    return 0.0 if missed == 0 else math.sqrt(missed / gone) if gone > 0 else math.inf


class _ReachedError(BaseException):
    """The step where the stretch ends: no error, and nothing in between may catch it."""


class _Held(NamedTuple):
    weights: Mapping[str, Tensor]
    state: Mapping[str, Any]


@final
@dataclass(slots=True)
class _Watch:
    """A keeper that stops the run where the stretch ends, and has what it came to."""

    start: int
    end: int
    begun: str | None = None
    found: _Held | None = field(default=None)

    def due(self, step: int) -> bool:
        return step == self.end

    def enter(self, moment: Moment) -> None:
        weights = {name: value.detach().cpu().clone() for name, value in moment.weights.items()}
        if self.begun is None and moment.step == self.start:
            self.begun = tensors_digest(weights)
        if moment.step == self.end:
            self.found = _Held(weights, moment.state)
            raise _ReachedError


def _opened(folder: Path, entry: Entry) -> _Held:
    """The checkpoint of an entry, once both files are known to be those that it names.

    Raises:
        UnreadableClaimError: one of them is not.
    """
    kept = diaries.kept_in(folder, entry.number)
    try:
        state = load_training(kept / diaries.STATE_FILE)
        weights = read_weights(kept / WEIGHTS_FILE).tensors
        same = sha256_of(kept / diaries.STATE_FILE) == entry.facts.state
        same = same and tensors_digest(weights) == entry.facts.checkpoint
        known = isinstance(state["done"], int) and isinstance(state["optimizer"], dict)
    except (UnreadableModelError, KeyError) as error:
        raise UnreadableClaimError(
            f"the checkpoint of entry {entry.number} cannot be read ({error}); needed: the files "
            f"that were kept, in {kept}"
        ) from error
    if not (same and known):
        raise UnreadableClaimError(
            f"{kept} is not the checkpoint that entry {entry.number} names; needed: the files that "
            "were kept"
        )
    return _Held(weights, state)


def _result(
    stretch: Stretch,
    before: _Held,
    after: _Held,
    found: _Held,
    tolerance: float,
    *,
    fault: str | None = None,
) -> Replayed:
    weights = compared(before.weights, after.weights, found.weights)
    optimiser = _apart(after.state["optimizer"], found.state["optimizer"])
    sizes = [_size(_tensors(each.state["optimizer"])) for each in (after, found)]
    return Replayed(
        stretch.start.number,
        stretch.end.number,
        stretch.end.facts.step - stretch.start.facts.step,
        fault is None and weights == optimiser == 0.0,
        weights,
        optimiser,
        sizes[0] / sizes[1] if sizes[1] > 0 else math.inf if sizes[0] > 0 else 1.0,
        (0.0, 0.0),
        tolerance,
        fault,
    )


def _apart(one: Mapping[str, Any], other: Mapping[str, Any]) -> float:
    """How far an optimiser's tensors are from another's, as a share of their size."""
    mine, theirs = _tensors(one), _tensors(other)
    if mine.keys() != theirs.keys() or any(mine[n].shape != theirs[n].shape for n in mine):
        return math.inf
    size = _size(mine)
    missed = _size({n: mine[n].double() - theirs[n].double() for n in mine})
    return 0.0 if missed == 0 else missed / size if size > 0 else math.inf


def _size(tensors: Mapping[str, Tensor]) -> float:
    return math.sqrt(sum(float(each.double().square().sum()) for each in tensors.values()))


def _tensors(state: Any, path: str = "") -> dict[str, Tensor]:
    if isinstance(state, Tensor):
        return {path: state.detach().cpu()}
    inner = (
        state.items()
        if isinstance(state, Mapping)
        else enumerate(state)
        if isinstance(state, list | tuple)
        else ()
    )
    found: dict[str, Tensor] = {}
    for name, value in inner:
        found |= _tensors(value, f"{path}/{name}")
    return found
