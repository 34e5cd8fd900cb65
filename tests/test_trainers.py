"""What the loops of others write down, and that they go on from it: Lightning, Hugging Face."""

import base64

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

import nnpassport
from nnpassport.data.images import Normalisation
from nnpassport.embedding.network.layers import passport_norms

NORMALISE = Normalisation((0.5,), (0.5,))
EXAMPLE = torch.zeros(2, 1, 8, 8)
SEED = bytes(range(100, 132))
LAYER = "bert.encoder.layer.1.intermediate.dense"


def secrets_of(key, network):
    """The bytes of everything secret, in every way in which somebody may have written them."""
    spelled = SEED.decode("latin-1").encode()  # as pickles of protocol 2 do
    found = [SEED, spelled, SEED.hex().encode(), base64.b64encode(SEED)]
    for norm in passport_norms(network).values():
        found += [row.contiguous().numpy().tobytes() for row in norm.mean_patch]
        kinds = (torch.float32, torch.float64, torch.int8, torch.int64)
        found += [norm.signs.to(kind).numpy().tobytes() for kind in kinds]
        found.append((norm.signs > 0).numpy().tobytes())
    if key.context.triggers is not None:
        images, labels = key.trigger_set()
        found += [labels.numpy().tobytes(), images[0].numpy().tobytes()]
        found.append(NORMALISE(images[:1]).numpy().tobytes())
    return found


