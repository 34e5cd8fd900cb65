"""Training loops and images as people have them: a mark that cannot go in is said, never silent."""

import functools
import warnings
from dataclasses import replace

import pytest
import torch
from constructed import marked as marked_network
from constructed import small_alexnet
from torch import nn
from torch.nn import functional as F

import nnpassport
from nnpassport import verify
from nnpassport.data.images import ImageSet, Normalisation
from nnpassport.embedding.checkpoint import save_model
from nnpassport.embedding.owner import divide, release
from nnpassport.embedding.schemes.passport import V2, V3
from nnpassport.embedding.schemes.triggers import branch_loss
from nnpassport.embedding.train.labels import rows, with_triggers
from nnpassport.files.config import ModelConfig, other_classes
from nnpassport.scheme import UnmarkedWarning, UnreadableDataError, UnsuitableModelError
from nnpassport.verification.verdicts import Trial

EXAMPLE = torch.zeros(2, 1, 16, 16)
NORMALISE = Normalisation((0.5,), (0.5,))


def small(width=128):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Conv2d(16, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(8),
        nn.Flatten(),
        nn.Linear(width, 10),
    )


def key_for(model, scheme=V2):
    return scheme.draw_key(model, EXAMPLE, layers=["4"], seed=bytes(32))


def batch(count=8):
    rng = torch.Generator().manual_seed(0)
    return torch.randn(count, 1, 16, 16, generator=rng), torch.arange(count) % 10


# A mark that cannot go in


def freeze(model):
    for name, each in model.named_parameters():
        each.requires_grad_(name.startswith("9"))


@pytest.mark.parametrize("scheme", [nnpassport.V1, V2], ids=lambda each: each.name)
def test_34_a_frozen_layer_cannot_be_marked(scheme):
    model = small()
    key = key_for(model, scheme)
    freeze(model)
    before = [type(each) for each in model.modules()]
    with pytest.raises(UnsuitableModelError, match=r"weights of 4 are frozen .*requires_grad_\(Tr"):
        nnpassport.mark(model, key, EXAMPLE)
    assert [type(each) for each in model.modules()] == before


def test_34_one_that_is_frozen_after_mark_is_refused_at_the_first_loss():
    model = small()
    marked = nnpassport.mark(model, key_for(model), EXAMPLE)
    freeze(model)
    with pytest.raises(UnsuitableModelError, match=r"weights of 4 are frozen"):
        marked.loss(*batch())


def test_34_one_that_was_grafted_may_be_frozen():
    model = small()
    key = key_for(model)
    marked = nnpassport.mark(model, key, EXAMPLE)
    marked.graft(batch(64)[0])
    freeze(model)
    marked.loss(*batch()).backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert V2.verify(marked.released().state_dict(), key).accepted


def test_34_what_the_optimiser_does_not_have_is_named_when_it_is_released():
    model = small()
    marked = nnpassport.mark(model, key_for(model), EXAMPLE)
    optimizer = torch.optim.AdamW(model[-1].parameters(), 1e-3)
    marked.loss(*batch()).backward()
    optimizer.step()
    with pytest.warns(UnmarkedWarning, match=r"of 128 bits match.*weights of 4 have not changed"):
        marked.released()
    marked.loss(*batch()).backward()
    torch.optim.SGD(model.parameters(), 1e-4).step()
    with pytest.warns(UnmarkedWarning, match="train for longer"):
        marked.released()


def test_triggers_that_were_not_learnt_are_warned_of_when_bits_are_released(tmp_path):
    """The bits are in by construction; every answer is that of another class."""
    rng = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (64, 1, 32, 32), generator=rng).to(torch.uint8)
    data = ImageSet(pixels, torch.arange(64) % 10, tuple("0123456789"), "noise")
    model = small_alexnet()
    key = V3.draw_key(model, torch.zeros(2, 1, 32, 32), seed=bytes(32))
    model = marked_network(V3, model, key, data, NORMALISE)
    model.classifier.weight.data = model.classifier.weight.data.roll(1, 0)  # other answers
    arguments = {"classes": 10, "channels": 1, "norm": "batch", "width": 0.25}
    config = ModelConfig("alexnet", arguments, data.classes, (1, 32, 32), (0.5,), (0.5,))
    save_model(tmp_path / "own", model, config)
    with pytest.warns(UnmarkedWarning, match=r"of 100 have their label.*triggers_per_step"):
        found = release(tmp_path / "own", key, tmp_path / "released")
    assert found.accepted


def test_a_key_that_no_verdict_could_accept_is_not_drawn():
    tiny = nn.Sequential(nn.Conv2d(1, 20, 3), nn.ReLU(), nn.Flatten(), nn.Linear(20 * 14 * 14, 3))
    with pytest.raises(UnsuitableModelError, match=r"20 bits together, and 100 are needed"):
        V2.draw_key(tiny, EXAMPLE)
    assert V2.draw_key(tiny, EXAMPLE, layers=["0"]).context.bits == 20


