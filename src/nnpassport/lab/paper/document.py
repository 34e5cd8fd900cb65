"""The page of the reproduction: every table and figure of every plan that was run."""

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from nnpassport.attacks.table import ATTACKS
from nnpassport.embedding.train.loop import Recipe
from nnpassport.files.disk import write_atomically
from nnpassport.lab.findings import NOT_RUN, Entry, Findings, seconds
from nnpassport.lab.paper import costs, figures, tables
from nnpassport.lab.paper.contents import CONTENTS
from nnpassport.lab.plans import Plan
from nnpassport.lab.results import read_json
from nnpassport.scheme import UnreadableDataError

TITLES: Mapping[str, str] = {
    "table1": "Table 1: marks of the baselines, real and forged",
    "table2": "Table 2: removal by fine-tuning",
    "table3": "Table 3: forged passports",
    "table4": "Table 4: cost",
    "fig2": "Figure 2b: accuracy with genuine and with counterfeit passports",
    "fig3": "Figure 3: removal by pruning",
    "fig4": "Figure 4: valid, random and reverse-engineered passports",
    "fig5": "Figure 5: passports that are optimised towards flipped bits",
}
CAPTIONS: Mapping[str, str] = {
    "fig2": "A dot is a network or, in the last line, a random passport; the first two lines are "
    "measured on all test images. The cross is what the paper says of random passports.",
    "fig3": "The accuracy of V2 and V3 is that of the released network.",
    "fig4": "A dot is a network or a forged passport; the first line is measured on all test "
    "images. Crosses are what the paper says; of fake2 it gives the best.",
    "fig5": "Of V2 and V3 the accuracy of the private branch. Crosses are the losses that the "
    "paper reports, below the network's own accuracy.",
}
_TABLES: Mapping[str, Callable[[Findings], list[tables.Table]]] = {
    "table1": tables.table1,
    "table2": tables.table2,
    "table3": tables.table3,
}
_HEADING = re.compile(r"^## +(.+?) *$", flags=re.M)


class Document(NamedTuple):
    """A page in Markdown and its pictures, by the names that it links to."""

    text: str
    pictures: Mapping[str, bytes]


def render(
    results: Path, plans: Iterable[Plan], out: Path, *, notes: Path | None = None
) -> Document:
    """Write the page to `out`, and its pictures into `figures` beside it.

    Args:
        results: folder of the results, as `Store.results`.
        plans: those without any result are left out. Seeds that were run are shown, whether or
            not the plan names them.
        out: a Markdown file.
        notes: prose in sections that are named by table or figure ("## table2", or
            "## table2 (short)" for one plan; "## introduction"); each is put below what it names.
            By default the file `reproduction-notes.md` beside `out`, where there is one.

    Raises:
        UnreadableDataError: a file is no result, or one of other inputs; a note names nothing.
    """
    known = notes or out.with_name("reproduction-notes.md")
    prose = _notes(known.read_text(encoding="utf-8")) if known.exists() else {}
    done = document(results, plans, prose)
    for name, picture in done.pictures.items():
        write_atomically(out.parent / name, picture)
    write_atomically(out, done.text.encode())
    return done


def document(results: Path, plans: Iterable[Plan], prose: Mapping[str, str]) -> Document:
    """The page and its pictures, from what lies in the folder of results."""
    parts = [_PREAMBLE, *_note(prose, "introduction", "")]
    pictures: dict[str, bytes] = {}
    for plan in plans:
        findings = Findings(plan.with_seeds(_seeds(results, plan)), results)
        if findings:
            parts += _section(findings, prose, pictures)
    parts += _table4(results, prose)
    return Document("\n\n".join(parts) + "\n", pictures)


_PREAMBLE = """# The paper's experiments, reproduced

Rendered from result files, one for each run; do not edit. Accuracies are of test images, in %.
A field gives the mean, the standard deviation over networks of different seeds where there are at
least two, and *n*, how many there are (in Table 3, of forged keys). Where nothing was run it says
*not run*. "Paper" is what [Fan, Ng & Chan 2019](https://arxiv.org/abs/1909.07830) report, with
their own recipe: 200 epochs, 5 networks, 50 fake passports. Below each table stands what was run,
on what and by which commits. Wall time is the sum over its runs, one after the other; of a training
that was interrupted, what its images take at its speed.

Table 2's goal is to lose no more than the paper's own distance to the plain network of the same
norm. In Table 3, F passes if the forged passport costs at most ε_f of the network's own accuracy;
"V as published" accepts a signature all of whose bits match, as those of a forger do who reads them
off the network with his passport; "V exact" one whose p-value is below the threshold, which only a
key that is derived from a seed has. fake3 without flips presents the owner's own bits."""


