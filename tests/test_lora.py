"""Adapters of peft on real networks: marked while they are tuned, read from their file alone."""

import json
import runpy
import subprocess
import sys
import warnings
from copy import deepcopy
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    ViTConfig,
    ViTForImageClassification,
)

import nnpassport
from nnpassport import LORA
from nnpassport.claims.claim import Finding
from nnpassport.claims.standing import Standing
from nnpassport.embedding.network.tensors import ArraysOf, as_tensor, read_weights
from nnpassport.embedding.schemes.lora import Pair, adapted
from nnpassport.files.adapter import CONFIG_FILE, MAX_CONFIG_BYTES
from nnpassport.keys import adapters, reading
from nnpassport.keys.chance import LOG10_ALPHA_UNCOMMITTED
from nnpassport.keys.context import Context
from nnpassport.keys.key import Key
from nnpassport.keys.keyfile import load_key, save_key
from nnpassport.scheme import UnreadableModelError, UnsuitableModelError
from nnpassport.verification.verdicts import Options, verify


def added(weights, base, key):
    found = adapters.added(ArraysOf(weights), ArraysOf(base), key)
    return {name: as_tensor(array) for name, array in found.items()}


def base_digest(weights):
    return adapters.base_digest(ArraysOf(weights))


def pairs_in(weights, layers):
    found = reading.pairs_in(ArraysOf(weights), layers)
    return {name: Pair(*map(as_tensor, pair)) for name, pair in found.items()}


pytestmark = pytest.mark.filterwarnings(
    # peft asks transformers by its old name; nothing of ours does.
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)
TRAINED_ON = 1_300
RANK = 8


class Tuned(NamedTuple):
    base: nn.Module
    model: PeftModel
    key: Key
    folder: Path
    merged: Path


def pictures(*, turned):
    """Digits of 8 by 8 pixels, upright for the base's task, on their side for the adapter's."""
    table = load_digits()
    images = torch.tensor(table.images, dtype=torch.float32)[:, None] / 8 - 1
    images = images.rot90(1, (2, 3)) if turned else images
    labels = torch.tensor(table.target)
    return images[:TRAINED_ON], labels[:TRAINED_ON], images[TRAINED_ON:], labels[TRAINED_ON:]


