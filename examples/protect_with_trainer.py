"""Passports in Hugging Face's Trainer: one method of it is ours.

A small BERT learns which of six texts some words are from. Needs transformers.
Run it: python examples/protect_with_trainer.py
"""

import tempfile
import zlib

import torch
from sklearn import datasets
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

import nnpassport
from nnpassport.embedding.network import surgery

LENGTH, VOCABULARY = 24, 500
SOURCES = ("iris", "wine", "digits", "diabetes", "breast_cancer", "linnerud")
HOST = "bert.encoder.layer.1.intermediate.dense"

rows = []
for label, source in enumerate(SOURCES):
    words = getattr(datasets, f"load_{source}")().DESCR.lower().split()
    ids = torch.tensor([zlib.crc32(word.encode()) % VOCABULARY for word in words])
    for start in range(0, len(ids) - LENGTH, 4):
        part = {"input_ids": ids[start : start + LENGTH], "attention_mask": torch.ones(LENGTH)}
        rows.append({**part, "labels": torch.tensor(label)})
train, test = [row for i, row in enumerate(rows) if i % 5], rows[::5]

torch.manual_seed(0)
sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
model = BertForSequenceClassification(
    BertConfig(
        vocab_size=VOCABULARY, max_position_embeddings=LENGTH, num_attention_heads=2,
        num_labels=len(SOURCES), **sizes,
    )
)  # fmt: skip
# All the inputs that training has, without labels.
example = {name: torch.stack([row[name] for row in test[:3]]) for name in part}
key = nnpassport.V2.draw_key(model, example, owner="Alice", layers=[HOST])  # keep it: save_key
print(f"bits right before {nnpassport.V2.verify(model.state_dict(), key).matches} of 128")
marked = nnpassport.mark(model, key, example)


class PassportTrainer(Trainer):
    """The loss is equation 1's; everything else is the Trainer's own."""

    def compute_loss(self, model, inputs, return_outputs=False, **_):
        """In training both branches and the sign loss; in evaluation one branch's own."""
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs)
        given = {name: value for name, value in inputs.items() if name != "labels"}
        return marked.loss(given, inputs["labels"], model=model)


def share_right(answers):
    """The accuracy in [0, 1]."""
    return {"accuracy": (answers.predictions.argmax(-1) == answers.label_ids).mean().item()}


with tempfile.TemporaryDirectory() as folder:
    arguments = TrainingArguments(
        folder, max_steps=120, per_device_train_batch_size=32, learning_rate=2e-3,
        save_strategy="no", logging_strategy="no", report_to=[], disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    trainer = PassportTrainer(
        model, arguments, train_dataset=train, eval_dataset=test, compute_metrics=share_right
    )
    # The loss is a mean: the Trainer has to divide it by the steps that it accumulates.
    trainer.model_accepts_loss_kwargs = False
    trainer.train()
    public = trainer.evaluate()["eval_accuracy"]
    surgery.present(model)
    private = trainer.evaluate()["eval_accuracy"]
    surgery.withhold(model)
    marked.released().save_pretrained(folder)  # not trainer.save_model: it saves the marked one
    verdict = nnpassport.verify(folder, key)
    released = BertForSequenceClassification.from_pretrained(folder)
print(f"accuracy {public:.3f} public")
print(f"accuracy {private:.3f} private")
with torch.no_grad():
    same = torch.equal(released.eval()(**example).logits, model.eval()(**example).logits)
print(f"released answers as withheld: {same}")

print(f"owner accepted: {verdict.accepted}; {verdict.reason}")
fresh = nnpassport.V2.draw_key(released, example, layers=[HOST])
stranger = nnpassport.V2.verify(released.state_dict(), fresh)
print(f"fresh key accepted: {stranger.accepted}; {stranger.reason}")
raise SystemExit(0 if verdict.accepted and not stranger.accepted else 1)
