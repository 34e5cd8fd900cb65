"""What benchmarks do alike: AlexNet on CIFAR-10 under a short budget, in a folder; the commands."""

import argparse
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from nnpassport.catalog import scheme_named, with_settings
from nnpassport.data.images import read_images
from nnpassport.embedding import owner as ownership
from nnpassport.embedding.train.loop import RECIPES, Journal, Recipe
from nnpassport.files.config import ModelConfig
from nnpassport.files.disk import write_atomically
from nnpassport.keys.key import Key
from nnpassport.keys.keyfile import load_key, save_key

RESULTS = Path(__file__).parent.parent / "results"


def sets_in(data: Path, task: str = "cifar10", *, seed: int = 0) -> ownership.Sets:
    """95 % of the training images, the rest to choose checkpoints by, and all test images."""
    train = read_images(str(data / f"{task}-train-*.parquet"))
    test = read_images(data / f"{task}-test.parquet")
    return ownership.divide(train, test, validation=0.05, seed=seed)


def alexnet(classes: tuple[str, ...], norm: str) -> ModelConfig:
    """AlexNet for ten classes of 32 by 32 pixels."""
    return ModelConfig(
        architecture="alexnet",
        arguments={"classes": 10, "norm": norm},
        classes=classes,
        input_size=(3, 32, 32),
        mean=(0.5,) * 3,
        std=(0.5,) * 3,
    )


def short(epochs: int, seed: int, precision: str = "bfloat16") -> Recipe:
    """The short recipe, for so many epochs."""
    return replace(RECIPES["short"], epochs=epochs, seed=seed, precision=precision)


def key_in(folder: Path, config: ModelConfig, scheme: str) -> Key:
    """The owner's key in a run's folder; it is drawn if there is none, as in the paper's form."""
    path = folder / "owner.key"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        save_key(ownership.draw_key(config, scheme, owner="benchmark", passports="derived"), path)
    return load_key(path)


def trained(
    folder: Path,
    config: ModelConfig,
    sets: ownership.Sets,
    recipe: Recipe,
    *,
    scheme: str = "",
    settings: Mapping[str, Any] | None = None,
    initial: Any = None,
) -> tuple[Mapping[str, float], Key | None]:
    """Train a network in a folder, or go on where it stopped: its metrics, and the key it has.

    `scheme` "" is a plain network.
    """
    how = {"initial": initial, "journal": Journal(folder / "training", resume=True)}
    if not scheme:
        return dict(ownership.train(folder, config, sets, recipe, **how).metrics), None
    key = key_in(folder, config, scheme)
    chosen = with_settings(scheme_named(scheme), **(settings or {}))
    done = ownership.embed(folder, config, key, sets, recipe, scheme=chosen, **how)
    return dict(done.metrics), key


def command_line(
    doc: str,
    pages: Callable[[], Mapping[Path, str | bytes]],
    run: Callable[..., None] | None = None,
    options: Mapping[str, Mapping[str, Any]] | None = None,
) -> None:
    """`run` with these options, where there is something to run, and `render`; both write `pages`.

    Options are called as argparse's arguments are, and `run` gets each by its name.
    """
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("render")
    if run is not None:
        running = commands.add_parser("run")
        for name, how in (options or {}).items():
            running.add_argument(name, **how)
    given = vars(parser.parse_args())
    if given.pop("command") == "run" and run is not None:
        run(**given)
    for path, page in pages().items():
        write_atomically(path, page.encode() if isinstance(page, str) else page)