def tell(folder, secrets):
    """The files below a folder that hold a secret."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    assert files
    return [path.name for path in files if any(each in path.read_bytes() for each in secrets)]


def same(one, other):
    assert one.keys() == other.keys()
    return all(torch.equal(one[name], other[name]) for name in one)


def network(seed):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 32, 3), nn.BatchNorm2d(32), nn.ReLU(), nn.Flatten(), nn.Linear(512, 3),
    )  # fmt: skip


def test_a_whole_network_in_a_file_tells_its_passport(tmp_path):
    """What the other tests here look for can be found; and never save a marked network whole."""
    model = network(0)
    key = nnpassport.V2.draw_key(model, EXAMPLE, seed=SEED, layers=["3"])
    nnpassport.mark(model, key, EXAMPLE)
    for name, value in (("whole", model), ("key", {"key": key}), ("state", model.state_dict())):
        torch.save(value, tmp_path / f"{name}.pt")
    assert tell(tmp_path, secrets_of(key, model)) == ["key.pt", "whole.pt"]


def lightning_module(lightning, model, key):
    class Protected(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.network = model
            self.marked = nnpassport.mark(model, key, EXAMPLE, normalise=NORMALISE)

        def training_step(self, batch, _):
            return self.marked.loss(*batch)

        def validation_step(self, batch, _):
            images, labels = batch
            answers = self.network(images)
            assert len(answers) == len(labels)
            self.log("loss", nn.functional.cross_entropy(answers, labels))

        def configure_optimizers(self):
            return torch.optim.Adam(self.network.parameters(), lr=1e-2)

        def on_save_checkpoint(self, saved):
            saved["marked_step"] = self.marked.step

        def on_load_checkpoint(self, saved):
            self.marked.step = saved["marked_step"]

    return Protected()


# What Lightning says of few workers, of a folder that a resumed run goes on in, and of what it uses
# of a torch that is newer than it.
@pytest.mark.filterwarnings("ignore:.*(does not have many workers|exists and is not empty)")
@pytest.mark.filterwarnings("ignore:.*LeafSpec")
def test_lightning_saves_no_secret_and_goes_on_as_if_never_stopped(tmp_path):
    lightning = pytest.importorskip("lightning")
    rng = torch.Generator().manual_seed(0)
    data = TensorDataset(torch.randn(32, 1, 8, 8, generator=rng), torch.arange(32) % 3)
    key = nnpassport.V3.draw_key(network(0), EXAMPLE, seed=SEED, layers=["3"])

    def fit(seed, **resume):
        module = lightning_module(lightning, network(seed), key)
        trainer = lightning.Trainer(
            max_epochs=3,
            accelerator="cpu",
            default_root_dir=tmp_path,
            callbacks=[
                lightning.pytorch.callbacks.ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
            ],
            enable_progress_bar=False,
            enable_model_summary=False,
            logger=False,
        )
        trainer.fit(module, DataLoader(data, 8), DataLoader(data, 8), **resume)
        return module

    whole = fit(seed=0)
    resumed = fit(seed=1, ckpt_path=tmp_path / "epoch=0.ckpt")
    assert tell(tmp_path, secrets_of(key, whole.network)) == []
    assert resumed.marked.step == whole.marked.step == 12
    assert same(resumed.state_dict(), whole.state_dict())
    plain = network(2)
    plain.load_state_dict(whole.marked.released().state_dict())


def bert(transformers, dropout):
    torch.manual_seed(0)
    return transformers.BertForSequenceClassification(
        transformers.BertConfig(
            vocab_size=50,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            max_position_embeddings=6,
            num_labels=3,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
        )
    )


def train_bert(folder, *, resume=None, dropout=0.1, **arguments):
    """A marked BERT, its key and the loss that the Trainer reports, after training."""
    transformers = pytest.importorskip("transformers")
    model = bert(transformers, dropout)
    example = {"input_ids": torch.zeros(2, 6).long(), "attention_mask": torch.ones(2, 6)}
    key = nnpassport.V2.draw_key(model, example, seed=SEED, layers=[LAYER])
    marked = nnpassport.mark(model, key, example)

    class PassportTrainer(transformers.Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, **_):
            if not model.training:
                return super().compute_loss(model, inputs, return_outputs)
            given = {name: value for name, value in inputs.items() if name != "labels"}
            return marked.loss(given, inputs["labels"], model=model)

    class Turns(transformers.TrainerCallback):
        def on_train_begin(self, args, state, control, **_):
            marked.step = state.global_step * args.gradient_accumulation_steps

    rng = torch.Generator().manual_seed(0)
    words = torch.randint(50, (64, 6), generator=rng)
    rows = [{"input_ids": x, "attention_mask": torch.ones(6), "labels": x[0] % 3} for x in words]
    settings = transformers.TrainingArguments(
        str(folder),
        **{"save_strategy": "no", "max_steps": 6, **arguments},
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = PassportTrainer(
        model, settings, train_dataset=rows, eval_dataset=rows[:8], callbacks=[Turns()]
    )
    trainer.model_accepts_loss_kwargs = False
    loss = trainer.train(resume_from_checkpoint=resume).training_loss
    assert trainer.predict(rows[:8]).predictions.shape == (8, 3)
    return marked, key, loss


@pytest.mark.slow
def test_the_trainer_saves_no_secret_and_goes_on_as_if_never_stopped(tmp_path):
    often = {"save_strategy": "steps", "save_steps": 2, "gradient_accumulation_steps": 2}
    whole, key, _ = train_bert(tmp_path, **often)
    assert tell(tmp_path, secrets_of(key, whole.model)) == []
    resumed, _, _ = train_bert(tmp_path, resume=str(tmp_path / "checkpoint-2"), **often)
    assert resumed.step == whole.step == 12
    assert same(resumed.model.state_dict(), whole.model.state_dict())


def test_batches_that_the_trainer_accumulates_weigh_what_one_does(tmp_path):
    quiet = {"max_steps": 1, "dropout": 0.0}
    _, _, whole = train_bert(tmp_path, per_device_train_batch_size=16, **quiet)
    parts = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4}
    _, _, parted = train_bert(tmp_path, **parts, **quiet)
    assert parted == pytest.approx(whole, rel=1e-5)


class Thrifty(nn.Module):
    """Keeps, if `again` is True, no activations of its middle for the backward pass."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Conv2d(1, 8, 3), nn.Linear(256, 3)
        self.middle = nn.Sequential(nn.Conv2d(8, 16, 3), nn.BatchNorm2d(16), nn.ReLU())
        self.again = self.reentrant = False

    def forward(self, x):
        x = self.first(x)
        again = self.again
        x = checkpoint(self.middle, x, use_reentrant=self.reentrant) if again else self.middle(x)
        return self.last(x.flatten(1))


@pytest.mark.parametrize("reentrant", [False, True])
def test_activations_that_are_computed_again_give_the_same_gradients(reentrant):
    rng = torch.Generator().manual_seed(0)
    images, labels = torch.randn(6, 1, 8, 8, generator=rng), torch.arange(6) % 3
    torch.manual_seed(0)
    model = Thrifty()
    key = nnpassport.V2.draw_key(model, EXAMPLE, seed=SEED, layers=["middle.0"])
    marked = nnpassport.mark(model, key, EXAMPLE)
    gradients = []
    for model.again, model.reentrant in ((False, False), (True, reentrant)):
        model.zero_grad()
        marked.loss(images, labels).backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) == 8
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, again)
