"""Options that several commands share, and what they ask for: keys, images, configs, recipes."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, final

import typer

from nnpassport.cli.terminal import errors, progress_bar

_NAMED = 10  # classes and pictures that are named, at most

AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
KeyFile = Annotated[Path, typer.Option("--key", help="Secret key file, from `key new`.")]
Out = Annotated[Path, typer.Option("--out", "-o", help="File or folder to write.")]
Passphrase = Annotated[
    bool,
    typer.Option(help="Ask for the key's passphrase ($NNPASSPORT_PASSPHRASE is used if set)."),
]
Factory = Annotated[
    str | None,
    typer.Option(help="Your own architecture, package.module:factory; its code will be run."),
]
Images = Annotated[
    str,
    typer.Option(
        "--data",
        help="Images: 'digits'; a Parquet, Arrow, WebDataset or CSV file, a pattern, a folder "
        "of such files or of one folder per class; CIFAR's own files; .npz; "
        "hub:owner/name; or factory:package.module:function, your own code, which "
        "returns a PyTorch data set.",
    ),
]
OptionalImages = Annotated[
    str | None,
    typer.Option("--data", help="Images on which to measure accuracy, for the fidelity test F."),
]
ImageColumn = Annotated[
    str | None,
    typer.Option(help="Column of the pictures, if its name is not a usual one (image, img …)."),
]
LabelColumn = Annotated[
    str | None,
    typer.Option(help="Column of the classes, if its name is not a usual one (label, class …)."),
]
SkipCorrupt = Annotated[
    bool,
    typer.Option("--skip-corrupt", help="Leave out pictures that cannot be read, and name them."),
]
Split = Annotated[str | None, typer.Option(help="Split of --data (digits, folders, hub names).")]
Architecture = Annotated[
    str,
    typer.Option("--model", help="Architecture: alexnet, resnet18, resnet50, or a model folder."),
]
Norm = Annotated[str, typer.Option(help="Normalisation: batch, group, layer or none.")]
Arguments = Annotated[
    list[str] | None,
    typer.Option("--set", help="Another argument of the architecture, as name=value; repeatable."),
]
Size = Annotated[int, typer.Option(help="Side of the network's input, in pixels.")]
Channels = Annotated[int, typer.Option(help="Colour channels of the network's input.")]
RecipeName = Annotated[
    str | None,
    typer.Option(
        "--recipe",
        help="Training recipe: short, paper or tune (default: short; with --init: tune).",
    ),
]
Epochs = Annotated[int | None, typer.Option(help="Passes over the images (default: the recipe's).")]
BatchSize = Annotated[
    int | None, typer.Option("--batch", help="Images in a step (default: the recipe's).")
]
Rate = Annotated[float | None, typer.Option(help="Highest learning rate (default: the recipe's).")]
Precision = Annotated[
    str, typer.Option(help="float32, or bfloat16 or tf32 if the hardware has it.")
]
Compile = Annotated[bool, typer.Option("--compile", help="Use torch.compile.")]
Seed = Annotated[
    int, typer.Option(help="Seed of initial weights, order of images and augmentation.")
]
Held = Annotated[
    float, typer.Option(help="Share of --data that is held out, to choose checkpoints.")
]
Test = Annotated[str | None, typer.Option(help="Test images; used for the report only.")]
TestSplit = Annotated[str | None, typer.Option(help="Split of --test.")]
Stream = Annotated[
    bool,
    typer.Option(
        "--stream",
        help="Read Parquet shards as they are needed, instead of loading all into memory.",
    ),
]
Resume = Annotated[bool, typer.Option("--resume", help="Continue an interrupted run.")]
Tensorboard = Annotated[bool, typer.Option("--tensorboard", help="Also write TensorBoard events.")]
DiaryFolder = Annotated[
    Path | None,
    typer.Option(
        "--diary", help="Keep a diary of this training in this folder; `diary new` begins one."
    ),
]
DiarySigning = Annotated[
    Path | None,
    typer.Option("--diary-signing", help="The secret signing key with which the diary was begun."),
]
DiarySteps = Annotated[
    int | None,
    typer.Option(
        "--diary-steps", help="Steps between the diary's entries (default: one entry an hour)."
    ),
]
DiaryKeep = Annotated[
    int,
    typer.Option(
        "--diary-keep",
        help="Keep the checkpoint of every Nth entry, for `diary replay`; 0 keeps none.",
    ),
]
Initial = Annotated[Path | None, typer.Option("--init", help="Start from this model folder.")]
Public = Annotated[
    list[Path] | None,
    typer.Option(
        help="A network that others have too, such as the base you started from; repeatable. "
        "The network before the mark must not be one of them."
    ),
]
Setting = Annotated[
    list[str] | None,
    typer.Option(
        "--setting",
        help="Parameter of the scheme, such as user=3 (deepmarks), strength=0.05 or "
        "kind=mirrored (answers); repeatable.",
    ),
]
Flip = Annotated[
    bool, typer.Option("--augment/--no-augment", help="Random crops and horizontal flips.")
]
Best = Annotated[
    bool, typer.Option("--keep-best", help="Keep the epoch that scores best on held-out images.")
]


Report = Annotated[
    Path | None, typer.Option(help="Also write the result as one self-contained HTML page.")
]

MADE = "factory:"
"""Before the name of a function of the caller's own that gives images."""


