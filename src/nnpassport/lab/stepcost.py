"""What a training step costs with a mark, beside the same step without."""

from copy import deepcopy
from itertools import count
from typing import Any

import torch

from nnpassport.embedding.checkpoint import load_model
from nnpassport.embedding.schemes.protocol import Scheme
from nnpassport.embedding.train.loop import classification
from nnpassport.keys.keyfile import load_key
from nnpassport.lab.cells import Cell, embed_recipe
from nnpassport.lab.descent import descent, random_batch
from nnpassport.lab.store import Store
from nnpassport.lab.timing import in_turns, paired, spread
from nnpassport.report.provenance import device_name

TURNS = 9
_WARM = 3


def step_cost(cell: Cell, store: Store, scheme: Scheme) -> dict[str, Any]:
    """Seconds of a step with the mark over seconds of a plain one, the two taken in turns."""
    plain = load_model(store.folder(cell.plain))
    key = load_key(store.folder(cell) / "owner.key")
    normalise = plain.normalise
    marked = deepcopy(plain.model)
    scheme.insert(marked, key, torch.zeros(2, *plain.config.input_size))
    recipe = embed_recipe(cell.plan, cell.network)
    objective = scheme.objective(key, steps=TURNS + _WARM, normalise=normalise)
    steps = {}
    for name, model, descended in (
        ("plain", plain.model, classification),
        ("marked", marked, objective),
    ):
        model.to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]
        batch = random_batch((recipe.batch, *plain.config.input_size), "cpu")
        steps[name] = descent(model, descended, batch, count(), precision=recipe.precision)
    timed = in_turns(steps, repeats=TURNS, warmup=_WARM)
    found = spread(paired(timed["marked"].seconds, timed["plain"].seconds))
    return {
        "ratio": found["median"],
        "quartiles": [found["lower_quartile"], found["upper_quartile"]],
        "n": found["n"],
        "batch": recipe.batch,
        "precision": recipe.precision,
        "device": device_name(),
    }
