"""One cell, run: a network trained, transferred or attacked, and what was measured."""

import dataclasses
import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from shutil import rmtree
from typing import Any, cast

import torch
from torch import Tensor, nn

from nnpassport.attacks.ambiguity import insider_passport
from nnpassport.attacks.forging import forge_triggers, forge_uchida, forge_uchida_by_gradient
from nnpassport.attacks.outcome import Forged, stopwatch
from nnpassport.attacks.passports import draw_seed, draw_template, forged
from nnpassport.attacks.removal import fine_tune, with_head
from nnpassport.attacks.subject import Subject
from nnpassport.catalog import CATALOG, scheme_named, with_settings
from nnpassport.data.images import ImageSet, Normalisation
from nnpassport.data.imageset import generator_for
from nnpassport.embedding import owner as ownership
from nnpassport.embedding.checkpoint import Loaded, load_model, save_model
from nnpassport.embedding.measured import verify_model
from nnpassport.embedding.schemes.drawn import shuffled_passports, with_passports
from nnpassport.embedding.schemes.passport import draw_by_layer
from nnpassport.embedding.schemes.protocol import Scheme
from nnpassport.embedding.train.fidelity import accuracy, measuring_on
from nnpassport.embedding.train.loop import Journal, Progress
from nnpassport.embedding.train.team import together
from nnpassport.files.config import ModelConfig
from nnpassport.files.disk import write_atomically
from nnpassport.keys.chance import LOG10_ALPHA_COMMITTED
from nnpassport.keys.key import Key
from nnpassport.keys.keyfile import load_key, save_key
from nnpassport.lab.audit.run import attempt, before_attacks, measured
from nnpassport.lab.cells import (
    Cell,
    attackers_of,
    embed_recipe,
    settings_of,
    transfer_recipe,
)
from nnpassport.lab.marks import facts_of, readings
from nnpassport.lab.speed import training_speed
from nnpassport.lab.stepcost import step_cost
from nnpassport.lab.store import Store
from nnpassport.lab.tasks import images_of, published_triggers
from nnpassport.report.provenance import device_name, provenance
from nnpassport.scheme import UnreadableModelError, Verdict

Show = Callable[[Progress], None]
_BEGUN = "begun.json"


def run(cell: Cell, store: Store, show: Show = lambda _: None) -> dict[str, Any]:
    """The cell's result: read if it was run, else run now, after what it needs.

    A training that was interrupted goes on from its last checkpoint.
    """
    kept = store.read(cell)
    if kept is not None:
        return kept
    for needed in cell.needs:
        if not store.ready(needed):
            _train(needed, store, show)
    begun = time.monotonic()
    works = {
        "train": _train,
        "transfer": _transfer,
        "cost": _cost,
        "strangers": _strangers,
    }
    with measuring_on(together().device):
        result = works.get(cell.work, _attack)(cell, store, show)
    kept = store.keep(cell, result, begun)
    rmtree(store.checkpoints(cell), ignore_errors=True)
    return kept


def _train(cell: Cell, store: Store, show: Show) -> dict[str, Any]:
    """Train the cell's network into its folder; what it reaches, and what it carries."""
    plan, network, folder = cell.plan, cell.network, store.folder(cell)
    sets, recipe = _sets(cell, store), embed_recipe(plan, network)
    _note_beginning(folder)
    journal = Journal(folder / "training", resume=True, show=show)
    config = ModelConfig(
        architecture=network.architecture,
        arguments={
            "classes": len(sets.train.classes),
            "norm": network.norm,
            **plan.architectures[network.architecture],
        },
        classes=sets.train.classes,
        input_size=(3, *sets.train.sample(1, seed=0).images.shape[2:]),
        mean=(0.5,) * 3,
        std=(0.5,) * 3,
    )
    initial = load_model(store.folder(cell.plain)).model.state_dict() if network.tuned else None
    key = _key(cell, store, config, sets) if network.scheme else None
    if key is None:
        done = ownership.train(folder, config, sets, recipe, initial=initial, journal=journal)
    else:
        scheme = _scheme(cell)
        done = ownership.embed(
            folder, config, key, sets, recipe, scheme=scheme, initial=initial, journal=journal
        )
        _release(folder, scheme, key)
    counts = {"train_images": len(sets.train), "test_images": len(sets.test or ())}
    result = {"metrics": dict(done.metrics), **counts}
    result |= training_speed(cell, folder, device_name())
    result["begun"] = json.loads((folder / _BEGUN).read_text())
    return result if key is None else {**result, "marks": _marks(_subject(cell, store))}