@final
@dataclass(frozen=True, slots=True)
class Reading:
    """How images are read, where that is not as usual."""

    image_column: ImageColumn = None
    label_column: LabelColumn = None
    skip_corrupt: SkipCorrupt = False


AS_USUAL = Reading()


@final
@dataclass(frozen=True, slots=True)
class Network:
    """The shape of a network: an architecture and its input, or a model folder."""

    architecture: Architecture = "alexnet"
    norm: Norm = "group"
    arguments: Arguments = None
    size: Size = 32
    channels: Channels = 3

    def config(self, factory: str | None, classes: int | None = None) -> Any:
        """The config of the model folder, or of the architecture with these arguments.

        Raises:
            typer.BadParameter: an argument is no name=value.
        """
        from nnpassport.files.config import ModelConfig, read_config

        if Path(self.architecture).is_dir():
            return read_config(Path(self.architecture))
        given: dict[str, Any] = {"norm": self.norm} if factory is None else {}
        for pair in self.arguments or []:
            name, equals, value = pair.partition("=")
            if not equals:
                raise typer.BadParameter(
                    f"--set {pair!r} is no name=value, such as --set width=0.5"
                )
            given[name] = _value(value)
        count = 10 if classes is None else classes
        if factory is None:
            given |= {"classes": count, "channels": self.channels}
        return ModelConfig(
            architecture=factory or self.architecture,
            arguments=given,
            classes=tuple(map(str, range(count))),
            input_size=(self.channels, self.size, self.size),
            mean=(0.5,) * self.channels,
            std=(0.5,) * self.channels,
        )


@final
@dataclass(frozen=True, slots=True)
class Sets:
    """Which images beside those of --data there are, and how all are read."""

    split: Split = None
    test: Test = None
    test_split: TestSplit = None
    reading: Reading = AS_USUAL
    stream: Stream = False

    def divided(self, data: str, base: "Base", run: "Run") -> Any:
        """Training, held-out and test images, read with a bar on stderr, or to be streamed."""
        from nnpassport.embedding import owner as ownership

        opened = stream_from if self.stream else images_from
        images = opened(data, self.split, base.config, self.reading)
        tested = None
        if self.test is not None:
            tested = opened(self.test, self.test_split, base.config, self.reading)
        return ownership.divide(images, tested, validation=run.validation, seed=run.seed)


