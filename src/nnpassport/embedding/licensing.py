"""A copy for one licensee: the released network with its units in the licensee's order.

The order is bound to the released network and to its table of axes, and a later version of this
package may find another table. So whoever makes copies over the years gives the release that he
kept, with the table in its folder: that is what `trace` compares a copy with.
"""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from nnpassport.alignment.reorder import reordered
from nnpassport.embedding.axes import axes_of_folder
from nnpassport.embedding.checkpoint import load_model, save_model
from nnpassport.embedding.network.tensors import as_tensor
from nnpassport.embedding.owner import release
from nnpassport.files.arrays import arrays_digest
from nnpassport.files.weights import read_arrays
from nnpassport.keys.key import Key
from nnpassport.scheme import UnsuitableModelError, Verdict
from nnpassport.verification.licensees import Original, original_of, read_original


class Licensed(NamedTuple):
    """A licensee's copy.

    Attributes:
        verdict: V of the release before its units were put into order.
        axes: how many axes are in an order of their own.
        table: digest of the table that they are in.
    """

    verdict: Verdict
    axes: int
    table: str


def release_to(
    licensee: str,
    source: Path,
    key: Key,
    folder: Path,
    *,
    original: Path | None = None,
    trusted_factory: str | None = None,
) -> Licensed:
    """Write the copy of `licensee` into `folder`: `owner.release`, its units in his order.

    `original` is the release without an order, with its table of axes; None traces the axes anew.

    Raises:
        UnreadableModelError: `original` or its table cannot be read, or the table is not of it.
        UnsuitableModelError: `source` does not carry the key, `original` is the release of another
            network, or no axis can be put into order. Nothing is written then.
    """
    kept = None if original is None else read_original(original)
    with TemporaryDirectory() as scratch:
        plain = Path(scratch) / "release"
        verdict = release(source, key, plain, trusted_factory=trusted_factory)
        loaded = load_model(plain, trusted_factory=trusted_factory)
        made = _original_of(plain, trusted_factory) if kept is None else _same(kept, plain)
    orders = made.orders(key, licensee)
    moved = reordered(made.axes, made.arrays, orders)
    loaded.model.load_state_dict({name: as_tensor(each) for name, each in moved.items()})
    save_model(folder, loaded.model, loaded.config)
    return Licensed(verdict, len(orders), made.table)


def _original_of(plain: Path, trusted_factory: str | None) -> Original:
    """A release, and its axes as they are traced today."""
    return original_of(read_arrays(plain).arrays, axes_of_folder(plain, trusted_factory))


def _same(kept: Original, plain: Path) -> Original:
    """The original, if it is this release."""
    if arrays_digest(read_arrays(plain).arrays) != kept.digest:
        raise UnsuitableModelError(
            "the original is not the release of this network: their tensors differ, so `trace` "
            "would not find the copy's order; needed: what `release` without a licensee made of "
            "this network and key"
        )
    return kept