def _transfer(cell: Cell, store: Store, show: Show) -> dict[str, Any]:
    """Table 2, and Table 1: fine-tune to another task, and read the marks before and after.

    Keys that are forged are forged before the transfer. Triggers are asked with the original head.
    """
    subject, target = _subject(cell, store), images_of(store.data, cell.target)
    train = target.train.at_most(cell.plan.transfer_images, seed=cell.network.seed)
    recipe, normalise = transfer_recipe(cell), subject.normalise
    forgeries = _forgeries(cell, subject)
    journal = replace(subject.journal("transfer") or Journal(), show=show)
    tuned = fine_tune(
        subject.model, train, recipe, normalise=normalise, form="rtal", journal=journal
    ).model
    original_head = with_head(tuned, subject.model)
    return {
        "accuracy": accuracy(tuned, target.test, normalise),
        "source_accuracy": _source_accuracy(cell, store, subject),
        "train_images": len(train),
        "test_images": len(target.test),
        "marks_before": _marks(subject) | _read_all(forgeries, subject, subject.model),
        "marks": _marks(replace(subject, model=original_head))
        | _read_all(forgeries, subject, original_head),
    }


def _source_accuracy(cell: Cell, store: Store, subject: Subject) -> float:
    trained = store.read(cell.trains)
    if trained is not None:
        return float(trained["result"]["metrics"]["accuracy"])
    return accuracy(subject.model, subject.tested(), subject.normalise)


def _attack(cell: Cell, store: Store, show: Show) -> dict[str, Any]:
    """An attack of the audit's table, at each strength."""
    subject = _subject(cell, store)
    subject = replace(subject, test=subject.tested().at_most(cell.tested, seed=0))
    before, genuine = _unattacked(cell.trains, cell.tested, store)
    entries = [_attempt(cell, store, subject, strength, before) for strength in cell.strengths]
    return {
        "before": before,
        "entries": entries,
        "genuine": genuine,
        "train_images": len(subject.images()),
        "test_images": len(subject.tested()),
    }


@lru_cache(maxsize=2)
def _unattacked(
    trained: Cell, tested: int | None, store: Store
) -> tuple[Mapping[str, Any], float | None]:
    """What there is before any attack, the same for all of them: measured once a network."""
    subject = _subject(trained, store)
    subject = replace(subject, test=subject.tested().at_most(tested, seed=0))
    return before_attacks(subject), _genuine(subject)


def _attempt(
    cell: Cell, store: Store, subject: Subject, strength: float, before: Mapping[str, Any]
) -> dict[str, Any]:
    """The audit's own attack, but for two where the plan has another way."""
    if cell.work == "fake1" and cell.plan.passports != "derived":
        outcome = _redrawn(cell, store, subject, strength)
    elif cell.work == "fake3" and cell.plan.insider_rate is not None:
        outcome = _insider(subject, strength, cell.plan.insider_rate)
    else:
        return attempt(subject, cell.work, strength, before)
    return measured(subject, cell.work, strength, outcome, before)


def _redrawn(cell: Cell, store: Store, subject: Subject, number: float) -> Forged:
    """fake1 where the owner's passports are activations: others, drawn in the same way."""
    stop, rng = stopwatch("W"), subject.rng(f"redrawn {number}")
    template = draw_template(subject.scheme, subject.model, subject.example, rng)
    passports = _shuffled(template, cell, store, rng)
    return Forged(subject.model, forged(template, passports, subject.model.state_dict()), stop())


def _insider(subject: Subject, share: float, rate: float) -> Forged:
    """fake3 at a rate of the plan's."""
    return insider_passport(
        subject.model,
        subject.scheme,
        subject.owner_key(),
        subject.images(),
        subject.recipe(rate, "constant"),
        normalise=subject.normalise,
        rng=subject.rng(f"fake3 {share}"),
        share=share,
        journal=subject.journal(f"fake3 {share:g}"),
    )


