"""The page of the reproduction, on made-up results: which number lands where, what is left out."""

import dataclasses
import json
import re
import time
import xml.etree.ElementTree as ET
from pathlib import Path
from unittest import mock

import pytest
from matplotlib.figure import Figure

from nnpassport.lab.cells import Cell, Network
from nnpassport.lab.findings import Findings, Group, Sample
from nnpassport.lab.paper import figures, reported
from nnpassport.lab.paper.contents import PRUNED, cells_of
from nnpassport.lab.paper.document import document, render
from nnpassport.lab.plans import PLANS, TRIAL
from nnpassport.lab.store import Store
from nnpassport.scheme import UnreadableDataError

ROOT = Path(__file__).parent.parent
PLAN = dataclasses.replace(
    TRIAL,
    name="made-up",
    summary="numbers that nobody measured",
    tasks=("cifar10",),
    targets=("cifar10", "cifar100"),
    architectures={"alexnet": {}, "resnet18": {}},
    fakes=2,
)
V1 = Network("alexnet", "cifar10", "passport-v1", "batch", 0)
V2 = Network("alexnet", "cifar10", "passport-v2", "group", 0)
GN = V2._replace(scheme="")
# As the paper prints it: accuracy, or detection (accuracy).
TABLE2 = """
| alexnet cifar10 | 91.12 | 90.91 | 90.88 | 89.44 | 89.15 |
| alexnet cifar10 cifar100 | 65.53 | 100 (64.64) | 62.17 | 99.91 (59.31) | 99.96 (59.41) |
| alexnet cifar10 caltech101 | 76.33 | 73.03 | 73.28 | 70.87 | 71.37 |
| resnet18 cifar10 | 94.85 | 94.62 | 93.65 | 93.41 | 93.26 |
| resnet18 cifar10 cifar100 | 72.62 | 69.63 | 69.40 | 63.84 | 99.98 (63.61) |
| resnet18 cifar10 caltech101 | 78.98 | 72.13 | 75.08 | 71.07 | 99.99 (72.00) |
| alexnet cifar100 | 68.26 | 68.31 | 65.09 | 64.09 | 63.67 |
| alexnet cifar100 cifar10 | 89.46 | 89.07 | 88.30 | 87.47 | 87.46 |
| alexnet cifar100 caltech101 | 79.66 | 78.83 | 78.08 | 76.31 | 75.89 |
| resnet18 cifar100 | 76.25 | 75.52 | 72.06 | 72.15 | 72.10 |
| resnet18 cifar100 cifar10 | 93.22 | 95.28 | 91.83 | 90.94 | 91.30 |
| resnet18 cifar100 caltech101 | 82.88 | 99.99 (79.27) | 79.15 | 77.34 | 77.46 |
"""


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "results", tmp_path / "networks", None)


def mark(matches=896, bits=896, log10=-269.72):
    return {"bits": bits, "matches": matches, "log10_p_value": log10, "accepted": True}


def trained(accuracy, private=None, **marks):
    metrics = {"accuracy": accuracy} | ({} if private is None else {"private_accuracy": private})
    return {"metrics": metrics, "train_images": 47_500, "test_images": 10_000, "marks": marks}


def forged(accuracy, strength=None, *, log10=None, signature=True, accepted=False, **more):
    facts = {
        "accuracy": accuracy,
        "published_signature": signature,
        "published_fidelity": "not to be read: its tolerance is the audit's",
        "log10_p_value": log10,
        "accepted": accepted,
        "differs_from_owner": 0.25,
    }
    cost = {"had": "W, D", "seconds": 1.0, "samples": 0, "epochs": 0}
    return {"strength": strength, "accuracy": accuracy, "cost": cost, "forged": facts | more}


def attacked(*entries, own=0.80, genuine=0.79):
    before = {"accuracy": own, "owner": mark()}
    counts = {"train_images": 500, "test_images": 2_000}
    return {"before": before, "entries": list(entries), "genuine": genuine, **counts}


def page(store, plan=PLAN):
    """The page's text; pictures take most of the time, and have tests of their own."""
    with mock.patch.object(figures, "picture", return_value=b""):
        return document(store.results, [plan], {}).text


def section(text, heading, of=""):
    """What stands below a heading, or below a table's own title there."""
    below = text.split(f"\n### {heading}", 1)[1].split("\n### ", 1)[0].split("\n## ", 1)[0]
    return below.split(f"**{of}**", 1)[1].split("\n**", 1)[0] if of else below


