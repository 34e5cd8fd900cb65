"""Architectures that the zoo does not have: small, untrained, moved for free, and read again.

Each is here for something that it does its own way: a norm whose weight is one off (Gemma), weight
norm and a norm for each channel (wav2vec 2), a response norm over pixels (ConvNeXt V2), attention
in one tensor, experts, positions in biases, two towers.
"""

from collections.abc import Mapping
from copy import deepcopy

import pytest
import torch
import transformers

from nnpassport import V2
from nnpassport.alignment.anchored import verify_anchored
from nnpassport.alignment.byaxes import anchor_of
from nnpassport.attacks.moves import move
from nnpassport.embedding.axes import axes_of
from nnpassport.embedding.schemes.channels import Limit
from nnpassport.embedding.schemes.graft import graft_channels
from nnpassport.keys.counts import Reading
from nnpassport.keys.reading import read_passports

WORDS = 128
SMALL = {
    "vocab_size": WORDS,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 40,
}
PATCHES = {
    "num_labels": 10,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 8,
}
BOTH_SIDES = {
    "vocab_size": WORDS,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}


def normal(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def words(count, length=16):
    rng = torch.Generator().manual_seed(1)
    return torch.randint(2, WORDS, (count, length), generator=rng)


def images(count):
    return {"pixel_values": normal(count, 3, 32, 32)}


def texts(count):
    return {"input_ids": words(count)}


def pairs(count):
    return {"input_ids": words(count), "decoder_input_ids": words(count, 8)}


def speech(count):
    return {"input_features": normal(count, 8, 32), "decoder_input_ids": words(count, 8)}


def sound(count):
    return {"input_values": normal(count, 200)}


def classifier(kind, **settings):
    return f"{kind}Config", f"{kind}ForImageClassification", {"num_labels": 10, **settings}, images


def decoder(kind, **settings):
    return f"{kind}Config", f"{kind}ForCausalLM", {**SMALL, **settings}, texts


def encoder(kind, **settings):
    return f"{kind}Config", f"{kind}ForMaskedLM", {**SMALL, **settings}, texts


NETWORKS = {
    "BART": ("BartConfig", "BartForConditionalGeneration",
             {**BOTH_SIDES, "max_position_embeddings": 40}, pairs),
    "BEiT": classifier("Beit", use_relative_position_bias=True, **PATCHES),
    "BLOOM": decoder("Bloom", n_layer=2, n_head=4),
    "ConvNeXt V2": classifier("ConvNextV2", hidden_sizes=[16, 32], depths=[1, 1], patch_size=2,
                              num_stages=2),
    "DeBERTa": encoder("DebertaV2", relative_attention=True, position_buckets=8,
                       pos_att_type=["p2c", "c2p"]),
    "FocalNet": classifier("FocalNet", image_size=32, patch_size=2, embed_dim=16, depths=[1, 1],
                           focal_levels=[2, 2], focal_windows=[3, 3]),
    "GPT-NeoX": decoder("GPTNeoX"),
    "Gemma": decoder("Gemma", num_key_value_heads=2, head_dim=8, pad_token_id=0),
    "LeViT": classifier("Levit", image_size=32, hidden_sizes=[16, 32, 48],
                        num_attention_heads=[2, 2, 2], depths=[1, 1, 1], key_dim=[8, 8, 8]),
    "Mamba": decoder("Mamba", state_size=8),
    "Mixtral": decoder("Mixtral", num_key_value_heads=2, num_local_experts=4,
                       num_experts_per_tok=2),
    "Phi": decoder("Phi"),
    "PoolFormer": classifier("PoolFormer", hidden_sizes=[16, 32], depths=[1, 1],
                             patch_sizes=[3, 3], strides=[2, 2], padding=[1, 1],
                             num_encoder_blocks=2),
    "Qwen3": decoder("Qwen3", num_key_value_heads=2, head_dim=8),
    "ResNet-50": classifier("ResNet", embedding_size=16, hidden_sizes=[32, 64], depths=[1, 2],
                            layer_type="bottleneck"),
    "T5": ("T5Config", "T5ForConditionalGeneration",
           {"vocab_size": WORDS, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2,
            "num_heads": 4}, pairs),
    "Whisper": ("WhisperConfig", "WhisperForConditionalGeneration",
                {**BOTH_SIDES, **SPECIAL, "num_mel_bins": 8, "max_source_positions": 16,
                 "max_target_positions": 16, "suppress_tokens": [], "begin_suppress_tokens": []},
                speech),
    "wav2vec 2": ("Wav2Vec2Config", "Wav2Vec2ForSequenceClassification",
                  {**SMALL, "conv_dim": [16, 16], "conv_kernel": [5, 3], "conv_stride": [2, 2],
                   "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 4,
                   "classifier_proj_size": 16, "num_labels": 5, "num_feat_extract_layers": 2,
                   "apply_spec_augment": False}, sound),
}  # fmt: skip
"""By name: its configuration, its class, what is set, and what it takes."""

MADE: Mapping[str, Mapping[str, int]] = {
    "ConvNeXt V2": {"reorder": 4},
    "Gemma": {"regain": 5, "rotate": 1},
    "wav2vec 2": {"negate": 1},
}
"""Moves that were not found, or not undone, before there were rules for these networks."""

QUICK = {"ConvNeXt V2", "Gemma", "wav2vec 2"}


@pytest.mark.parametrize(
    "name",
    [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in sorted(NETWORKS)],
)
def test_what_free_moves_hide_in_architectures_of_many_makes_is_read(name):
    config, made, settings, batch = NETWORKS[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(transformers, made)(getattr(transformers, config)(**settings)).eval()
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=draw))
    example, seen = batch(2), batch(48)
    key = V2.draw_key(model, example, seed=bytes(32), seen=seen)
    owned = deepcopy(model)
    V2.insert(owned, key, example)
    graft_channels(owned, seen, limit=Limit(1.0, 10.0))
    released = V2.released(owned).eval()

    moved = move(released, example, torch.Generator().manual_seed(1))
    assert moved.error < 1e-4
    made_ones = MADE.get(name, {})
    assert {kind: moved.done[kind] for kind in made_ones} == made_ones
    arrays = {n: t.detach().numpy() for n, t in model.state_dict().items()}
    suspect = {n: t.detach().numpy() for n, t in moved.model.state_dict().items()}
    anchor = anchor_of(axes_of(model, example), arrays, key)
    v = Reading.by(read_passports, key).through(lambda aligned: {**arrays, **aligned})
    assert v.verdict(verify_anchored(v, suspect, anchor)).matches >= 0.97 * key.context.bits
