"""V of a mark in ordinary answers where networks run: on files, on anybody's images, and a plan.

Every function here either gives a verdict or raises, and then nothing was decided.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from nnpassport.data.images import ImageSet, Normalisation
from nnpassport.embedding.checkpoint import Loaded, load_model, load_suspect
from nnpassport.embedding.network.tensors import tensors_digest
from nnpassport.embedding.schemes.answers import scores_of, scores_of_key
from nnpassport.files.config import ModelConfig
from nnpassport.files.suspect import Suspect
from nnpassport.files.weights import within
from nnpassport.keys.answers import (
    UNITS,
    Read,
    baseline_from,
    form_of,
    functions_of,
    inputs_of,
    read_answers,
    read_on,
)
from nnpassport.keys.key import Key
from nnpassport.scheme import UnsuitableModelError, Verdict
from nnpassport.verification.anchor import ANCHOR, anchor_in, require_anchor
from nnpassport.verification.collected import Collected, read_collected
from nnpassport.verification.verdicts import Options, Trial, under_claim

CHOSEN = (
    "images and signs are independent only if whoever chose the images had no key: let a judge "
    "choose them, or read the inputs that the key is bound to"
)
LEFT_OUT = (
    "some inputs have no answer, or not all of it: if whoever left them out had the key, he chose "
    "by it, and p says nothing"
)
PLANNED = (50, 100, 200, 500, 1_000, 2_000, 5_000, 10_000)
_OTHERS = 100_000  # images of anybody's that are read at most


class Expected(NamedTuple):
    """What so many queries would show, if a service ran on the network itself: log₁₀ p."""

    queries: int
    scores: float
    labels: float


def by_labels(suspect: Suspect | Path, key: Key, options: Options) -> Verdict:
    """V by nothing but the classes that a suspect gives to the key's inputs."""
    loaded = load_suspect(suspect, options.reference, trusted_factory=options.trusted_factory)
    said = scores_of_key(loaded.model, key, _normalise(loaded.config, options))
    found = read_answers(said.argmax(1).numpy(), key, labels=True, log10_alpha=options.threshold)
    return found.beside(digests=loaded.digests)


def on_images(suspect: Suspect | Path, key: Key, options: Options, trial: Trial) -> Verdict:
    """V by a suspect's scores of images that are none of the key's.

    Raises:
        UnsuitableModelError: the network to align to is not the key's anchor, or the suspect has
            another task.
    """
    loaded = load_suspect(suspect, options.reference, trusted_factory=options.trusted_factory)
    pictures = _pictures(trial.data, key)
    said = scores_of(loaded.model, pictures, _normalise(loaded.config, options))
    anchor, before = _before(pictures, key, options)
    found = read_on(
        said.numpy(),
        pictures.numpy(),
        before,
        key,
        functions_of(key),
        labels=False,
        log10_alpha=options.threshold,
    )
    digests = {**loaded.digests, **within(ANCHOR, anchor.digests)}
    return found.beside(digests=digests).remarked(CHOSEN)


def collected(
    answers: Path,
    key: Key,
    options: Options,
    data: ImageSet | None = None,
    *,
    labels_only: bool = False,
) -> Verdict:
    """V on a file of answers to the key's inputs, in their order; or to `data`, in theirs.

    For `data` the anchor is needed, `options.alignment`. With `labels_only` nothing is read of
    scores but which is the highest.

    Raises:
        UnreadableDataError: the file is none.
        UnsuitableModelError: as for `on_images`.
    """
    if data is None:
        inputs, _ = inputs_of(key)
        given = _given(answers, len(inputs), labels_only)
        found = read_answers(given.numbers, key, labels=given.labels, log10_alpha=options.threshold)
    else:
        pictures = _pictures(data, key)
        given = _given(answers, len(pictures), labels_only)
        _, before = _before(pictures, key, options)
        found = read_on(
            given.numbers,
            pictures.numpy(),
            before,
            key,
            functions_of(key),
            labels=given.labels,
            log10_alpha=options.threshold,
        )
        found = found.remarked(CHOSEN)
    found = found if given.whole else found.remarked(LEFT_OUT)
    found = found.remarked("what the answers are of is the word of whoever collected them")
    return found if options.standing is None else under_claim(found, options.standing)


def _given(answers: Path, inputs: int, labels_only: bool) -> Collected:
    given = read_collected(answers, inputs)
    return given.as_labels() if labels_only else given


def planned(folder: Path, key: Key, *, most: int | None = None) -> list[Expected]:
    """Which p the first so many inputs would show, if they were asked of the network in `folder`.

    A copy of it shows less. Nothing is sent.

    Raises:
        UnsuitableModelError: the network is not one that the key was made for.
    """
    loaded = load_model(folder)
    said = scores_of_key(loaded.model, key, Normalisation(loaded.config.mean, loaded.config.std))
    return expected(said.numpy(), key, most)


def expected(said: NDArray[np.float32], key: Key, most: int | None = None) -> list[Expected]:
    """The same, of the scores (count classes) that the network gives."""
    functions, last = functions_of(key), len(said) if most is None else min(most, len(said))
    counts = [*(count for count in PLANNED if count < last), last]
    found = []
    for count in counts:
        scores = read_answers(said[:count], key, functions=functions)
        labels = read_answers(said[:count].argmax(1), key, labels=True, functions=functions)
        found.append(Expected(count, scores.log10_p_value or 0.0, labels.log10_p_value or 0.0))
    return found


def _normalise(config: ModelConfig, options: Options) -> Normalisation:
    config = config if options.facts is None else options.facts.put_into(config)
    return Normalisation(config.mean, config.std)


def _pictures(data: ImageSet, key: Key) -> Tensor:
    _, shape = form_of(key.context)
    pictures = data.images.cpu()[:_OTHERS]
    if tuple(pictures.shape[1:]) != shape.size:
        raise UnsuitableModelError(
            f"the images are {tuple(pictures.shape[1:])}, and the key's functions are of "
            f"{shape.size}; needed: images of that size (--like FOLDER says which)"
        )
    return pictures


def _before(pictures: Tensor, key: Key, options: Options) -> tuple[Loaded, Read]:
    """The key's anchor, and what it says of the pictures, as a key would keep it."""
    if options.alignment is None:
        raise UnsuitableModelError(
            "images that the key is not bound to are read beside what the network before the mark "
            f"says of them; needed: --align with that network, a folder {ANCHOR}/, or no --data"
        )
    folder = anchor_in(options.alignment.reference)
    anchor = load_model(folder, trusted_factory=options.trusted_factory)
    require_anchor(tensors_digest(anchor.model.state_dict()), key)
    said = scores_of(anchor.model, pictures, Normalisation(anchor.config.mean, anchor.config.std))
    return anchor, baseline_from(said.numpy()) / float(UNITS)