def rows(text, heading, of):
    """A table's rows, each a list of fields."""
    lines = [line for line in section(text, heading, of).splitlines() if line.startswith("| ")]
    return [line.strip("| ").split(" | ") for line in lines[2:]]


def row(text, heading, of, *names):
    found = [each for each in rows(text, heading, of) if all(n in each[:8] for n in names)]
    assert len(found) == 1
    return found[0]


def test_table_2_has_mean_and_deviation_beside_the_reported_number(store):
    plan = PLAN.with_seeds((0, 1, 2))
    for seed, accuracy in enumerate((0.78, 0.79, 0.80)):
        bits = mark(matches=895, log10=-266.77) if seed == 0 else mark()
        found = trained(accuracy, accuracy - 0.01, bits=bits)
        store.keep(Cell(plan, V2._replace(seed=seed)), found, 0.0)
    for seed, accuracy in enumerate((0.80, 0.80, 0.81)):
        store.keep(Cell(plan, GN._replace(seed=seed)), trained(accuracy), 0.0)
    text = page(store, plan)
    assert row(text, "Table 2", "AlexNet, CIFAR-10", "V2 (GN)") == [
        *("V2 (GN)", "79.00 ± 1.00 (n=3)", "89.44", "78.00 ± 1.00 (n=3)"),
        *("1.33 ± 0.58 (n=3)", "1.44", "< 1.4: reached", "99.96 ± 0.06 (n=3)", "100"),
        *("−266.8", "–"),
    ]
    baseline = row(text, "Table 2", "AlexNet, CIFAR-10", "baseline GN")
    assert baseline[:3] == ["baseline GN", "80.33 ± 0.58 (n=3)", "90.88"]


def test_the_loss_is_to_the_baseline_of_the_same_norm_and_seed(store):
    store.keep(Cell(PLAN, V1), trained(0.82, bits=mark()), 0.0)
    store.keep(Cell(PLAN, V1._replace(scheme="", norm="batch", seed=1)), trained(0.9), 0.0)
    store.keep(Cell(PLAN, GN), trained(0.7), 0.0)
    found = row(page(store), "Table 2", "AlexNet, CIFAR-10", "V1 (BN)")
    assert found[1] == "82.00 (n=1)"
    assert found[4:7] == ["*not run*", "0.21", "≤ 0.21: *not run*"]


@pytest.mark.parametrize(
    ("network", "lost", "said"),
    [
        (V1, 0.0021, "≤ 0.21: reached"),
        (V1, 0.0022, "≤ 0.21: missed"),
        (V1, -0.01, "≤ 0.21: reached"),
        (V2, 0.0139, "< 1.4: reached"),
        (V2, 0.0142, "< 1.4: missed"),
    ],
)
def test_the_goal_is_the_papers_own_distance_or_less(store, network, lost, said):
    private = None if network == V1 else 0.8
    store.keep(Cell(PLAN, network), trained(0.84 - lost, private, bits=mark()), 0.0)
    store.keep(Cell(PLAN, network._replace(scheme="")), trained(0.84), 0.0)
    label = {V1: "V1 (BN)", V2: "V2 (GN)"}[network]
    assert row(page(store), "Table 2", "AlexNet, CIFAR-10", label)[6] == said


def test_transfers_have_their_own_table_and_v3_its_triggers(store):
    v3 = V2._replace(scheme="passport-v3")
    result = {"accuracy": 0.5, "source_accuracy": 0.8, "train_images": 7, "test_images": 9}
    marks = {"bits": mark(matches=448), "triggers": mark(matches=27, bits=100)}
    store.keep(Cell(PLAN, v3, "transfer", "cifar100"), result | {"marks": marks}, 0.0)
    found = row(page(store), "Table 2", "AlexNet, CIFAR-10 → CIFAR-100", "V3 (GN)")
    assert found[1:4] == ["50.00 (n=1)", "59.41", "–"]
    assert found[7:] == ["50.00 (n=1)", "99.96", "−269.7", "27.00 (n=1)"]


