"""A copy for one licensee: the released network with its units in the licensee's order."""

from pathlib import Path

from nnpassport.alignment.reorder import reordered
from nnpassport.embedding.axes import axes_of_folder
from nnpassport.embedding.checkpoint import load_model, save_model
from nnpassport.embedding.network.tensors import as_tensor
from nnpassport.files.weights import read_arrays
from nnpassport.keys.key import Key
from nnpassport.verification.licensees import original_of


def license_to(folder: Path, key: Key, licensee: str, *, trusted_factory: str | None = None) -> int:
    """Put the network in `folder`, in place, into the order of `licensee`; how many axes that are.

    Raises:
        UnsuitableModelError: it has no axis that can be put into order; nothing is written.
    """
    loaded = load_model(folder, trusted_factory=trusted_factory)
    original = original_of(read_arrays(folder).arrays, axes_of_folder(folder, trusted_factory))
    orders = original.orders(key, licensee)
    moved = reordered(original.axes, original.arrays, orders)
    loaded.model.load_state_dict({name: as_tensor(each) for name, each in moved.items()})
    save_model(folder, loaded.model, loaded.config)
    return len(orders)
