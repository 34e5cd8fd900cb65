"""Every kind of page that the commands write, made as users make them, in a folder.

python tests/pages.py FOLDER
"""

import contextlib
import io
import os
import shutil
import sys
import tempfile
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

from authority import Signer, Website, certificate, new_key, pem

from nnpassport.cli import app as cli

ROOT = Path(__file__).parent.parent
TOMORROW = (datetime.now(UTC) + timedelta(days=1)).isoformat()
COMMANDS = {each.name or each.callback.__name__ for each in cli.app.registered_commands}


def make_pages(folder: Path) -> dict[str, Path]:
    """Run the commands in `folder`; the pages by their names."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        _verdicts()
        _dispute()
        _called(
            "audit demo/released --key demo/alice.key --anchor demo/owner --data digits --limit 20 "
            "-o audit"
        )
        _leaderboard()
        if "compare" in COMMANDS:
            _called("attack ftal demo/released --train digits --data digits --split test -o tuned")
            _called("compare demo/released tuned --report compare.html")
    finally:
        os.chdir(before)
    places = {
        "demo": "demo/demo.html",
        "verdict": "verdict.html",
        "refusal": "refusal.html",
        "ruling": "ruling.html",
        "audit": "audit/audit.html",
        "leaderboard": "leaderboard.html",
        "compare": "compare.html",
    }
    return {name: folder / place for name, place in places.items() if (folder / place).exists()}


def _verdicts() -> None:
    _called("demo --out demo")
    measured = "--data digits --split test"
    _called(f"verify demo/released --key demo/alice.key {measured} --report verdict.html")
    _called("verify demo/plain --key demo/alice.key --report refusal.html", 1)


def _dispute() -> None:
    """Alice, dated, whose network was stolen; and Bob, who has a key and a claim and no mark."""
    dated = shutil.which("openssl") is not None
    with _authority() if dated else contextlib.nullcontext() as url:
        stamp = f"--authority {url} --authority-root tsa.pem" if dated else ""
        _called("attack combine demo/released --data digits --split test -o stolen")
        _called("key new --model demo/released --owner Bob --passports derived -o bob.key")
        for name, key, anchor in (
            ("alice", "demo/alice.key", "--anchor demo/owner"),
            ("bob", "bob.key", ""),
        ):
            _called(f"claim keygen -o {name}.pem")
            claim = f"--key {key} --signing {name}.pem --reference demo/released {anchor}"
            _called(f"claim new {claim} {stamp} -o {name}.claim.json")
            shown = f"{name}.claim.json --key {key} --reference demo/released {anchor} -o {name}"
            _called(f"claim disclose {shown}")
    judged = f"--root tsa.pem --appeared {TOMORROW}" if dated else ""
    _called(f"judge stolen alice bob {judged} --report ruling.html", 0, 1, 3)


def _leaderboard() -> None:
    """As it stands in the documentation, rendered again from its results."""
    _called(f"leaderboard --render-only --results {ROOT / 'results'} -o leaderboard.md")


def _called(words: str, *codes: int) -> str:
    """What a command prints; it has to end with one of these codes, 0 if none is named."""
    argv, sys.argv = sys.argv, ["nnpassport", *words.split()]
    out = io.StringIO()
    try:
        with contextlib.redirect_stdout(out):
            cli.main()
    except SystemExit as exit_:
        if exit_.code not in (codes or (0,)):
            raise RuntimeError(f"nnpassport {words}: exit code {exit_.code}") from exit_
    finally:
        sys.argv = argv
    return out.getvalue()


@contextlib.contextmanager
def _authority() -> Iterator[str]:
    """A timestamp authority on this machine; its root is in tsa.pem."""
    root_key, key = new_key(), new_key()
    root = certificate("A Root", root_key, ca=True)
    signer = Signer(Path("tsa").resolve(), key, certificate("An Authority", key, (root, root_key)))
    Path("tsa.pem").write_bytes(pem(root))
    os.environ["NO_PROXY"] = "127.0.0.1"
    with Website() as server:
        server.answer = lambda query: (200, signer.answer(query))
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server.url
        finally:
            server.shutdown()
            thread.join()


if __name__ == "__main__":
    for place in make_pages(Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp())).items():
        print(*place)  # noqa: T201