def test_table_1_has_real_and_forged_marks_after_and_before(store):
    adi = Network("alexnet", "cifar10", "adi", "batch", 0)
    real, fake = mark(90, 100, -80.0), mark(100, 100, None)
    result = {
        "accuracy": 0.6,
        "source_accuracy": 0.8,
        "train_images": 7,
        "test_images": 9,
        "marks_before": {"triggers": mark(100, 100), "forged": fake},
        "marks": {"triggers": real, "forged": mark(30, 100, None)},
    }
    store.keep(Cell(PLAN, adi, "transfer", "cifar100"), result, 0.0)
    text = page(store)
    assert row(text, "Table 1", "AlexNet, CIFAR-10", "Adi") == [
        *("Adi", "CIFAR-100", "60.00 (80.00), n=1", "65.20 (91.03)"),
        *("90.00 (100.00), n=1", "25.00 (100.00)", "−80.0", "optimised pictures"),
        *("30.00 (100.00), n=1", "27.80 (100.00)", "none"),
    ]
    uchida = row(text, "Table 1", "AlexNet, CIFAR-10", "Uchida", "closed form (ours)")
    assert [uchida[i] for i in (2, 4, 6, 8, 10)] == ["*not run*"] * 5


def test_a_plan_shows_what_is_missing_and_a_plan_without_results_is_not_there(store):
    store.keep(Cell(PLAN, V1), trained(0.8, bits=mark()), 0.0)
    text = document(store.results, [PLAN, TRIAL], {}).text
    assert "## Plan `made-up`" in text
    assert "`trial`" not in text
    missing = row(text, "Table 2", "AlexNet, CIFAR-10", "V2 (GN)")
    assert [missing[i] for i in (1, 3, 4, 7, 9)] == ["*not run*"] * 5
    wanted = len(cells_of(PLAN, ("table2",)))
    assert f"1 of {wanted} runs; trained with 47500 images and tested on 10000" in text
    assert "**ResNet-18, CIFAR-10**: *not run*, none of" in section(text, "Table 3")
    nothing = section(text, "Figure 5")
    assert "Plan `made-up`: 0 of" in nothing
    assert "![" not in nothing
    assert "**AlexNet, CIFAR-10 → CIFAR-100**: *not run*, none of 5 rows" in text


def test_results_of_other_inputs_are_not_shown(store):
    cell = Cell(PLAN, V1, "fake2", strengths=(0.0,))
    store.keep(Cell(PLAN, V1), trained(0.8, bits=mark()), 0.0)
    store.keep(cell, attacked(forged(0.777)), 0.0)
    assert "77.70 (n=1)" in page(store)
    changed = dataclasses.replace(PLAN, attack_images=100)
    assert "77.70" not in page(store, changed)
    assert "80.00 (n=1)" in page(store, changed)
    path = store.path(cell)
    path.write_text(path.read_text().replace('"attackers"', '"defenders"'))
    with pytest.raises(UnreadableDataError, match="inputs are others"):
        page(store)


def test_table_3_takes_the_papers_tolerance_of_the_network(store):
    resnet = V1._replace(architecture="resnet18")
    for network in (V1, resnet):
        for share, accuracy in ((0.1, 0.771), (0.5, 0.769), (1.0, 0.599)):
            cell = Cell(PLAN, network, "fake3", strengths=(share,))
            store.keep(cell, attacked(forged(accuracy, share), own=0.8), 0.0)
    text = page(store)

    def said(table):
        names = [f"fake3: {share} % of the bits flipped" for share in (10, 50, 100)]
        return [row(text, "Table 3", table, name, "V1 (BN)")[7] for name in names]

    assert said("AlexNet, CIFAR-10") == ["passes", "fails", "fails"]
    assert said("ResNet-18, CIFAR-10") == ["passes", "passes", "fails"]
    assert "F (ε = 3 points)" in section(text, "Table 3", "AlexNet, CIFAR-10")
    assert "F (ε = 20 points)" in section(text, "Table 3", "ResNet-18, CIFAR-10")


