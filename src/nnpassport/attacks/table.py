"""Every attack as a row: what it is, what it needs, at which strengths an audit runs it.

The table needs no torch; what the rows do is in `acts.py` and is loaded when one of them is run.
"""

from collections.abc import Mapping, Sequence
from enum import Enum, unique
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from nnpassport.attacks.acts import Act
    from nnpassport.attacks.outcome import Attacked, Forged
    from nnpassport.attacks.subject import Subject
    from nnpassport.embedding.schemes.protocol import Scheme


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
        needs: what a subject must have beside the network: "key", "train", "transfer", "base".
        other_task: whether the network has another task afterwards.
        turns: whether it negates or moves channels or layers, so that the mark is read aligned too.
        informed: whether it looks where a mark of weights must lie, at inputs without labels.
        marks: the schemes it applies to, by the part they share; "" is all of them.
    """

    family: Family
    summary: str
    run: "Act"
    strength: str = ""
    quick: Sequence[float] = ()
    full: Sequence[float] = (0.0,)
    needs: frozenset[str] = frozenset()
    marks: str = ""
    other_task: bool = False
    turns: bool = False
    informed: bool = False


ONCE = (0.0,)
SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
FLIPS = (0.0, 0.1, 0.25, 0.5, 0.75, 1.0)
KINDS = ("float16", "bfloat16", "int8-tensor", "int8-channel", "int4-channel")
"""The grids of `perturbation.KINDS`, in its order."""
MOVES = (
    *("negate", "scale", "stretch", "regain", "fix", "balance", "heads", "pairs", "mix", "rotate"),
    *("reorder", "mirror", "split", "dummies", "widen", "groups"),
)
"""The kinds of `moves.KINDS`, in its order."""
KEEPS = (0.97, 0.99, 0.95, 0.9)
"""What informed thieves keep of the network's own answers: three points are lost by default."""
FORMS = ("ftll", "ftal", "rtll", "rtal")
"""The forms of fine-tuning of `removal.FORMS`, in its order."""
REMOVAL, OBFUSCATION, AMBIGUITY = Family.REMOVAL, Family.OBFUSCATION, Family.AMBIGUITY


def _needs(*what: str) -> frozenset[str]:
    return frozenset(what)


def _informed(name: str, summary: str, *, quick: bool = True) -> Attack:
    """A thief who changes as much as leaves his own answers standing."""
    return Attack(
        REMOVAL,
        summary,
        act(name),
        "share of the network's own answers that is kept",
        KEEPS[:1] if quick else (),
        KEEPS,
        needs=_needs("train"),
        informed=True,
    )


def act(name: str) -> "Act":
    """The act of this name in `acts.py`, which is loaded when it is carried out."""

    def run(subject: "Subject", strength: float) -> "Attacked | Forged":
        from nnpassport.attacks.acts import ACTS  # noqa: PLC0415

        return ACTS[name](subject, strength)

    return run