@final
@dataclass(frozen=True, slots=True)
class Run:
    """How a training goes, and what it begins with."""

    recipe: RecipeName = None
    epochs: Epochs = None
    batch: BatchSize = None
    rate: Rate = None
    precision: Precision = "float32"
    compiled: Compile = False
    augment: Flip = True
    keep_best: Best = False
    seed: Seed = 0
    validation: Held = 0.05
    init: Initial = None
    factory: Factory = None
    resume: Resume = False
    tensorboard: Tensorboard = False
    diary: DiaryFolder = None
    diary_signing: DiarySigning = None
    diary_steps: DiarySteps = None
    diary_keep: DiaryKeep = 24

    @property
    def chosen(self) -> Any:
        """The recipe of this name, with what was given in place of its own; None is the usual one.

        Raises:
            typer.BadParameter: there is no such recipe, or nothing would be trained.
        """
        from nnpassport.embedding.train.loop import RECIPES

        name = self.recipe or ("short" if self.init is None else "tune")
        if name not in RECIPES:
            there = ", ".join(RECIPES)
            raise typer.BadParameter(f"--recipe {name!r} is unknown; there are: {there}")
        if self.epochs == 0 and self.init is None:
            raise typer.BadParameter(
                "--epochs 0 trains nothing; it needs a trained network, --init"
            )
        given: dict[str, Any] = {"epochs": self.epochs, "batch": self.batch, "rate": self.rate}
        return replace(
            RECIPES[name],
            **{field: value for field, value in given.items() if value is not None},
            precision=self.precision,
            compile=self.compiled,
            augment=self.augment,
            keep_best=self.keep_best,
            seed=self.seed,
        )

    def base(self, network: Network) -> "Base":
        """The network to start from: a model folder's (--init), or a new one of this shape."""
        from nnpassport.embedding.checkpoint import load_model

        if self.init is None:
            return Base(network.config(self.factory), None)
        loaded = load_model(self.init, trusted_factory=self.factory)
        return Base(loaded.config, loaded.model.state_dict())

    @contextmanager
    def journal(self, out: Path) -> Iterator[Any]:
        """The journal of a run, in `out`/training, with a bar on stderr while it is open."""
        from nnpassport.embedding.train.loop import Journal
        from nnpassport.embedding.train.loop import Progress as Step

        diary = self.opened_diary()
        with progress_bar("training") as show:

            def step(now: Step) -> None:
                facts = {"loss": now.loss, **now.measures}
                text = "  ".join(f"{name} {value:.3f}" for name, value in facts.items())
                show(now.step, now.steps, f"{text}  {now.images_per_second:.0f} images/s")

            options = {"resume": self.resume, "tensorboard": self.tensorboard, "diary": diary}
            yield Journal(out / "training", show=step, prepare=show, **options)

    def opened_diary(self) -> Any:
        """The diary that the run is to be entered in, or None.

        Raises:
            typer.BadParameter: one of folder and key is missing, or a number is none.
        """
        if (self.diary is None) != (self.diary_signing is None):
            raise typer.BadParameter("--diary and --diary-signing go together; give both")
        if self.diary is None or self.diary_signing is None:
            return None
        if self.diary_keep < 0 or (self.diary_steps is not None and self.diary_steps < 1):
            raise typer.BadParameter("--diary-steps is 1 or more, --diary-keep 0 or more")
        from nnpassport.claims.signing import load_signing_key
        from nnpassport.embedding.train.keeping import Diary, Pace

        passphrase = os.environ.get("NNPASSPORT_SIGNING_PASSPHRASE")
        secret = load_signing_key(self.diary_signing, passphrase=passphrase)
        return Diary(self.diary, secret, Pace(steps=self.diary_steps, keep=self.diary_keep))


class Base:
    """A network before training: its config, and weights if it starts from given ones."""

    def __init__(self, config: Any, weights: Any) -> None:
        self.config, self.weights = config, weights

    def config_for(self, sets: Any) -> Any:
        """The config with the images' classes; a new network of ours gets as many outputs."""
        config, names = self.config, sets.train.classes
        if self.weights is None and "classes" in config.arguments:
            config = replace(config, arguments={**config.arguments, "classes": len(names)})
        return replace(config, classes=names)

    def config_of_its_task(self, sets: Any) -> Any:
        """The same, of a network that goes on with the task which it was trained for.

        Raises:
            UnreadableDataError: it was trained for other classes than the images'.
        """
        from nnpassport.files.config import other_classes
        from nnpassport.scheme import UnreadableDataError

        differ = other_classes(sets.train.classes, self.config.classes)
        if self.weights is not None and differ is not None:
            raise UnreadableDataError(
                f"the images of --data are of other classes than the network of --init ({differ}); "
                "needed: images of the task that it was trained for; `train --init` trains it for "
                "another"
            )
        return self.config_for(sets)


