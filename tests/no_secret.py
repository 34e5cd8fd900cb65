"""Refuse files that hold a secret key of ours or a private key: a hook before each commit.

    python tests/no_secret.py FILE ...

Exits with 1 if there is one, and names it.
"""

import sys
from pathlib import Path

# In two parts, so that this file is none of them.
MARKS = tuple(
    (first + rest).encode()
    for first, rest in (
        ('"nnpassport', '-key"'),
        ("-----BEGIN", " PRIVATE"),
        ("-----BEGIN", " ENCRYPTED"),
    )
)


def main(names):
    """The names of files that hold one of the marks of a secret."""
    found = [n for n in names if any(mark in Path(n).read_bytes() for mark in MARKS)]
    for name in found:
        print(f"{name} holds a secret key", file=sys.stderr)  # noqa: T201
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
