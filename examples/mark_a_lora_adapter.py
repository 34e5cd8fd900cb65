"""A LoRA adapter that carries a mark: tuned with peft, read from its own file, and merged.

Run it: python examples/mark_a_lora_adapter.py   (needs peft and transformers; half a minute)
"""

import tempfile
from copy import deepcopy
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from torch.nn import functional as F
from transformers import ViTConfig, ViTForImageClassification

import nnpassport
from nnpassport.verification.verdicts import Options

table = load_digits()
upright = torch.tensor(table.images, dtype=torch.float32)[:, None] / 8 - 1
turned, labels = upright.rot90(1, (2, 3)), torch.tensor(table.target)


def tune(model, images, loss_of, steps, rate):
    """A loop of your own; the last 497 images are kept for testing."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate)
    for _ in range(steps):
        index = torch.randint(1300, (64,))
        loss = loss_of(images[index], labels[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def accuracy(model):
    """On the digits kept for testing, lying on their side."""
    with torch.no_grad():
        return (model.eval()(turned[1300:]).logits.argmax(1) == labels[1300:]).float().mean().item()


# Somebody's base: it has learnt digits that stand upright.
torch.manual_seed(0)
base = ViTForImageClassification(
    ViTConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128,
              image_size=8, patch_size=2, num_channels=1, num_labels=10)
)  # fmt: skip
tune(base, upright, lambda x, y: F.cross_entropy(base(x).logits, y), steps=200, rate=2e-3)

# Your adapter, for digits that lie on their side. Two lines of the loop are ours.
targets = ["q_proj", "v_proj", "fc1", "fc2"]
model = get_peft_model(deepcopy(base), LoraConfig(r=8, lora_alpha=16, target_modules=targets))
key = nnpassport.LORA.draw_key(model, owner="Alice", layers=["*"])  # keep it: save_key
marked = nnpassport.mark(model, key, turned[:2])
tune(model, turned, marked.loss, steps=150, rate=5e-3)
print(f"accuracy on turned digits: {accuracy(base):.3f} before, {accuracy(model):.3f} after")

with tempfile.TemporaryDirectory() as name:
    folder = Path(name)
    marked.released().save_pretrained(folder / "adapter")  # what you publish
    alone = nnpassport.verify(folder / "adapter", key)
    print(f"the adapter's file alone: {alone.reason}")

    # Somebody merges it. The base is public, and the key knows it.
    save_file(base.state_dict(), folder / "base.safetensors")
    save_file(model.merge_and_unload().state_dict(), folder / "merged.safetensors")
    options = Options(base=folder / "base.safetensors")
    merged = nnpassport.verify(folder / "merged.safetensors", key, options=options)
    print(f"merged, less the base: {merged.reason}")
raise SystemExit(0 if alone.accepted and merged.accepted else 1)