def _genuine(subject: Subject) -> float | None:
    """Accuracy with the owner's own passports presented, on the same images."""
    if subject.key is None or not subject.key.context.layers:
        return None
    test, normalise = subject.tested(), subject.normalise
    return subject.scheme.fidelity(subject.model, subject.key, test, normalise)


def _sets(cell: Cell, store: Store) -> ownership.Sets:
    images = images_of(store.data, cell.network.task)
    seed, plan = cell.network.seed, cell.plan
    train = images.train.at_most(plan.train_images.get(cell.network.architecture), seed=0)
    if plan.selection == "best-on-test":
        return ownership.Sets(train, images.test, images.test, Normalisation.measured(train))
    sets = ownership.divide(train, images.test, validation=plan.validation, seed=seed)
    if not cell.network.tuned:
        return sets
    # Mean and deviation stay those of the network that it begins as.
    return replace(sets, train=cast(ImageSet, sets.train).at_most(plan.tuning_images, seed=seed))


def _scheme(cell: Cell) -> Scheme:
    scheme = scheme_named(cell.network.scheme)
    return with_settings(scheme, **settings_of(cell.plan, scheme.name))


def _key(cell: Cell, store: Store, config: ModelConfig, sets: ownership.Sets) -> Key:
    """The owner's key: that of the folder, or a new one as the plan wants it."""
    path = store.folder(cell) / "owner.key"
    if path.exists():
        return load_key(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    example = torch.zeros(1, *config.input_size)
    key = draw_by_layer(_scheme(cell), config.build(), example, owner="reproduction")
    if cell.network.tuned:
        key = _prepared(key, cell, store, cast(ImageSet, sets.train))
    if key.context.layers and cell.network.scheme.startswith("passport"):
        key = _with_plan_passports(key, cell, store)
    if _scheme(cell).triggers and cell.plan.triggers == "published":
        key = ownership.with_trigger_file(key, published_triggers(store.data))
    save_key(key, path)
    return key


def _prepared(key: Key, cell: Cell, store: Store, images: ImageSet) -> Key:
    """With the pictures that the scheme makes, in the plain network that this one begins as."""
    plain = load_model(store.folder(cell.plain))
    normalise = plain.normalise
    return _scheme(cell).prepared(key, plain.model.eval(), images, normalise)


def _cost(cell: Cell, store: Store, show: Show) -> dict[str, Any]:
    return step_cost(cell, store, _scheme(cell))


def _strangers(cell: Cell, store: Store, show: Show) -> dict[str, Any]:
    """The owner's key and fresh ones, read on networks that carry none of them.

    Fresh keys are drawn and prepared as the owner's was: pictures are made in the plain network.
    """
    folder, scheme = store.folder(cell), _scheme(cell)
    images = cast(ImageSet, _sets(cell, store).train)
    keys = [load_key(folder / "owner.key")]
    plain = load_model(store.folder(cell.plain)).config
    model, example = plain.build(), torch.zeros(1, *plain.input_size)
    rng = generator_for("fresh keys", cell.network.seed)
    for _ in range(cell.fresh_keys):
        drawn = draw_by_layer(scheme, model, example, owner="stranger", seed=draw_seed(rng))
        keys.append(_prepared(drawn, cell, store, images))
    readings = [
        {"network": other.network.slug, "key": "owner's" if number == 0 else f"fresh {number}"}
        | reading
        for other in cell.strangers
        for number, key in enumerate(keys)
        for reading in _read_by_stranger(load_model(_released(other, store)), scheme, key)
    ]
    return {"readings": readings}


def _read_by_stranger(loaded: Loaded, scheme: Scheme, key: Key) -> Iterator[dict[str, Any]]:
    """Every mark of the key, as it is read on a network that does not carry it.

    By the published rule with the key that the paper would have made, where that is another.
    """
    entry = CATALOG[scheme.name]
    read = by_paper = _read_all_marks(loaded, scheme, key)
    if entry.published_key is not None:
        by_paper = _read_all_marks(loaded, scheme, entry.published_key(key))
    for mark, verdict in read.items():
        published = scheme.verify_as_published(by_paper[mark])
        yield {
            "mark": mark,
            **facts_of(verdict),
            "published_matches": published.matches,
            "published_accepted": published.accepted,
        }


def _read_all_marks(loaded: Loaded, scheme: Scheme, key: Key) -> dict[str, Verdict]:
    normalise = loaded.normalise
    model, alpha = loaded.model.eval(), LOG10_ALPHA_COMMITTED
    ways = readings(scheme, key, model, normalise, log10_alpha=alpha)
    return {mark: read() for mark, read in ways.items()}


def _with_plan_passports(key: Key, cell: Cell, store: Store) -> Key:
    if cell.plan.passports == "derived":
        return key
    rng = generator_for("passports", cell.network.seed)
    return with_passports(key, _shuffled(key, cell, store, rng), rng)


def _shuffled(key: Key, cell: Cell, store: Store, rng: torch.Generator) -> dict[str, Tensor]:
    """Passports as in the paper: activations of 20 and 20 images in the plain network."""
    loaded = load_model(store.folder(cell.plain))
    task = images_of(store.data, cell.network.task)
    images = task.test if cell.plan.passports == "shuffle-test" else task.train
    picked = torch.randperm(len(images), generator=rng)[:40]
    inputs = loaded.normalise(images.images[picked])
    return shuffled_passports(
        loaded.model,
        [layer.name for layer in key.context.layers],
        inputs[:20],
        inputs[20:],
        rng,
        batch_statistics=cell.plan.passports == "shuffle-test",
    )


def _release(folder: Path, scheme: Scheme, key: Key) -> None:
    """The plain network that is published, whatever became of the mark: that is measured."""
    loaded = load_model(folder)
    scheme.insert(loaded.model, key, torch.zeros(2, *loaded.config.input_size))
    released = scheme.released(loaded.model)
    save_model(folder / "released", released, dataclasses.replace(loaded.config, notes={}))


def _released(cell: Cell, store: Store) -> Path:
    """The folder of the network that is published."""
    folder = store.folder(cell)
    return folder / "released" if cell.network.scheme else folder


def _subject(cell: Cell, store: Store) -> Subject:
    """The released network of this cell, for its attackers."""
    folder = store.folder(cell)
    loaded = load_model(_released(cell, store))
    images = images_of(store.data, cell.network.task)
    config, key = loaded.config, None
    if cell.network.scheme:
        key = load_key(folder / "owner.key")
        if key.context.scheme != cell.network.scheme:
            raise UnreadableModelError(f"{folder} holds a key of another scheme; remove the folder")
    return Subject(
        model=loaded.model.eval(),
        config=config,
        scheme=_scheme(cell) if key is not None else scheme_named("passport-v2"),
        normalise=Normalisation(config.mean, config.std),
        key=key,
        test=images.test,
        train=images.train.at_most(cell.plan.attack_images, seed=cell.network.seed),
        budget=attackers_of(cell),
        seed=cell.network.seed,
        checkpoints=store.checkpoints(cell),
    )


def _forgeries(cell: Cell, subject: Subject) -> dict[str, Key]:
    """Keys that somebody forged on the network: Table 1's for the baselines."""
    rng, example = subject.rng("forgery"), subject.example
    if cell.network.scheme == "adi":
        key = forge_triggers(
            subject.model, subject.scheme, example, rng, normalise=subject.normalise
        ).key
        return {"forged": key}
    if cell.network.scheme == "uchida":
        gradient = forge_uchida_by_gradient(subject.model, subject.scheme, example, rng)
        closed = forge_uchida(subject.model, subject.scheme, example, rng)
        return {"forged": gradient.key, "forged in closed form": closed.key}
    return {}


def _marks(subject: Subject) -> dict[str, Any]:
    """What V reads of the owner's mark: bits of the weights, answers to triggers."""
    if subject.key is None:
        return {}
    ways = readings(subject.scheme, subject.key, subject.model, subject.normalise)
    return {mark: facts_of(read()) for mark, read in ways.items()}


def _read_all(keys: Mapping[str, Key], subject: Subject, model: nn.Module) -> dict[str, Any]:
    read = {name: verify_model(model, subject.normalise, key) for name, key in keys.items()}
    return {name: facts_of(verdict) for name, verdict in read.items()}


def _note_beginning(folder: Path) -> None:
    """By what a network was begun: an interrupted run may be ended by another commit."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / _BEGUN).exists():
        write_atomically(folder / _BEGUN, (json.dumps(provenance()) + "\n").encode())
