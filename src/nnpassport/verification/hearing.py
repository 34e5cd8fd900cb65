"""Hear a case: one suspect, rival claimants, everything derived again from what they disclose.

An exhibit is a folder that a claimant hands in: `claim.json`, `disclosed.key` (the key, which is
secret no longer), if the claim commits to one, `reference/`, the released network, if the key has
one, `anchor/`, the network before the mark, and, if he kept one, `diary/`, that of its training.
`nnpassport claim disclose` makes it. Nothing in it is believed before it is checked.
"""

import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from itertools import chain, count
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, final

from cryptography import x509

from nnpassport.alignment.rate import READINGS
from nnpassport.alignment.table import AXES_FILE
from nnpassport.catalog import entry_named
from nnpassport.claims.claim import Claim, open_claim
from nnpassport.claims.claimfile import read_signed, write_signed
from nnpassport.claims.diary import check_chain, time_of
from nnpassport.claims.facts import Facts, check_config
from nnpassport.claims.rules import ALIGNED, AS_IT_STANDS, Claimant, Ruling, rule
from nnpassport.claims.signing import public_from_hex
from nnpassport.claims.standing import Standing, standing_of
from nnpassport.files.arrays import MAX_MODEL_BYTES, arrays_digest
from nnpassport.files.config import CONFIG_FILE, ModelConfig, read_config
from nnpassport.files.disk import (
    brief,
    make_folder,
    read_once,
    refuse_leaving,
    write_atomically,
    writing,
)
from nnpassport.files.suspect import Suspect
from nnpassport.files.weights import digest_of, read_arrays
from nnpassport.ground.progress import Listener
from nnpassport.keys.chance import LOG10_ALPHA_UNCOMMITTED
from nnpassport.keys.key import Key
from nnpassport.keys.keyfile import load_key, save_key
from nnpassport.scheme import (
    BadSignatureError,
    FoldedNormsError,
    OwnershipError,
    UnreadableDataError,
    UnsuitableModelError,
    Verdict,
)
from nnpassport.verification.aligning import read_committed
from nnpassport.verification.anchor import ANCHOR, anchor_in, require_anchor
from nnpassport.verification.bridge import MEASURED, running
from nnpassport.verification.compare import compare
from nnpassport.verification.lineage import open_network
from nnpassport.verification.relations import relations_of
from nnpassport.verification.trained import trained_by
from nnpassport.verification.verdicts import (
    Alignment,
    Options,
    Trial,
    can_be_aligned,
    declared_trial,
    verify,
)

if TYPE_CHECKING:
    from nnpassport.data.images import ImageSet

LARGEST_SIDE = 1_024
"""Pixels a side of the judge's images, at most, whatever a claimant says that his network takes."""

CLAIM_FILE, KEY_FILE, REFERENCE = "claim.json", "disclosed.key", "reference"
DIARY = "diary"


@final
@dataclass(frozen=True, slots=True)
class Bench:
    """What the judge brings.

    Attributes:
        roots: certificates of timestamp authorities that he trusts.
        appeared: when the suspect is known to have been there first, or None.
        unrelated: models that have nothing to do with any claimant: the null of aligned readings.
        images: labelled images to measure F on, against what each claimant declared; or such
            images by the size (channels height width) that a network takes, see `networks`.
    """

    roots: Sequence[x509.Certificate] = ()
    appeared: datetime | None = None
    unrelated: tuple[Path, ...] = ()
    images: "ImageSet | Mapping[tuple[int, int, int], ImageSet] | None" = None


