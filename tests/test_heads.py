"""Attentions of every make: what a thief does to their heads for nothing, alignment undoes."""

import numpy as np
import pytest
import torch
import transformers

from nnpassport.alignment.axes import Axes
from nnpassport.alignment.solve import aligner
from nnpassport.alignment.table import check_table
from nnpassport.attacks.moves import KINDS, move
from nnpassport.embedding.axes import axes_of

WIDTH, HEADS = 32, 4
COMMON = {"use_cache": False, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
SIZES = {
    "vocab_size": 50, "hidden_size": WIDTH, "num_hidden_layers": 1, "num_attention_heads": HEADS,
    "intermediate_size": 40, "max_position_embeddings": 32, **COMMON,
}  # fmt: skip
OLDER = {"vocab_size": 50, "n_embd": WIDTH, "n_layer": 1, "n_head": HEADS, "n_positions": 32}
FALCON = {"vocab_size": 50, "hidden_size": WIDTH, "num_hidden_layers": 1, **COMMON}


def of(kind, **settings):
    return lambda: getattr(transformers, f"{kind}ForCausalLM")(
        getattr(transformers, f"{kind}Config")(**settings)
    )


MADE = {
    "queries, keys and values in one tensor, rotated": (
        of("GPTNeoX", **SIZES, rotary_pct=1.0), {"heads": 1, "pairs": 1},
    ),
    "a part of each head rotated": (
        of("GPTNeoX", **SIZES, rotary_pct=0.5), {"heads": 2, "pairs": 1},
    ),
    "heads of queries that share keys, in one tensor": (
        of("Phi3", **SIZES, num_key_value_heads=2), {"heads": 1, "pairs": 1},
    ),
    "neighbours rotated, in one tensor": (
        of("CodeGen", **OLDER, rotary_dim=4, **COMMON), {"heads": 2, "pairs": 1},
    ),
    "one key for all heads": (
        of("GPTBigCode", **OLDER, multi_query=True, **COMMON), {"heads": 2, "pairs": 0},
    ),
    "one key for all heads, rotated": (
        of("Llama", **SIZES, num_key_value_heads=1), {"heads": 1, "pairs": 1},
    ),
    "a slope of its own for each head": (
        of("Bloom", vocab_size=50, hidden_size=WIDTH, n_layer=1, n_head=HEADS, **COMMON),
        {"heads": 2, "pairs": 0},
    ),
    "queries and keys normed": (
        of("Qwen3", **SIZES, num_key_value_heads=2, head_dim=8), {"heads": 1, "pairs": 0},
    ),
}  # fmt: skip


def network(name):
    """With random ones and zeros, and letters."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = MADE[name][0]().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        letters = torch.randint(1, 50, (2, 12))
    return model, {"input_ids": letters, "attention_mask": torch.ones_like(letters)}


def arrays(model):
    return {
        n: t.detach().double().numpy()
        for n, t in model.state_dict().items()
        if t.is_floating_point()
    }


def least_likeness(found, reference):
    """Of all matrices, the least mean cosine of rows or columns: some have scales of their own."""
    return min(
        max(_cosine(found[name], there, axis) for axis in (0, 1))
        for name, there in reference.items()
        if there.ndim == 2
    )


def _cosine(mine, theirs, axis):
    lengths = np.linalg.norm(mine, axis=axis) * np.linalg.norm(theirs, axis=axis)
    return float(((mine * theirs).sum(axis) / np.maximum(lengths, 1e-300)).mean())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", MADE)
def test_what_a_thief_does_to_heads_is_undone(name):
    model, example = network(name)
    kinds = [kind for kind in KINDS if kind not in {"mirror", "split"}]
    moved = move(model, example, torch.Generator().manual_seed(1), kinds=kinds)
    assert {kind: moved.done[kind] for kind in ("heads", "pairs")} == MADE[name][1]
    assert not moved.undone["reorder"]
    axes = axes_of(model, example)
    assert Axes.from_bytes(axes.to_bytes()) == axes
    check_table(axes, {n: tuple(t.shape) for n, t in model.state_dict().items()})
    to = aligner(axes, arrays(model))
    before = aligner(axes, arrays(moved.model)).reference
    assert least_likeness(before, to.reference) < 0.5
    found = to.align(arrays(moved.model)).weights
    assert least_likeness(found, to.reference) > 0.9999
