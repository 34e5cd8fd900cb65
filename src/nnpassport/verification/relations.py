"""Which networks that claimants committed to the suspect was made from, and which from each other.

`hearing` asks this about files; `evidence.relation` measures. Only networks under claims that are
proved to be older than the suspect are looked at: another can be made to fit.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import final

import torch
from torch import Tensor

from nnpassport.alignment.null import Unrelated
from nnpassport.alignment.unfold import state_from
from nnpassport.claims.rules import Work
from nnpassport.data.images import ImageSet, Normalisation
from nnpassport.embedding.checkpoint import Loaded, load_model
from nnpassport.embedding.measured import given, of_its_own
from nnpassport.embedding.network.tensors import as_tensors, read_weights
from nnpassport.embedding.train.fidelity import accuracy
from nnpassport.files.config import CONFIG_FILE, ModelConfig, read_config
from nnpassport.files.disk import brief
from nnpassport.files.onnx import ONNX
from nnpassport.files.suspect import Suspect
from nnpassport.files.weights import without_prefixes
from nnpassport.scheme import OwnershipError
from nnpassport.verification.relation import Relation, relation, work_of

IMAGES = 512
"""How many images a suspect is run on, at most."""

NOISE = 128
"""On how much noise, where there are no images."""

_BETTER_THAN_CHANCE = 2.0
"""Times the rate of chance that a suspect has to reach on images to be at home on them."""


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
    images: ImageSet | Mapping[tuple[int, int, int], ImageSet] | None = None,
) -> dict[str, Related]:
    """How the suspect and these networks of claimants, by their names, were made from each other.

    `images` are the judge's, or those by the size (channels height width) that a network takes.
    A comparison that cannot be made leaves nothing known, and says so in the notes.
    """
    strangers = {str(path): read_weights(path) for path in unrelated}
    null = given(strangers) if strangers else None
    loaded: dict[str, Loaded] = {}
    weights: dict[str, Mapping[str, Tensor]] = {}
    found: dict[str, Related] = {}
    for name, path in references.items():
        try:
            loaded[name], weights[name] = load_model(path), read_weights(path).tensors
        except Exception as error:  # what a claimant hands in stops no other
            found[name] = Related(notes=(f"its network cannot be compared: {_said(error)}",))
    configs = [*(each.config for each in loaded.values()), *_config_of(suspect.path)]
    tensors = as_tensors(suspect.arrays).tensors
    onnx = suspect.path.suffix.lower() == ONNX
    for name, one in loaded.items():
        akin = {
            other: _akin(theirs, one, null) for other, theirs in weights.items() if other != name
        }
        try:
            relates = _compared(tensors, one, null, onnx=onnx)
        except Exception as error:  # as above
            note = f"whether the suspect was made from its network is not known: {_said(error)}"
            found[name] = Related(akin=akin, notes=(note,))
            continue
        work: Work | None = None
        notes: tuple[str, ...] = ()
        own = _of_size(images, one.config)
        if relates.related and (own is not None or len(loaded) > 1):
            work, notes = _measured(relates, own, one.config, configs)
        found[name] = Related(relates.related, akin, work, notes)
    return found


def _of_size(
    images: ImageSet | Mapping[tuple[int, int, int], ImageSet] | None, config: ModelConfig
) -> ImageSet | None:
    """The judge's images as this network takes them, if there are any."""
    return images.get(config.input_size) if isinstance(images, Mapping) else images


def _compared(
    tensors: Mapping[str, Tensor], one: Loaded, null: Unrelated | None, *, onnx: bool = False
) -> Relation:
    tensors = _under_names_of(tensors, one)
    tensors = state_from(tensors, one.model) if onnx else tensors
    return relation(tensors, one.model, null or of_its_own(tensors, one.model))


def _akin(tensors: Mapping[str, Tensor], one: Loaded, null: Unrelated | None) -> bool:
    """Whether two claimants' networks are known to have anything to do with each other."""
    try:
        return _compared(tensors, one, null).akin
    except Exception:  # whichever of the two it is due to
        return False


_Measured = tuple[Work | None, tuple[str, ...]]


def _measured(
    found: Relation, images: ImageSet | None, own: ModelConfig, configs: list[ModelConfig]
) -> _Measured:
    """What a part does on images, or without any on noise, in words."""
    try:
        return (None, _on_noise(found, own)) if images is None else _work(found, images, configs)
    except Exception as error:  # what a claimant hands in stops no other
        return None, (f"what its part does could not be measured: {_said(error)}",)


def _work(found: Relation, images: ImageSet, configs: list[ModelConfig]) -> _Measured:
    """What the part does, on images as the suspect answers them best."""
    count = min(IMAGES, len(images.images))
    some = images.subset(torch.linspace(0, len(images.images) - 1, count).long())
    ways = [Normalisation(*way) for way in dict.fromkeys((e.mean, e.std) for e in configs)]
    reached = [accuracy(found.whole, some, each) for each in ways]
    best = max(range(len(ways)), key=reached.__getitem__)
    if reached[best] <= _BETTER_THAN_CHANCE / max(2, len(images.classes)):
        return None, (
            f"the suspect answers {100 * reached[best]:.0f} % of the images rightly, which is "
            "chance, so they do not show what any part of it does",
        )
    return work_of(found, ways[best](some.images)), ()


def _on_noise(found: Relation, config: ModelConfig) -> tuple[str, ...]:
    """What the part does on noise, for people: a part can be made to speak on noise alone."""
    noise = torch.randn(NOISE, *config.input_size, generator=torch.Generator().manual_seed(0))
    work = work_of(found, noise)
    if work is None:
        return ()
    return (
        f"on noise its part explains {100 * work.carries:.0f} % of what the suspect answers, and "
        f"{100 * work.changes:.0f} % of the answers are others without it; the ruling does not "
        "rest on this, because a part can be made to speak on noise alone",
    )


def _under_names_of(tensors: Mapping[str, Tensor], one: Loaded) -> Mapping[str, Tensor]:
    """The same tensors, without the prefixes that wrappers for training put before every name."""
    wanted = {name for name, values in one.model.state_dict().items() if values.dim() > 1}
    names = without_prefixes(tensors, wanted)
    return {new: tensors[old] for new, old in names.items()}


def _config_of(suspect: Path) -> list[ModelConfig]:
    """How the suspect says that images are to be given to it, if it says so."""
    try:
        return [read_config(suspect)] if (suspect / CONFIG_FILE).is_file() else []
    except OwnershipError:
        return []


def _said(error: Exception) -> str:
    return str(error) if isinstance(error, OwnershipError) else brief(error)
