"""V on a suspect aligned over a table of axes that its owner's claim commits to: no network runs.

A table that is not in the claim does not count: whoever has the suspect could have fitted it. It is
the table of what is aligned to: of the key's anchor where there is one, else of the reference.
"""

from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path

from nnpassport.alignment.anchored import verify_anchored
from nnpassport.alignment.axes import Axes
from nnpassport.alignment.byaxes import anchor_of, can_read, reference_of, verify_by_axes
from nnpassport.alignment.table import AXES_FILE, MAX_AXES_BYTES
from nnpassport.claims.claim import Claim
from nnpassport.claims.facts import check_config
from nnpassport.claims.standing import Standing
from nnpassport.files.arrays import arrays_digest
from nnpassport.files.disk import read_once, refuse_leaving
from nnpassport.files.weights import Arrays, read_arrays
from nnpassport.keys.chance import LOG10_BY_NAME, TENSORS
from nnpassport.keys.counts import Counts, Reading
from nnpassport.keys.key import Key
from nnpassport.scheme import UnsuitableModelError
from nnpassport.verification.aligned import with_files
from nnpassport.verification.anchor import anchor_in


def committed_claim(key: Key, standing: Standing | None) -> Claim | None:
    """The claim, if it commits to axes over which this key's mark can be read; else None."""
    claim = None if standing is None or not standing.finding.holds else standing.claim
    return claim if claim is not None and claim.axes is not None and can_read(key) else None


def read_committed(folder: Path, claim: Claim) -> tuple[Axes, Arrays]:
    """The network to align to and the table in the owner's folder, if they are those of the claim.

    Raises:
        UnreadableModelError: one of them cannot be read.
        UnsuitableModelError: the claim commits to another.
    """
    weights, anchor = read_arrays(folder), claim.context.anchor
    if arrays_digest(weights.arrays) != (claim.reference if anchor is None else anchor):
        which = "--reference" if anchor is None else "--anchor"
        raise UnsuitableModelError(
            "the network to align to is not the one that the claim commits to; needed: the folder "
            f"that `claim new {which}` was given, or no claim"
        )
    if anchor is None:
        check_config(folder, claim.network)
    refuse_leaving(folder, folder / AXES_FILE)
    content = read_once(folder / AXES_FILE, MAX_AXES_BYTES)
    if sha256(content).hexdigest() != claim.axes:
        raise UnsuitableModelError(
            f"{folder / AXES_FILE} is not the table of axes that the claim commits to; needed: "
            "the one that was there when `claim new` was run"
        )
    return Axes.from_bytes(content), weights


def aligned_by_axes(
    read: Reading,
    suspect: Arrays,
    folder: Path,
    claim: Claim,
    unrelated: Mapping[str, Arrays],
) -> Counts:
    """What the key reads of the suspect, under its names, aligned to the network in `folder`.

    Raises:
        OwnershipError: it could not be checked; which kind says why.
    """
    key = read.key
    anchored = key.context.anchor is not None
    folder = anchor_in(folder) if anchored else folder
    axes, weights = read_committed(folder, claim)
    if anchored:
        counts = verify_anchored(read, suspect.arrays, anchor_of(axes, weights.arrays, key))
        # The table is the claimant's choice, layer by layer: only its date keeps it from fitting.
        counts = counts._replace(alignment={**(counts.alignment or {}), "bound": False})
    else:
        others = [each.arrays for each in unrelated.values()] if unrelated else None
        reference = reference_of(axes, weights.arrays, key)
        counts = verify_by_axes(read, suspect.arrays, reference, others)
        counts = counts.paid(LOG10_BY_NAME, "aligned by the tensors' names", of=TENSORS)
    counts = counts.remarked("over the claim's axes")
    owners = {**weights.digests, AXES_FILE: str(claim.axes)}
    return with_files(counts, key, suspect.digests, owners, unrelated, claim)