def test_an_adapter_s_key_takes_as_many_layers_as_a_verdict_needs():
    peft = pytest.importorskip("peft")

    def adapted(*sides):
        torch.manual_seed(0)
        pairs = zip((16, *sides), sides, strict=False)
        plain = nn.Sequential(*(nn.Linear(a, b) for a, b in pairs), nn.Linear(sides[-1], 4))
        names = [str(index) for index in range(len(sides))]
        return peft.get_peft_model(plain, peft.LoraConfig(r=2, target_modules=names))

    key = nnpassport.LORA.draw_key(adapted(48, 48, 48))
    assert [layer.name for layer in key.context.layers] == ["0", "1", "2"]  # a third has 48 bits
    with pytest.raises(UnsuitableModelError, match="48 bits together, and 100 are needed"):
        nnpassport.LORA.draw_key(adapted(48))


# Classes


@pytest.mark.parametrize(
    ("one", "other", "said"),
    [
        (("ant", "bee"), ("Ant ", "BEE"), None),
        (("dump_truck", "x"), ("dump truck", "X"), None),
        (("0", "1"), ("ant", "bee"), None),
        (("ant", "bee"), ("0", "1"), None),
        (("ant", "bee"), ("bee", "cat"), "other names: class 0 is 'ant' against 'bee'"),
        (("ant", "bee"), ("bee", "ant"), "the same names in another order"),
        (("0", "1", "10", "2"), ("0", "1", "2", "3"), None),
        (("0", "2", "1"), ("0", "1", "2"), "another order: class 1 is '2' against '1'"),
        (("ant",), ("ant", "bee"), "1 classes against 2"),
    ],
)
def test_names_that_both_sides_state_are_compared(one, other, said):
    found = other_classes(one, other)
    assert found is None if said is None else said in found


@pytest.fixture(scope="module")
def owned(tmp_path_factory):
    """A released network's folder, its key, and images that it knows."""
    rng = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (64, 1, 32, 32), generator=rng).to(torch.uint8)
    names = ("ant", "bee", "cat", "dog", "eel", "fox", "gnu", "hen", "ibis", "jay")
    data = ImageSet(pixels, torch.arange(64) % 10, names, "noise")
    model = small_alexnet()
    key = V2.draw_key(model, torch.zeros(2, 1, 32, 32), seed=bytes(32))
    released = marked_network(V2, model, key, data, NORMALISE)
    folder = tmp_path_factory.mktemp("owned")
    arguments = {"classes": 10, "norm": "batch", "width": 0.25, "channels": 1}
    config = ModelConfig("alexnet", arguments, names, (1, 32, 32), (0.5,), (0.5,))
    save_model(folder, released, config)
    return folder, key, data


def test_26_images_of_other_classes_test_no_fidelity(owned):
    folder, key, data = owned
    assert verify(folder, key, trial=Trial(data)).fidelity.passed
    moved = replace(data, classes=(*data.classes[1:], "kiwi"))
    with pytest.raises(UnreadableDataError, match=r"class 0 is 'bee' against 'ant'.*--like"):
        verify(folder, key, trial=Trial(moved))
    counted = replace(data, classes=tuple("0123456789"))
    assert verify(folder, key, trial=Trial(counted)).fidelity.passed


def test_26_a_target_that_guessing_meets_is_none(owned):
    folder, key, data = owned
    wrong = replace(data, labels=(data.labels + 1) % 10, classes=tuple("0123456789"))
    with pytest.raises(UnreadableDataError, match=r"target of \d.\d\d %: .*classes in 10.00 %"):
        verify(folder, key, trial=Trial(wrong))
    with pytest.raises(UnreadableDataError, match=r"target of 10.00 %"):
        verify(folder, key, trial=Trial(data, target=0.1))


def test_26_training_and_test_images_are_of_the_same_classes(owned):
    _, _, data = owned
    with pytest.raises(UnreadableDataError, match=r"test images are of other classes"):
        divide(data, replace(data, classes=data.classes[::-1]), validation=0.1, seed=0)


# Labels of every task

INDICES = torch.arange(8) % 10
SOFT = F.one_hot(INDICES, 10) * 0.7 + 0.03


def losses(labels, task=None, scheme=V2, model=None):
    """Loss and measures of one step."""
    model = small() if model is None else model
    key = key_for(model, scheme)
    normalise = NORMALISE if scheme is V3 else None
    marked = nnpassport.mark(model, key, EXAMPLE, task=task, normalise=normalise)
    loss = marked.loss(batch()[0], labels)
    loss.backward()
    return loss, marked.measures


