"""Tables of results as Markdown, and how their numbers are said."""

from collections.abc import Iterable, Sequence


def table(head: Sequence[object], rows: Iterable[Sequence[object]]) -> list[str]:
    """Lines of a table as GitHub renders it; None is an empty field."""
    lines = [head, ["---"] * len(head), *rows]
    return [f"| {' | '.join('' if v is None else str(v) for v in line)} |" for line in lines]


def in_percent(share: float | None, digits: int = 2) -> str:
    """A share in percent, without the sign; nothing where there is none."""
    return "" if share is None else f"{100 * share:.{digits}f}"
