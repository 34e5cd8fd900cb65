"""Marked networks that are compiled, data-parallel or sharded train as they do alone."""

import json
import subprocess
import sys
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

from nnpassport import V1, V2, mark
from nnpassport.embedding.network.survey import survey
from nnpassport.scheme import UnsuitableModelError

EXAMPLE = torch.zeros(2, 1, 6, 6)

# A fork for each rank: half of every batch, and the whole of it alone for comparison. Then, in the
# process that forked them, what a compiler makes of a marked network.
PROGRAM = """
import functools, json, os, sys, traceback
from pathlib import Path
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
import nnpassport


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.ReLU(),
        nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 16), nn.LayerNorm(16),
        nn.Linear(16, 3),
    ).double()


def sharded_by_layer(model):
    for layer in model:
        if list(layer.parameters()):
            fully_shard(layer)
    return fully_shard(model)


def waiting(model):
    return nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)


WRAPPERS = {
    "ddp": {"passport-v1": waiting, "passport-v2": nn.parallel.DistributedDataParallel},
    "sharded": dict.fromkeys(("passport-v1", "passport-v2"), fully_shard),
    "sharded by layer": dict.fromkeys(("passport-v1", "passport-v2"), sharded_by_layer),
}
draw = torch.Generator().manual_seed(1)
IMAGES = torch.randn(8, 1, 6, 6, generator=draw).double()
LABELS = torch.arange(8) % 3


def whole(tensor):
    tensor = tensor.detach()
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor.clone()


def train(name, wrap, rows):
    scheme, model = nnpassport.catalog.scheme_named(name), network()
    hosts = ["0", "6"] if name == "passport-v1" else ["0", "3", "6"]
    key = scheme.draw_key(model, IMAGES, layers=hosts, seed=bytes(32))
    marked = nnpassport.mark(model, key, IMAGES)
    running = wrap(model)
    optimizer = torch.optim.SGD(running.parameters(), lr=0.05, momentum=0.9)
    losses, gradients = [], []
    for _ in range(4):
        loss = marked.loss(IMAGES[rows], LABELS[rows], model=running)
        optimizer.zero_grad()
        loss.backward()
        losses.append(loss.detach())
        gradients.append({n: whole(p.grad) for n, p in model.named_parameters()
                          if p.grad is not None})
        optimizer.step()
    weights = {n: whole(p) for n, p in model.named_parameters()}
    return torch.stack(losses), gradients, weights, scheme, key, marked


@functools.cache
def trained_alone(name):
    return train(name, lambda model: model, slice(None))


def rank_main(rank, store, out):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    found = {}
    for kind, by_scheme in WRAPPERS.items():
        for name, wrap in by_scheme.items():
            losses, gradients, weights, scheme, key, marked = train(
                name, wrap, slice(rank, None, 2)
            )
            dist.all_reduce(losses)
            alone = trained_alone(name)
            differences = [(losses / 2 - alone[0]).abs().max()]
            for mine, own in zip([*gradients, weights], [*alone[1], alone[2]]):
                assert list(mine) == list(own)
                differences += [(mine[n] - own[n]).abs().max() for n in own]
            flat = torch.cat([each.flatten() for each in weights.values()])
            gathered = [torch.empty_like(flat) for _ in range(2)]
            dist.all_gather(gathered, flat)
            try:
                marked.released()
                refusal = ""
            except nnpassport.scheme.OwnershipError as error:
                refusal = str(error)
            model = network()
            fresh = nnpassport.mark(model, key, IMAGES)
            missing = model.load_state_dict(weights, strict=False).missing_keys
            plain = fresh.released()
            found[f"{kind}, {name}"] = {
                "difference": torch.stack(differences).max().item(),
                "ranks agree": torch.equal(*gathered),
                "moved": (weights["6.weight" if "6.weight" in weights else "6.norm.weight"]
                          - network()[6].weight).abs().max().item(),
                "missing": missing,
                "refusal": refusal,
                "matches": scheme.verify(plain.state_dict(), key).matches,
                "matches alone": scheme.verify(
                    alone[5].released().state_dict(), key).matches,
            }
    if rank == 0:
        with open(out, "w") as file:
            json.dump(found, file)
    dist.destroy_process_group()


def compiled():
    images, labels = torch.randn(4, 1, 6, 6), torch.tensor([0, 1, 2, 0])
    for scheme in (nnpassport.V1, nnpassport.V2):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(),
                              nn.Conv2d(4, 4, 1), nn.GroupNorm(2, 4), nn.Flatten(),
                              nn.Linear(64, 3))
        key = scheme.draw_key(model, images, layers=["0", "3"], seed=bytes(32))
        marked = nnpassport.mark(model, key, images)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        found = []
        for running in (None, compiled):
            model.zero_grad()
            loss = marked.loss(images, labels, model=running)
            loss.backward()
            found.append([loss, *(p.grad for p in model.parameters() if p.grad is not None)])
        torch.testing.assert_close(*found)
        with torch.no_grad():  # one network for each branch, and no stale graph of the other
            nnpassport.embedding.network.surgery.withhold(model)
            public = compiled(images)
            nnpassport.embedding.network.surgery.present(model)
            private = compiled(images)
        assert (public - private).abs().max() > 1e-3
        torch.testing.assert_close(private, model(images))


def in_a_fork(function, *given):
    child = os.fork()
    if child == 0:
        code = 1
        try:
            function(*given)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return child


if __name__ == "__main__":
    torch.set_num_threads(1)  # before anything is forked: a pool of threads does not survive it
    torch.optim.SGD([torch.zeros(1)], lr=1.0)  # imports much, and not in every fork
    folder = Path(sys.argv[1])
    ranks = [in_a_fork(rank_main, n, folder / "store", folder / "found.json") for n in range(2)]
    codes = [os.waitpid(child, 0)[1] for child in [*ranks, in_a_fork(compiled)]]
    (folder / "codes.json").write_text(json.dumps(codes))
"""


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """How two ranks and the compiled run ended."""
    folder = tmp_path_factory.mktemp("ranks")
    program = folder / "program.py"
    program.write_text(PROGRAM, encoding="utf-8")
    run = subprocess.run(
        [sys.executable, program, folder], capture_output=True, text=True, timeout=300, check=False
    )
    assert run.returncode == 0, run.stderr
    *ranks, compiled = json.loads((folder / "codes.json").read_text(encoding="utf-8"))
    return SimpleNamespace(folder=folder, ranks=ranks, compiled=compiled, errors=run.stderr)