@final
@dataclass(frozen=True, slots=True)
class Hearing:
    """A ruling and all that it rests on; `standings` are of those whose claims could be read."""

    ruling: Ruling
    claimants: Sequence[Claimant]
    standings: Mapping[str, Standing]
    digests: Mapping[str, str]
    appeared: datetime | None

    def as_dict(self) -> dict[str, Any]:
        """Everything as plain JSON values; no key is in it."""
        return {
            **self.ruling.as_dict(),
            "suspect": {
                "digests": dict(self.digests),
                "appeared": None if self.appeared is None else self.appeared.isoformat(),
            },
            "claimants": [
                {
                    "name": each.name,
                    "owner": each.owner,
                    "fingerprint": each.fingerprint,
                    "proves": each.proves,
                    "older": each.older,
                    "owner_key": each.owner_key,
                    "refused": each.refused,
                    "unchecked": each.unchecked,
                    "readings": {how: found.as_dict() for how, found in each.readings.items()},
                    "elsewhere": {
                        other: {how: found.as_dict() for how, found in readings.items()}
                        for other, readings in each.elsewhere.items()
                    },
                    "related": each.related,
                    "akin": dict(each.akin),
                    "work": None if each.work is None else each.work._asdict(),
                    "trained": None
                    if each.trained is None
                    else [time_of(moment) for moment in each.trained],
                    "notes": list(each.notes),
                    "standing": None
                    if each.name not in self.standings
                    else self.standings[each.name].as_dict(),
                }
                for each in self.claimants
            ],
        }


class Exhibit(NamedTuple):
    """What a claimant has handed in, checked; networks only if they are what he committed to."""

    standing: Standing
    key: Key
    reference: Path | None
    config: ModelConfig | None
    notes: tuple[str, ...] = ()
    anchor: Path | None = None
    diary: Path | None = None


def hear(
    suspect: Suspect | Path, folders: Sequence[Path], bench: Bench, *, show: Listener | None = None
) -> Hearing:
    """Who, of those who handed in these folders, owns the network in `suspect`?

    Every mark is read as the suspect stands and, where there is a committed reference, aligned; and
    so is every claimant's mark in every other's reference. p-values are corrected for the readings
    and for the number of claimants whose claims hold.

    Raises:
        UnreadableModelError: the suspect cannot be read at all.
    """
    suspect = Suspect.of(suspect)
    digests = suspect.arrays.digests  # all of it: every claimant's reading is of this
    exhibits, claimants = _handed_in(folders, bench)
    steps, done = len(exhibits) ** 2, count()

    def tell(what: str) -> None:
        if show is not None:
            show(next(done), steps, what)

    # Whose claim cannot be read, or does not hold, can prove nothing: that is no try.
    holding = sum(claimants[name].refused is None for name in exhibits)
    for name, exhibit in exhibits.items():
        if claimants[name].refused is None:
            tell(f"{name}: the suspect")
            found = _on_suspect(suspect, exhibit, bench, holding)
            elsewhere = _elsewhere(name, exhibits, bench, tell)
            claimant = _with_findings(claimants[name], found, elsewhere)
            claimant = _with_diary(claimant, exhibit, suspect, bench)
            claimants[name] = _with_lineage(claimant, exhibit, suspect)
    dated = _dated(exhibits, claimants)
    found_of = relations_of(suspect, dated, unrelated=bench.unrelated, images=bench.images)
    for name, facts in found_of.items():
        claimants[name] = replace(
            claimants[name],
            related=facts.related,
            akin=facts.akin,
            work=facts.work,
            notes=(*claimants[name].notes, *(f"{name}: {note}" for note in facts.notes)),
        )
    everyone = list(claimants.values())
    standings = {name: exhibit.standing for name, exhibit in exhibits.items()}
    return Hearing(rule(everyone), everyone, standings, digests, bench.appeared)


def _handed_in(
    folders: Sequence[Path], bench: Bench
) -> tuple[dict[str, Exhibit], dict[str, Claimant]]:
    """By name the exhibits that can be read, and all claimants."""
    exhibits, claimants = dict[str, Exhibit](), dict[str, Claimant]()
    names = _distinct([folder.resolve().name for folder in folders])
    for name, folder in zip(names, folders, strict=True):
        try:
            exhibits[name] = exhibit = read_exhibit(folder, bench)
            claimants[name] = _claimant(name, exhibit)
        except Exception as error:  # whatever one hands in, it stops nobody else's claim
            claimants[name] = Claimant(name, unchecked=_said(error))
    return exhibits, claimants


