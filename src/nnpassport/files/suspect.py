"""A network from anybody, opened once for all who look at it."""

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import final

from nnpassport.files.arrays import Array, Described
from nnpassport.files.safetensors import Shards
from nnpassport.files.weights import Arrays, read_lazily, read_suspect


@final
class Suspect:
    """A folder or file with somebody's weights: tensors, shapes, digests, what is left out.

    Everything is read when it is first asked for, and only once. Tensors of safetensors are read
    one at a time, so a network may be larger than the memory, unless `arrays` asks for all of them.
    Do not write into the arrays that it returns. A file that changed in between is refused.

    Attributes:
        path: where it is.
        entry: if the file has several networks, the prefix of the names of the one meant, such as
            "generator" or "state.teacher"; None is all that is there.
    """

    def __init__(self, path: Path | str, entry: str | None = None) -> None:
        self.path, self.entry = Path(path), entry

    @classmethod
    def of(cls, suspect: "Suspect | Path | str") -> "Suspect":
        """The suspect itself, or the one in this folder or file."""
        return suspect if isinstance(suspect, Suspect) else cls(Path(suspect))

    @cached_property
    def arrays(self) -> Arrays:
        """All that a layer can be of it, in memory, as `weights.read_suspect` reads it.

        Raises:
            UnreadableModelError: missing, corrupt, too large, hostile, or nothing can be used.
        """
        return read_suspect(self.path, self.entry)

    @property
    def shards(self) -> Shards | None:
        """The same to be read one at a time; None if all of it is in memory, or has to be.

        Raises:
            UnreadableModelError: missing, corrupt, hostile, or too large even for this.
        """
        return None if "arrays" in vars(self) else self._shards

    @cached_property
    def _shards(self) -> Shards | None:
        return None if self.entry is not None else read_lazily(self.path)

    @property
    def tensors(self) -> Mapping[str, Array]:
        """By name, each read when it is asked for if that can be."""
        return self.arrays.arrays if self.shards is None else self.shards

    @property
    def described(self) -> Mapping[str, Array | Described]:
        """By name, what is known of tensors without their numbers."""
        return self.arrays.arrays if self.shards is None else self.shards.described()

    @property
    def left_out(self) -> Mapping[str, str]:
        """Tensors that no layer can be, by name, and why."""
        return self.arrays.left_out if self.shards is None else self.shards.left_out

    @property
    def digests(self) -> dict[str, str]:
        """SHA-256 (hex) of every file that belongs to it, by name.

        Raises:
            UnreadableModelError: a file is not what it was when it was opened.
        """
        return self.arrays.digests if self.shards is None else self._digests

    @cached_property
    def _digests(self) -> dict[str, str]:
        return {} if self.shards is None else self.shards.digests()
