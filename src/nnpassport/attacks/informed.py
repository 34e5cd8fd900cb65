"""Removal by thieves who know how marks of weights are made: no key, no labels, any architecture.

A mark must lie somewhere. One passport for a whole layer makes it one singular component; a change
that is to cost little lies where inputs have little to say; and released scales may say it aloud.
Each thief here looks in one of these places, does the most that leaves the answers standing
(`unlabelled.scout` says what he knows and how much he keeps), and returns a changed copy. Ours: we
know of no publication of them.
"""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from nnpassport.attacks.outcome import Attacked, stopwatch
from nnpassport.attacks.unlabelled import (
    AT_ONCE,
    Rows,
    Scouted,
    Sight,
    answers_of,
    scout,
)
from nnpassport.embedding.network.outputs import length_of, part_of, parts

COMPONENTS = 3
"""Singular components of a layer that a thief tries to take out."""
TAILS = (1e-3, 1e-2)
"""Shares of the inputs' variance that are in directions which inputs hardly use."""
_PROBE = 192  # inputs that a single component is tried on
_FLOOR = 1.0  # of the mean eigenvalue: what a mark is thought to weigh unused directions with
_RIDGE = 1e-6  # of the mean square of what a layer puts out
_SEEN_AS_ZERO = 1e-7  # of the largest eigenvalue; less cannot be told from rounding


@torch.no_grad()
def shave(thief: Scouted, *, tries: int = 200) -> Attacked:
    """Subtract singular components one by one, those that outputs feel least first.

    The first three of every weight are candidates; each is taken out for good if the answers to 192
    inputs, and to those that are held out, still stand without it; `tries` of them are tried.
    """
    stop = stopwatch("W, D")
    return Attacked(_without(thief, _quietest(thief)[:tries]), stop(thief.count))


@torch.no_grad()
def shave_outliers(thief: Scouted) -> Attacked:
    """Subtract of each weight the one component that a mark of one passport would be.

    Bits times one direction are a component whose left vector is nearly ±1 everywhere, and which
    weighs more in the weight than in what the layer puts out. Of the first three the one goes that
    looks most like it, if the answers stand without it: a third of the tries of `shave`.
    """
    stop = stopwatch("W, D")
    suspects: list[tuple[float, str, Tensor]] = []
    for name, rows in thief.rows.items():
        sight = thief.seen[name]
        found = [(_suspicion(each, rows, sight), name, each) for each in components(rows)]
        suspects.append(max(found, key=lambda each: each[0]))
    suspects.sort(key=lambda each: -each[0])
    candidates = [(name, component) for _, name, component in suspects]
    return Attacked(_without(thief, candidates), stop(thief.count))


def _without(thief: Scouted, candidates: Sequence[tuple[str, Tensor]]) -> nn.Module:
    """The network without these components, but for those that its answers need."""
    probe = part_of(thief.inputs, 0, _PROBE)
    own = answers_of(thief.model, probe, thief.asking)
    best, taken = deepcopy(thief.model), dict[str, Tensor]()
    for name, component in candidates:
        without = {**taken, name: taken.get(name, thief.rows[name]) - component}
        shaved = thief.changed(without)
        alike = thief.asking.alike(own, answers_of(shaved, probe, thief.asking))
        if alike >= thief.kept and thief.likeness(shaved) >= thief.kept:
            taken, best = without, shaved
    return best


def _quietest(thief: Scouted) -> list[tuple[str, Tensor]]:
    """Components of all layers, by the share of their layer's output that they are."""
    found: list[tuple[float, str, Tensor]] = []
    for name, rows in thief.rows.items():
        whole = thief.seen[name].felt(rows).sum().clamp(min=1e-30)
        for component in components(rows):
            found.append((float(thief.seen[name].felt(component).sum() / whole), name, component))
    return [(name, component) for _, name, component in sorted(found, key=lambda each: each[0])]


def components(
    rows: Float[Tensor, "out fan_in"], count: int = COMPONENTS
) -> list[Float[Tensor, "out fan_in"]]:
    """The first singular components of a weight, each a matrix of rank one."""
    left, values, right = torch.linalg.svd(rows, full_matrices=False)
    return [torch.outer(left[:, i] * values[i], right[i]) for i in range(min(count, len(values)))]


def _suspicion(component: Tensor, rows: Tensor, sight: Sight) -> float:
    """How much more a component weighs in the weight than in the output, if it is flat."""
    left = component.norm(dim=1)
    flat = float(left.mean() ** 2 / left.square().mean().clamp(min=1e-30))  # 2/π is a Gaussian's
    weight = component.square().sum() / rows.square().sum()
    felt = sight.felt(component).sum() / sight.felt(rows).sum().clamp(min=1e-30)
    return flat**4 * float(weight / felt.clamp(min=1e-9))


