"""Passports in a training loop of your own: six lines of it are ours.

Run it: python examples/own_training_loop.py
"""

from copy import deepcopy

import torch
from torch import nn
from torch.nn import functional as F

import nnpassport
from nnpassport.data.images import Normalisation, batches, read_images
from nnpassport.embedding.network import surgery
from nnpassport.embedding.schemes.channels import ANY
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
example = torch.zeros(2, 1, 8, 8)

for batch in batches(data, normalise, size=64, seed=0, epoch=0):  # first without the mark
    optimizer.zero_grad()
    F.cross_entropy(model(batch.images), batch.labels).backward()
    optimizer.step()
anchor = deepcopy(model.eval())  # keep it as you keep the key: suspects are aligned to it
seen = normalise(data.images[:256])
key = nnpassport.V2.draw_key(model, example, owner="Alice", layers=["4"], seen=seen)
print(f"bits right before {nnpassport.V2.verify(model.state_dict(), key).matches} of 128")
marked = nnpassport.mark(model, key, example)  # keep the key: save_key
marked.graft(seen, limit=ANY)  # every bit is right from here on
model.train()
for epoch in range(1, 4):
    for batch in batches(data, normalise, size=64, seed=0, epoch=epoch):
        loss = marked.loss(batch.images, batch.labels)  # both branches and the sign loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
model.eval()  # ends the two branches
released = marked.released()  # a plain network: no passport, no bits, no extra cost

images = normalise(test.images)
with torch.no_grad():
    print(f"released answers as withheld: {torch.equal(released(images), model(images))}")
print(f"accuracy {accuracy(model, test, normalise):.3f} public")
surgery.present(model)
print(f"accuracy {accuracy(model, test, normalise):.3f} private")
surgery.withhold(model)

verdict = nnpassport.V2.verify(released.state_dict(), key)
print(f"owner accepted: {verdict.accepted}; {verdict.reason}")
fresh = nnpassport.V2.draw_key(anchor, example, layers=["4"], seen=seen)
stranger = nnpassport.V2.verify(released.state_dict(), fresh)
print(f"fresh key accepted: {stranger.accepted}; {stranger.reason}")
raise SystemExit(0 if verdict.accepted and not stranger.accepted else 1)
