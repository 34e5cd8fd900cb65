"""The architectures: the paper's shapes, torchvision's names and numbers, clear refusals."""

import pytest
import torch
from torch import nn

from nnpassport.embedding.network.models import (
    ARCHITECTURES,
    alexnet,
    build,
    import_factory,
    resnet18,
    resnet50,
)
from nnpassport.embedding.network.models.norms import NORMS, scaled


def count(model):
    return sum(parameter.numel() for parameter in model.parameters())


def on_meta(factory, *arguments, **keywords):
    with torch.device("meta"):
        return factory(*arguments, **keywords)


@pytest.mark.parametrize(
    ("architecture", "norm"),
    [(each, norm) for each in ("alexnet", "resnet18") for norm in sorted(NORMS)]
    + [("resnet50", "group")],
)
def test_every_architecture_runs_and_learns_with_every_norm(architecture, norm):
    torch.manual_seed(0)
    model = build(architecture, classes=7, norm=norm, width=0.1)
    logits = model(torch.randn(2, 3, 32, 32))
    assert logits.shape == (2, 7)
    logits.sum().backward()
    missing = [name for name, each in model.named_parameters() if each.grad is None]
    assert not missing


@pytest.mark.parametrize(("factory", "published"), [(resnet18, 11_689_512), (resnet50, 25_557_032)])
def test_resnets_have_the_published_parameter_counts(factory, published):
    assert count(on_meta(factory, 1000, stem="imagenet")) == published


def test_alexnet_for_imagenet_without_norm_has_the_published_parameter_count():
    assert count(on_meta(alexnet, 1000, stem="imagenet", norm="none")) == 61_100_840


def test_imagenet_stems_take_224_pixels():
    images = torch.randn(1, 3, 224, 224)
    for architecture in ARCHITECTURES:
        model = build(architecture, classes=5, stem="imagenet", width=0.1).eval()
        with torch.no_grad():
            assert model(images).shape == (1, 5)


def test_resnet_names_are_those_of_torchvision():
    basic = dict(on_meta(resnet18, 1000, stem="imagenet").named_parameters())
    assert basic["conv1.weight"].shape == (64, 3, 7, 7)
    assert basic["layer2.0.downsample.0.weight"].shape == (128, 64, 1, 1)
    assert basic["layer2.0.downsample.1.bias"].shape == (128,)
    assert basic["fc.weight"].shape == (1000, 512)
    assert {name.split(".")[0] for name in basic} == {
        "conv1", "bn1", "layer1", "layer2", "layer3", "layer4", "fc",
    }  # fmt: skip
    deep = dict(on_meta(resnet50, 1000, stem="imagenet").named_parameters())
    assert deep["layer4.2.conv3.weight"].shape == (2048, 512, 1, 1)
    assert deep["layer4.2.bn3.weight"].shape == (2048,)
    assert deep["layer1.0.downsample.0.weight"].shape == (256, 64, 1, 1)
    buffers = {name.rsplit(".", 1)[1] for name, _ in resnet18(width=0.25).named_buffers()}
    assert buffers == {"running_mean", "running_var", "num_batches_tracked"}


def test_the_passport_layers_of_the_paper_are_where_it_says():
    model = on_meta(alexnet)
    hosts = [model.get_submodule(f"features.{index}") for index in (8, 11, 14)]
    assert [host.in_channels for host in hosts] == [192, 384, 256]
    assert sum(host.out_channels for host in hosts) == 896
    convolutions = [
        each for each in on_meta(resnet18).layer4.modules() if isinstance(each, nn.Conv2d)
    ]
    assert sum(each.out_channels for each in convolutions) == 2560


@pytest.mark.parametrize("stem", ["cifar", "imagenet"])
@pytest.mark.parametrize("norm", sorted(NORMS))
def test_alexnet_numbers_its_features_alike_for_every_norm_and_stem(norm, stem):
    features = on_meta(alexnet, norm=norm, stem=stem).features
    assert len(features) == 18
    for index in (0, 4, 8, 11, 14):
        assert isinstance(features[index], nn.Conv2d)
        assert isinstance(features[index + 1], type(NORMS[norm](16)))
        assert isinstance(features[index + 2], nn.ReLU)
        assert (features[index].bias is not None) == (norm == "none")
    assert all(isinstance(features[index], nn.MaxPool2d) for index in (3, 7, 17))