def _section(findings: Findings, prose: Mapping[str, str], pictures: dict[str, bytes]) -> list[str]:
    plan = findings.plan
    parts = [f"## Plan `{plan.name}`", f"{_sentence(plan.summary)}", _recipe(plan)]
    for name, title in TITLES.items():
        if name in CONTENTS and not findings.part(name)[0]:
            body = []  # how many runs are wanted is said below
        elif name in _TABLES:
            body = [table.markdown() for table in _TABLES[name](findings)]
        elif name in figures.PANELS:
            body = _figure(findings, name, pictures)
        else:
            continue
        parts += [f"### {title}", *body, _made(findings, name), *_note(prose, name, plan.name)]
    return parts


def _figure(findings: Findings, name: str, pictures: dict[str, bytes]) -> list[str]:
    picture = figures.picture(findings, name)
    if picture is None:
        return [NOT_RUN]
    path = f"figures/{findings.plan.name}-{name}.svg"
    pictures[path] = picture
    return [f"![{TITLES[name]}]({path})", CAPTIONS[name]]


def _table4(results: Path, prose: Mapping[str, str]) -> list[str]:
    path = results / costs.NAME
    known = read_json(path) if path.exists() else None
    made = []
    if known is not None:
        source, batches = known["provenance"], known["numbers"]
        sizes = {f"{e['architecture']} {e['batch']}, {e['precision']}" for e in batches}
        made = [
            "<sub>The middle half of the turns in brackets. Images a step: "
            f"{'; '.join(sorted(sizes))}. {source['device']} ({source['threads']} thread); torch "
            f"{source['torch']}; commit {str(source['commit'])[:7]}; {source['date']}; wall time "
            f"{source['wall_seconds'] / 60:.0f} min.</sub>"
        ]
    table = tables.table4(known).markdown()
    return [f"## {TITLES['table4']}", table, *made, *_note(prose, "table4", "")]


def _recipe(plan: Plan) -> str:
    plans = {name: plan.of(name) for name in plan.architectures}
    lines = {
        "Networks": _each(plans, lambda own: _words(own.embed)),
        "Transfers": _each(plans, _transfers),
        "Attackers": _each(plans, _attackers),
        "Images": _limits(plan),
        "Passports": f"{plan.passports}; triggers {plan.triggers}",
        "Weights": plan.selection.replace("-", " ")
        + (f"; {plan.validation:.0%} of the training images held out" if plan.validation else ""),
        "Seeds": ", ".join(map(str, plan.seeds)),
    }
    return "\n".join(f"- {name}: {words}" for name, words in lines.items())


def _each(plans: Mapping[str, Plan], words: Callable[[Plan], str]) -> str:
    """What holds for all architectures, or what holds for each."""
    said = {name: words(own) for name, own in plans.items()}
    if len(set(said.values())) == 1:
        return next(iter(said.values()))
    return "; ".join(f"{tables.ARCHITECTURES.get(n, n)}: {each}" for n, each in said.items())


def _transfers(plan: Plan) -> str:
    usual = plan.transfer.epochs
    other = (f"{n} for {tables.name_of(t)}" for t, n in plan.transfer_epochs.items() if n != usual)
    return ", ".join([_words(plan.transfer), *other])


def _attackers(plan: Plan) -> str:
    spent = plan.attackers
    epochs = f"{spent.epochs} epoch{'' if spent.epochs == 1 else 's'}"
    other = (f"{n} for {attack}" for attack, n in plan.attack_epochs.items())
    return ", ".join([epochs, *other, f"batch {spent.batch}", spent.precision])


def _words(recipe: Recipe) -> str:
    flags = [name for name in ("nesterov", "compile") if getattr(recipe, name)]
    plain = [] if recipe.augment else ["no augmentation"]
    return ", ".join(
        [
            f"{recipe.epochs} epochs",
            f"batch {recipe.batch}",
            f"rate {recipe.rate:g} ({recipe.schedule})",
            f"weight decay {recipe.weight_decay:g}",
            recipe.precision,
            *flags,
            *plain,
        ]
    )


