"""The command `compare`: is one of two networks made from the other? No key is needed."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, final

import typer

from nnpassport.cli.options import AsJson, Report
from nnpassport.cli.spread import spread
from nnpassport.cli.terminal import output, paged, print_result, print_table, shown


@final
@dataclass(frozen=True, slots=True)
class Beside:
    """What else is known of two networks that are compared."""

    parents: Annotated[
        list[Path] | None,
        typer.Option(help="A network, besides B, from which A may be mixed; repeatable."),
    ] = None
    unrelated: Annotated[
        list[Path] | None,
        typer.Option(
            help="A network that has nothing to do with the question: somebody else's, or a "
            "public base from which both started; repeatable."
        ),
    ] = None
    axes: Annotated[
        Path | None,
        typer.Option(
            help="Table of A's axes, from `claim axes` (default: axes.json in B's folder, or "
            "in A's; without one, tensors are matched by shape)."
        ),
    ] = None
    card: Annotated[
        bool,
        typer.Option(
            "--card",
            help="Compare what A's card (base_model in README.md) or its bill of materials "
            "(bom.cdx.json) declares with what is found in B.",
        ),
    ] = False

    def compared(self, first: Path, second: Path) -> dict[str, Any]:
        """What the two have in common, as plain JSON values."""
        from nnpassport.report.provenance import made_with
        from nnpassport.verification.cards import declaration_says, declared
        from nnpassport.verification.compare import compare
        from nnpassport.verification.lineage import open_network

        stated = declared(first) if self.card else None
        a, b = open_network(first, self.axes), open_network(second)
        parents, unrelated = (
            [open_network(path) for path in paths or ()] for paths in (self.parents, self.unrelated)
        )
        found = compare(a, b, parents=parents, unrelated=unrelated)
        said = None if stated is None else declaration_says(stated, found.outcome, b.digests)
        return {**found.as_dict(), "card": said, "made_with": made_with()}


@spread
def compare(
    *,
    first: Annotated[Path, typer.Argument(help="A: model folder or weights file, from anybody.")],
    second: Annotated[Path, typer.Argument(help="B: the other one; the order does not matter.")],
    beside: Beside,
    report: Report = None,
    as_json: AsJson = False,
) -> None:
    """Is one network made from the other? 0: related. 1: no sign. 2: not checked. 3: undecided.

    It needs no key and no architecture. Hidden units of independent networks are in the same order
    only by chance, and that chance is known exactly. Related is not copied: two networks that were
    trained from the same seed are related too.
    """
    facts = beside.compared(first, second)
    print_result(facts, as_json, lambda: print_comparison(facts))
    paged("nnpassport.report.comparison:write_comparison_page", facts, report)
    raise typer.Exit({"related": 0, "none": 1, "undecided": 3}[facts["outcome"]])


def print_comparison(facts: Any) -> None:
    """Print what two networks have in common, and what it does not say."""
    from nnpassport.report.comparison import SAID, summary

    plain = output()
    plain.print(shown(SAID[facts["outcome"]].upper(), "bold"))
    print_table(("what", "found", "by chance, or unrelated"), summary(facts))
    for number, reason in enumerate(facts["reasons"], 1):
        plain.print(shown(f"{number}. {reason}"))
    plain.print(shown("This does not say"))
    for limit in facts["limits"]:
        plain.print(shown(f"- {limit}"))