def _elsewhere(
    name: str, exhibits: Mapping[str, Exhibit], bench: Bench, tell: Callable[[str], None]
) -> dict[str, dict[str, Verdict]]:
    """What a claimant's mark reads as in the networks of all others, by whose they are."""
    exhibit, found = exhibits[name], dict[str, dict[str, Verdict]]()
    strict = Options(exhibit.config, log10_alpha=LOG10_ALPHA_UNCOMMITTED, every_reading=True)
    for other, theirs in exhibits.items():
        if other != name and theirs.reference is not None:
            tell(f"{name}: {other}'s network")
            there = Suspect(theirs.reference)
            found[other] = _readings(there, exhibit, strict, bench.unrelated).verdicts
    return found


def _dated(exhibits: Mapping[str, Exhibit], claimants: Mapping[str, Claimant]) -> dict[str, Path]:
    """Dated networks of those who prove a mark; where that is but an order, of the others too."""
    proving = [each for each in claimants.values() if each.proves]
    everybody = bool(proving) and all(each.by_order for each in proving)
    return {
        name: exhibit.reference
        for name, exhibit in exhibits.items()
        if exhibit.reference is not None
        and (
            claimants[name].dates_a_network
            or (everybody and claimants[name].refused is None and claimants[name].older)
        )
    }


def _traced(exhibit: Exhibit, claim: Claim) -> Path | None:
    """The folder of the network whose table of axes a dated claim commits to, if it is there.

    A table that nobody dated may have been fitted to the suspect.
    """
    folder = exhibit.reference if claim.context.anchor is None else exhibit.anchor
    if folder is None or claim.axes is None or not exhibit.standing.older:
        return None
    return folder if (folder / AXES_FILE).is_file() else None


def _with_lineage(claimant: Claimant, exhibit: Exhibit, suspect: Suspect) -> Claimant:
    """The claimant, with what `compare` says of the suspect and his network: for the judge to read.

    No rule rests on it: who begins with one seed, or at one public network, has an order in common.
    """
    if exhibit.reference is None or not claimant.proves:
        return claimant
    try:
        found = compare(open_network(suspect), open_network(exhibit.reference))
        note = f"compare, of the suspect and its network: {found.outcome.value}: {found.reasons[0]}"
    except Exception as error:  # what a claimant hands in stops no other
        note = f"the suspect and its network could not be compared: {_said(error)}"
    return replace(claimant, notes=(*claimant.notes, f"{claimant.name}: {note}"))


def _with_diary(claimant: Claimant, exhibit: Exhibit, suspect: Suspect, bench: Bench) -> Claimant:
    """The claimant, with what his diary dates."""
    claim = exhibit.standing.claim
    if claim is None or exhibit.diary is None or not claimant.proves:
        return claimant
    try:
        found = trained_by(
            exhibit.diary,
            claim,
            suspect,
            roots=bench.roots,
            appeared=bench.appeared,
            unrelated=bench.unrelated,
            traced=_traced(exhibit, claim),
        )
        between, note = found.between, found.note
    except Exception as error:  # what a claimant hands in stops no other
        between, note = None, f"its diary could not be checked: {_said(error)}"
    notes = (*claimant.notes, f"{claimant.name}: {note}")
    return replace(claimant, trained=between, notes=notes)