def test_table_3_says_what_each_verification_says(store):
    fakes = Cell(PLAN, V2, "fake1", strengths=(0.0, 1.0))
    entries = (forged(0.1, 0.0), forged(0.79, 1.0, signature=False))
    store.keep(fakes, attacked(*entries, own=0.8), 0.0)
    keys = Cell(PLAN, V2, "grind", strengths=(100.0, 1000.0))
    entries = (forged(0.1, 100.0, log10=-2.04, signature=False), forged(0.1, 1000.0, log10=-3.1))
    store.keep(keys, attacked(*entries), 0.0)
    impossible = {"strength": None, "impossible": "there is no batch norm"}
    store.keep(Cell(PLAN, V2, "hash-bound", strengths=(0.0,)), attacked(impossible), 0.0)
    text, where = page(store), ("Table 3", "AlexNet, CIFAR-10")
    assert row(text, *where, "fake1: random passports", "V2 (GN)") == [
        *("fake1: random passports", "V2 (GN)", "W, D", "80.00 (n=1)", "79.00 (n=1)"),
        *("44.50 ± 48.79 (n=2)", "10", "passes (1 of 2)", "fails, by a large margin"),
        *("25.0 ± 0.0 (n=2)", "accepted (1 of 2)", "refused (2 of 2): not derived"),
    ]
    ground = row(text, *where, "best of 100 honest keys (ours)", "V2 (GN)")
    assert ground[10:] == ["refused", "refused: log₁₀ p = −2.0"]
    bound = row(text, *where, "solved, bits bound to a hash (ours)", "V2 (GN)")
    assert set(bound[2:]) == {"impossible", "–"}
    assert "V2 (GN): there is no batch norm." in section(text, *where)


def test_a_key_that_the_exact_verification_accepts_is_not_hidden(store):
    keys = Cell(PLAN, V2, "grind", strengths=(100.0, 1000.0))
    entries = (forged(0.1, 100.0, log10=-40.0, accepted=True), forged(0.1, 1000.0, log10=-3.0))
    store.keep(keys, attacked(*entries), 0.0)
    found = row(
        page(store), "Table 3", "AlexNet, CIFAR-10", "best of 100 honest keys (ours)", "V2 (GN)"
    )
    assert found[11] == "accepted: log₁₀ p = −40.0"


def test_reported_numbers_are_those_of_the_paper():
    columns = ("baseline BN", "V1 (BN)", "baseline GN", "V2 (GN)", "V3 (GN)")
    known = 0
    for line in TABLE2.strip().splitlines():
        name, *fields = line.strip("| ").split(" | ")
        architecture, task, *target = name.split()
        for column, field in zip(columns, fields, strict=True):
            found = reported.TABLE2[architecture, task, "".join(target), column]
            numbers = [float(number) for number in re.findall(r"[\d.]+", field)]
            assert found == ((*numbers[1:], numbers[0]) if len(numbers) > 1 else (*numbers, 100))
            known += 1
    assert known == len(reported.TABLE2) == 60
    adi = reported.TABLE1["adi", "caltech101"]
    assert adi == ((75.06, 91.03), (43.60, 100), (46.80, 100))
    assert reported.TABLE1["uchida", "cifar100"].accuracy == (64.25, 90.97)
    assert reported.FIDELITY == {"alexnet": 3, "resnet18": 20}
    assert reported.FAKE2["resnet18", "cifar100"] == 35
    assert reported.TABLE4["V2"] == ((100, 125), 0, 182)


def painted(findings, name, network):
    """Lines of a panel: label, and x and y of its points."""
    axes = Figure().subplots()
    paint = figures.PANELS[name](findings, Group(*network[:4]))
    assert paint is not None
    paint(axes)
    return {line.get_label(): line.get_xydata().round(4).tolist() for line in axes.lines}


def test_figure_3_has_accuracy_and_bits_by_the_pruned_share(store):
    entries = [
        {"strength": share, "accuracy": 0.8 - share / 2, "owner": mark(matches=800)}
        for share in PRUNED
    ]
    store.keep(Cell(PLAN, V1, "prune", strengths=PRUNED), attacked(*entries), 0.0)
    lines = painted(Findings(PLAN, store.results), "fig3", V1)
    assert lines["accuracy"][:2] == [[0, 80], [10, 75]]
    assert lines["bits found"][-1] == [90, round(100 * 800 / 896, 4)]
    assert lines["paper, at 60 %: 5 to 25 points lost"] == [[60, 55], [60, 75]]
    assert figures.PANELS["fig3"](Findings(PLAN, store.results), Group(*V2[:4])) is None


def test_figure_5_has_means_over_seeds_and_the_reported_losses(store):
    plan = PLAN.with_seeds((0, 1))
    for seed, accuracy in ((0, 0.70), (1, 0.72)):
        cell = Cell(plan, V1._replace(seed=seed), "fake3", strengths=(0.1,))
        store.keep(cell, attacked(forged(accuracy, 0.1), own=0.8), 0.0)
    lines = painted(Findings(plan, store.results), "fig5", V1)
    assert lines["fake3"] == [[10, 71]]
    assert lines["paper, CIFAR-100: 5 and 50 points lost"] == [[10, 75], [50, 30]]


