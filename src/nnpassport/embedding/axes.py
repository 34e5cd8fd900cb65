"""The axes of a network in a model folder: traced on noise, proved by reordering."""

from pathlib import Path

import torch

from nnpassport.alignment.axes import Axes
from nnpassport.alignment.table import check_table
from nnpassport.embedding.checkpoint import load_model
from nnpassport.embedding.network.prove import prove
from nnpassport.embedding.network.trace import trace

IMAGES = 2


def axes_of_folder(folder: Path, trusted_factory: str | None = None) -> Axes:
    """The proved axes of the owner's network, as a claim can commit to them.

    Raises:
        UnreadableModelError: the folder cannot be read.
    """
    loaded = load_model(folder, trusted_factory=trusted_factory)
    rng = torch.Generator().manual_seed(0)
    example = torch.randn(IMAGES, *loaded.config.input_size, generator=rng)
    found = prove(loaded.model, example, trace(loaded.model, example))
    state = loaded.model.state_dict()
    check_table(found, {name: tuple(tensor.shape) for name, tensor in state.items()})
    return found
