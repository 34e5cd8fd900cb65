"""The command `trace`: whose copies a network was made of."""

from pathlib import Path
from typing import Annotated, Any

import typer

from nnpassport.cli.options import AsJson, KeyFile, Passphrase, key_from
from nnpassport.cli.terminal import print_result, print_rows, print_table


def trace(
    suspect: Annotated[Path, typer.Argument(help="Model folder or weights file, from anybody.")],
    key: KeyFile,
    original: Annotated[
        Path | None,
        typer.Option(
            help="Your release without --licensee, with axes.json (`claim axes`). The "
            "suspect's units are compared with each licensee's order; works with keys of "
            "any scheme."
        ),
    ] = None,
    licensee: Annotated[
        list[str] | None,
        typer.Option(
            help="With --original: somebody who got a copy; repeatable. Name everybody who did."
        ),
    ] = None,
    alpha: Annotated[
        float | None,
        typer.Option(
            help="With --original: log10 of the threshold α on the p-value (default: -30.1, which "
            "is 2^-100)."
        ),
    ] = None,
    passphrase: Passphrase = False,
    as_json: AsJson = False,
) -> None:
    """Name whose copy leaked: a licensee of `release --licensee`, or a user of scheme deepmarks.

    Exit code 0 if somebody is named, 1 if nobody is, 2 if it could not be checked.
    """
    if (original is None) != (not licensee):
        raise typer.BadParameter("--original and --licensee belong together; give both or none")
    if alpha is not None and not alpha < 0:
        raise typer.BadParameter(f"--alpha {alpha} is no power of ten below 1, such as -9")
    if original is not None:
        _trace_order(suspect, key, original, licensee or [], alpha, passphrase, as_json)
    from nnpassport.embedding.measured import trace_file

    found = trace_file(suspect, key_from(key, passphrase))
    shares = {user: found.shares[user] for user in found.users}
    facts = {
        "users": list(found.users),
        "published": list(found.published),
        "shares": {str(user): share for user, share in shares.items()},
        "scores": {str(user): found.scores[user] for user in found.users},
        "verdict": found.verdict.as_dict(),
    }
    named = ", ".join(f"{user} ({100 * share:.0f} %)" for user, share in shares.items())
    rows = [
        ("mark", found.verdict.reason),
        ("users, and their shares", named or "nobody"),
        ("by the paper's rule", ", ".join(map(str, found.published)) or "nobody"),
    ]
    print_rows(facts, as_json, rows)
    raise typer.Exit(0 if found.users else 1)


def _trace_order(
    suspect: Path,
    key: Path,
    original: Path,
    licensees: list[str],
    alpha: float | None,
    passphrase: bool,
    as_json: bool,
) -> None:
    from nnpassport.keys.chance import LOG10_ALPHA_UNCOMMITTED
    from nnpassport.verification.licensees import read_original, trace_order

    secret = key_from(key, passphrase)
    threshold = LOG10_ALPHA_UNCOMMITTED if alpha is None else alpha
    found = trace_order(suspect, secret, read_original(original), licensees, log10_alpha=threshold)
    print_result(found.as_dict(), as_json, lambda: _print_leak(found))
    raise typer.Exit(0 if found.named else 1)


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