@torch.no_grad()
def drown(thief: Scouted, rng: torch.Generator, *, tails: Sequence[float] = TAILS) -> Attacked:
    """Add noise along directions that inputs hardly use, as much as leaves the answers standing.

    Directions are the principal axes of what a layer meets that together hold a small share of its
    variance. Of the shares `tails` that one is taken whose noise disturbs the weights most.
    """
    stop = stopwatch("W, D")
    return Attacked(_drowned(thief, rng, thief.kept, tails), stop(thief.count))


def _drowned(
    thief: Scouted, rng: torch.Generator, kept: float, tails: Sequence[float]
) -> nn.Module:
    best, loudest = deepcopy(thief.model), 0.0
    for tail in tails:
        noise = {
            name: unused_noise(rows, thief.seen[name], rng, tail=tail)
            for name, rows in thief.rows.items()
        }

        def louder(felt: float, noise: Rows = noise) -> Rows:
            return {n: rows + noise[n] * felt**0.5 for n, rows in thief.rows.items()}

        model, felt = thief.strongest(louder, 1e-6, 1.0, kept=kept)
        loud = sum(_loudness(noise[n], thief.rows[n], thief.seen[n], felt) for n in noise)
        if loud > loudest:
            best, loudest = model, loud
    return best


def unused_noise(
    rows: Float[Tensor, "out fan_in"], sight: Sight, rng: torch.Generator, *, tail: float
) -> Float[Tensor, "out fan_in"]:
    """Noise that lies in the axes which together hold the share `tail` of the inputs' variance.

    It is as loud in the layer's outputs as the filters themselves, and meant to be scaled. At least
    one axis is taken.
    """
    values = sight.values.clamp(min=_SEEN_AS_ZERO * float(sight.values[-1]) + 1e-30)
    count = max(1, int((values.cumsum(0) <= tail * values.sum()).sum()))
    drawn = torch.randn(len(rows), count, generator=rng, dtype=torch.double)
    heard = drawn.square() @ values[:count]
    typical = sight.felt(rows).mean()
    return (drawn * (typical / heard).sqrt()[:, None]) @ sight.axes[:, :count].T


def _loudness(noise: Tensor, rows: Tensor, sight: Sight, felt: float) -> float:
    """Noise over filters, in the metric of a mark with a floor, on a scale of logarithms."""
    floor = _FLOOR * float(sight.values.mean())
    over, under = (
        float(x.square().sum()) * floor + float(sight.felt(x).sum()) for x in (noise, rows)
    )
    return float(torch.log1p(torch.tensor(felt * over / max(under, 1e-30))))


@torch.no_grad()
def unscale(thief: Scouted, rng: torch.Generator) -> Attacked:
    """Take out of each weight what its norm's released scales are a linear image of.

    If γ = W·m for one m, then ⟨u, m⟩ = 1 for every u = Wᵀa with aᵀγ = 1, whatever m is, and
    W − γ·uᵀ says nothing of γ any more. Of all such u this is the one that outputs feel least,

        u = Wᵀ(W·C·Wᵀ)⁻¹γ / (γᵀ(W·C·Wᵀ)⁻¹γ),

    C the second moment of the inputs. Each filter gets a little more or less of it, so that what is
    left has any sign.
    """
    stop = stopwatch("W, D")
    said = {name: _said(thief, name, rng) for name in thief.rows}

    def unsaid(share: float) -> Rows:
        return {n: rows - share * said[n] for n, rows in thief.rows.items()}

    best, _ = thief.strongest(unsaid, 0.01, 1.0)
    return Attacked(best, stop(thief.count))


def _said(thief: Scouted, name: str, rng: torch.Generator) -> Float[Tensor, "out fan_in"]:
    rows, norm = thief.rows[name], thief.sites[name].norm
    scale = None if norm is None else getattr(thief.model.get_submodule(norm), "weight", None)
    if scale is None or scale.numel() != len(rows):
        return torch.zeros_like(rows)
    gamma, sight = scale.detach().double(), thief.seen[name]
    heard = (rows @ sight.axes) * sight.values.sqrt()
    kernel = heard @ heard.T
    kernel.diagonal().add_(_RIDGE * kernel.diagonal().mean() + 1e-30)
    solved = torch.linalg.solve(kernel, gamma)
    more = 1 + 0.5 * torch.randn(len(rows), generator=rng, dtype=torch.double)
    return torch.outer(more * gamma, rows.T @ solved / (gamma @ solved))


@torch.no_grad()
def narrow(thief: Scouted) -> Attacked:
    """Keep of each weight the fewest directions of its inputs that leave the answers standing."""
    stop = stopwatch("W, D")

    def narrowed(lost: float) -> Rows:
        return {n: _projected(rows, thief.seen[n], lost) for n, rows in thief.rows.items()}

    best, _ = thief.strongest(narrowed, 1e-5, 0.5)
    return Attacked(best, stop(thief.count))


def _projected(rows: Tensor, sight: Sight, lost: float) -> Tensor:
    dropped = int((sight.values.cumsum(0) <= lost * sight.values.sum()).sum())
    axes = sight.axes[:, dropped:]
    return rows @ axes @ axes.T