def images_from(source: str, split: str | None, config: Any, reading: Reading = AS_USUAL) -> Any:
    """The images of one source, at the size and channels of `config`; stderr says what was read."""
    from nnpassport.data.images import read_images, read_images_skipping

    channels, size, _ = config.input_size
    given: Any = source
    if source.startswith(MADE):
        from nnpassport.data.datasets import made_by

        given, split = made_by(source.removeprefix(MADE), split), None
    named = {"image_column": reading.image_column, "label_column": reading.label_column}
    with progress_bar(f"reading {Path(source).name}") as show:
        wanted = {"split": split, "size": size, "channels": channels, **named, "progress": show}
        if reading.skip_corrupt:
            images, skipped = read_images_skipping(given, **wanted)
        else:
            images, skipped = read_images(given, **wanted), ()
    say_read(images)
    for each in skipped[:_NAMED]:
        errors.print(f"left out: {each}", markup=False)
    if len(skipped) > _NAMED:
        errors.print(f"left out: {len(skipped) - _NAMED} more", markup=False)
    return images


def stream_from(source: str, split: str | None, config: Any, reading: Reading = AS_USUAL) -> Any:
    """The images of Parquet shards, at the size and channels of `config`; none is read yet."""
    from nnpassport.data.stream import open_stream

    channels, size, _ = config.input_size
    images = open_stream(
        source,
        split=split,
        size=size,
        channels=channels,
        image_column=reading.image_column,
        label_column=reading.label_column,
        skip_corrupt=reading.skip_corrupt,
    )
    say_read(images)
    return images


def say_read(images: Any) -> None:
    """Say on stderr how many images of which classes there are, and where classes have none."""
    names = images.classes
    shown = ", ".join(names[:_NAMED]) + (f" … {names[-1]}" if len(names) > _NAMED else "")
    text = f"{images.name}: {len(images):,} images in {len(names):,} classes: {shown}"
    labels = getattr(images, "labels", None)  # a stream reads them later
    empty = 0 if labels is None else len(names) - labels.unique().numel()
    if empty:
        text += f"; {empty:,} of these classes have no image"
    errors.print(text, markup=False)


def key_from(path: Path, ask: bool) -> Any:
    """The key in a file; its passphrase is the environment's, or asked for."""
    return opened_key(path, ask)[0]


def opened_key(path: Path, ask: bool) -> tuple[Any, str | None]:
    """The key in a file, and the passphrase that opened it."""
    from nnpassport.keys.keyfile import load_key

    passphrase = os.environ.get("NNPASSPORT_PASSPHRASE")
    if passphrase is None and ask:
        passphrase = typer.prompt("Passphrase of the key", hide_input=True, err=True)
    return load_key(path, passphrase=passphrase), passphrase


def save_bound(key: Any, path: Path, passphrase: str | None, out: Path) -> None:
    """Put a key that was bound to its anchor in the place of the one that was not."""
    from nnpassport.embedding.train.team import together
    from nnpassport.keys.keyfile import save_key
    from nnpassport.verification.anchor import ANCHOR

    team = together()
    team.from_leader(lambda: save_key(key, path, passphrase=passphrase, overwrite=True))
    if team.leads:
        errors.print(
            f"{path} is now bound to {out / ANCHOR}, the network before the mark: copies of the "
            "key from before are of no use. Keep both, and show them to nobody.",
            soft_wrap=True,
        )


def new_passphrase() -> str:
    """A passphrase to protect a new key with: the environment's, or asked for twice."""
    given = os.environ.get("NNPASSPORT_PASSPHRASE")
    if given is not None:
        return given
    return str(typer.prompt("New passphrase", hide_input=True, confirmation_prompt=True, err=True))


def _value(text: str) -> str | int | float | bool:
    if text in {"true", "false"}:
        return text == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
