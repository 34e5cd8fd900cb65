"""Every attack as a row: what it is, what it needs, at which strengths an audit runs it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from enum import Enum, unique
from typing import NamedTuple

from nnpassport.attacks import ambiguity, forging, hashbound, obfuscation, perturbation, removal
from nnpassport.attacks import substitution as fully_connected
from nnpassport.attacks.extraction import distil_soft, extract_hard
from nnpassport.attacks.outcome import Attacked, Forged
from nnpassport.attacks.passports import draw_seed
from nnpassport.attacks.projection import project
from nnpassport.audit.subject import Subject
from nnpassport.data.images import ImageSet
from nnpassport.scheme import BadRecipeError
from nnpassport.schemes.passport import V2
from nnpassport.schemes.protocol import Scheme


@unique
class Family(Enum):
    """What an attack is after."""

    REMOVAL = "removal"  # network → network: the owner's mark shall not be found
    OBFUSCATION = "obfuscation"  # the same by equal networks: nothing is lost
    AMBIGUITY = "ambiguity"  # network → key: another mark shall be found


class Attack(NamedTuple):
    """One attack.

    Attributes:
        run: takes a subject and a strength.
        strength: what the strength is, in words; "" where there is none.
        quick: strengths of a quick audit.
        full: strengths of a full one.
        needs: what a subject must have beside the network: "key", "train", "transfer".
        other_task: whether the network has another task afterwards.
        turns: whether it negates or moves channels, so that the mark is read aligned as well.
        marks: the schemes it applies to, by the part they share; "" is all of them.
    """

    family: Family
    summary: str
    run: Callable[[Subject, float], Attacked | Forged]
    strength: str = ""
    quick: Sequence[float] = ()
    full: Sequence[float] = (0.0,)
    needs: frozenset[str] = frozenset()
    marks: str = ""
    other_task: bool = False
    turns: bool = False


ONCE = (0.0,)
SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
FLIPS = (0.0, 0.1, 0.25, 0.5, 0.75, 1.0)
_SEEN = 512  # images that a layer's inputs are measured on
KINDS = tuple(perturbation.KINDS)
REMOVAL, OBFUSCATION, AMBIGUITY = Family.REMOVAL, Family.OBFUSCATION, Family.AMBIGUITY


def _kind(number: float) -> str:
    if number not in range(len(KINDS)):
        raise BadRecipeError(
            f"grid {number:g} is unknown; there are 0 to {len(KINDS) - 1}: {', '.join(KINDS)}"
        )
    return KINDS[int(number)]


def _needs(*what: str) -> frozenset[str]:
    return frozenset(what)


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
    drawn = subject.scheme.draw_key(subject.model, subject.example, owner="attacker", seed=seed)
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
    theirs = V2.draw_key(subject.model, subject.example, owner="attacker", seed=seed)
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


ATTACKS: Mapping[str, Attack] = {
    # Removal: what is cheap, then what trains.
    "prune": Attack(
        REMOVAL,
        "zero the smallest of all parameters together (class-blind, the paper's Fig. 3)",
        lambda s, share: perturbation.prune(s.model, share=share),
        "share of the parameters",
        SHARES,
        SHARES,
    ),
    "prune-layerwise": Attack(
        REMOVAL,
        "zero the smallest weights of each layer",
        lambda s, share: perturbation.prune_layerwise(s.model, share=share),
        "share of each layer",
        (0.6,),
        SHARES,
    ),
    "prune-channels": Attack(
        REMOVAL,
        "zero whole channels with the smallest filters",
        lambda s, share: perturbation.prune_channels(s.model, s.example, share=share),
        "share of the channels",
        (0.1, 0.3),
        SHARES[:6],
    ),
    "quantise": Attack(
        REMOVAL,
        f"round the weights: 0 to {len(KINDS) - 1} are {', '.join(KINDS)}",
        lambda s, kind: perturbation.quantise(s.model, _kind(kind)),
        "grid",
        tuple(map(float, range(len(KINDS)))),
        tuple(map(float, range(len(KINDS)))),
    ),
    "noise": Attack(
        REMOVAL,
        "add Gaussian noise, in standard deviations of each layer's weights",
        lambda s, strength: perturbation.add_noise(
            s.model, s.rng(f"noise {strength}"), strength=strength
        ),
        "standard deviations",
        (0.1, 0.3, 1.0),
        (0.05, 0.1, 0.2, 0.3, 0.5, 1.0),
    ),
    **{
        form: Attack(
            REMOVAL,
            f"fine-tune on the same task ({form.upper()})",
            _tuned(form),
            needs=_needs("train"),
        )
        for form in removal.FORMS
    },
    **{
        f"transfer-{form}": Attack(
            REMOVAL,
            f"fine-tune to another task ({form.upper()}; the paper's Table 2 is RTAL)",
            _transferred(form),
            needs=_needs("transfer"),
            other_task=True,
        )
        for form in ("rtal", "rtll")
    },
    "overwrite": Attack(
        REMOVAL, "embed a second mark of the same scheme", _overwritten, needs=_needs("train")
    ),
    "graft": Attack(
        REMOVAL,
        "put a passport in by linear algebra, without training",
        _grafted_over,
        needs=_needs("train"),
        turns=True,
    ),
    "project": Attack(
        REMOVAL,
        "keep of each filter what lies in the directions that its inputs have",
        _projected,
        "share of the inputs' mean square that is kept",
        (0.99,),
        (0.9, 0.95, 0.99, 0.999),
        needs=_needs("train"),
    ),
    "fine-prune": Attack(
        REMOVAL,
        "silence channels that clean images leave idle, then fine-tune",
        _fine_pruned,
        "share of the last convolution",
        full=(0.3,),
        needs=_needs("train"),
    ),
    "distil": Attack(
        REMOVAL,
        "teach a fresh network by the probabilities of this one",
        _copied(distil_soft, _images),
        needs=_needs("train"),
    ),
    "extract": Attack(
        REMOVAL,
        "teach a fresh network by the decisions of this one",
        _copied(extract_hard, _images),
        needs=_needs("train"),
    ),
    "distil-unrelated": Attack(
        REMOVAL,
        "the same by probabilities on pictures of another task",
        _copied(distil_soft, _unrelated),
        needs=_needs("transfer"),
    ),
    # Networks that compute the same.
    "flip-signs": Attack(
        OBFUSCATION,
        "negate channels and undo it in the norm",
        _obfuscated(obfuscation.flip_signs, "share"),
        "share of the channels",
        (0.5,),
        (0.1, 0.25, 0.5),
    ),
    "permute": Attack(
        OBFUSCATION, "reorder channels", _obfuscated(obfuscation.permute), quick=ONCE
    ),
    "rescale": Attack(
        OBFUSCATION,
        "scale channels and undo it where they are read",
        _obfuscated(obfuscation.rescale, "spread"),
        "largest factor",
        (2.0,),
        (1.5, 2.0, 4.0),
    ),
    "insert-dummies": Attack(
        OBFUSCATION,
        "insert channels that cancel each other",
        _obfuscated(obfuscation.insert_dummies, "share"),
        "share of the channels",
        (0.1,),
        (0.1, 0.3),
    ),
    "split-channels": Attack(
        OBFUSCATION,
        "split channels into twins",
        _obfuscated(obfuscation.split_channels, "share"),
        "share of the channels",
        (0.1,),
        (0.1, 0.3),
    ),
    "combine": Attack(
        OBFUSCATION,
        "flip, permute and rescale",
        _obfuscated(obfuscation.combine),
        quick=ONCE,
    ),
    # Keys.
    "fake1": Attack(
        AMBIGUITY,
        "present a random passport",
        _forged(ambiguity.random_passport),
        "number of the passport",
        tuple(map(float, range(10))),
        tuple(map(float, range(50))),
        marks="passport",
    ),
    "grind": Attack(
        AMBIGUITY,
        "draw honest keys and keep the best: all that is left when keys are derived",
        _ground,
        "keys drawn",
        (10.0, 100.0),
        (10.0, 100.0, 1000.0),
        marks="weights",
    ),
    "solve": Attack(
        AMBIGUITY,
        "solve a linear system for a passport of the released network",
        _forged(ambiguity.solve_passport),
        quick=ONCE,
        marks="passport",
    ),
    "hash-bound": Attack(
        AMBIGUITY,
        "the same with bits that are the hash of the passport, by negating channels (batch norm)",
        _forged(hashbound.forge_hash_bound),
        quick=ONCE,
        marks="passport",
    ),
    "flip": Attack(
        AMBIGUITY,
        "negate γ of genuine passports",
        _flipped,
        "share of the bits",
        FLIPS,
        FLIPS,
        _needs("key"),
        "passport",
    ),
    "fake2": Attack(
        AMBIGUITY,
        "train new γ and β",
        _reversed,
        needs=_needs("train"),
        marks="passport",
    ),
    "fake3": Attack(
        AMBIGUITY,
        "optimise genuine passports towards other bits",
        _insider,
        "share of the bits",
        full=FLIPS,
        needs=_needs("key", "train"),
        marks="passport",
    ),
    "substitute-ierb": Attack(
        AMBIGUITY,
        "train new γ through a small network for each channel",
        _substituted(fully_connected.substitute_individual),
        "share of the images",
        full=(0.02, 0.1),
        needs=_needs("train"),
        marks="passport",
    ),
    "substitute-cerb": Attack(
        AMBIGUITY,
        "train new γ through one small network a layer",
        _substituted(fully_connected.substitute_across),
        "share of the images",
        full=(0.02, 0.1),
        needs=_needs("train"),
        marks="passport",
    ),
    "forge-projection": Attack(
        AMBIGUITY,
        "mirror rows of a projection until it reads the forger's bits",
        _forged(forging.forge_uchida),
        quick=ONCE,
        marks="projection",
    ),
    "forge-projection-gradient": Attack(
        AMBIGUITY,
        "the same by gradient descent",
        _forged(forging.forge_uchida_by_gradient),
        quick=ONCE,
        marks="projection",
    ),
    "forge-activations": Attack(
        AMBIGUITY,
        "mirror rows of a projection until activations of noise read the forger's bits",
        _forged_activations,
        quick=ONCE,
        marks="activations",
    ),
    "forge-triggers": Attack(
        AMBIGUITY,
        "optimise pictures until the network gives the forger's labels",
        _forged_triggers,
        quick=ONCE,
        marks="triggers",
    ),
}


def applies(attack: Attack, subject: Subject) -> bool:
    """Whether the subject's scheme has what the attack forges."""
    return aims_at(attack, subject.scheme)


def aims_at(attack: Attack, scheme: Scheme) -> bool:
    """Whether the scheme has what the attack forges; removals aim at all of them."""
    by_weights = attack.marks == "weights" and scheme.reads_weights
    return by_weights or attack.marks in {"", *scheme.parts}


def why_not(attack: Attack, subject: Subject) -> str | None:
    """Why the attack cannot be run on this subject, or None."""
    if not applies(attack, subject):
        return f"does not apply to {subject.scheme.name}"
    missing = lacking(attack, subject)
    return f"needs --{', --'.join(missing)}" if missing else None


def lacking(attack: Attack, subject: Subject) -> list[str]:
    """What the attack needs and the subject does not have."""
    there = {"key": subject.key, "train": subject.train, "transfer": subject.transfer}
    return sorted(name for name in attack.needs if there[name] is None)
