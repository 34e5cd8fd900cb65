"""Passports in a training loop of your own: five lines of it are ours.

Run it: python examples/own_training_loop.py
"""

import torch
from torch import nn

import nnpassport
from nnpassport.data.images import Normalisation, batches, read_images

data = read_images("digits", split="train", size=16, channels=1)
normalise = Normalisation.measured(data)

torch.manual_seed(0)
model = nn.Sequential(
    nn.Conv2d(1, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
    nn.Conv2d(32, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2),
    nn.Flatten(), nn.Linear(64 * 4 * 4, 10),
)  # fmt: skip
optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
example = torch.zeros(1, 1, 16, 16)

key = nnpassport.V2.draw_key(model, example, owner="Alice", layers=["4"])  # keep it: save_key
marked = nnpassport.mark(model, key, example)
for epoch in range(3):
    for batch in batches(data, normalise, size=64, seed=0, epoch=epoch):
        loss = marked.loss(batch.images, batch.labels)  # both branches and the sign loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
released = marked.released()  # a plain network: no passport, no bits, no extra cost

verdict = nnpassport.V2.verify(released.state_dict(), key, log10_alpha=-9.0)
print(f"loss {loss.item():.3f}; {verdict.reason}")
raise SystemExit(0 if verdict.accepted else 1)