def mixup(output, labels):
    one, other, share = labels
    return share * F.cross_entropy(output, one) + (1 - share) * F.cross_entropy(output, other)


MULTI = (torch.arange(80).view(8, 10) % 3 == 0).float()
TASKS = {
    "int32": (INDICES.int(), None),
    "soft": (SOFT, None),
    "soft, task": (SOFT, F.cross_entropy),
    "several": (MULTI, F.binary_cross_entropy_with_logits),
    "not reduced": (INDICES, functools.partial(F.cross_entropy, reduction="none")),
    "smoothed": (INDICES, functools.partial(F.cross_entropy, label_smoothing=0.1)),
    "mixed pairs": ((INDICES, INDICES.flip(0), 0.3), mixup),
}


@pytest.mark.parametrize("scheme", [nnpassport.V1, V2, V3], ids=lambda each: each.name)
@pytest.mark.parametrize("name", TASKS)
def test_33_measures_mean_something_for_every_task(name, scheme):
    labels, task = TASKS[name]
    loss, measures = losses(labels, task, scheme)
    assert torch.isfinite(loss)
    accuracies = [value for each, value in measures.items() if "accuracy" in each]
    assert len(accuracies) == (0 if task else 1 if scheme is nnpassport.V1 else 2)
    assert all(0 <= value <= 1 for value in accuracies)
    assert ("task_loss" in measures) == (task is not None)


def test_33_an_unreduced_loss_is_its_mean():
    torch.manual_seed(0)
    one, _ = losses(INDICES, F.cross_entropy)
    other, _ = losses(INDICES, functools.partial(F.cross_entropy, reduction="none"))
    torch.testing.assert_close(one, other)


ONE = torch.ones(8, 1)
WRONG = {
    "several classes": (MULTI, None, "are no shares"),
    "one score": (ONE, 1, "cross-entropy of one is always zero"),
    "one score, indices": (ONE[:, 0].long(), 1, "cross-entropy of one is always zero"),
    "out of range": (INDICES + 5, None, "from 5 to 12, and the network has scores for 10"),
    "numbers": (ONE[:, 0], None, "of float32, which are neither"),
    "a tuple": ((INDICES, INDICES, 0.5), None, "the labels are tuple"),
    "hot ones": (F.one_hot(INDICES, 10), None, "of int64, which are neither"),
}


@pytest.mark.parametrize("name", WRONG)
def test_33_labels_of_another_task_ask_for_one(name):
    labels, outputs, said = WRONG[name]
    model = small()
    if outputs is not None:
        model[-1] = nn.Linear(128, outputs)
    with pytest.raises(UnsuitableModelError, match=said) as refused:
        losses(labels, model=model)
    assert "pass task=" in str(refused.value)


def test_33_triggers_keep_their_class_among_soft_labels():
    """The step's loss is that of the images by their labels, and of the triggers by their own."""
    count, wanted = 2, torch.tensor([3, 4])
    torch.manual_seed(0)
    scores = torch.randn(8 + count, 10)
    for labels, task in ((SOFT, None), ((INDICES, INDICES.flip(0), 0.3), mixup)):
        joined = with_triggers(labels, 8, wanted)
        loss, _ = branch_loss(scores, joined, count, None, task)
        own = (task or F.cross_entropy)(scores[:8], labels)
        expected = (8 * own + count * F.cross_entropy(scores[8:], wanted)) / (8 + count)
        torch.testing.assert_close(loss, expected)
        last = rows(joined, 5, 10)
        assert last.images == 3
        assert torch.equal(last.triggers, wanted)


def test_33_dense_outputs_count_places_that_have_a_label():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 64, 3, padding=1, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.Conv2d(64, 64, 3, padding=1, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.Conv2d(64, 5, 1),
    )
    key = V2.draw_key(model, EXAMPLE, layers=["3"], seed=bytes(32))
    marked = nnpassport.mark(model, key, EXAMPLE)
    images, dense = batch()[0], torch.randint(0, 5, (8, 16, 16))
    dense[:, 4:] = -100
    loss = marked.loss(images, dense)
    assert torch.isfinite(loss)
    assert 0 < marked.measures["accuracy"] < 1
    with pytest.raises(UnsuitableModelError, match=r"from 0 to 255, and .*pass task="):
        marked.loss(images, dense.where(dense >= 0, 255))


# Loops and networks as people have them


class BatchNormAct2d(nn.BatchNorm2d):
    """A norm and its activation in one module, as timm has them."""

    def __init__(self, channels, act):
        super().__init__(channels)
        self.drop, self.act = nn.Identity(), act()

    def forward(self, x):
        return self.act(self.drop(super().forward(x)))


