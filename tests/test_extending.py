"""`docs/extending.md`: a scheme and an attack, each a file and a row, on the leaderboard."""

import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from nnpassport.attacks import table
from nnpassport.attacks.acts import ACTS
from nnpassport.attacks.table import REMOVAL, Attack, act
from nnpassport.catalog import CATALOG, Entry
from nnpassport.cli.app import app
from nnpassport.data.images import Normalisation
from nnpassport.embedding import measured
from nnpassport.embedding.checkpoint import load_model
from nnpassport.embedding.schemes.engine import Secret
from nnpassport.embedding.schemes.protocol import Scheme
from nnpassport.keys.chance import LOG10_ALPHA_COMMITTED
from nnpassport.keys.keyfile import load_key
from nnpassport.lab.cells import Cell, Network
from nnpassport.lab.leaderboard.field import NORM
from nnpassport.lab.leaderboard.standings import Outcome, standings
from nnpassport.lab.plans import FIELD_PLANS, LEADERBOARD_TRIAL
from nnpassport.lab.store import Store

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "extending.md").read_text()
EXAMPLES = ROOT / "examples" / "extending"
QUICK = replace(
    LEADERBOARD_TRIAL,
    embed=replace(LEADERBOARD_TRIAL.embed, epochs=1),
    tuning=replace(LEADERBOARD_TRIAL.tuning, epochs=4, batch=16),
    architectures={"alexnet": {"width": 0.125}},
    train_images={"alexnet": 256},
    tuning_images=256,
    settings={"median-filter": {"strength": 0.2}},
    fresh_keys=2,
)


def row_on_page(number):
    """A row of the page, as the dictionary that it is part of."""
    names = {"Entry": Entry, "Attack": Attack, "REMOVAL": REMOVAL, "act": act}
    names |= {"clip_weights": sys.modules["clip_weights"].clip_weights}
    block = re.findall(r"```python\n(.*?)```", PAGE, flags=re.S)[number]
    return eval(f"{{{block}}}", names)  # our own page


@pytest.fixture(scope="module", autouse=True)
def rows():
    """The rows of the page in the tables that it names, and back out."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        __import__("clip_weights")
        for number, rows in enumerate((CATALOG, table.ATTACKS, ACTS)):
            for name, entry in row_on_page(number).items():
                patch.setitem(rows, name, entry)
        patch.setitem(FIELD_PLANS, QUICK.name, QUICK)
        yield
    for name in ("median_filter", "clip_weights"):
        sys.modules.pop(name, None)


def test_the_example_is_a_scheme():
    assert isinstance(CATALOG["median-filter"].scheme, Scheme)


def test_the_example_is_short():
    assert len((EXAMPLES / "median_filter.py").read_text().splitlines()) < 90


def test_training_and_v_read_the_same_bits():
    torch.manual_seed(0)
    scheme = CATALOG["median-filter"].scheme
    model = torch.nn.Sequential(torch.nn.Conv2d(15, 6, 3), torch.nn.BatchNorm2d(6))
    key = scheme.draw_key(model, torch.zeros(1, 15, 5, 5), seed=bytes(32))
    (layer,) = key.context.layers
    secret = Secret(layer, key.layer_projection("0"), key.layer_signs("0"))
    read = scheme.signals(model[0].weight.detach(), secret).sign()
    assert scheme.verify(model.state_dict(), key).matches == int((read == secret.signs).sum())


@pytest.fixture(scope="module")
def run(tmp_path_factory, rows):
    """Both on the leaderboard of the trial, with trainings of a few steps: store and pages."""
    folder = tmp_path_factory.mktemp("board")
    words = ["leaderboard", "--recipe", QUICK.name, "--scheme", "median-filter"]
    words += ["--attack", "clip", "--attack", "forge-projection", "--json"]
    words += ["--results", str(folder / "results"), "--networks", str(folder / "networks")]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    store = Store(folder / "results", folder / "networks", None)
    return store, [Path(page) for page in json.loads(done.stdout)["pages"]]


@pytest.mark.slow
@pytest.mark.trains
def test_it_finds_its_key_and_no_other(run):
    scheme, (store, _) = CATALOG["median-filter"].scheme, run
    network = Network("alexnet", "digits", "median-filter", NORM, 0, tuned=True)
    folder = store.folder(Cell(QUICK, network))
    key, loaded = load_key(folder / "owner.key"), load_model(folder / "released")
    normalise = Normalisation(loaded.config.mean, loaded.config.std)
    model = loaded.model.eval()
    found = measured.verify_model(model, normalise, key, log10_alpha=LOG10_ALPHA_COMMITTED)
    assert found.accepted
    assert scheme.verify_as_published(found).accepted
    for number in (1, 2, 3):
        other = scheme.draw_key(model, torch.zeros(2, 3, 32, 32), seed=bytes([number] * 32))
        assert measured.verify_model(model, normalise, other).log10_p_value > -5


def test_clipping_clips_as_many_as_it_says():
    torch.manual_seed(0)
    model = torch.nn.Linear(100, 50)
    clipped = sys.modules["clip_weights"].clip_weights(model, share=0.1).model
    bound = clipped.weight.abs().max()
    changed = (clipped.weight != model.weight).sum()
    assert int(changed) == 500
    assert (model.weight.abs() > bound).sum() == changed
    assert torch.equal(clipped.bias, model.bias)


@pytest.mark.slow
@pytest.mark.trains
def test_both_are_on_the_leaderboard(run):
    store, pages = run
    (line,) = standings(QUICK, store)
    assert line.label == "median-filter, bits"
    assert line.mark.log10_p < -9
    assert line.removals["clip"].outcome in {Outcome.HELD, Outcome.SPOILT}
    assert line.strangers.exact == 0
    page = pages[0].read_text()
    assert "| median-filter, bits |" in page
    assert "| clip |" in page
