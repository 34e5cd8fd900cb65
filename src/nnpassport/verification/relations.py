"""Which networks that claimants committed to the suspect was made from, and which from each other.

`hearing` asks this about files; `relation` measures. Only networks under claims that are
proved to be older than the suspect are looked at: another can be made to fit.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, final

from nnpassport.alignment.channels import Network
from nnpassport.alignment.folders import Known, network_in
from nnpassport.alignment.null import Unrelated, of_its_own
from nnpassport.alignment.unfold import frame, state_from
from nnpassport.claims.rules import Work
from nnpassport.files.arrays import Array
from nnpassport.files.config import CONFIG_FILE, ModelConfig, read_config
from nnpassport.files.disk import brief
from nnpassport.files.onnx import ONNX
from nnpassport.files.suspect import Suspect
from nnpassport.files.weights import read_arrays, without_prefixes
from nnpassport.scheme import OwnershipError, UnsuitableModelError
from nnpassport.verification.aligned import given
from nnpassport.verification.bridge import WORK, running
from nnpassport.verification.relation import Relation, relation

if TYPE_CHECKING:
    from nnpassport.data.images import ImageSet


@final
@dataclass(frozen=True, slots=True)
class Related:
    """What was found of one claimant's network; as in `Claimant`."""

    related: bool | None = None
    akin: Mapping[str, bool] = field(default_factory=dict)
    work: Work | None = None
    notes: tuple[str, ...] = ()


def relations_of(
    suspect: Suspect,
    references: Mapping[str, Path],
    *,
    unrelated: tuple[Path, ...] = (),
    images: "ImageSet | Mapping[tuple[int, int, int], ImageSet] | None" = None,
) -> dict[str, Related]:
    """How the suspect and these networks of claimants, by their names, were made from each other.

    `images` are the judge's, or those by the size (channels height width) that a network takes.
    A comparison that cannot be made leaves nothing known, and says so in the notes.
    """
    if not references:
        return {}
    null = given({str(path): read_arrays(path) for path in unrelated})
    loaded: dict[str, Known] = {}
    found: dict[str, Related] = {}
    for name, path in references.items():
        try:
            loaded[name] = _known(path)
        except Exception as error:  # what a claimant hands in stops no other
            found[name] = Related(notes=(f"its network cannot be compared: {_said(error)}",))
    configs = [*(each.config for each in loaded.values()), *_config_of(suspect.path)]
    arrays, onnx = suspect.arrays.arrays, suspect.path.suffix.lower() == ONNX
    for name, one in loaded.items():
        akin = {
            other: _akin(theirs.network.arrays, one.network, null)
            for other, theirs in loaded.items()
            if other != name
        }
        try:
            relates = _compared(arrays, one.network, null, onnx=onnx)
        except Exception as error:  # as above
            note = f"whether the suspect was made from its network is not known: {_said(error)}"
            found[name] = Related(akin=akin, notes=(note,))
            continue
        work: Work | None = None
        notes: tuple[str, ...] = ()
        own = _of_size(images, one.config)
        if relates.related and (own is not None or len(loaded) > 1):
            work, notes = _measured(relates, references[name], own, configs)
        found[name] = Related(relates.related, akin, work, notes)
    return found


def _known(folder: Path) -> Known:
    found = network_in(folder)
    if found is None:
        raise UnsuitableModelError(
            f"it is {read_config(folder).architecture!r:.100}, and which of its layers share "
            "channels is not known; needed: one of the package's own architectures"
        )
    return found


def _of_size(
    images: "ImageSet | Mapping[tuple[int, int, int], ImageSet] | None", config: ModelConfig
) -> "ImageSet | None":
    """The judge's images as this network takes them, if there are any."""
    return images.get(config.input_size) if isinstance(images, Mapping) else images


def _compared(
    arrays: Mapping[str, Array], one: Network, null: Unrelated | None, *, onnx: bool = False
) -> Relation:
    names = without_prefixes(arrays, {n for n, each in one.arrays.items() if each.ndim > 1})
    arrays = {new: arrays[old] for new, old in names.items()}
    arrays = state_from(arrays, frame(one)) if onnx else arrays
    return relation(arrays, one, null or of_its_own(arrays, one))


def _akin(arrays: Mapping[str, Array], one: Network, null: Unrelated | None) -> bool:
    """Whether two claimants' networks are known to have anything to do with each other."""
    try:
        return _compared(arrays, one, null).akin
    except Exception:  # whichever of the two it is due to
        return False


def _measured(
    found: Relation, owners: Path, images: "ImageSet | None", configs: list[ModelConfig]
) -> tuple[Work | None, tuple[str, ...]]:
    """What a part does, which takes a network that runs."""
    try:
        measure = running(f"{WORK}:measured", "to see what a part does")
        said: tuple[Work | None, tuple[str, ...]] = measure(found, owners, images, configs)
        return said
    except Exception as error:  # what a claimant hands in stops no other
        return None, (f"what its part does could not be measured: {_said(error)}",)


def _config_of(suspect: Path) -> list[ModelConfig]:
    """How the suspect says that images are to be given to it, if it says so."""
    try:
        return [read_config(suspect)] if (suspect / CONFIG_FILE).is_file() else []
    except OwnershipError:
        return []


def _said(error: Exception) -> str:
    return str(error) if isinstance(error, OwnershipError) else brief(error)
