"""Keep a diary of a training: entries at a pace, checkpoints now and then, tokens at intervals.

    diary = Diary(Path("diary"), load_signing_key(Path("alice.pem")))
    nnpassport.train("plain", config, sets, recipe, journal=Journal(diary=diary))

Loops of others call `enter_network`, or give `lightning_callback(diary)` or
`trainer_callback(diary)` to theirs. What is kept is what was trained: show it to nobody before a
dispute, since a checkpoint from before a mark is enough to subtract it.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, final

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from safetensors.torch import save
from torch import Tensor, nn

from nnpassport.claims import diary as diaries
from nnpassport.claims.entries import Facts, Line
from nnpassport.embedding.checkpoint import save_training
from nnpassport.embedding.network import surgery
from nnpassport.embedding.network.tensors import tensors_digest
from nnpassport.embedding.train.loop import Moment
from nnpassport.files.config import CONFIG_FILE, ModelConfig, config_bytes
from nnpassport.files.disk import sha256_of, write_atomically, writing
from nnpassport.files.weights import WEIGHTS_FILE
from nnpassport.scheme import NoTimestampError

_HOUR = 3600.0


@final
@dataclass(frozen=True, slots=True)
class Pace:
    """How often.

    Attributes:
        seconds: between entries; the first and the last step are always entered.
        steps: between entries, instead: entries at its multiples.
        keep: every so many entries the checkpoint is kept, and the state to go on from; the first
            and the last are always kept, if any. 0 keeps none.
    """

    seconds: float = _HOUR
    steps: int | None = None
    keep: int = 24


class Authority(NamedTuple):
    """Who timestamps the diary, and how often.

    Attributes:
        url: of an RFC 3161 authority.
        roots: its certificates, to check tokens with at once.
        seconds: between tokens.
    """

    url: str
    roots: Sequence[x509.Certificate]
    seconds: float = 24 * _HOUR


@final
@dataclass(slots=True, eq=False)
class Diary:
    """An open diary: it was begun with `diaries.begin`, or `nnpassport diary new`.

    An authority that does not answer stops no training: `trouble` says what it was, and the next
    entry tries again.

    Attributes:
        folder: of the diary.
        signing: the owner's secret signing key. It is in no `repr`.
        network: config of the network that is trained, kept beside its checkpoints.
        about: how it is trained, beside the recipe: plain values.
        trouble: why the last token could not be had, or None.
    """

    folder: Path
    signing: Ed25519PrivateKey = field(repr=False)
    pace: Pace = Pace()
    authority: Authority | None = None
    network: ModelConfig | None = None
    about: Mapping[str, Any] = field(default_factory=dict)
    trouble: str | None = None
    _entered: float = field(default_factory=time.monotonic, repr=False)
    _stamped: float = field(default=float("-inf"), repr=False)
    _count: int = field(default=0, repr=False)
    _step: int = field(default=0, repr=False)

    def of(self, network: ModelConfig, **about: Any) -> "Diary":
        """The same diary for a run that trains this network."""
        return replace(self, network=network, about=about)

    def due(self, step: int) -> bool:
        """Whether an entry is to be made after this step."""
        if self.pace.steps is not None:
            return step % self.pace.steps == 0
        return time.monotonic() - self._entered >= self.pace.seconds

    def enter(self, moment: Moment) -> None:
        """Make the entry of a run of ours, and keep its checkpoint if it is to be kept."""
        self._step = moment.step
        document = {
            "network": None if self.network is None else config_bytes(self.network).decode(),
            "recipe": dict(moment.recipe),
            **self.about,
        }
        self.enter_network(
            moment.step,
            moment.weights,
            metrics=moment.metrics,
            configuration=diaries.stated(document),
            data=moment.data,
            state=lambda path: save_training(path, moment.state),
            last=moment.last,
        )

    def enter_result(self, weights: Mapping[str, Tensor]) -> None:
        """Make the entry of the network as it was written to its folder, after a run of ours."""
        note = "the network as it was written to its folder"
        self.enter_network(self._step, weights, last=True, note=note)

    def enter_network(
        self,
        step: int,
        weights: Mapping[str, Tensor],
        *,
        metrics: Mapping[str, float] | None = None,
        configuration: bytes | None = None,
        data: str | None = None,
        state: Callable[[Path], None] | None = None,
        last: bool = False,
        note: str = "",
    ) -> Line:
        """Make an entry: for loops of others.

        Args:
            step: optimiser steps so far.
            weights: the network's state dict.
            metrics: finite numbers by name; others are left out.
            configuration: bytes that say how it is trained.
            data: SHA-256, in hexadecimal, that stands for what it is trained on.
            state: writes what the run goes on from to a path, where it can be run again.
            last: whether the run ends here.
            note: up to 200 printable characters.

        Raises:
            BadSignatureError: the diary is another key's.
            UnwritableOutputError: it cannot be written.
        """
        self._entered = time.monotonic()
        _make_private(self.folder / diaries.KEPT)
        keeps = self.pace.keep > 0 and (self._count % self.pace.keep == 0 or last)
        tensors = {name: each.detach().cpu().contiguous().clone() for name, each in weights.items()}
        waiting = self.folder / diaries.KEPT / ".waiting"
        named = None
        if keeps and state is not None:
            state(waiting)
            named = sha256_of(waiting)
        finite = {n: float(v) for n, v in (metrics or {}).items() if abs(float(v)) < float("inf")}
        line = diaries.add(
            self.folder,
            self.signing,
            Facts(
                step=step,
                checkpoint=tensors_digest(tensors),
                state=named,
                configuration=None
                if configuration is None
                else diaries.configured(self.folder, configuration),
                data=data,
                metrics=finite,
                note=note,
            ),
        )
        if keeps:
            self._keep(line.entry.number, tensors, waiting if named is not None else None)
        self._count += 1
        self._stamp(last=last)
        return line

    def _keep(self, number: int, tensors: Mapping[str, Tensor], state: Path | None) -> None:
        folder = diaries.kept_in(self.folder, number)
        weights = save(dict(tensors), metadata={"format": "pt"})
        write_atomically(folder / WEIGHTS_FILE, weights, mode=0o600)
        if self.network is not None:
            write_atomically(folder / CONFIG_FILE, config_bytes(self.network))
        if state is not None:
            state.replace(folder / diaries.STATE_FILE)

    def _stamp(self, *, last: bool) -> None:
        authority = self.authority
        if authority is None or not (last or time.monotonic() - self._stamped > authority.seconds):
            return
        try:
            diaries.stamp(self.folder, authority.url, authority.roots)
        except NoTimestampError as error:
            self.trouble = str(error)
            return
        self.trouble, self._stamped = None, time.monotonic()


def _make_private(folder: Path) -> None:
    with writing(folder):
        folder.mkdir(mode=0o700, exist_ok=True)


def lightning_callback(
    diary: Diary, *, configuration: bytes | None = None, data: str | None = None
) -> Any:
    """A callback for Lightning's trainer that enters what the module's weights have come to.

    A network in it that is marked is entered as its plain network. Needs lightning, or
    pytorch_lightning.
    """
    try:
        from lightning.pytorch import Callback  # noqa: PLC0415 - optional
    except ImportError:
        from pytorch_lightning import Callback  # type: ignore[assignment, unused-ignore] # noqa: PLC0415

    class Keeping(Callback):  # type: ignore[misc, unused-ignore]
        """Enters the first step, those that are due, and the last."""

        def on_train_start(self, trainer: Any, module: Any) -> None:
            enter(trainer, module, last=False)

        def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
            if diary.due(trainer.global_step):
                enter(trainer, module, last=False)

        def on_train_end(self, trainer: Any, module: Any) -> None:
            enter(trainer, module, last=True)

    def enter(trainer: Any, module: Any, *, last: bool) -> None:
        if trainer.is_global_zero:
            metrics = {n: float(v) for n, v in trainer.callback_metrics.items()}
            _enter(diary, trainer.global_step, module, metrics, configuration, data, last=last)

    return Keeping()


def trainer_callback(
    diary: Diary, *, configuration: bytes | None = None, data: str | None = None
) -> Any:
    """The same for Hugging Face's Trainer. Needs transformers."""
    from transformers import TrainerCallback  # noqa: PLC0415 - optional

    class Keeping(TrainerCallback):  # type: ignore[misc, unused-ignore]
        """Enters the first step, those that are due, and the last."""

        def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            enter(state, given["model"], last=False)

        def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            if diary.due(state.global_step):
                enter(state, given["model"], last=False)

        def on_train_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            enter(state, given["model"], last=True)

    def enter(state: Any, model: Any, *, last: bool) -> None:
        if state.is_world_process_zero:
            logged = state.log_history[-1] if state.log_history else {}
            metrics = {n: float(v) for n, v in logged.items() if isinstance(v, int | float)}
            _enter(diary, state.global_step, model, metrics, configuration, data, last=last)

    return Keeping()


def _enter(
    diary: Diary,
    step: int,
    model: nn.Module,
    metrics: Mapping[str, float],
    configuration: bytes | None,
    data: str | None,
    *,
    last: bool,
) -> None:
    weights = surgery.plain_state(model, dict(model.state_dict()))
    diary.enter_network(
        step, weights, metrics=metrics, configuration=configuration, data=data, last=last
    )