def test_groups_have_sixteen_channels_and_layer_norm_has_one_group():
    for factory in ARCHITECTURES.values():
        for norm, per_group in (
            ("group", lambda channels: 16),
            ("layer", lambda channels: channels),
        ):
            norms = [
                each
                for each in on_meta(factory, norm=norm).modules()
                if isinstance(each, nn.GroupNorm)
            ]
            assert len(norms) >= 5
            assert all(n.num_channels // n.num_groups == per_group(n.num_channels) for n in norms)


def test_no_norm_leaves_none_and_gives_every_convolution_a_bias():
    model = on_meta(resnet18, norm="none")
    kinds = {type(module) for module in model.modules()}
    assert not kinds & {nn.BatchNorm2d, nn.GroupNorm, nn.InstanceNorm2d}
    assert all(m.bias is not None for m in model.modules() if isinstance(m, nn.Conv2d))


@pytest.mark.parametrize("factory", [resnet18, resnet50])
def test_residual_variants_share_weights_and_differ_in_function(factory):
    torch.manual_seed(0)
    standard = factory(width=0.1).eval()
    early = factory(width=0.1, residual="relu-before-addition").eval()
    early.load_state_dict(standard.state_dict())
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert not torch.allclose(standard(images), early(images))
        block, x = early.layer2[0], torch.randn(1, early.layer2[0].conv1.in_channels, 8, 8)
        shortcut = block.downsample(x)
        assert shortcut.min() == 0
        inner = block.relu(block.bn1(block.conv1(x)))
        deep = isinstance(getattr(block, "conv3", None), nn.Conv2d)
        inner = block.bn2(block.conv2(inner))
        inner = block.bn3(block.conv3(inner.relu())) if deep else inner
        torch.testing.assert_close(block(x), inner.relu() + shortcut)


def test_a_standard_block_is_that_of_he_et_al():
    torch.manual_seed(0)
    block = resnet18(width=0.25).layer1[0].eval()
    x = torch.randn(2, 16, 8, 8)
    expected = (x + block.bn2(block.conv2(block.bn1(block.conv1(x)).relu()))).relu()
    torch.testing.assert_close(block(x), expected)


def test_width_scales_channels_in_whole_groups():
    assert [scaled(64, width) for width in (1.0, 0.25, 0.01, 0.4, 2)] == [64, 16, 16, 32, 128]
    model = on_meta(alexnet, width=0.5)
    widths = [model.features[index].out_channels for index in (0, 4, 8, 11, 14)]
    assert widths == [32, 96, 192, 128, 128]
    assert on_meta(resnet50, width=0.5).fc.in_features == 1024


def test_grey_images_need_one_channel():
    assert alexnet(channels=1, width=0.25)(torch.randn(1, 1, 32, 32)).shape == (1, 10)


def test_convolutions_start_at_kaiming_fan_out():
    torch.manual_seed(0)
    for factory in (alexnet, resnet18):
        for conv in (m for m in factory(width=0.5).modules() if isinstance(m, nn.Conv2d)):
            fan_out = conv.out_channels * conv.kernel_size[0] * conv.kernel_size[1]
            assert conv.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.1)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"architecture": "vgg"}, "there are: alexnet, resnet18, resnet50"),
        ({"architecture": ["alexnet"]}, "not in the table"),
        ({"architecture": "alexnet", "depth": 3}, "takes no argument 'depth'; it takes: classes"),
        ({"architecture": "alexnet", "residual": "standard"}, "takes no argument 'residual'"),
        ({"architecture": "resnet18", "norm": "bach"}, "norm is 'bach'; allowed values: batch"),
        ({"architecture": "resnet18", "norm": ["batch"]}, "allowed values"),
        ({"architecture": "resnet18", "stem": "mnist"}, "allowed values: cifar, imagenet"),
        ({"architecture": "resnet18", "residual": "pre"}, "allowed values: standard"),
        ({"architecture": "alexnet", "classes": 0}, "classes is 0"),
        ({"architecture": "alexnet", "classes": True}, "classes is True"),
        ({"architecture": "alexnet", "classes": 10.0}, "classes is 10.0"),
        ({"architecture": "alexnet", "classes": 10**9}, "needed: a whole number from 1 to"),
        ({"architecture": "alexnet", "channels": "3"}, "channels is '3'"),
        ({"architecture": "alexnet", "width": float("nan")}, "width is nan"),
        ({"architecture": "alexnet", "width": 1e9}, "width is 1000000000.0"),
        ({"architecture": "alexnet", "width": "wide"}, "width is 'wide'"),
    ],
)
def test_build_refuses_what_it_does_not_know(arguments, complaint):
    with pytest.raises(ValueError, match=complaint):
        build(**arguments)


def test_import_factory_finds_the_callers_own_code(tmp_path, monkeypatch):
    (tmp_path / "my_networks.py").write_text("from torch.nn import Linear\nbroken = 3\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert import_factory("my_networks:Linear") is nn.Linear
    for name, complaint in [
        ("my_networks", "needed: package.module:factory"),
        ("my_networks:", "needed: package.module:factory"),
        (".my_networks:Linear", "needed: package.module:factory"),
        ("no_such_networks:Linear", "cannot be imported"),
        ("my_networks:Convolution", "has no callable 'Convolution'"),
        ("my_networks:broken", "has no callable 'broken'"),
    ]:
        with pytest.raises(ValueError, match=complaint):
            import_factory(name)


def test_a_state_dict_says_everything_about_a_network():
    for factory in ARCHITECTURES.values():
        model = factory(width=0.1).eval()
        other = factory(width=0.1).eval()
        other.load_state_dict(model.state_dict())
        images = torch.randn(1, 3, 32, 32)
        with torch.no_grad():
            assert torch.equal(model(images), other(images))
