"""Passports in Lightning: the training step is ours.

Needs lightning. Run it: python examples/protect_with_lightning.py
"""

import lightning
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import nnpassport
from nnpassport.data.images import Normalisation, read_images

data = read_images("digits", split="train", size=16, channels=1)
pixels = Normalisation.measured(data)(data.images)
torch.manual_seed(0)
network = nn.Sequential(
    nn.Conv2d(1, 32, 3, padding=1), nn.GroupNorm(4, 32), nn.ReLU(), nn.MaxPool2d(2),
    nn.Conv2d(32, 128, 3, padding=1), nn.GroupNorm(8, 128), nn.ReLU(), nn.MaxPool2d(2),
    nn.Flatten(), nn.Linear(128 * 4 * 4, 10),
)  # fmt: skip
key = nnpassport.V2.draw_key(network, pixels[:2], owner="Alice", layers=["4"])


class Protected(lightning.LightningModule):
    """A module whose network carries a key."""

    def __init__(self):
        super().__init__()
        self.network = network
        self.marked = nnpassport.mark(network, key, pixels[:2])

    def training_step(self, batch, _):
        """Both branches and the sign loss."""
        return self.marked.loss(*batch)

    def validation_step(self, batch, _):
        """The public network, as it will be released."""
        images, labels = batch
        self.log("loss", F.cross_entropy(self.network(images), labels))

    def configure_optimizers(self):
        """Whatever you like."""
        return torch.optim.Adam(self.network.parameters(), lr=2e-3)


module = Protected()
loader = DataLoader(TensorDataset(pixels, data.labels), batch_size=64, shuffle=True)
trainer = lightning.Trainer(
    max_epochs=4, accelerator="cpu", logger=False, enable_checkpointing=False,
    enable_progress_bar=False, enable_model_summary=False,
)  # fmt: skip
trainer.fit(module, loader, DataLoader(TensorDataset(pixels[:200], data.labels[:200]), 100))
print(f"loss of the public network {trainer.callback_metrics['loss'].item():.3f}")
released = module.marked.released()

verdict = nnpassport.V2.verify(released.state_dict(), key)
print(f"owner accepted: {verdict.accepted}; {verdict.reason}")
fresh = nnpassport.V2.draw_key(released, pixels[:2], layers=["4"])
stranger = nnpassport.V2.verify(released.state_dict(), fresh)
print(f"fresh key accepted: {stranger.accepted}; {stranger.reason}")
raise SystemExit(0 if verdict.accepted and not stranger.accepted else 1)