ATTACKS: Mapping[str, Attack] = {
    # Removal: what is cheap, then what trains.
    "prune": Attack(
        REMOVAL,
        "zero the smallest of all parameters together (class-blind, the paper's Fig. 3)",
        act("prune"),
        "share of the parameters",
        SHARES,
        SHARES,
    ),
    "prune-layerwise": Attack(
        REMOVAL,
        "zero the smallest weights of each layer",
        act("prune-layerwise"),
        "share of each layer",
        (0.6,),
        SHARES,
    ),
    "prune-channels": Attack(
        REMOVAL,
        "zero whole channels with the smallest filters",
        act("prune-channels"),
        "share of the channels",
        (0.1, 0.3),
        SHARES[:6],
    ),
    "quantise": Attack(
        REMOVAL,
        f"round the weights: 0 to {len(KINDS) - 1} are {', '.join(KINDS)}",
        act("quantise"),
        "grid",
        tuple(map(float, range(len(KINDS)))),
        tuple(map(float, range(len(KINDS)))),
    ),
    "noise": Attack(
        REMOVAL,
        "add Gaussian noise, in standard deviations of each layer's weights",
        act("noise"),
        "standard deviations",
        (0.1, 0.3, 1.0),
        (0.05, 0.1, 0.2, 0.3, 0.5, 1.0),
    ),
    **{
        form: Attack(
            REMOVAL,
            f"fine-tune on the same task ({form.upper()})",
            act(form),
            needs=_needs("train"),
        )
        for form in FORMS
    },
    **{
        f"transfer-{form}": Attack(
            REMOVAL,
            f"fine-tune to another task ({form.upper()}; the paper's Table 2 is RTAL)",
            act(f"transfer-{form}"),
            needs=_needs("transfer"),
            other_task=True,
        )
        for form in ("rtal", "rtll")
    },
    "overwrite": Attack(
        REMOVAL, "embed a second mark of the same scheme", act("overwrite"), needs=_needs("train")
    ),
    "graft": Attack(
        REMOVAL,
        "put a passport in by linear algebra, without training",
        act("graft"),
        needs=_needs("train"),
        turns=True,
    ),
    "project": Attack(
        REMOVAL,
        "keep of each filter what lies in the directions that its inputs have",
        act("project"),
        "share of the inputs' mean square that is kept",
        (0.99,),
        (0.9, 0.95, 0.99, 0.999),
        needs=_needs("train"),
    ),
    "fine-prune": Attack(
        REMOVAL,
        "silence channels that clean images leave idle, then fine-tune",
        act("fine-prune"),
        "share of the last convolution",
        full=(0.3,),
        needs=_needs("train"),
    ),
    "distil": Attack(
        REMOVAL,
        "teach a fresh network by the probabilities of this one",
        act("distil"),
        needs=_needs("train"),
    ),
    "extract": Attack(
        REMOVAL,
        "teach a fresh network by the decisions of this one",
        act("extract"),
        needs=_needs("train"),
    ),
    "distil-unrelated": Attack(
        REMOVAL,
        "the same by probabilities on pictures of another task",
        act("distil-unrelated"),
        needs=_needs("transfer"),
    ),
    "merge-base": Attack(
        REMOVAL,
        "average with the public network that this one was made from",
        act("merge-base"),
        "share of the other network",
        (0.5,),
        (0.25, 0.5, 0.75),
        needs=_needs("base"),
    ),
    "merge-tuned": Attack(
        REMOVAL,
        "average with a fine-tuning of that network",
        act("merge-tuned"),
        "share of the other network",
        full=(0.25, 0.5, 0.75),
        needs=_needs("base", "train"),
    ),
    "drop-block": Attack(
        REMOVAL,
        "leave out one of the blocks that a network can run without",
        act("drop-block"),
        "block",
        ONCE,
        (0.0, 1.0, 2.0),
        turns=True,
    ),
    # Thieves who know where a mark of weights must lie; they have images and need no labels.
    "shave": _informed(
        "shave", "subtract singular components one by one where answers hardly feel it"
    ),
    "shave-outliers": _informed(
        "shave-outliers", "subtract of each weight the component that one passport would be"
    ),
    "drown": _informed("drown", "add noise along directions that a layer's inputs hardly use"),
    "unscale": _informed(
        "unscale", "take out of each weight what its norm's scales and shifts say of it"
    ),
    "narrow": _informed("narrow", "keep of each weight the fewest directions of its inputs"),
    "replace": _informed(
        "replace", "put noise in the place of what each weight has where inputs hardly go"
    ),
    "low-rank": _informed(
        "low-rank", "give each weight the lowest rank in the metric of its inputs"
    ),
    "drown-and-imitate": _informed(
        "drown-and-imitate",
        "rounds of more noise than answers bear, and of learning the answers again",
        quick=False,
    ),
    # Networks that compute the same.
    "flip-signs": Attack(
        OBFUSCATION,
        "negate channels and undo it in the norm",
        act("flip-signs"),
        "share of the channels",
        (0.5,),
        (0.1, 0.25, 0.5),
    ),
    "permute": Attack(OBFUSCATION, "reorder channels", act("permute"), quick=ONCE),
    "rescale": Attack(
        OBFUSCATION,
        "scale channels and undo it where they are read",
        act("rescale"),
        "largest factor",
        (2.0,),
        (1.5, 2.0, 4.0),
    ),
    "insert-dummies": Attack(
        OBFUSCATION,
        "insert channels that cancel each other",
        act("insert-dummies"),
        "share of the channels",
        (0.1,),
        (0.1, 0.3),
    ),
    "split-channels": Attack(
        OBFUSCATION,
        "split channels into twins",
        act("split-channels"),
        "share of the channels",
        (0.1,),
        (0.1, 0.3),
    ),
    "combine": Attack(
        OBFUSCATION,
        "flip, permute and rescale",
        act("combine"),
        quick=ONCE,
    ),
    "free-moves": Attack(
        OBFUSCATION,
        "every free move along the axes of any network: also rotated streams, mixed heads, twins",
        act("free-moves"),
    ),
    "free-move": Attack(
        OBFUSCATION,
        f"one kind of free move alone: 0 to {len(MOVES) - 1} are {', '.join(MOVES)}",
        act("free-move"),
        "kind",
        full=tuple(map(float, range(len(MOVES)))),
    ),
    "insert-block": Attack(
        OBFUSCATION,
        "put a block of random numbers in front that adds nothing",
        act("insert-block"),
        quick=ONCE,
    ),
    "rename": Attack(
        OBFUSCATION,
        "give all tensors names that say nothing, in an order by lot",
        act("rename"),
        quick=ONCE,
    ),
    "untie": Attack(
        OBFUSCATION,
        "give shared parameters a tensor each, and move these apart",
        act("untie"),
    ),
    # Keys.
    "fake1": Attack(
        AMBIGUITY,
        "present a random passport",
        act("fake1"),
        "number of the passport",
        tuple(map(float, range(10))),
        tuple(map(float, range(50))),
        marks="passport",
    ),
    "grind": Attack(
        AMBIGUITY,
        "draw honest keys and keep the best: all that is left when keys are derived",
        act("grind"),
        "keys drawn",
        (10.0, 100.0),
        (10.0, 100.0, 1000.0),
        marks="weights",
    ),
    "solve": Attack(
        AMBIGUITY,
        "solve a linear system for a passport of the released network",
        act("solve"),
        quick=ONCE,
        marks="passport",
    ),
    "hash-bound": Attack(
        AMBIGUITY,
        "the same with bits that are the hash of the passport, by negating channels (batch norm)",
        act("hash-bound"),
        quick=ONCE,
        marks="passport",
    ),
    "flip": Attack(
        AMBIGUITY,
        "negate γ of genuine passports",
        act("flip"),
        "share of the bits",
        FLIPS,
        FLIPS,
        _needs("key"),
        "passport",
    ),
    "fake2": Attack(
        AMBIGUITY,
        "train new γ and β",
        act("fake2"),
        needs=_needs("train"),
        marks="passport",
    ),
    "fake3": Attack(
        AMBIGUITY,
        "optimise genuine passports towards other bits",
        act("fake3"),
        "share of the bits",
        full=FLIPS,
        needs=_needs("key", "train"),
        marks="passport",
    ),
    "substitute-ierb": Attack(
        AMBIGUITY,
        "train new γ through a small network for each channel",
        act("substitute-ierb"),
        "share of the images",
        full=(0.02, 0.1),
        needs=_needs("train"),
        marks="passport",
    ),
    "substitute-cerb": Attack(
        AMBIGUITY,
        "train new γ through one small network a layer",
        act("substitute-cerb"),
        "share of the images",
        full=(0.02, 0.1),
        needs=_needs("train"),
        marks="passport",
    ),
    "forge-projection": Attack(
        AMBIGUITY,
        "mirror rows of a projection until it reads the forger's bits",
        act("forge-projection"),
        quick=ONCE,
        marks="projection",
    ),
    "forge-projection-gradient": Attack(
        AMBIGUITY,
        "the same by gradient descent",
        act("forge-projection-gradient"),
        quick=ONCE,
        marks="projection",
    ),
    "forge-activations": Attack(
        AMBIGUITY,
        "mirror rows of a projection until activations of noise read the forger's bits",
        act("forge-activations"),
        quick=ONCE,
        marks="activations",
    ),
    "forge-triggers": Attack(
        AMBIGUITY,
        "optimise pictures until the network gives the forger's labels",
        act("forge-triggers"),
        quick=ONCE,
        marks="triggers",
    ),
}


def applies(attack: Attack, subject: "Subject") -> bool:
    """Whether the subject's scheme has what the attack forges."""
    return aims_at(attack, subject.scheme)


def aims_at(attack: Attack, scheme: "Scheme") -> bool:
    """Whether the scheme has what the attack forges; removals aim at all of them."""
    by_weights = attack.marks == "weights" and scheme.reads_weights
    return by_weights or attack.marks in {"", *scheme.parts}


def why_not(attack: Attack, subject: "Subject") -> str | None:
    """Why the attack cannot be run on this subject, or None."""
    if not applies(attack, subject):
        return f"does not apply to {subject.scheme.name}"
    missing = lacking(attack, subject)
    return f"needs --{', --'.join(missing)}" if missing else None


def lacking(attack: Attack, subject: "Subject") -> list[str]:
    """What the attack needs and the subject does not have."""
    there = {
        "key": subject.key,
        "train": subject.train,
        "transfer": subject.transfer,
        "base": subject.base,
    }
    return sorted(name for name in attack.needs if there[name] is None)
