"""Passports in Hugging Face's Trainer: one method of it is ours.

Needs transformers. Run it: python examples/protect_with_trainer.py
"""

import tempfile
from pathlib import Path

import torch
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification

import nnpassport
from nnpassport.data.images import Normalisation, read_images
from nnpassport.weights import read_weights

data = read_images("digits", split="train", size=16, channels=1)
pixels = Normalisation.measured(data)(data.images)
rows = [{"pixel_values": x, "labels": y} for x, y in zip(pixels, data.labels, strict=True)]
torch.manual_seed(0)
sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
config = ViTConfig(
    image_size=16, patch_size=4, num_channels=1, intermediate_size=128, num_labels=10, **sizes
)
model = ViTForImageClassification(config)

example = {"pixel_values": pixels[:2]}
key = nnpassport.V2.draw_key(model, example, owner="Alice", layers=["vit.layers.2.mlp.fc1"])
marked = nnpassport.mark(model, key, example)


class PassportTrainer(Trainer):
    """The loss is equation 1's; everything else is the Trainer's own."""

    def compute_loss(self, model, inputs, return_outputs=False, **_):
        """In training both branches and the sign loss; in evaluation the public network's own."""
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs)
        images = {name: value for name, value in inputs.items() if name != "labels"}
        return marked.loss(images, inputs["labels"], model=model)


with tempfile.TemporaryDirectory() as folder:
    arguments = TrainingArguments(
        folder, max_steps=120, per_device_train_batch_size=32, learning_rate=2e-3,
        save_strategy="no", report_to=[], disable_tqdm=True, use_cpu=True, logging_strategy="no",
    )  # fmt: skip
    trainer = PassportTrainer(model, arguments, train_dataset=rows, eval_dataset=rows[:200])
    trainer.train()
    print(f"loss of the public network {trainer.evaluate()['eval_loss']:.3f}")
    released = marked.released()  # a plain ViTForImageClassification
    released.save_pretrained(folder, save_original_format=False)  # its layers' own names
    weights = read_weights(Path(folder)).tensors
    again = ViTForImageClassification.from_pretrained(folder)

verdict = nnpassport.V2.verify(weights, key)
print(f"owner accepted: {verdict.accepted}; {verdict.reason}")
fresh = nnpassport.V2.draw_key(again, example, layers=["vit.layers.2.mlp.fc1"])
stranger = nnpassport.V2.verify(again.state_dict(), fresh)
print(f"fresh key accepted: {stranger.accepted}; {stranger.reason}")
raise SystemExit(0 if verdict.accepted and not stranger.accepted else 1)