def train(model, loss_of, *, turned, steps, rate):
    images, labels, _, _ = pictures(turned=turned)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    rng = torch.Generator().manual_seed(0)
    model.train()
    for _ in range(steps):
        index = torch.randint(len(images), (64,), generator=rng)
        loss = loss_of(images[index], labels[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()


def plain_loss_of(model):
    return lambda images, labels: F.cross_entropy(model(images).logits, labels)


@torch.no_grad()
def accuracy(model):
    _, _, images, labels = pictures(turned=True)
    return (model(images).logits.argmax(1) == labels).float().mean().item()


def adapter_on(base, *, seed=1, **settings):
    torch.manual_seed(seed)
    targets = ["q_proj", "v_proj", "fc1", "fc2"]
    config = LoraConfig(r=RANK, lora_alpha=16, target_modules=targets, **settings)
    return get_peft_model(deepcopy(base), config)


def transformer():
    """A small vision transformer for digits, as it is built."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    pixels = {"image_size": 8, "patch_size": 2, "num_channels": 1, "num_labels": 10}
    return ViTForImageClassification(ViTConfig(**sizes, **pixels, intermediate_size=128))


def saved(base, model, key, root):
    """The adapter in its folder, the base and both merged."""
    model.save_pretrained(root / "adapter")
    # Not save_pretrained: of this architecture transformers writes older names than it has.
    for name, network in (("base", base), ("merged", deepcopy(model).merge_and_unload())):
        (root / name).mkdir()
        save_file(network.state_dict(), root / name / "model.safetensors")
    save_key(key, root / "alice.key")
    return Tuned(base, model, key, root / "adapter", root / "merged")


@pytest.fixture(scope="module")
def base():
    return transformer().eval()


@pytest.fixture(scope="module")
def tuned(base, tmp_path_factory):
    """An adapter that reads as its key by construction: row i of B is ±A·x_i."""
    model = adapter_on(base)
    key = LORA.draw_key(model, layers=["*"], owner="Alice", seed=bytes(32))
    with torch.no_grad():
        for name, layer in adapted(model).items():
            a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            along = F.normalize(key.layer_projection(name) @ a.T, dim=1)
            b.copy_(0.1 * key.layer_signs(name)[:, None] * along)
    return saved(base, model, key, tmp_path_factory.mktemp("lora"))


@pytest.fixture(scope="module")
def learnt(tmp_path_factory):
    """A network that has learnt upright digits, and its marked adapter for those on their side."""
    base = transformer()
    train(base, plain_loss_of(base), turned=False, steps=200, rate=2e-3)
    model = adapter_on(base)
    key = LORA.draw_key(model, layers=["*"], owner="Alice", seed=bytes(32))
    marked = nnpassport.mark(model, key, pictures(turned=True)[0][:2])
    train(model, marked.loss, turned=True, steps=100, rate=5e-3)
    assert marked.measures["sign_match"] == 1
    return saved(base, model, key, tmp_path_factory.mktemp("learnt"))


def of(tuned, name):
    return tuned.folder.parent / name


def read(tuned, tensors):
    return LORA.verify(tensors, tuned.key)


def tensors_of(tuned):
    return read_weights(tuned.folder).tensors


def halves(tensors):
    """Names of A and of B of every pair."""
    return [(n, n.replace("lora_A", "lora_B")) for n in tensors if "lora_A" in n]


def refactored(tensors, change):
    changed = dict(tensors)
    for a, b in halves(tensors):
        changed[a], changed[b] = change(tensors[a], tensors[b])
    return changed


@pytest.mark.slow
@pytest.mark.trains
def test_every_bit_is_right_and_the_task_is_learnt_about_as_well(learnt):
    unmarked = adapter_on(learnt.base)
    train(unmarked, plain_loss_of(unmarked), turned=True, steps=100, rate=5e-3)
    found = verify(learnt.folder, learnt.key)
    assert found.matches == found.bits == 2 * (64 + 64 + 128 + 64)
    assert found.accepted
    assert found.log10_alpha == LOG10_ALPHA_UNCOMMITTED
    assert LORA.verify_as_published(found).accepted
    assert accuracy(learnt.base) < 0.3 < 0.7 < accuracy(learnt.model)
    assert accuracy(learnt.model) > accuracy(unmarked) - 0.06


def test_the_command_reads_the_adapter_s_folder_alone(tuned, call):
    code, out, _ = call("verify", tuned.folder, "--key", of(tuned, "alice.key"), "--json")
    facts = json.loads(out)
    assert (code, facts["matches"], facts["scheme"]) == (0, facts["bits"], "lora")
    assert set(facts["digests"]) == {"adapter_model.safetensors", "adapter_config.json"}
    code, _, _ = call("verify", tuned.folder / "adapter_model.safetensors", "--key",
                      of(tuned, "alice.key"))  # fmt: skip
    assert code == 0


def test_reading_an_adapter_takes_neither_peft_nor_transformers(tuned):
    script = (
        "import sys, nnpassport\n"
        "sys.modules['peft'] = sys.modules['transformers'] = None\n"
        "found = nnpassport.verify(sys.argv[1], nnpassport.load_key(sys.argv[2]))\n"
        "assert found.accepted, found.reason\n"
    )
    words = [sys.executable, "-c", script, str(tuned.folder), str(of(tuned, "alice.key"))]
    subprocess.run(words, check=True)


def test_the_command_reads_a_merged_network_against_its_base(tuned, call):
    words = ("verify", tuned.merged, "--key", of(tuned, "alice.key"))
    code, out, _ = call(*words, "--base", of(tuned, "base"), "--json")
    facts = json.loads(out)
    assert (code, facts["matches"]) == (0, facts["bits"])
    assert "base/model.safetensors" in facts["digests"]
    assert "older than the suspect is your word" in facts["reason"]
    code, out, _ = call(*words, "--json")  # without the base its weights are noise, no more
    assert code == 0
    assert 0.8 < json.loads(out)["match_rate"] < 1
    assert call("verify", of(tuned, "base"), "--key", of(tuned, "alice.key"))[0] == 1
    assert call(*words, "--base", of(tuned, "base"), "--align", tuned.merged)[0] == 2


def test_a_merged_network_under_names_of_another_make_could_not_be_checked(tuned, tmp_path, call):
    tuned.base.save_pretrained(tmp_path)
    words = ("verify", tmp_path, "--key", of(tuned, "alice.key"), "--base", of(tuned, "base"))
    code, _, err = call(*words)
    assert code == 2
    assert "vit.encoder.layer.0.attention.attention.query.weight" in " ".join(err.split())


def test_no_base_is_taken_but_the_key_s_own(tuned):
    """Or whoever has the suspect W would take W − b·X for W0, and read any bits off any network."""
    suspect = tuned.base.state_dict()
    names = [layer.name for layer in tuned.key.context.layers]
    fitted = {
        f"{n}.weight": suspect[f"{n}.weight"]
        - 1e-3 * tuned.key.layer_signs(n)[:, None] * tuned.key.layer_projection(n)
        for n in names
    }
    difference = {n: suspect[n] - each for n, each in fitted.items()}
    assert read(tuned, difference).accepted  # what would happen
    with pytest.raises(UnsuitableModelError, match="not the network that the key was drawn for"):
        added(suspect, fitted, tuned.key)
    with pytest.raises(UnsuitableModelError, match="an adapter's own file"):
        verify(tuned.folder, tuned.key, options=Options(base=of(tuned, "base")))


def test_a_base_loaded_in_another_precision_than_it_was_saved_in_is_still_it(tuned):
    weights = {"layer": tuned.base.classifier.weight.detach().bfloat16()}
    assert base_digest(weights) == base_digest({"layer": weights["layer"].float()})
    assert base_digest(weights) != base_digest({"layer": weights["layer"].float() + 1})


def test_an_adapter_that_was_tuned_without_the_mark_is_refused(tuned):
    other = adapter_on(tuned.base, seed=7)
    train(other, plain_loss_of(other), turned=True, steps=40, rate=5e-3)
    found = read(tuned, other.state_dict())
    assert not found.accepted
    assert found.log10_p_value > -5


def test_fresh_keys_match_one_low_rank_adapter_as_fair_coins_do(tuned):
    """Rows of rank 8 depend on one another; committed bits do not, and that is what counts."""
    tensors = tensors_of(tuned)
    layers = tuned.key.context.layers[:1]
    context = Context(LORA.name, "Bob", layers, None, tuned.key.context.nonce)
    seeds = [number.to_bytes(32, "big") for number in range(1, 401)]
    matches = torch.tensor([LORA.verify(tensors, Key(s, context)).matches for s in seeds]).double()
    bits = context.bits
    # Mean n/2 and variance n/4; over 400 keys their deviations are 0.2 and 7 % of the variance.
    assert abs(matches.mean() - bits / 2) < 4 * (bits / 4 / 400) ** 0.5
    assert 0.72 < matches.var() / (bits / 4) < 1.28


def test_a_fresh_key_is_refused(tuned):
    other = LORA.draw_key(tuned.model, layers=["*"])
    found = verify(tuned.folder, other)
    assert not found.accepted
    assert found.log10_p_value > -5


def test_other_factors_of_the_same_product_hold_the_same_bits(tuned):
    """A mark on one of the two factors is gone after this, at no cost; the adapter is the same."""
    rng = torch.Generator().manual_seed(3)

    def change(a, b):
        mixing = torch.randn(RANK, RANK, generator=rng, dtype=torch.float64)
        return torch.linalg.solve(mixing, a.double()), b.double() @ mixing

    before = tensors_of(tuned)
    after = refactored(before, change)
    found = read(tuned, after)
    assert found.matches == found.bits
    for name in (name for pair in halves(before) for name in pair):
        same = (before[name].sign() == after[name].sign()).double().mean()
        assert abs(same - 0.5) < 0.15  # no sign of a factor is where it was


def test_scale_that_moves_between_the_factors_and_alpha_changes_nothing(tuned):
    moved = refactored(tensors_of(tuned), lambda a, b: (a * 1e-3, b * 1e5))
    assert read(tuned, moved).matches == tuned.key.context.bits


def test_a_larger_rank_that_pads_the_pair_changes_nothing(tuned):
    def pad(a, b):
        extra = torch.randn(5, a.shape[1], generator=torch.Generator().manual_seed(0))
        return torch.cat([a, extra]), torch.cat([b, torch.zeros(len(b), 5)], 1)

    assert read(tuned, refactored(tensors_of(tuned), pad)).matches == tuned.key.context.bits


@pytest.mark.slow
@pytest.mark.trains
def test_no_singular_component_holds_the_mark(learnt):
    """One passport for all channels would be one component, and dropping it the end of the bits."""
    for dropped in range(RANK):

        def drop(a, b, dropped=dropped):
            u, s, v = torch.linalg.svd(b @ a, full_matrices=False)
            s[dropped] = 0
            return v[:RANK], u[:, :RANK] * s[:RANK]

        found = read(learnt, refactored(tensors_of(learnt), drop))
        assert found.accepted
        assert found.match_rate > 0.9


def test_a_layer_left_out_costs_its_bits_and_no_more(tuned):
    tensors = tensors_of(tuned)
    first = tuned.key.context.layers[0]
    fewer = {name: t for name, t in tensors.items() if f"{first.name}." not in name}
    found = read(tuned, fewer)
    assert found.layers[first.name] == (0, first.length)
    assert found.accepted
    assert found.matches == found.bits - first.length


@pytest.mark.slow
@pytest.mark.trains
@pytest.mark.parametrize("share", [0.3, 0.6])
def test_pruning_leaves_enough(learnt, share):
    def prune(a, b):
        for half in (a, b):
            half[half.abs() < half.abs().flatten().quantile(share)] = 0
        return a, b

    assert read(learnt, refactored(tensors_of(learnt), prune)).accepted


@pytest.mark.slow
@pytest.mark.trains
def test_tuning_on_without_the_mark_leaves_enough(learnt):
    model = deepcopy(learnt.model)
    train(model, plain_loss_of(model), turned=True, steps=40, rate=2e-3)
    found = read(learnt, model.state_dict())
    assert found.accepted
    assert found.match_rate > 0.9


def test_merging_in_half_precision_leaves_enough(tuned):
    halves = deepcopy(tuned.model).half()
    merged = halves.merge_and_unload().state_dict()
    found = read(tuned, added(merged, tuned.base.state_dict(), tuned.key))
    assert found.accepted
    assert found.match_rate > 0.95


def test_a_negative_alpha_does_not_hide_negated_factors(tuned, tmp_path):
    name = tuned.key.context.layers[0].name
    whole = json.loads((tuned.folder / CONFIG_FILE).read_text())
    negated = refactored(tensors_of(tuned), lambda a, b: (a, -b))
    only = refactored(tensors_of(tuned), lambda a, b: (a, b))
    only |= {n: -t for n, t in only.items() if f"{name}.lora_B" in n}
    for number, (tensors, config) in enumerate(
        [
            (negated, {**whole, "lora_alpha": -16}),
            (only, {**whole, "alpha_pattern": {name: -16}}),
            # In a regular expression a dot is any letter.
            (only, {**whole, "alpha_pattern": {name.replace("_", "."): -16}}),
        ]
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        save_file(tensors, folder / "adapter_model.safetensors")
        (folder / CONFIG_FILE).write_text(json.dumps(config))
        with warnings.catch_warnings():
            loaded = PeftModel.from_pretrained(deepcopy(tuned.base), folder).eval()
        assert abs(accuracy(loaded) - accuracy(tuned.model)) < 0.01  # the thief's adapter works
        found = verify(folder, tuned.key)
        assert found.matches == found.bits


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "LOHA"}, "peft_type is not LORA"),
        ({"lora_alpha": "16"}, "not a finite number"),
        ({"lora_alpha": True}, "not a finite number"),
        ({"alpha_pattern": [1]}, "not an object"),
        ({"alpha_pattern": {"(a+)+b": -1}}, "not a plain name"),
        ({"padding": "x" * MAX_CONFIG_BYTES}, "at most"),
    ],
)
def test_a_config_that_is_not_one_is_an_error_and_no_verdict(tuned, tmp_path, change, message):
    whole = json.loads((tuned.folder / CONFIG_FILE).read_text())
    save_file(tensors_of(tuned), tmp_path / "adapter_model.safetensors")
    (tmp_path / CONFIG_FILE).write_text(json.dumps({**whole, **change}))
    with pytest.raises(UnreadableModelError, match=message):
        verify(tmp_path, tuned.key)


def test_a_field_given_twice_or_not_a_number_is_refused(tuned, tmp_path):
    save_file(tensors_of(tuned), tmp_path / "adapter_model.safetensors")
    for text in (
        '{"peft_type":"LORA","lora_alpha":1,"lora_alpha":-1}',
        '{"peft_type":"LORA","lora_alpha":NaN}',
        '{"peft_type":"LORA","lora_alpha":1e999}',
        "[" * 100_000,
    ):
        (tmp_path / CONFIG_FILE).write_text(text)
        with pytest.raises(UnreadableModelError, match="not the config of a LoRA adapter"):
            verify(tmp_path, tuned.key)


def test_pairs_that_do_not_multiply_are_refused(tuned):
    a, b = "base_model.model.x.lora_A.weight", "base_model.model.x.lora_B.weight"
    for tensors in (
        {a: torch.zeros(2, 3)},
        {a: torch.zeros(2, 3), b: torch.zeros(4, 3)},
        {a: torch.zeros(()), b: torch.zeros(4, 3)},
        {a: torch.zeros(2), b: torch.zeros(4, 2)},
    ):
        with pytest.raises(UnsuitableModelError, match="is not A"):
            pairs_in(tensors, ["x"])
    twice = {a.replace("A.", f"A.{n}."): torch.zeros(2, 3) for n in "ij"}
    with pytest.raises(UnsuitableModelError, match="several adapters"):
        pairs_in(twice, ["x"])
    with pytest.raises(UnsuitableModelError, match="no pair on any layer"):
        LORA.verify({a: torch.zeros(2, 3), b: torch.zeros(4, 2)}, tuned.key)
    wide = refactored(tensors_of(tuned), lambda a, b: (a[:, :-1], b))
    with pytest.raises(UnsuitableModelError, match="numbers, and the key for"):
        LORA.verify(wide, tuned.key)


def test_gamma_is_the_product_with_each_channel_s_own_passport():
    a, b, rows = torch.randn(3, 7), torch.randn(5, 3), torch.randn(5, 7)
    delta = 2 * b @ a
    oracle = [sum(float(w * x) for w, x in zip(delta[i], rows[i], strict=True)) for i in range(5)]
    torch.testing.assert_close(Pair(a, b, 2.0).read(rows), torch.tensor(oracle))


def short_run(model, batch, key, steps=60):
    marked = nnpassport.mark(model, key, batch, task=lambda output, labels: output.loss)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    right = 0
    for _ in range(steps):
        loss = marked.loss(batch, batch["labels"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        right += marked.measures["sign_match"] == 1
        if right == 10:  # a bit that has just come right may turn again
            break
    return marked


def language_models():
    small = {"vocab_size": 50, "num_labels": 2}
    torch.manual_seed(0)
    bert = BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
                      intermediate_size=64, **small)  # fmt: skip
    gpt = GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=16, pad_token_id=0, **small)
    return {
        "bert": (BertForSequenceClassification(bert), {"target_modules": ["query", "value"]}),
        "gpt2": (
            GPT2ForSequenceClassification(gpt),
            {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True, "use_rslora": True},
        ),
        "dora": (
            BertForSequenceClassification(bert),
            {"target_modules": ["query", "value"], "use_dora": True},
        ),
    }


@pytest.mark.parametrize("name", ["bert", "gpt2", "dora"])
def test_language_models_keep_the_mark_in_their_adapter_and_merged(name, tmp_path):
    base, settings = language_models()[name]
    torch.manual_seed(0)
    model = get_peft_model(deepcopy(base), LoraConfig(r=4, **settings))
    tokens = torch.randint(1, 50, (8, 12))
    batch = {"input_ids": tokens, "labels": tokens[:, 0] % 2}
    key = LORA.draw_key(model, layers=["*"], seed=bytes(32))
    marked = short_run(model, batch, key)
    assert marked.measures["sign_match"] == 1
    marked.released().save_pretrained(tmp_path / "adapter")
    found = verify(tmp_path / "adapter", key)
    assert found.matches == found.bits == key.context.bits
    if name == "dora":  # a merged W is normalised, so W − W0 is another matrix than B·A
        return
    base.save_pretrained(tmp_path / "base")
    marked.released().merge_and_unload().save_pretrained(tmp_path / "merged")
    found = verify(tmp_path / "merged", key, options=Options(base=tmp_path / "base"))
    assert found.matches == found.bits


@pytest.mark.filterwarnings(
    "ignore:LoRA adapter added to ConvNd layer with groups"
)  # it is refused
def test_convolutions_can_be_adapted_and_grouped_ones_are_refused():
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(2, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2), nn.Flatten())
    model = get_peft_model(plain, LoraConfig(r=2, target_modules=["0", "2"]))
    with pytest.raises(UnsuitableModelError, match="grouped"):
        LORA.draw_key(model, layers=["2"])
    key = LORA.draw_key(model, layers=["0"], seed=bytes(32))
    assert [layer.weight for layer in key.context.layers] == [(8, 2, 3, 3)]
    layer = model.base_model.model[0]
    nn.init.normal_(layer.lora_B["default"].weight)
    pair = pairs_in(model.state_dict(), ["0"])["0"]
    delta = {"0.weight": layer.get_delta_weight("default")}
    whole = (delta["0.weight"].flatten(1).double() * key.layer_projection("0").double()).sum(1)
    gamma = Pair(pair.a.double(), pair.b.double()).read(key.layer_projection("0").double())
    assert torch.equal(whole.sign(), gamma.sign())
    assert LORA.verify(delta, key).matches == LORA.verify(model.state_dict(), key).matches


def test_a_key_is_drawn_for_one_positive_adapter_on_layers_it_has(base):
    with pytest.raises(UnsuitableModelError, match="carries no LoRA adapter"):
        LORA.draw_key(base)
    negative = adapter_on(base)
    key = LORA.draw_key(negative)
    for layer in adapted(negative).values():
        layer.scaling["default"] = -2.0
    with pytest.raises(UnsuitableModelError, match="α/r is -2"):
        LORA.insert(negative, key, torch.zeros(1))
    model = adapter_on(base)
    default = LORA.draw_key(model)
    names = [layer.name for layer in LORA.draw_key(model, layers=["*"]).context.layers]
    assert [layer.name for layer in default.context.layers] == names[-2:]  # a third of eight
    other = get_peft_model(deepcopy(base), LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(UnsuitableModelError, match="no adapter on"):
        nnpassport.mark(other, default, torch.zeros(1))
    elsewhere = adapter_on(base)
    with torch.no_grad():
        for parameter in elsewhere.parameters():
            parameter.add_(1e-3)
    with pytest.raises(UnsuitableModelError, match="not the network that the key was drawn for"):
        nnpassport.mark(elsewhere, default, torch.zeros(1))


def test_a_text_reads_back_from_the_adapter_and_the_key_survives_its_file(base, tmp_path):
    model = adapter_on(base)
    key = LORA.draw_key(model, text="(c) Alice", seed=bytes(32))
    save_key(key, tmp_path / "key")
    assert load_key(tmp_path / "key").fingerprint == key.fingerprint
    again = LORA.draw_key(model, text="(c) Alice", seed=bytes(32))
    assert again.fingerprint == key.fingerprint


def test_keys_of_other_schemes_are_refused(tuned, tmp_path):
    layers = tuple(layer._replace(bits=None) for layer in tuned.key.context.layers)
    other = Key(bytes(32), Context("passport-v2", "Bob", layers, None, bytes(16)))
    with pytest.raises(UnsuitableModelError, match="key is for passport-v2"):
        LORA.insert(tuned.model, other, torch.zeros(1))
    with pytest.raises(UnsuitableModelError, match="key is for passport-v2"):
        LORA.verify(tensors_of(tuned), other)
    assert not load_file(tuned.folder / "adapter_model.safetensors").keys() & {"passport", "signs"}


EXAMPLE = Path(__file__).parent.parent / "examples" / "mark_a_lora_adapter.py"


@pytest.mark.slow
@pytest.mark.trains
def test_the_example_runs_as_it_stands(capsys):
    with pytest.raises(SystemExit) as done:
        runpy.run_path(str(EXAMPLE), run_name="__main__")
    assert done.value.code == 0
    assert "640 of 640 adapter bits match" in capsys.readouterr().out


def test_the_example_runs_with_fewer_steps(capsys):
    """On a base that has learnt little; most of the bits are right by then."""
    fewer = EXAMPLE.read_text().replace("steps=200", "steps=2").replace("steps=150", "steps=40")
    with pytest.raises(SystemExit) as done:
        exec(compile(fewer, EXAMPLE, "exec"), {"__name__": "__main__"})  # our own file
    out = capsys.readouterr().out
    assert done.value.code == 0
    assert out.count("of 640 adapter bits match") == 2


@pytest.mark.parametrize("older", [True, False])
def test_under_a_claim_what_was_added_counts_only_if_the_claim_is_older(tuned, older):
    standing = Standing(Finding(True, "it holds"), -9.0, older, "its age")
    options = Options(base=of(tuned, "base"), standing=standing)
    found = verify(tuned.merged, tuned.key, options=options)
    assert found.matches == found.bits
    assert found.accepted is older
    assert ("counts only under a claim" in found.reason) is not older