@pytest.fixture(scope="module")
def ranks(processes):
    assert processes.ranks == [0, 0], processes.errors
    return json.loads((processes.folder / "found.json").read_text(encoding="utf-8"))


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["passport-v1", "passport-v2"])
@pytest.mark.parametrize("kind", ["ddp", "sharded", "sharded by layer"])
def test_two_processes_train_as_one_does(kind, scheme, ranks):
    found = ranks[f"{kind}, {scheme}"]
    assert found["difference"] < 1e-12  # losses, gradients and weights of four steps
    assert found["ranks agree"]
    assert found["moved"] > 1e-3
    assert found["missing"] == []
    assert ("full_state_dict=True" in found["refusal"]) is (kind != "ddp")
    assert found["matches"] == found["matches alone"]


def small():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)
    )


def marked_with(scheme):
    model = small()
    return mark(model, scheme.draw_key(model, EXAMPLE, layers=["0"], seed=bytes(32)), EXAMPLE)


class DistributedDataParallel(nn.Module):
    """What a loss sees of torch's own, without its processes."""

    def __init__(self, module, *, unused=False, static=False):
        super().__init__()
        self.module, self.find_unused_parameters, self.static_graph = module, unused, static

    def forward(self, x):
        return self.module(x)


def test_v1_asks_for_a_wrapper_that_does_not_wait_for_parameters_without_gradient():
    images, labels = torch.randn(4, 1, 6, 6), torch.tensor([0, 1, 2, 0])
    marked = marked_with(V1)
    with pytest.raises(UnsuitableModelError, match="find_unused_parameters=True"):
        marked.loss(images, labels, model=DistributedDataParallel(marked.model))
    assert marked.step == 0
    for settings in ({"unused": True}, {"static": True}):
        wrapped = DistributedDataParallel(marked.model, **settings)
        assert torch.equal(marked.loss(images, labels, model=wrapped), marked.loss(images, labels))
    other = marked_with(V2)
    other.loss(images, labels, model=DistributedDataParallel(other.model))


def test_a_wrapper_that_takes_the_weights_away_is_refused():
    marked = marked_with(V2)
    images, labels = torch.randn(4, 1, 6, 6), torch.tensor([0, 1, 2, 0])
    flat = FullyShardedDataParallel.__new__(FullyShardedDataParallel)  # it needs its processes
    for wrapped in (nn.DataParallel(marked.model), flat):
        with pytest.raises(UnsuitableModelError, match="fully_shard or DistributedDataParallel"):
            marked.loss(images, labels, model=wrapped)
    assert marked.step == 0


@pytest.mark.parametrize(
    ("wrap", "inside"),
    [
        (partial(torch.compile, backend="eager"), "_orig_mod"),
        (nn.DataParallel, "model.module"),
        (DistributedDataParallel, "model.module"),
    ],
)
def test_passports_go_into_the_network_and_not_into_its_wrapper(wrap, inside):
    with pytest.raises(UnsuitableModelError, match=rf"{inside}.*wrap it afterwards"):
        survey(wrap(small()), EXAMPLE)


@pytest.mark.slow
def test_a_compiled_network_has_the_loss_and_the_gradients_of_the_plain_one(processes):
    assert processes.compiled == 0, processes.errors
