"""Removal that needs no training and no table of layers: blocks, names, shared tensors, means."""

import pytest
import torch
import zoo
from torch import nn

from nnpassport.attacks.acts import ACTS
from nnpassport.attacks.blocks import Renamed, drop_block, insert_block
from nnpassport.attacks.merging import merge
from nnpassport.attacks.moves import KINDS
from nnpassport.attacks.subject import Subject
from nnpassport.attacks.table import ATTACKS, MOVES, why_not
from nnpassport.embedding.axes import tied
from nnpassport.embedding.schemes.passport import V2
from nnpassport.scheme import BadRecipeError, UnreadableModelError, UnsuitableModelError


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


class Block(nn.Module):
    """Two convolutions beside what they are given."""

    def __init__(self, enter, width, stride):
        super().__init__()
        self.one = nn.Conv2d(enter, width, 3, stride, 1, bias=False)
        self.two = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.norms = nn.ModuleList([nn.BatchNorm2d(width), nn.BatchNorm2d(width)])
        self.beside = nn.Conv2d(enter, width, 1, stride) if stride > 1 else nn.Identity()

    def forward(self, x):
        y = self.norms[1](self.two(self.norms[0](self.one(x)).relu()))
        return (y + self.beside(x)).relu()


@pytest.fixture
def stages():
    """Two stages of two blocks, of which the first of each has another shape."""
    torch.manual_seed(0)
    body = [nn.Sequential(Block(3, 8, 2), Block(8, 8, 1))]
    body += [nn.Sequential(Block(8, 16, 2), Block(16, 16, 1))]
    model = nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5))
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
                module.bias.normal_()
    return model.eval(), torch.randn(2, 3, 16, 16)


def test_a_block_goes_into_a_stage_whose_blocks_are_not_alike(stages):
    model, x = stages
    found = insert_block(model, x, rng())
    assert len(found[0]) + len(found[1]) == 5
    with torch.no_grad():
        assert (found(x) - model(x)).abs().max() < 1e-5
    (new,) = (each for stage in found[:2] for each in stage if not each.two.weight.any())
    assert new.one.weight.std() > 0  # its other numbers are none that the network has


def test_blocks_are_left_out_where_the_network_runs_without_them(stages):
    model, x = stages
    before = model(x)
    for number, stage in ((0, 0), (1, 1)):
        found = drop_block(model, x, number)
        assert [len(each) for each in found[:2]] == [2 - (stage == 0), 2 - (stage == 1)]
        assert found(x).shape == before.shape
        assert (found(x) - before).abs().max() > 1e-3
    with pytest.raises(UnsuitableModelError, match="or not so many"):
        drop_block(model, x, 2)


def test_a_renamed_network_computes_the_same_under_other_names(stages):
    model, x = stages
    found = Renamed(model, rng())
    assert torch.equal(found(x), model(x))
    own, theirs = model.state_dict(), found.state_dict()
    assert set(theirs) == {f"t{n}" for n in range(len(own))}
    sums = [sorted(float(t.double().sum()) for t in each.values()) for each in (own, theirs)]
    assert sums[0] == sums[1]
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.zero_()
    assert not found(x).any()  # what it computes with is what its state dict says
    assert model(x).any()


def test_the_mean_of_two_networks_is_taken_once_of_each_tensor(stages):
    model, _ = stages
    other = type(model)(*model)  # the same modules: nothing to change
    assert torch.equal(
        merge(model, other, share=0.5).model[0][0].one.weight, model[0][0].one.weight
    )
    with torch.random.fork_rng():
        torch.manual_seed(1)
        theirs = zoo.ZOO["GPT-2"].build()
        mine = zoo.ZOO["GPT-2"].build()
    assert tied(mine) == ["lm_head.weight"]
    found = merge(mine, theirs, share=0.25).model
    wanted = 0.75 * mine.lm_head.weight + 0.25 * theirs.lm_head.weight
    torch.testing.assert_close(found.transformer.wte.weight, wanted)
    with pytest.raises(UnsuitableModelError, match="not in the other network"):
        merge(model, mine, share=0.5)
    with pytest.raises(BadRecipeError, match=r"share must be in \[0, 1\]"):
        merge(model, model, share=1.5)


def test_every_kind_of_move_is_an_attack_by_its_number(stages):
    assert tuple(KINDS) == MOVES
    assert ATTACKS["free-move"].full == tuple(range(len(MOVES)))
    model, x = stages
    subject = of(model, x)
    moved = ACTS["free-move"](subject, MOVES.index("negate")).model
    torch.testing.assert_close(moved(x), model(x), atol=1e-4, rtol=1e-4)
    assert not torch.equal(moved[0][0].one.weight, model[0][0].one.weight)
    with pytest.raises(UnsuitableModelError, match=r"nothing in this network.*'heads'"):
        ACTS["free-move"](subject, MOVES.index("heads"))
    with pytest.raises(BadRecipeError, match="there are 0 to"):
        ACTS["free-move"](subject, len(MOVES))


class Config:
    """What a subject asks of it."""

    input_size = (3, 16, 16)


def of(model, x, **others):
    return Subject(model=model, config=Config(), scheme=V2, normalise=None, **others)


def test_what_a_merge_and_a_tie_need_is_said(stages):
    model, x = stages
    subject = of(model, x)
    assert why_not(ATTACKS["merge-base"], subject) == "needs --base"
    assert why_not(ATTACKS["merge-tuned"], subject) == "needs --base, --train"
    assert why_not(ATTACKS["merge-base"], of(model, x, base=model)) is None
    with pytest.raises(UnreadableModelError, match="--base"):
        ACTS["merge-base"](subject, 0.5)
    with pytest.raises(UnsuitableModelError, match="none of this network's parameters are shared"):
        ACTS["untie"](subject, 0.0)


def test_shared_weights_are_parted_and_move_apart():
    torch.manual_seed(0)
    shared = nn.Conv2d(8, 8, 3, 1, 1)
    layers = [nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), shared, nn.ReLU(), shared, nn.ReLU()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)).eval()
    x = torch.randn(2, 3, 16, 16)
    found = ACTS["untie"](of(model, x), 0.0).model
    torch.testing.assert_close(found(x), model(x), atol=1e-5, rtol=1e-4)
    assert not torch.allclose(found[2].weight, found[4].weight, atol=1e-2)
