"""The one way from here to what runs networks: by name, and without PyTorch a clear refusal."""

from typing import Any

from nnpassport.ground.lazy import load
from nnpassport.scheme import UnsuitableModelError

MEASURED = "nnpassport.embedding.measured"
"""Where V and F are that take a network that runs."""

ANSWERING = "nnpassport.embedding.answering"
"""Where V is of a mark in ordinary answers."""

WORK = "nnpassport.embedding.work"
"""Where it is measured what a part of a network does."""


def running(where: str, purpose: str) -> Any:
    """The object at "package.module:NAME", on torch's side.

    Raises:
        UnsuitableModelError: PyTorch is not installed; `purpose` says what it was needed for.
    """
    try:
        return load(where)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "torch":
            raise
        raise UnsuitableModelError(
            f"{purpose} needs PyTorch, which is not installed; needed: "
            "pip install 'nnpassport[torch]'"
        ) from error