def test_figures_are_files_that_the_page_shows_and_say_what_was_not_run(store, tmp_path):
    store.keep(Cell(PLAN, GN), trained(0.8), 0.0)
    store.keep(Cell(PLAN, V2), trained(0.79, 0.78, bits=mark()), 0.0)
    cell = Cell(PLAN, V2, "fake1", strengths=(0.0, 1.0))
    store.keep(cell, attacked(forged(0.1, 0.0), forged(0.12, 1.0)), 0.0)
    out = tmp_path / "docs" / "reproduction.md"
    done = render(store.results, [PLAN], out)
    assert set(done.pictures) == {"figures/made-up-fig2.svg", "figures/made-up-fig4.svg"}
    for name in re.findall(r"\]\((figures/[^)]+)\)", out.read_text()):
        assert (out.parent / name).stat().st_size < 100_000
    picture = ET.parse(out.parent / "figures/made-up-fig4.svg")
    words = ["".join(element.itertext()) for element in picture.iter() if "text" in element.tag]
    assert {"mean 11.0, n=2", "78.0, n=1", "not run"} <= {word.strip() for word in words}
    assert document(store.results, [PLAN], {}) == done


def test_notes_stand_below_what_they_name(store, tmp_path):
    store.keep(Cell(PLAN, V1), trained(0.8, bits=mark()), 0.0)
    out, notes = tmp_path / "page.md", tmp_path / "reproduction-notes.md"
    notes.write_text(
        "for writers\n\n## table2\n\nWhy it is less.\n\n## fig3 (made-up)\n\nOnly here.\n\n"
        "## fig3 (other)\n\nNever.\n\n## table3\n"
    )
    text = render(store.results, [PLAN], out).text
    assert "Why it is less." in section(text, "Table 2")
    assert "Only here." in section(text, "Figure 3")
    assert "Never." not in text
    assert "for writers" not in text
    notes.write_text("## tabel2\n\nlost\n")
    with pytest.raises(UnreadableDataError, match="tabel2"):
        render(store.results, [PLAN], out)


def test_seeds_that_were_run_are_shown_though_the_plan_names_fewer(store):
    for seed, accuracy in ((0, 0.8), (7, 0.82)):
        store.keep(Cell(PLAN, GN._replace(seed=seed)), trained(accuracy), 0.0)
    text = page(store)
    assert "81.00 ± 1.41 (n=2)" in text
    assert "- Seeds: 0, 7" in text


def test_below_a_table_stands_how_it_was_made(store):
    begun = {
        "commit": "abcdef0123",
        "device": "Old",
        "threads": 1,
        "torch": "2.9",
        "date": "2026-01-02",
    }
    result = trained(0.8) | {"begun": begun, "images_per_second": 100.0}
    now = time.monotonic()
    store.keep(Cell(PLAN, GN), result, now)
    made = json.loads(store.path(Cell(PLAN, GN)).read_text())["provenance"]
    text = section(page(store), "Table 2")
    facts = ("Plan `made-up`, 12 epochs", "abcdef0", made["torch"], "2.9", "Old (1 thread)")
    for fact in facts:
        assert fact in text
    # 12 epochs of 47,500 images at 100 a second: the file has the last sitting's seconds only.
    assert "wall time 1 h 35 min" in text


def test_a_sample_of_one_has_no_deviation():
    assert Sample((91.0,)).said() == "91.00 (n=1)"
    assert Sample((1.0, 2.0, 4.0)).said() == "2.33 ± 1.53 (n=3)"
    assert Sample((-0.001,)).said() == "0.00 (n=1)"
    assert Sample((-1.5,)).said(1) == "−1.5 (n=1)"
    assert Sample(()).said() == "*not run*"


def test_the_page_of_this_repository_is_what_its_results_give(tmp_path):
    results, kept = ROOT / "results" / "reproduction", ROOT / "docs" / "reproduction.md"
    assert results.exists() == kept.exists()
    if not results.exists():
        pytest.skip("there are no results yet")
    out, notes = tmp_path / "reproduction.md", ROOT / "docs" / "reproduction-notes.md"
    done = render(results, PLANS.values(), out, notes=notes)
    assert out.read_text() == kept.read_text(), "render it again: results or rendering changed"
    assert all((kept.parent / name).exists() for name in done.pictures)
