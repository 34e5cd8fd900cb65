"""Attentions of every make: what a thief does to their heads for nothing, alignment undoes."""

import numpy as np
import pytest
import torch
import transformers
from torch import nn

from nnpassport.alignment.axes import Axes
from nnpassport.alignment.solve import aligner
from nnpassport.alignment.table import check_table
from nnpassport.attacks.moves import KEEPING, move
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
        of("Qwen3", **SIZES, num_key_value_heads=2, head_dim=8), {"heads": 1, "pairs": 1},
    ),
    "all that is written normed": (
        of("Olmo2", **SIZES, num_key_value_heads=2), {"heads": 1, "pairs": 1},
    ),
    "gains of one more than what is kept": (
        of("Gemma2", **SIZES, num_key_value_heads=2, head_dim=8), {"heads": 1, "pairs": 1},
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
    moved = move(model, example, torch.Generator().manual_seed(1), kinds=KEEPING)
    assert {kind: moved.done[kind] for kind in ("heads", "pairs")} == MADE[name][1]
    assert moved.done["regain"] > 0
    assert not moved.undone["reorder"]
    axes = axes_of(model, example)
    assert Axes.from_bytes(axes.to_bytes()) == axes
    check_table(axes, {n: tuple(t.shape) for n, t in model.state_dict().items()})
    to = aligner(axes, arrays(model))
    before = aligner(axes, arrays(moved.model)).reference
    assert least_likeness(before, to.reference) < 0.5
    found = to.align(arrays(moved.model)).weights
    assert least_likeness(found, to.reference) > 0.9999


class Plain(nn.Module):
    """One attention of so many heads of such a size; scores are divided alike whatever it is."""

    def __init__(self, heads, size):
        super().__init__()
        self.heads = heads
        self.embed, self.head = nn.Embedding(11, 12), nn.Linear(12, 5)
        self.q, self.k, self.v = (nn.Linear(12, heads * size, bias=False) for _ in range(3))
        self.o = nn.Linear(heads * size, 12)

    def forward(self, tokens):
        x = self.embed(tokens)
        q, k, v = (
            f(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v)
        )
        mixed = (q @ k.transpose(2, 3) / 2).softmax(-1) @ v
        return self.head((x + self.o(mixed.transpose(1, 2).flatten(2))).mean(1))


@torch.no_grad()
def larger(model, heads, size, more_heads, more):
    """A copy with more heads, which add nothing, and larger ones, all mixed inside."""
    draw = torch.Generator().manual_seed(3)
    wide = Plain(heads + more_heads, size + more).double()
    state = {n: t.double().clone() for n, t in model.state_dict().items()}

    def noise(*shape):
        return torch.randn(shape, generator=draw, dtype=torch.float64)

    mixes = {pair: noise(heads + more_heads, size + more, size + more) for pair in ("qk", "vo")}
    for name in "qkvo":
        weight = state[f"{name}.weight"] if name != "o" else state["o.weight"].T
        rows = weight.reshape(heads, size, 12)
        loud = 0.0 if name in "qo" else 1.0  # of queries, and of what is written, there is nothing
        rows = torch.cat([rows, loud * noise(heads, more, 12)], 1)
        rows = torch.cat([rows, (name != "o") * noise(more_heads, size + more, 12)])
        by = mixes["qk" if name in "qk" else "vo"]
        rows = (by if name in "qv" else torch.linalg.inv(by).mT) @ rows
        order = torch.arange(heads + more_heads).roll(1)
        flat = rows[order].reshape(-1, 12)
        state[f"{name}.weight"] = flat if name != "o" else flat.T
    wide.load_state_dict(state)
    return wide


@pytest.mark.parametrize(("more_heads", "more"), [(1, 0), (3, 0), (0, 1), (0, 4), (1, 2), (4, 4)])
def test_heads_that_were_added_or_made_larger_are_left_out(more_heads, more):
    torch.manual_seed(0)
    model, tokens = Plain(4, 4).eval(), torch.arange(14).view(2, 7) % 11
    axes = axes_of(model, tokens)
    thief = larger(model, 4, 4, more_heads, more)
    with torch.no_grad():
        assert torch.allclose(thief(tokens), model.double()(tokens), atol=1e-12)
    to = aligner(axes, arrays(model))
    found = to.align(arrays(thief)).weights
    assert least_likeness(found, to.reference) > 0.9999


@pytest.mark.parametrize(
    "name",
    ["one key for each two heads", "a key for each head"],
)
def test_heads_that_cancel_each_other_are_left_out(name):
    shared = {"one key for each two heads": 2, "a key for each head": HEADS}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = of("Llama", **SIZES, num_key_value_heads=shared[name])().eval()
        letters = {"input_ids": torch.randint(1, 50, (2, 12))}
    moved = move(model, letters, torch.Generator().manual_seed(1), kinds=["reorder", "widen"])
    assert moved.done["widen"] == 1
    assert moved.error < 1e-6
    shape = moved.model.state_dict()["model.layers.0.self_attn.v_proj.weight"].shape
    assert shape == ((shared[name] + 2) * WIDTH // HEADS, WIDTH)
    to = aligner(axes_of(model, letters), arrays(model))
    found = to.align(arrays(moved.model)).weights
    assert least_likeness(found, to.reference) > 0.9999