def networks(suspect: Suspect | Path, folders: Sequence[Path]) -> list[ModelConfig]:
    """Configs by which images are to be made: of the claimants' networks, by their own word.

    And of the suspect by its own, which counts where a claimant handed in no network. None that
    asks for images of more than `LARGEST_SIDE` pixels.
    """
    own = running(f"{MEASURED}:own_config", "F")(Suspect.of(suspect).path)
    found = [own, *(_config_in(folder / REFERENCE) for folder in folders)]
    stated = [] if own is None else [_committed_in(folder) for folder in folders]
    found += [facts.put_into(own) for facts in stated if own is not None and facts is not None]
    return [
        config
        for config in found
        if config is not None and max(config.input_size[1:]) <= LARGEST_SIDE
    ]


def _config_in(folder: Path) -> ModelConfig | None:
    try:
        return read_config(folder)
    except OwnershipError:  # `read_exhibit` says what is wrong with it
        return None


def _committed_in(folder: Path) -> Facts | None:
    """What a claim commits to of its owner's network, by its own word, where it does."""
    try:
        signed = read_signed(folder / CLAIM_FILE)
        return open_claim(signed, public_from_hex(signed.envelope.keyid)).network
    except OwnershipError:  # as above
        return None


def disclose(
    claim: Path,
    key: Key,
    folder: Path,
    *,
    reference: Path | None = None,
    anchor: Path | None = None,
    diary: Path | None = None,
) -> None:
    """Make the folder that a claimant hands to a judge; the key in it is not encrypted.

    Raises:
        BadSignatureError: the claim does not hold with this key.
        BadSignatureError: the diary is another key's, or does not hold.
        UnsuitableModelError: `reference` is not the network that the claim commits to, or `anchor`
            not the key's.
        UnwritableOutputError: the folder cannot be written to, or holds a key already.
    """
    signed = read_signed(claim)
    standing = standing_of(signed, public_from_hex(signed.envelope.keyid), key)
    if not standing.finding.holds or standing.claim is None:
        raise BadSignatureError(f"{claim} does not hold with this key: {standing.finding.reason}")
    files = dict[Path, bytes]()
    if reference is not None:
        files |= _files_of(reference, REFERENCE, standing.claim, standing.claim.reference)
    if anchor is not None:
        at = anchor_in(anchor)
        require_anchor(digest_of(at), key)
        files |= _files_of(at, ANCHOR, standing.claim, key.context.anchor)
    if diary is not None:
        held = check_chain(diary, public_from_hex(standing.claim.owner_key))
        if not held.holds:
            raise BadSignatureError(f"the diary {diary} does not hold: {held.reason}")
    with writing(folder), make_folder(folder):
        save_key(key, folder / KEY_FILE)
        write_signed(signed, folder / CLAIM_FILE)
        for name, content in files.items():
            write_atomically(folder / name, content)
        if diary is not None:
            shutil.copytree(diary, folder / DIARY, copy_function=shutil.copyfile)


def _files_of(folder: Path, name: str, claim: Claim, digest: str | None) -> dict[Path, bytes]:
    """The files of a network to hand in, and of its table of axes, if the claim has this one."""
    weights = read_arrays(folder)
    if digest is None or arrays_digest(weights.arrays) != digest:
        raise UnsuitableModelError(
            f"{folder} is not the network that the claim commits to; needed: the folder that "
            f"`claim new --{name}` was given, or none"
        )
    names = [CONFIG_FILE, *weights.digests]
    aligned_to = REFERENCE if claim.context.anchor is None else ANCHOR
    if claim.axes is not None and name == aligned_to:
        read_committed(folder, claim)
        names.append(AXES_FILE)
    return {Path(name) / each: read_once(folder / each, MAX_MODEL_BYTES) for each in names}


def read_exhibit(folder: Path, bench: Bench) -> Exhibit:
    """What is in a claimant's folder, checked as far as it can be without the suspect.

    Raises:
        OwnershipError: something in it cannot be read.
    """
    signed = read_signed(folder / CLAIM_FILE)
    key = load_key(folder / KEY_FILE)
    entry_named(key.context.scheme)  # refuses one that there is not
    owner = public_from_hex(signed.envelope.keyid)
    standing = standing_of(signed, owner, key, roots=bench.roots, appeared=bench.appeared)
    path, why = _reference_in(folder, standing)
    config = None if path is None else read_config(path)
    anchor, missing = _anchor_in(folder, key)
    notes = tuple(note for note in (why, missing) if note is not None)
    diary = folder / DIARY
    kept = diary if diary.is_dir() and not diary.is_symlink() else None
    return Exhibit(standing, key, path, config, notes, anchor, kept)