def _limits(plan: Plan) -> str:
    limits = {
        **{f"to train {name}": count for name, count in plan.train_images.items()},
        "to transfer": plan.transfer_images,
        "for attackers": plan.attack_images,
        "to test attacks on": plan.attack_test_images,
        "to test random passports on": plan.fake_images,
    }
    said = [f"at most {count} {what}" for what, count in limits.items() if count is not None]
    return "; ".join(said) or "all"


def _made(findings: Findings, part: str) -> str:
    """What was run for this table: plan, images, device, versions, commits, time."""
    entries, wanted = findings.part(part)
    count = f"{len(entries)} of {wanted} runs"
    if not entries:
        return f"Plan `{findings.plan.name}`: {count}."
    made = [found for entry in entries for found in _provenances(entry)]
    plans = [findings.plan.of(name) for name in findings.plan.architectures]
    epochs = " or ".join(dict.fromkeys(str(own.embed.epochs) for own in plans))
    facts = [
        f"Plan `{findings.plan.name}`, {epochs} epochs: {count}",
        _images(entries),
        ", ".join(_distinct(_device(each) for each in made)),
        "torch " + ", ".join(_distinct(each["torch"] for each in made)),
        "commits " + ", ".join(_distinct((each["commit"] or "unknown")[:7] for each in made)),
        f"wall time {_duration(sum(map(seconds, entries)))}",
        f"run until {max(each['date'] for each in made)}",
    ]
    return f"<sub>{'; '.join(facts)}.</sub>"


def _provenances(entry: Entry) -> list[Entry]:
    begun = entry["result"].get("begun")
    return [entry["provenance"], *([] if begun is None else [begun])]


def _device(made: Entry) -> str:
    threads = made["threads"]
    return f"{made['device']} ({threads} thread{'s' if threads > 1 else ''})"


def _images(entries: Iterable[Entry]) -> str:
    """How many images the runs had, by what they did."""
    had: dict[str, tuple[set[int], set[int]]] = {}
    for entry in entries:
        work = entry["inputs"].get("work", "train")
        use = {"train": "trained", "transfer": "transferred"}.get(work, "attacked")
        train, test = had.setdefault(use, (set(), set()))
        test.add(entry["result"]["test_images"])
        if use != "attacked" or "train" in ATTACKS[work].needs:
            train.add(entry["result"]["train_images"])
    return ", ".join(
        f"{use}{f' with {_numbers(train)} images' if train else ''} and tested on {_numbers(test)}"
        for use, (train, test) in had.items()
    )


def _numbers(counts: Iterable[int]) -> str:
    return " or ".join(map(str, sorted(counts)))


def _distinct(words: Iterable[str]) -> list[str]:
    return sorted(set(words))


def _duration(taken: float) -> str:
    minutes, rest = divmod(round(taken), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min" if minutes else f"{rest} s"


def _seeds(results: Path, plan: Plan) -> tuple[int, ...]:
    """The plan's, and those of the files that are there."""
    found = set(plan.seeds)
    for path in (results / plan.name).glob("*.json"):
        try:
            inputs = read_json(path)["inputs"]
            found.add(inputs.get("network", inputs)["seed"])
        except (KeyError, TypeError) as error:
            raise UnreadableDataError(
                f"{path} is no result of a run ({error!r}); remove it, and it will be run again"
            ) from error
    return tuple(sorted(found))


def _notes(text: str) -> dict[str, str]:
    """Sections of the prose by heading; what is above the first one is for its writers."""
    _, *parts = _HEADING.split(text)
    found = dict(zip(parts[::2], (body.strip() for body in parts[1::2]), strict=True))
    for heading in found:
        if heading.split(" (")[0] not in {*TITLES, "introduction"}:
            raise UnreadableDataError(
                f"a note is headed {heading!r}, which names no part of the page; there are: "
                f"introduction, {', '.join(TITLES)}, each with the name of a plan in brackets "
                "where it is about one"
            )
    return {heading: body for heading, body in found.items() if body}


def _note(prose: Mapping[str, str], part: str, plan: str) -> list[str]:
    return [prose[name] for name in (part, f"{part} ({plan})") if name in prose]


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."
