"""One thread, CPU only, shapes checked at run time; the small things that several files share."""

import os
import sys

import jaxtyping

# Before the modules are imported: the hook rewrites them on their way in.
jaxtyping.install_import_hook(
    [
        "nnpassport.embedding.network.equations",
        "nnpassport.embedding.network.layers",
        "nnpassport.embedding.schemes",
    ],
    "beartype.beartype",
)
os.environ["ACCELERATE_USE_CPU"] = "true"

import pytest  # noqa: E402 - see above
import torch  # noqa: E402
from sklearn.datasets import load_digits  # noqa: E402
from torch.optim.optimizer import register_optimizer_step_post_hook  # noqa: E402

from nnpassport.cli import app as cli  # noqa: E402
from nnpassport.data.images import ImageSet, Normalisation  # noqa: E402
from nnpassport.embedding.network.equations import (  # noqa: E402
    filters,
    mean_patch,
    passport_space,
)
from nnpassport.embedding.network.surgery import Secret  # noqa: E402
from nnpassport.embedding.network.survey import choose, survey  # noqa: E402

torch.set_num_threads(1)

SHIFT = int(os.environ.get("NNPASSPORT_TEST_SHIFT", "0"))
"""Added to every seed that torch is given, for other luck in training: see `make portable`."""

if SHIFT:
    plain_generator, plain_seed = torch.Generator, torch.manual_seed

    class ShiftedGenerator(plain_generator):
        def manual_seed(self, seed):
            return super().manual_seed(seed + SHIFT)

    torch.Generator = ShiftedGenerator
    torch.manual_seed = lambda seed: plain_seed(seed + SHIFT)


def pytest_collection_modifyitems(config, items):
    """Slow tests, and those in a browser, run when they are asked for: -m slow, -m browser."""
    if not config.option.markexpr:
        for item in items:
            for name in ("slow", "browser"):
                if name in item.keywords:
                    item.add_marker(pytest.mark.skip(reason=f"{name}; run with -m {name}"))


MOST_STEPS = 80
"""A test that takes more steps of an optimiser trains a network, and is marked so."""

_steps = 0


def _count(*_):
    global _steps  # noqa: PLW0603 - hooks of all optimisers write one number
    _steps += 1


register_optimizer_step_post_hook(_count)


def _watched(marked, what):
    """Run what is left of a hook; fail if it trained and nothing says so."""
    before = _steps
    result = yield
    if not marked and _steps - before > MOST_STEPS:
        pytest.fail(
            f"{what} takes {_steps - before} steps of an optimiser: take a network from "
            "constructed.py, or mark the test `trains` and assert with a margin (CONTRIBUTING.md)"
        )
    return result


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem):
    return (yield from _watched("trains" in pyfuncitem.keywords, "this test"))


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef, request):
    """A fixture may train for tests that are all marked: a module's tests share it."""
    name, place = fixturedef.argname, fixturedef.baseid
    items = [i for i in request.session.items if i.nodeid.startswith(place)]
    items = [i for i in items if name in i.fixturenames]
    marked = all("trains" in item.keywords for item in items)
    return (yield from _watched(marked, f"the fixture {fixturedef.argname}"))


@pytest.fixture(scope="session")
def draw_secrets():
    """Random passports and signs for the layers that a network's patterns name."""

    def draw(model, example, patterns=None, *, seed=0):
        rng = torch.Generator().manual_seed(seed)
        secrets = {}
        for site in choose(model, survey(model, example), patterns):
            weight = filters(site.layer.weight, site.geometry)
            space = passport_space(site.space, tuple(weight.shape[2:]), site.geometry)
            inputs = weight.shape[1] * site.geometry.groups
            passport = torch.rand(2, inputs, *space, generator=rng) * 2 - 1
            signs = torch.randint(0, 2, (len(weight),), generator=rng) * 2.0 - 1
            patch = mean_patch(passport, tuple(weight.shape), site.geometry)
            secrets[site.name] = Secret(patch, signs)
        return secrets

    return draw


@pytest.fixture
def call(monkeypatch, capsys):
    """Run a command in this process; returns its exit code, stdout and stderr."""

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["nnpassport", *map(str, words)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        printed = capsys.readouterr()
        return exit_.value.code, printed.out, printed.err

    return run


@pytest.fixture(scope="session")
def digits():
    """Training set, test set and normalisation: handwritten digits of 16 by 16 grey pixels."""
    table = load_digits()
    pixels = torch.from_numpy(table.images / 16 * 255).round().to(torch.uint8)[:, None]
    labels = torch.from_numpy(table.target).long()
    data = ImageSet(pixels, labels, tuple("0123456789"), "digits").resized(16)
    train, rest = data.split(0.3, seed=0)
    return train, rest.subset(torch.arange(256)), Normalisation.measured(train)
