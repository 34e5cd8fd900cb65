"""The command `trace`: whose copies a network was made of."""

import json
from pathlib import Path
from typing import Annotated

import typer

from nnpassport.cli.options import AsJson, KeyFile, Passphrase, key_from
from nnpassport.cli.terminal import print_table


def trace(
    suspect: Annotated[Path, typer.Argument(help="Model folder or file of weights, from anybody.")],
    key: KeyFile,
    passphrase: Passphrase = False,
    as_json: AsJson = False,
) -> None:
    """Name the users whose copies a network is, or was averaged from (scheme deepmarks).

    Exit code 0 if somebody is named, 1 if nobody is, 2 if it could not be checked.
    """
    from nnpassport.embedding.measured import trace_file

    found = trace_file(suspect, key_from(key, passphrase))
    shares = {user: found.shares[user] for user in found.users}
    if as_json:
        facts = {
            "users": list(found.users),
            "published": list(found.published),
            "shares": {str(user): share for user, share in shares.items()},
            "scores": {str(user): found.scores[user] for user in found.users},
            "verdict": found.verdict.as_dict(),
        }
        typer.echo(json.dumps(facts, indent=2))
    else:
        named = ", ".join(f"{user} ({100 * share:.0f} %)" for user, share in shares.items())
        rows = [
            ("mark", found.verdict.reason),
            ("users, and their shares", named or "nobody"),
            ("by the paper's rule", ", ".join(map(str, found.published)) or "nobody"),
        ]
        print_table(("", ""), rows)
    raise typer.Exit(0 if found.users else 1)
