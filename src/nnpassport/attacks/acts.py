"""What the rows of `table.py` do: each attack as a function of a subject and a strength."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch

from nnpassport.attacks import (
    ambiguity,
    blocks,
    forging,
    hashbound,
    informed,
    obfuscation,
    perturbation,
    removal,
)
from nnpassport.attacks import substitution as fully_connected
from nnpassport.attacks.extraction import distil_soft, extract_hard
from nnpassport.attacks.merging import merge
from nnpassport.attacks.moves import KINDS as MOVES
from nnpassport.attacks.moves import move
from nnpassport.attacks.outcome import Attacked, Forged, stopwatch
from nnpassport.attacks.passports import draw_seed
from nnpassport.attacks.projection import project
from nnpassport.attacks.subject import Subject
from nnpassport.attacks.unlabelled import Scouted, scout
from nnpassport.data.images import ImageSet
from nnpassport.embedding.axes import tied
from nnpassport.embedding.schemes.passport import V2, draw_by_layer
from nnpassport.scheme import BadRecipeError, UnsuitableModelError

Act = Callable[[Subject, float], Attacked | Forged]
"""What an attack does to a subject, at a strength."""

_SEEN = 512  # images that a layer's inputs are measured on


def _kind(number: float) -> str:
    return _numbered(number, tuple(perturbation.KINDS), "grid")


def _numbered(number: float, kinds: Sequence[str], what: str) -> str:
    if number not in range(len(kinds)):
        raise BadRecipeError(
            f"{what} {number:g} is unknown; there are 0 to {len(kinds) - 1}: {', '.join(kinds)}"
        )
    return kinds[int(number)]


def _tuned(form: str) -> Callable[[Subject, float], Attacked]:
    def run(subject: Subject, _: float) -> Attacked:
        recipe = subject.recipe(0.01)
        normalise = subject.normalise
        return removal.fine_tune(
            subject.model, subject.images(), recipe, normalise=normalise, form=form
        )

    return run


def _transferred(form: str) -> Callable[[Subject, float], Attacked]:
    def run(subject: Subject, _: float) -> Attacked:
        data, recipe = subject.other_task().train, subject.recipe(0.01)
        normalise = subject.normalise
        return removal.fine_tune(subject.model, data, recipe, normalise=normalise, form=form)

    return run


def _overwritten(subject: Subject, _: float) -> Attacked:
    recipe = subject.recipe(0.01)
    seed = draw_seed(subject.rng("overwrite"))
    drawn = draw_by_layer(
        subject.scheme, subject.model, subject.example, owner="attacker", seed=seed
    )
    theirs = subject.scheme.prepared(drawn, subject.model, subject.images(), subject.normalise)
    return removal.overwrite(
        subject.model,
        subject.scheme,
        theirs,
        subject.images(),
        recipe,
        normalise=subject.normalise,
    )


def _grafted_over(subject: Subject, _: float) -> Attacked:
    # V2 whatever the owner's scheme is: it is the attacker's choice, and needs no training.
    seed = draw_seed(subject.rng("graft"))
    theirs = draw_by_layer(V2, subject.model, subject.example, owner="attacker", seed=seed)
    return removal.overwrite(
        subject.model,
        V2,
        theirs,
        subject.images(),
        replace(subject.recipe(0.01), epochs=0),
        normalise=subject.normalise,
        trained=True,
    )


def _projected(subject: Subject, share: float) -> Attacked:
    seen = subject.normalise(subject.images().images[:_SEEN]).to(subject.example)
    return project(subject.model, seen, subject.rng(f"project {share}"), share=share)


def _informed(attack: Callable[[Scouted], Attacked]) -> Callable[[Subject, float], Attacked]:
    def run(subject: Subject, kept: float) -> Attacked:
        return attack(scout(subject.model, subject.unlabelled(), kept=kept, seed=subject.seed))

    return run


def _informed_by_chance(
    attack: Callable[[Scouted, torch.Generator], Attacked],
) -> Callable[[Subject, float], Attacked]:
    def run(subject: Subject, kept: float) -> Attacked:
        thief = scout(subject.model, subject.unlabelled(), kept=kept, seed=subject.seed)
        return attack(thief, subject.rng(f"informed {kept}"))

    return run


def _fine_pruned(subject: Subject, share: float) -> Attacked:
    return removal.fine_prune(
        subject.model,
        subject.images(),
        subject.recipe(0.01),
        normalise=subject.normalise,
        share=share,
    )


def _unrelated(subject: Subject) -> ImageSet:
    """Pictures of another task to ask a network about; their labels are never read."""
    return subject.other_task().train


def _copied(
    imitate: Callable[..., Attacked], queries: Callable[[Subject], ImageSet]
) -> Callable[[Subject, float], Attacked]:
    def run(subject: Subject, _: float) -> Attacked:
        recipe = subject.recipe(0.05, "one-cycle", nesterov=True)
        return imitate(
            subject.model,
            subject.fresh(),
            queries(subject),
            recipe,
            normalise=subject.normalise,
        )

    return run


def _obfuscated(
    attack: Callable[..., Attacked], setting: str | None = None
) -> Callable[[Subject, float], Attacked]:
    def run(subject: Subject, strength: float) -> Attacked:
        rng = subject.rng(f"{attack.__name__} {strength}")
        given = {} if setting is None else {setting: strength}
        return attack(subject.model, rng, **given)

    return run


def _moved(subject: Subject, _: float) -> Attacked:
    rng = subject.rng("free moves")
    return move(subject.model, _noise(subject, rng), rng).attacked


def _noise(subject: Subject, rng: torch.Generator) -> torch.Tensor:
    return torch.randn(subject.example.shape, generator=rng)


def _moved_once(subject: Subject, number: float) -> Attacked:
    kind = _numbered(number, tuple(MOVES), "move")
    rng = subject.rng(f"free move {kind}")
    moved = move(subject.model, _noise(subject, rng), rng, kinds=[kind])
    if not moved.done[kind]:
        raise UnsuitableModelError(
            f"nothing in this network can be moved by {kind!r} without moving its outputs"
        )
    return moved.attacked


def _inserted(subject: Subject, _: float) -> Attacked:
    stop, rng = stopwatch("W"), subject.rng("insert-block")
    return Attacked(blocks.insert_block(subject.model, _noise(subject, rng), rng), stop())


def _dropped(subject: Subject, number: float) -> Attacked:
    stop, rng = stopwatch("W"), subject.rng("drop-block")
    if number < 0 or number != int(number):
        raise BadRecipeError(f"block {number:g} cannot be left out; needed: a number from 0 on")
    return Attacked(blocks.drop_block(subject.model, _noise(subject, rng), int(number)), stop())


def _renamed(subject: Subject, _: float) -> Attacked:
    stop = stopwatch("W")
    return Attacked(blocks.Renamed(subject.model, subject.rng("rename")), stop())


def _untied(subject: Subject, _: float) -> Attacked:
    if not (names := tied(subject.model)):
        raise UnsuitableModelError("none of this network's parameters are shared")
    rng = subject.rng("untie")
    moved = move(subject.model, _noise(subject, rng), rng, kinds=["rotate", "reorder"])
    if not sum(moved.done.values()):
        raise UnsuitableModelError(f"{names[0]} is shared, and nothing moves once it is not")
    return moved.attacked


def _merged(subject: Subject, share: float) -> Attacked:
    return merge(subject.model, subject.public_base(), share=share)


def _merged_with_tuned(subject: Subject, share: float) -> Attacked:
    stop, base = stopwatch("W, B, D"), subject.public_base()
    tuned = removal.fine_tune(
        base, subject.images(), subject.recipe(0.01), normalise=subject.normalise, form="ftal"
    )
    merged = merge(subject.model, tuned.model, share=share).model
    return Attacked(merged, stop(tuned.cost.samples, tuned.cost.epochs))


def _forged(attack: Callable[..., Forged]) -> Callable[[Subject, float], Forged]:
    def run(subject: Subject, number: float) -> Forged:
        rng = subject.rng(f"{attack.__name__} {number}")
        return attack(subject.model, subject.scheme, subject.example, rng)

    return run


def _ground(subject: Subject, tries: float) -> Forged:
    rng = subject.rng(f"grind {tries}")
    model, scheme, example = subject.model, subject.scheme, subject.example
    if not 1 <= tries < 1e9:
        raise BadRecipeError(f"{tries:g} keys cannot be drawn; needed: at least 1")
    return ambiguity.grind(model, scheme, example, rng, tries=int(tries))


def _flipped(subject: Subject, share: float) -> Forged:
    rng = subject.rng(f"flip {share}")
    return ambiguity.flip_gamma(subject.model, subject.owner_key(), rng, share=share)


def _reversed(subject: Subject, _: float) -> Forged:
    return ambiguity.reverse_engineer(
        subject.model,
        subject.scheme,
        subject.images(),
        subject.recipe(0.01),
        normalise=subject.normalise,
        rng=subject.rng("fake2"),
        journal=subject.journal("fake2"),
    )


def _insider(subject: Subject, share: float) -> Forged:
    # A hundred times the rate of the published code, which takes a hundred times the steps.
    return ambiguity.insider_passport(
        subject.model,
        subject.scheme,
        subject.owner_key(),
        subject.images(),
        subject.recipe(1.0, "constant"),
        normalise=subject.normalise,
        rng=subject.rng(f"fake3 {share}"),
        share=share,
        journal=subject.journal(f"fake3 {share:g}"),
    )


def _substituted(attack: Callable[..., Forged]) -> Callable[[Subject, float], Forged]:
    def run(subject: Subject, share: float) -> Forged:
        part = subject.images().split(share, seed=subject.seed)[1]
        # As many steps as the other attacks: a tenth of the images is seen ten times as often.
        epochs = max(1, round(subject.budget.epochs / share))
        batch = min(subject.budget.batch, len(part))
        recipe = subject.recipe(0.01, "one-cycle", epochs=epochs, batch=batch)
        return attack(
            subject.model,
            subject.scheme,
            part,
            recipe,
            normalise=subject.normalise,
            rng=subject.rng(f"{attack.__name__} {share}"),
            journal=subject.journal(f"{attack.__name__} {share:g}"),
        )

    return run


def _forged_triggers(subject: Subject, _: float) -> Forged:
    return forging.forge_triggers(
        subject.model,
        subject.scheme,
        subject.example,
        subject.rng("forge-triggers"),
        normalise=subject.normalise,
    )


def _forged_activations(subject: Subject, _: float) -> Forged:
    return forging.forge_activations(
        subject.model,
        subject.scheme,
        subject.example,
        subject.rng("forge-activations"),
        normalise=subject.normalise,
    )


def _images(subject: Subject) -> ImageSet:
    return subject.images()


ACTS: Mapping[str, Act] = {
    "prune": lambda s, share: perturbation.prune(s.model, share=share),
    "prune-layerwise": lambda s, share: perturbation.prune_layerwise(s.model, share=share),
    "prune-channels": lambda s, share: perturbation.prune_channels(s.model, s.example, share=share),
    "quantise": lambda s, kind: perturbation.quantise(s.model, _kind(kind)),
    "noise": lambda s, strength: perturbation.add_noise(
        s.model, s.rng(f"noise {strength}"), strength=strength
    ),
    **{form: _tuned(form) for form in removal.FORMS},
    **{f"transfer-{form}": _transferred(form) for form in ("rtal", "rtll")},
    "overwrite": _overwritten,
    "graft": _grafted_over,
    "project": _projected,
    "fine-prune": _fine_pruned,
    "distil": _copied(distil_soft, _images),
    "extract": _copied(extract_hard, _images),
    "distil-unrelated": _copied(distil_soft, _unrelated),
    "merge-base": _merged,
    "merge-tuned": _merged_with_tuned,
    "drop-block": _dropped,
    "shave": _informed(informed.shave),
    "shave-outliers": _informed(informed.shave_outliers),
    "drown": _informed_by_chance(informed.drown),
    "unscale": _informed_by_chance(informed.unscale),
    "narrow": _informed(informed.narrow),
    "replace": _informed_by_chance(informed.replace),
    "low-rank": _informed(informed.lower_rank),
    "drown-and-imitate": _informed_by_chance(informed.drown_and_imitate),
    "flip-signs": _obfuscated(obfuscation.flip_signs, "share"),
    "permute": _obfuscated(obfuscation.permute),
    "rescale": _obfuscated(obfuscation.rescale, "spread"),
    "insert-dummies": _obfuscated(obfuscation.insert_dummies, "share"),
    "split-channels": _obfuscated(obfuscation.split_channels, "share"),
    "combine": _obfuscated(obfuscation.combine),
    "free-moves": _moved,
    "free-move": _moved_once,
    "insert-block": _inserted,
    "rename": _renamed,
    "untie": _untied,
    "fake1": _forged(ambiguity.random_passport),
    "grind": _ground,
    "solve": _forged(ambiguity.solve_passport),
    "hash-bound": _forged(hashbound.forge_hash_bound),
    "flip": _flipped,
    "fake2": _reversed,
    "fake3": _insider,
    "substitute-ierb": _substituted(fully_connected.substitute_individual),
    "substitute-cerb": _substituted(fully_connected.substitute_across),
    "forge-projection": _forged(forging.forge_uchida),
    "forge-projection-gradient": _forged(forging.forge_uchida_by_gradient),
    "forge-activations": _forged_activations,
    "forge-triggers": _forged_triggers,
}
