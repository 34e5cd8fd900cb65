"""A key put into a network that is trained already, without training it.

Run it: python examples/protect_a_trained_network.py
"""

from copy import deepcopy

import torch
from torch import nn
from torch.nn import functional as F

import nnpassport
from nnpassport.data.images import Normalisation, batches, read_images
from nnpassport.embedding.network import surgery
from nnpassport.embedding.train.fidelity import accuracy

data, test = (read_images("digits", split=s, size=8, channels=1) for s in ("train", "test"))
normalise = Normalisation.measured(data)
torch.manual_seed(0)
model = nn.Sequential(
    nn.Conv2d(1, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
    nn.Conv2d(32, 128, 3, padding=1, bias=False), nn.BatchNorm2d(128), nn.ReLU(), nn.MaxPool2d(2),
    nn.Flatten(), nn.Linear(128 * 2 * 2, 10),
)  # fmt: skip
optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
for epoch in range(3):  # yours is trained already
    for batch in batches(data, normalise, size=64, seed=0, epoch=epoch):
        optimizer.zero_grad()
        F.cross_entropy(model(batch.images), batch.labels).backward()
        optimizer.step()
before = deepcopy(model).eval()
print(f"accuracy {accuracy(before, test, normalise):.3f} before")

images = normalise(data.images[:256])
# A passport for each channel, for this very network: keep the key (save_key), and `before`.
key = nnpassport.V2.draw_key(model, images[:2], owner="Alice", layers=["4"], seen=images)
print(f"bits right before {nnpassport.V2.verify(model.state_dict(), key).matches} of 128")
marked = nnpassport.mark(model, key, images[:2])
marked.graft(images)  # no labels, no steps
model.eval()
print(f"accuracy {accuracy(model, test, normalise):.3f} public, no step")
surgery.present(model)
print(f"accuracy {accuracy(model, test, normalise):.3f} private, no step")

model.train()
gentle = torch.optim.Adam(model.parameters(), lr=1e-4)  # a few steps, if you like
for batch in batches(data, normalise, size=64, seed=0, epoch=3):
    gentle.zero_grad()
    marked.loss(batch.images, batch.labels).backward()
    gentle.step()
model.eval()
released = marked.released()
print(f"accuracy {accuracy(released, test, normalise):.3f} public, after an epoch")
surgery.present(model)
print(f"accuracy {accuracy(model, test, normalise):.3f} private, after an epoch")
surgery.withhold(model)
with torch.no_grad():
    print(f"released answers as withheld: {torch.equal(released(images), model(images))}")

verdict = nnpassport.V2.verify(released.state_dict(), key)
print(f"owner accepted: {verdict.accepted}; {verdict.reason}")
fresh = nnpassport.V2.draw_key(released, images[:2], layers=["4"])
stranger = nnpassport.V2.verify(released.state_dict(), fresh)
print(f"fresh key accepted: {stranger.accepted}; {stranger.reason}")
raise SystemExit(0 if verdict.accepted and not stranger.accepted else 1)