@pytest.mark.parametrize("act", [nn.ReLU, nn.Hardswish, nn.Identity])
@pytest.mark.parametrize("scheme", [nnpassport.V1, V2], ids=lambda each: each.name)
def test_37_a_norm_with_its_activation_carries_a_passport(scheme, act):
    model = small()
    for index in (1, 5):
        model[index], model[index + 1] = (
            BatchNormAct2d(model[index].num_features, act),
            nn.Identity(),
        )
    key = key_for(model, scheme)
    marked = nnpassport.mark(model, key, EXAMPLE)
    marked.graft(batch(64)[0])
    assert torch.isfinite(marked.loss(*batch()))
    released = marked.released().eval()
    torch.testing.assert_close(released(batch()[0]), model.eval()(batch()[0]))
    assert scheme.verify(released.state_dict(), key).accepted


def test_36_networks_of_timm_are_marked():
    try:
        import timm
    except (ImportError, AttributeError):  # the second where torchvision does not fit torch
        pytest.skip("timm is not installed")
    model = timm.create_model("efficientnet_lite0", num_classes=10)
    key = V2.draw_key(model, torch.zeros(2, 3, 64, 64), layers=["conv_head"], seed=bytes(32))
    marked = nnpassport.mark(model, key, torch.zeros(2, 3, 64, 64))
    assert torch.isfinite(marked.loss(torch.randn(4, 3, 64, 64), torch.arange(4)))


def ready():
    """A network whose mark is in, and its key."""
    model = small()
    key = key_for(model)
    marked = nnpassport.mark(model, key, EXAMPLE)
    marked.graft(batch(64)[0])
    return model, marked, key


def average(model):
    rate = torch.optim.swa_utils.get_ema_multi_avg_fn(0.8)
    return torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=rate, use_buffers=True)


@pytest.mark.parametrize("make", [average, torch.optim.swa_utils.AveragedModel])
def test_32_an_average_is_released_by_the_scheme_or_through_the_marked_network(make):
    model, marked, key = ready()
    averaged = make(model)
    for _ in range(2):
        marked.loss(*batch())
        averaged.update_parameters(model)
    x = batch()[0]
    by_scheme = V2.released(averaged.module).eval()
    model.load_state_dict(averaged.module.state_dict())
    through = marked.released().eval()
    torch.testing.assert_close(by_scheme(x), averaged.module.eval()(x))
    torch.testing.assert_close(through(x), by_scheme(x))
    for released in (by_scheme, through):
        assert V2.verify(released.state_dict(), key).accepted
        assert not [name for name in released.state_dict() if "passport" in name]


def test_31_accumulated_and_scaled_gradients_are_those_of_the_mean():
    """Of a network without batch norm, whose statistics would be another batch's."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3),
        nn.ReLU(),
        nn.Conv2d(16, 128, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(18432, 4),
    )
    key = V2.draw_key(model, EXAMPLE, layers=["2"], seed=bytes(32))
    marked = nnpassport.mark(model, key, EXAMPLE)
    images, labels = batch()[0], torch.arange(8) % 4
    marked.loss(images, labels).backward()
    whole = [each.grad.clone() for each in model.parameters()]
    model.zero_grad()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    scaler = torch.amp.GradScaler("cpu")
    for part in (slice(0, 4), slice(4, 8)):
        scaler.scale(marked.loss(images[part], labels[part]) / 2).backward()
    scaler.unscale_(optimizer)
    for each, expected in zip(model.parameters(), whole, strict=True):
        torch.testing.assert_close(each.grad, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_35_a_prepared_network_s_release_is_a_network_of_its_own(precision):
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)
    model, marked, key = ready()
    accelerator = Accelerator(cpu=True, mixed_precision=precision, gradient_accumulation_steps=2)
    prepared, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), 1e-5))
    for _ in range(2):
        with accelerator.accumulate(prepared):
            accelerator.backward(marked.loss(*batch(), model=prepared))
            optimizer.step()
            optimizer.zero_grad()
    released, x = marked.released().eval(), batch()[0]
    before = released(x)
    with torch.no_grad():
        for each in model.parameters():
            each.zero_()
    assert torch.equal(released(x), before)
    assert V2.verify(released.state_dict(), key).accepted
    AcceleratorState._reset_state(True)


def test_a_detector_s_backbone_is_grafted_alone(tmp_path):
    """What takes targets with its inputs is not marked whole; its file is verified as it is."""
    detector = nn.ModuleDict({"backbone": small()[:8], "head": nn.Linear(128, 4)})
    key = key_for(detector["backbone"])
    marked = nnpassport.mark(detector["backbone"], key, EXAMPLE)
    marked.graft(batch(64)[0])
    detector["backbone"] = marked.released()
    torch.save(detector.state_dict(), tmp_path / "detector.pt")
    found = verify(tmp_path / "detector.pt", key)
    assert (found.accepted, found.matches) == (True, 128)
    assert "those under 'backbone'" in found.reason