def _reference_in(folder: Path, standing: Standing) -> tuple[Path | None, str | None]:
    """The network that the claim commits to, or None; and what there is to say of it."""
    committed = None if standing.claim is None else standing.claim.reference
    path = folder / REFERENCE
    if committed is None:
        note = "no reference network was committed to, so nothing can be aligned to one"
        return None, note if path.exists() else None
    if not path.exists():
        return None, "the network that the claim commits to is not there"
    if digest_of(path) != committed:
        note = "the reference network is not the one that the claim commits to, so it is not used"
        return None, note
    try:
        check_config(path, None if standing.claim is None else standing.claim.network)
    except UnsuitableModelError:
        note = "the reference's config is not the one that the claim commits to, so it is not used"
        return None, note
    refuse_leaving(path, path / CONFIG_FILE)
    return path, None


def _anchor_in(folder: Path, key: Key) -> tuple[Path | None, str | None]:
    """The key's anchor, or None; and why it is not used."""
    path = folder / ANCHOR
    if key.context.anchor is None:
        note = "the key names no anchor, so what was handed in as one is not used"
        return None, note if path.exists() else None
    if not path.exists():
        missing = "the network before the mark is not there, so nothing can be aligned to it"
        return None, missing if can_be_aligned(key) else None
    if digest_of(path) != key.context.anchor:
        return None, "the network handed in as anchor is not the key's, so it is not used"
    return path, None


class _Readings(NamedTuple):
    verdicts: dict[str, Verdict]
    failures: dict[str, str]


def _claimant(name: str, exhibit: Exhibit) -> Claimant:
    finding, token = exhibit.standing.finding, exhibit.standing.timestamp
    notes = [exhibit.standing.age, *exhibit.notes]
    return Claimant(
        name,
        owner=exhibit.key.context.owner,
        fingerprint=exhibit.key.fingerprint,
        refused=None if finding.holds else finding.reason,
        time=exhibit.standing.time,
        between=None if token is None else (token.earliest, token.latest),
        only_as_it_stands=not can_be_aligned(exhibit.key),
        by_order=exhibit.key.context.order is not None,
        older=exhibit.standing.older,
        owner_key=None if finding.claim is None else finding.claim.owner_key,
        notes=tuple(f"{name}: {note}" for note in notes),
    )


def _on_suspect(suspect: Suspect, exhibit: Exhibit, bench: Bench, claimants: int) -> _Readings:
    """The suspect's readings, with p-values for all claimants and both readings together."""
    trial, unmeasured = None, None
    try:
        images = _images(suspect, exhibit, bench)
        trial = None if images is None else declared_trial(images, standing=exhibit.standing)
    except Exception as error:  # as above: what a network takes is its claimant's to say
        unmeasured = _said(error)
    base = Options(standing=exhibit.standing, reference=exhibit.config, every_reading=True)
    found = _readings(suspect, exhibit, base, bench.unrelated, trial)
    for how, read in found.verdicts.items():
        verdict = read if unmeasured is None else _without_trial(read, unmeasured)
        if "readings" not in verdict.corrections:  # aligned ones, and those of answers, have paid
            verdict = verdict.paid(math.log10(READINGS), of="readings")
        found.verdicts[how] = verdict.paid(math.log10(claimants), of="claimants")
    return found


