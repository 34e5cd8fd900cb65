"""Verdicts and rulings in plain English, from the facts that `--json` prints."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from nnpassport.report.page import percent, power_of_ten, small
from nnpassport.report.tracks import short

Facts = Mapping[str, Any]

AS_IT_STANDS, ALIGNED = "as it stands", "aligned"
ANSWERS, AS_PUBLISHED = "by its answers", "as published"
_LIKELY = -1.0  # log10 p: what comes once in ten networks is called chance


def quoted(text: str) -> str:
    """A stranger's text inside a sentence: in quotation marks, and not endless."""
    return f"“{short(text, 80)}”"


def odds(log10_p: float) -> str:
    """How often chance alone matches as well, in words."""
    if log10_p > _LIKELY:
        return f"which is what chance gives (p = {small(log10_p)})"
    often = f"{10**-log10_p:.0f}" if log10_p > -3 else power_of_ten(math.floor(-log10_p))
    return f"which chance alone reaches less than once in {often} unrelated networks"


def matched(found: Facts) -> str:
    """How much matches, as "896 of 896 secret bits match"."""
    what = "trigger labels" if not found["layers"] else "secret bits"
    return f"{found['matches']} of {found['bits']} {what} match"


def verdict_ruling(facts: Facts) -> str:
    """A verdict in one sentence."""
    claimant = facts["claimants"][0]
    ((how, found),) = claimant["readings"].items()
    network = f"The network in {quoted(facts['suspect']['file'])}"
    if how == ANSWERS:
        network = f"What answers as {quoted(facts['suspect']['file'])}"
    mark = f"the mark of the key of {quoted(claimant['owner'])}"
    if found["accepted"]:
        return f"{network} carries {mark}: {matched(found)}, {_shown(how, found)}."
    return f"{network} is not shown to carry {mark}: {_lacking(found)}."


def hearing_ruling(facts: Facts) -> str:
    """A ruling in one sentence."""
    claimants = facts["claimants"]
    network = f"the network in {quoted(facts['suspect']['file'])}"
    proved = [quoted(each["name"]) for each in claimants if each["proves"]]
    if facts["ruling"] == "owner":
        owner = quoted(facts["owner"])
        if len(proved) == 1:
            return f"{owner} alone, of {count(claimants)}, proves a mark in {network}."
        return (
            f"{' and '.join(proved)} prove a mark in {network}, and {owner} comes before "
            "every other."
        )
    if facts["ruling"] == "shared":
        owners = [quoted(each) for each in facts["owners"]]
        return (
            f"Shared: {network} holds networks of {' and '.join(owners)}, and none of them was "
            "made from another."
        )
    if facts["ruling"] == "nobody":
        return f"Nobody, of {count(claimants)}, proves a claim to {network}."
    if proved:
        all_ = "both" if len(proved) == 2 else "all"
        return (
            f"Undecided: {' and '.join(proved)} {all_} prove a mark in {network}, and nothing "
            "shows whose was first."
        )
    unchecked = [quoted(each["name"]) for each in claimants if each["unchecked"] is not None]
    return (
        f"Undecided: no claim to {network} is proved, and that of {' and '.join(unchecked)} could "
        "not be checked."
    )


def count(claimants: Sequence[Facts]) -> str:
    """How many claimants there are, with the noun."""
    return "one claimant" if len(claimants) == 1 else f"{len(claimants)} claimants"


def why(facts: Facts) -> list[str]:
    """The reasons of a verdict or a ruling, in order."""
    sentences = [words for each in facts["claimants"] for words in _of_claimant(each)]
    return [*sentences, *map(_sentence, _of_order(facts))]


def limits(facts: Facts) -> list[str]:
    """What a reader must not take this for."""
    claimants = facts["claimants"]
    readings = [found for each in claimants for found in each["readings"].values()]
    said = [
        "A mark shows that a network is related to the one that the key was put into: made from "
        "it, or from a copy. It does not show whether that was allowed. A licence is not written "
        "in a network.",
        "Names are what people call themselves. That a key signed a claim is checked; who holds "
        "that key is not, and is for other evidence to show.",
        "A p-value is not the chance that somebody is innocent. It says how often a network that "
        "has nothing to do with the key would match as well by luck.",
    ]
    undated = [quoted(each["name"]) for each in claimants if _time(each) is None]
    if undated:
        said.append(
            f"No trusted timestamp was checked for {' and '.join(undated)}, so nothing here proves "
            "when that key was drawn. Somebody who has seen the network can try keys until one "
            "fits by luck; that is why an undated claim is held to 2⁻¹⁰⁰, which no search reaches, "
            "unless whoever made this page chose a threshold."
        )
    if not any(found["accepted"] for found in readings):
        said.append(
            "A mark that is not found does not prove that the network is independent. It may have "
            "been removed or hidden, or the network made without copying any weights."
        )
        if any(found["layers"] for found in readings) and not all(
            any(found["alignment"] for found in each["readings"].values()) for each in claimants
        ):
            said.append(
                "Read as it stands, a network hides its mark from this test if its channels were "
                "moved, negated or rescaled, which changes nothing that it computes. A reading "
                "aligned to the owner’s released network (verify --align) undoes that."
            )
    if not any(found["fidelity"] or not found["layers"] for found in readings):
        said.append("Accuracy with the passport was not measured; no test images were given.")
    return said


