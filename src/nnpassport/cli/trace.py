"""The command `trace`: whose copies a network was made of."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, cast, final

import typer

from nnpassport.cli.options import AsJson, KeyFile, Passphrase, key_from
from nnpassport.cli.spread import spread
from nnpassport.cli.terminal import print_result, print_rows, print_table


@final
@dataclass(frozen=True, slots=True)
class Copies:
    """The original of the copies that were handed out, and who got one."""

    original: Annotated[
        Path | None,
        typer.Option(
            help="Your release without --licensee, with axes.json (`claim axes`). The "
            "suspect's units are compared with each licensee's order; works with keys of "
            "any scheme."
        ),
    ] = None
    licensee: Annotated[
        list[str] | None,
        typer.Option(
            help="With --original: somebody who got a copy; repeatable. Name everybody who did."
        ),
    ] = None
    alpha: Annotated[
        float | None,
        typer.Option(
            help="With --original: log10 of the threshold α on the p-value (default: -30.1, which "
            "is 2^-100)."
        ),
    ] = None

    @property
    def given(self) -> bool:
        """Whether the suspect is compared with copies.

        Raises:
            typer.BadParameter: the options do not go together.
        """
        if (self.original is None) != (not self.licensee):
            raise typer.BadParameter("--original and --licensee belong together; give both or none")
        if self.alpha is not None and not self.alpha < 0:
            raise typer.BadParameter(f"--alpha {self.alpha} is no power of ten below 1, such as -9")
        return self.original is not None

    def compared(self, suspect: Path, key: Any) -> Any:
        """Whose copies the suspect may be."""
        from nnpassport.keys.chance import LOG10_ALPHA_UNCOMMITTED
        from nnpassport.verification.licensees import read_original, trace_order

        alpha = LOG10_ALPHA_UNCOMMITTED if self.alpha is None else self.alpha
        original = read_original(cast(Path, self.original))
        return trace_order(suspect, key, original, self.licensee or [], log10_alpha=alpha)


@spread
def trace(
    *,
    suspect: Annotated[Path, typer.Argument(help="Model folder or weights file, from anybody.")],
    key: KeyFile,
    copies: Copies,
    passphrase: Passphrase = False,
    as_json: AsJson = False,
) -> None:
    """Name whose copy leaked: a licensee of `release --licensee`, or a user of scheme deepmarks.

    Exit code 0 if somebody is named, 1 if nobody is, 2 if it could not be checked.
    """
    by_order, secret = copies.given, key_from(key, passphrase)
    if by_order:
        found = copies.compared(suspect, secret)
        print_result(found.as_dict(), as_json, lambda: _print_leak(found))
        raise typer.Exit(0 if found.named else 1)
    from nnpassport.embedding.measured import trace_file

    users = trace_file(suspect, secret)
    print_rows(_facts(users), as_json, _rows(users))
    raise typer.Exit(0 if users.users else 1)


def _facts(found: Any) -> dict[str, Any]:
    return {
        "users": list(found.users),
        "published": list(found.published),
        "shares": {str(user): found.shares[user] for user in found.users},
        "scores": {str(user): found.scores[user] for user in found.users},
        "verdict": found.verdict.as_dict(),
    }


def _rows(found: Any) -> list[tuple[str, str]]:
    named = ", ".join(f"{user} ({100 * found.shares[user]:.0f} %)" for user in found.users)
    return [
        ("mark", found.verdict.reason),
        ("users, and their shares", named or "nobody"),
        ("by the paper's rule", ", ".join(map(str, found.published)) or "nobody"),
    ]


def _print_leak(found: Any) -> None:
    from nnpassport.report.page import small

    rows = [
        (
            each.name,
            f"{each.fixed} of {each.units}",
            str(each.axes),
            small(each.log10_p),
            "named" if each.name in found.named else "",
        )
        for each in found.found
    ]
    print_table(("licensee", "units in place", "by chance", "p, for all names", ""), rows)
    if found.verdict is not None:
        print_table(("", ""), [("the key's mark, order undone", found.verdict.reason)])
