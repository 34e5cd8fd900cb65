"""Passports in Lightning: the training step is ours.

Needs lightning. Run it: python examples/protect_with_lightning.py
"""

import lightning
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import nnpassport
from nnpassport.data.images import Normalisation, read_images
from nnpassport.embedding.network import surgery

train, test = (read_images("digits", split=s, size=8, channels=1) for s in ("train", "test"))
normalise = Normalisation.measured(train)
training = DataLoader(TensorDataset(normalise(train.images), train.labels), 64, shuffle=True)
validation = DataLoader(TensorDataset(normalise(test.images), test.labels), 100)
example = torch.zeros(2, 1, 8, 8)


class Protected(lightning.LightningModule):
    """A module whose network carries a key; `save_hyperparameters` must leave both out."""

    def __init__(self, network, key):
        super().__init__()
        self.network = network
        self.marked = nnpassport.mark(network, key, example)

    def training_step(self, batch, _):
        """Both branches and the sign loss."""
        return self.marked.loss(*batch)

    def validation_step(self, batch, _):
        """One branch: the public one, unless the passport is presented."""
        images, labels = batch
        self.log("accuracy", (self.network(images).argmax(1) == labels).float().mean())

    def configure_optimizers(self):
        """Whatever you like."""
        return torch.optim.Adam(self.network.parameters(), lr=2e-3)

    def on_save_checkpoint(self, checkpoint):
        """The turn of the triggers, for V3; passports are in no checkpoint."""
        checkpoint["marked_step"] = self.marked.step

    def on_load_checkpoint(self, checkpoint):
        """A run that is resumed goes on with it."""
        self.marked.step = checkpoint["marked_step"]


torch.manual_seed(0)
network = nn.Sequential(
    nn.Conv2d(1, 32, 3, padding=1), nn.GroupNorm(4, 32), nn.ReLU(), nn.MaxPool2d(2),
    nn.Conv2d(32, 128, 3, padding=1), nn.GroupNorm(8, 128), nn.ReLU(), nn.MaxPool2d(2),
    nn.Flatten(), nn.Linear(128 * 2 * 2, 10),
)  # fmt: skip
key = nnpassport.V2.draw_key(network, example, owner="Alice", layers=["4"])  # keep it: save_key
print(f"bits right before {nnpassport.V2.verify(network.state_dict(), key).matches} of 128")
module = Protected(network, key)
trainer = lightning.Trainer(
    max_epochs=3, accelerator="cpu", logger=False, enable_checkpointing=False,
    enable_progress_bar=False, enable_model_summary=False,
)  # fmt: skip
trainer.fit(module, training, validation)
released = module.marked.released().eval()

(public,) = trainer.validate(module, validation, verbose=False)
surgery.present(network)
(private,) = trainer.validate(module, validation, verbose=False)
surgery.withhold(network)
print(f"accuracy {public['accuracy']:.3f} public")
print(f"accuracy {private['accuracy']:.3f} private")
images = normalise(test.images)
with torch.no_grad():
    print(f"released answers as withheld: {torch.equal(released(images), network.eval()(images))}")

verdict = nnpassport.V2.verify(released.state_dict(), key)
print(f"owner accepted: {verdict.accepted}; {verdict.reason}")
fresh = nnpassport.V2.draw_key(released, example, layers=["4"])
stranger = nnpassport.V2.verify(released.state_dict(), fresh)
print(f"fresh key accepted: {stranger.accepted}; {stranger.reason}")
raise SystemExit(0 if verdict.accepted and not stranger.accepted else 1)