@torch.no_grad()
def replace(thief: Scouted, rng: torch.Generator) -> Attacked:
    """Put noise in the place of what each weight has in the directions that inputs use the least.

    What stood there goes, as in `narrow`, and noise as loud as it takes its place, in those of the
    directions that are used the very least, as in `drown`: the mark loses what it had there, and
    what it has elsewhere is drowned.
    """
    stop = stopwatch("W, D")
    return Attacked(_replaced(thief, rng, thief.kept), stop(thief.count))


def _replaced(thief: Scouted, rng: torch.Generator, kept: float) -> nn.Module:
    rows_of = thief.rows
    noise = {n: unused_noise(w, thief.seen[n], rng, tail=TAILS[0]) for n, w in rows_of.items()}

    def without(lost: float) -> Rows:
        found = {}
        for name, rows in thief.rows.items():
            sight = thief.seen[name]
            left = _projected(rows, sight, lost)
            heard = float(sight.felt(rows - left).sum() / sight.felt(rows).sum().clamp(min=1e-30))
            found[name] = left + noise[name] * heard**0.5
        return found

    return thief.strongest(without, 1e-5, 0.5, kept=kept)[0]


@torch.no_grad()
def lower_rank(thief: Scouted) -> Attacked:
    """Give each weight the lowest rank, in the metric of its inputs, that leaves the answers.

    The best weight of rank r in that metric is U·Uᵀ·W, with U the first r principal axes of what
    the layer puts out.
    """
    stop = stopwatch("W, D")
    axes: Mapping[str, tuple[Tensor, Tensor]] = {
        n: _output_axes(rows, thief.seen[n]) for n, rows in thief.rows.items()
    }

    def lowered(lost: float) -> Rows:
        low = {}
        for name, (values, vectors) in axes.items():
            dropped = int((values.cumsum(0) <= lost * values.sum()).sum())
            low[name] = vectors[:, dropped:] @ (vectors[:, dropped:].T @ thief.rows[name])
        return low

    best, _ = thief.strongest(lowered, 1e-5, 0.5)
    return Attacked(best, stop(thief.count))


def _output_axes(rows: Tensor, sight: Sight) -> tuple[Tensor, Tensor]:
    heard = (rows @ sight.axes) * sight.values.sqrt()
    values, vectors = torch.linalg.eigh(heard @ heard.T)
    return values.clamp(min=0), vectors


class Imitation(NamedTuple):
    """How much a thief spends on learning the network's own answers again.

    Attributes:
        rounds: of noise and imitation.
        epochs: passes over his inputs in each.
        rate: of Adam; the statistics of norms are frozen.
        dared: how much likeness he gives up at first in each round, to win it back.
    """

    rounds: int = 3
    epochs: int = 3
    rate: float = 3e-4
    dared: float = 0.15


def drown_and_imitate(
    thief: Scouted,
    rng: torch.Generator,
    *,
    budget: Imitation = Imitation(),  # noqa: B008 (a tuple: it cannot change)
) -> Attacked:
    """More noise than the answers bear, and then learn the network's own answers again; in rounds.

    The noise is that of `replace`. A round counts if the answers to held-out inputs are as alike as
    the thief asks by the end of it; else it is undone, and it was the last one.
    """
    stop = stopwatch("W, D")
    best, passes, now = deepcopy(thief.model), 0, thief
    wanted = answers_of(thief.model, thief.inputs, thief.asking)
    for number in range(budget.rounds):
        if number:
            layers = [*thief.sites]
            now = scout(best, thief.whole, kept=thief.kept, layers=layers, asking=thief.asking)
        student = _replaced(now, rng, max(0.0, thief.kept - budget.dared))
        _imitate(student, thief, wanted, budget, rng)
        passes += budget.epochs
        if thief.likeness(student) < thief.kept:
            break
        best = student
    return Attacked(best.eval(), stop(thief.count, passes))


def _imitate(
    student: nn.Module, thief: Scouted, wanted: Tensor, budget: Imitation, rng: torch.Generator
) -> None:
    """Learn the answers to the thief's inputs, in evaluation mode, in place."""
    trained = {p: p.requires_grad for p in student.parameters() if p.is_floating_point()}
    for parameter in trained:
        parameter.requires_grad_(True)
    optimiser = torch.optim.Adam(list(trained), lr=budget.rate)
    scale = wanted.square().mean().clamp(min=1e-12)
    batches = list(parts(thief.inputs, AT_ONCE))
    answers = wanted.split(length_of(batches[0]))
    for _ in range(budget.epochs):
        for index in torch.randperm(len(batches), generator=rng).tolist():
            told = thief.asking.ask(student, batches[index]).float()
            optimiser.zero_grad()
            ((told - answers[index]).square().mean() / scale).backward()
            optimiser.step()
    for parameter, before in trained.items():
        parameter.requires_grad_(before)
        parameter.grad = None