def finding(found: Facts) -> str:
    """One reading's outcome in a few words."""
    if found["accepted"]:
        return "mark found"
    if found["marked"]:
        return "mark found, accuracy not"
    if found["log10_p_value"] is None:
        return "no p-value"
    if uncounted(found):
        return "does not count: undated"
    return "not found" if found["log10_p_value"] > found["log10_alpha"] else "claim does not hold"


def uncounted(found: Facts) -> bool:
    """Whether bits match once aligned, to a network not proved older than the suspect."""
    claim, log10_p = found["claim"], found["log10_p_value"]
    undated = claim is not None and claim["holds"] and not claim["older_than_the_suspect"]
    fitted = found["alignment"] is not None and not found["alignment"].get("bound")
    aligned = fitted and log10_p is not None
    return bool(undated and aligned and log10_p <= found["log10_alpha"])


def p_value(found: Facts) -> str:
    """The p-value as people read it."""
    return "none" if found["log10_p_value"] is None else small(found["log10_p_value"])


def accuracy(found: Facts) -> str:
    """What F found, or that it was not asked."""
    f = found["fidelity"]
    if f is None:
        return "not measured"
    said = "passed" if f["passed"] else "failed"
    declared = f"{percent(f['target'], 2)} less {100 * f['tolerance']:.4g} points needed"
    return f"{percent(f['accuracy'], 2)}, {declared}: {said}"


_UNCOUNTED = (
    "nothing proves that the network it was compared with is older than the suspect, and one that "
    "was made after it can be made to fit"
)


def _shown(how: str, found: Facts) -> str:
    if found["log10_p_value"] is not None:
        return odds(found["log10_p_value"])
    rule = " (published)" if how == AS_PUBLISHED else ""
    return (
        f"as the rule of the scheme’s paper{rule} asks; that rule knows no p-value, and forged "
        "keys can pass it"
    )


def _lacking(found: Facts) -> str:
    claim, log10_p = found["claim"], found["log10_p_value"]
    if claim is not None and not claim["holds"]:
        return "the claim itself does not hold"
    if uncounted(found):
        return f"{matched(found)} once aligned, but {_UNCOUNTED}"
    if found["marked"]:
        return f"{matched(found)}, but the accuracy with the passport is too low"
    if log10_p is None:
        return f"{matched(found)}, and no p-value says what that is worth"
    if log10_p > _LIKELY:
        return f"{matched(found)}, {odds(log10_p)}"
    return (
        f"{matched(found)}, too few: p = {small(log10_p)}, and {small(found['log10_alpha'])} or "
        "less is needed"
    )


def _of_claimant(claimant: Facts) -> Iterator[str]:
    name = quoted(claimant["name"])
    if claimant["unchecked"] is not None:
        yield _sentence(f"{name}: the claim could not be checked: {claimant['unchecked']}")
        return
    if claimant["refused"] is not None:
        yield _sentence(f"{name}: the claim does not hold: {claimant['refused']}")
        return
    standing = claimant["standing"]
    if standing is not None:
        if not standing["holds"]:
            yield _sentence(f"{name}: the claim does not hold: {standing['reason']}")
        else:
            yield f"{name} signed the claim, and it commits to this key. {_age(standing)}"
    for how, found in claimant["readings"].items():
        yield f"{name}, {_read(how, found)}"


def _age(standing: Facts) -> str:
    if standing["timestamp"] is None:
        return "Nothing proves how old it is."
    proved = f"A timestamp authority saw it on {standing['timestamp']['time']}"
    if standing["older_than_the_suspect"]:
        return f"{proved}, before the suspect appeared."
    return f"{proved}; that this was before the suspect appeared is not shown."


def _read(how: str, found: Facts) -> str:
    ways = {
        AS_IT_STANDS: "read as the network stands",
        ALIGNED: "read once the network’s channels are back in the order of the owner’s own",
        ANSWERS: "by nothing but answers to secret test images",
        AS_PUBLISHED: "by the rule of the scheme’s paper",
    }
    text = f"{ways.get(how, how)}: {matched(found)} ({percent(found['match_rate'])})"
    if found["log10_p_value"] is None:
        text += ", without a p-value"
    else:
        relation = "is met" if found["log10_p_value"] <= found["log10_alpha"] else "is not met"
        text += f", {odds(found['log10_p_value'])}. "
        text += f"The threshold, {small(found['log10_alpha'])}, {relation}"
        text += f", but this does not count: {_UNCOUNTED}" if uncounted(found) else ""
    if found["fidelity"] is not None:
        text += f". Accuracy with the passport: {accuracy(found)}"
    return f"{text}."


def _of_order(facts: Facts) -> Sequence[str]:
    """The judge's reasons behind those that `_of_claimant` puts in other words."""
    if "reasons" not in facts:
        return ()
    known = sum(
        1
        if each["unchecked"] is not None or each["refused"] is not None
        else 1 + len(each["notes"]) + (each.get("work") is not None)
        for each in facts["claimants"]
    )
    return list(facts["reasons"])[known:]


def _time(claimant: Facts) -> str | None:
    standing = claimant["standing"]
    stamp = None if standing is None else standing["timestamp"]
    return None if stamp is None else str(stamp["time"])


def _sentence(text: str) -> str:
    return text if text.endswith((".", "!", "?")) else f"{text}."