def _images(suspect: Suspect, exhibit: Exhibit, bench: Bench) -> "ImageSet | None":
    """The judge's images, of the size that the claimant's network takes.

    Raises:
        UnreadableDataError: there are none of that size.
    """
    if not isinstance(bench.images, Mapping):
        return bench.images
    if not bench.images:
        return None
    config = exhibit.config
    if config is None:
        stated = running(f"{MEASURED}:config_of", "F")
        config = stated(suspect, Options(standing=exhibit.standing))
    if config.input_size not in bench.images:
        raise UnreadableDataError(
            f"the network is said to take images of {config.input_size}, and the judge's are of "
            f"{', '.join(map(str, bench.images))}; needed: at most {LARGEST_SIDE} pixels a side"
        )
    return bench.images[config.input_size]


def _readings(
    network: Suspect,
    exhibit: Exhibit,
    base: Options,
    unrelated: tuple[Path, ...],
    trial: Trial | None = None,
) -> _Readings:
    """A claimant's mark in a network: as it stands, and aligned to his anchor or reference."""
    ways = {AS_IT_STANDS: base}
    own = exhibit.reference if exhibit.key.context.anchor is None else exhibit.anchor
    if own is not None and can_be_aligned(exhibit.key):
        ways[ALIGNED] = replace(base, alignment=Alignment(own, unrelated))
    found, folded = _Readings({}, {}), None
    for how, each in ways.items():
        try:
            found.verdicts[how] = _read(network, exhibit.key, trial, each)
        except FoldedNormsError as error:
            folded = error
        except Exception as error:  # as above: what a key or reference does is its claimant's
            found.failures[how] = _said(error)
    return found if folded is None else _unfolded(found, folded)


def _unfolded(found: _Readings, folded: FoldedNormsError) -> _Readings:
    """Alignment unfolds norms: what it refuses is refused, though nothing else could be read."""
    aligned = found.verdicts.get(ALIGNED)
    p = None if aligned is None else aligned.log10_p_value
    if aligned is None or p is None or p <= aligned.log10_alpha:  # what does not count stays open
        return _Readings(found.verdicts, {**found.failures, AS_IT_STANDS: _said(folded)})
    told = aligned.remarked("as it stands it was not read, as norms are folded into its layers")
    return _Readings({**found.verdicts, ALIGNED: told}, found.failures)


def _read(network: Suspect, key: Key, trial: Trial | None, options: Options) -> Verdict:
    """V, and F if it can be measured: what a thief did to the classes takes no mark away."""
    if trial is None:
        return verify(network, key, options=options)
    try:
        return verify(network, key, trial=trial, options=options)
    except Exception as error:  # as above; what is wrong with the reading itself comes again
        return _without_trial(verify(network, key, options=options), _said(error))


def _without_trial(verdict: Verdict, why: str) -> Verdict:
    return verdict.remarked(f"F was not measured: {why}")


def _said(error: Exception) -> str:
    """What went wrong; an error that is not ours says its kind, and no more than a line."""
    if isinstance(error, OwnershipError):
        return str(error)
    return f"it is of no kind that can be checked ({type(error).__name__}: {brief(error)})"


def _with_findings(
    claimant: Claimant, found: _Readings, elsewhere: Mapping[str, Mapping[str, Verdict]]
) -> Claimant:
    failures = [f"{claimant.name}: {how}: {why}" for how, why in found.failures.items()]
    accepted = any(verdict.accepted for verdict in found.verdicts.values())
    return replace(
        claimant,
        readings=found.verdicts,
        elsewhere=elsewhere,
        # Nothing accepted and something not read: that is no refusal.
        unchecked="; ".join(found.failures.values()) if failures and not accepted else None,
        notes=(*claimant.notes, *(failures if accepted else ())),
    )


def _distinct(names: Sequence[str]) -> list[str]:
    """The names, with a number behind those that were there before."""
    distinct: list[str] = []
    for name in names:
        numbered = (f"{name} ({number})" for number in count(2))
        distinct.append(next(each for each in chain([name], numbered) if each not in distinct))
    return distinct
