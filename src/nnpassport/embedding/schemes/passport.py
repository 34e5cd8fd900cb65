"""The paper's three schemes: V1 (passport distributed), V2 (private), V3 (private + triggers).

They are one mechanism with two switches, so they are one dataclass and three rows; a third switch
makes a fourth row, `pan`:

    scheme   runs in training              needed at inference     released
    V1       the private branch            the passport, or γ, β   passport folded into the norms
    V2       public and private branch     nothing                 passport taken out
    V3       the same, trigger images in   nothing                 passport taken out
    pan      as V2, with small networks    nothing                 passport taken out

[Fan19, sect. 3.3]
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any, cast, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from nnpassport.data.images import Images, ImageSet, Normalisation
from nnpassport.embedding.network import surgery
from nnpassport.embedding.network.equations import filters, passport_space, sign_loss
from nnpassport.embedding.network.inserted import Inserted, found_once
from nnpassport.embedding.network.layers import Branch, on_branch, passport_norms, public_count
from nnpassport.embedding.network.outputs import Example, call, length_of, part_of, tensors_in
from nnpassport.embedding.network.survey import Site, choose, choose_enough, shares, survey
from nnpassport.embedding.network.tensors import tensors_digest
from nnpassport.embedding.schemes import channels, mark
from nnpassport.embedding.schemes.engine import Carriers, Mark, Step, sign_match
from nnpassport.embedding.schemes.graft import graft, settle
from nnpassport.embedding.schemes.pan import encode
from nnpassport.embedding.schemes.protocol import Scheme
from nnpassport.embedding.schemes.seen import Seen, watch
from nnpassport.embedding.schemes.signature import presented, secrets_of
from nnpassport.embedding.schemes.triggers import trigger_shape
from nnpassport.embedding.train.fidelity import accuracy
from nnpassport.embedding.train.labels import rows as rows_of
from nnpassport.embedding.train.loop import Evaluation
from nnpassport.ground.progress import Listener
from nnpassport.keys.context import LayerShape
from nnpassport.keys.key import Key
from nnpassport.scheme import (
    BadRecipeError,
    Batch,
    HarmfulGraftError,
    UnmarkedWarning,
    UnsuitableModelError,
)
from nnpassport.verification.anchor import of_channels

SHOWN = 64
"""Inputs, at least, that an example shows what layers receive with."""
GRAFTED_ON = 512
"""Images, without their labels, that a key is grafted into a trained network with."""


@final
@dataclass(frozen=True, slots=True)
class Passport(Mark):
    """A passport scheme; `V1`, `V2` and `V3` below are the paper's.

    Attributes:
        name: as in keys and on the command line.
        two_branches: train the network to work without its passport too (V2, V3).
        triggers: size of the trigger set; 0 for none (V1, V2).
        triggers_per_step: trigger images that each training step mixes into its batch. None is
            2, as in the paper's code, or in a short training as many as teach them; see `Mark`.
        trigger_weight: λ_t of equation 1. None weighs a trigger like any other image of the step.
        sign_weight: λ_r of equation 1.
        margin: γ0 of equation 5, in units of γ.
        decay: factor on Σ γ², a term of the reference code (1e-5) that the paper does not have; as
            in that code it has no effect where `sign_weight` is 0.
        late: share of the steps, in [0, 1], that train only the public branch and the sign loss,
            before the private branch joins. This and the next two make training cheaper;
            `results/cheaper.md` says what they cost in accuracy. 1 is for passports of channels:
            `embed` ends with the private branch computing what the public one does (`settle`), so
            it need not be trained, also for V1. None is 1 there, and 0 elsewhere, as in the paper.
        private_share: share of each step's images, in (0, 1], that the private branch sees too.
        private_every: the private branch runs in every Nth step.
        teaching: for a trained network, the share in [0, 1] of each branch's loss that imitates
            what the network answered before.
        encoded: the private branch hears its passport through small networks; see `pan`.
        harm: share of confident answers, in [0, 1], that may change when passports of channels are
            put into a trained network. If more would change, the network is restored.
        harm_error: the same if there are no confident answers: relative error of the outputs.
    """

    name: str
    two_branches: bool
    triggers: int = 0
    triggers_per_step: int | None = None
    trigger_weight: float | None = None
    sign_weight: float = 0.1
    margin: float = 0.1
    decay: float = 0.0
    late: float | None = None
    private_share: float = 1.0
    private_every: int = 1
    teaching: float = 0.7
    encoded: bool = False
    harm: float = channels.LIMIT.answers
    harm_error: float = channels.LIMIT.error

    def __post_init__(self) -> None:
        for name, right, needed in (
            ("encoded", self.two_branches or not self.encoded, "two branches, or no small network"),
            ("late", 0 <= (self.late or 0) <= 1, "at least 0 and at most 1"),
            ("private_share", 0 < self.private_share <= 1, "above 0 and at most 1"),
            ("private_every", self.private_every >= 1, "1 or more steps"),
            ("harm", 0 <= self.harm <= 1, "at least 0 and at most 1"),
            ("harm_error", self.harm_error >= 0, "at least 0"),
        ):
            if not right:
                raise BadRecipeError(f"{name} is {getattr(self, name)}; needed: {needed}")

    def draw_key(
        self,
        model: nn.Module,
        example: Example = (),
        *,
        owner: str = "unnamed",
        layers: Sequence[str] | None = None,
        text: str | None = None,
        seed: bytes | None = None,
        passports: str | None = None,
        seen: Example | None = None,
    ) -> Key:
        """Draw a key for a network of this shape; every secret in it is derived from one seed.

        `example` is an input of the network: images (batch channels height width), or positional or
        named inputs. It shows which layers there are, how large their
        inputs are and, with triggers, how many classes. `layers` are patterns as in
        `survey.choose`; by default `survey.choose_enough` chooses layers with about a thousand
        bits. `text` is a signature that can be read back; without it the bits come from the seed's
        stream. `seed` (32 bytes) repeats a key; by default the operating system draws it.

        `passports` is "channel", a passport for each channel, or "derived", one for a whole layer
        as in the paper. Those of channels are for a trained network: draw the key for it, and give
        some hundred of its inputs as `seen`; without `seen`, an `example` of 64 inputs or more is
        used. Passports of channels are then the default (but for PAN). They lie in the directions
        in which their layer's input varies, and dead channels carry no bit. That network is the
        *anchor*: its digest is in the context, so everything derived depends on it, and suspects
        are aligned to it. Keep it, and keep it secret. Without such inputs the default is the
        paper's form, for which suspects can be aligned to the released network.

        Raises:
            UnsuitableModelError: a pattern names no layer that can carry a passport, or all layers
                together have too few channels for a verdict.
            BadSignatureError: `text` is longer than the layers have channels for, or not ASCII.
        """
        found = self.carriers(model, example, layers, passports=passports, seen=seen)
        return self.key_for(found, owner=owner, text=text, seed=seed)

    def carriers(
        self,
        model: nn.Module,
        example: Example,
        layers: Sequence[str] | None,
        *,
        passports: str | None = None,
        seen: Example | None = None,
    ) -> Carriers:
        """The layers that passports go into; see `draw_key`."""
        found, anchor = survey(model, example), None
        if seen is None and _tells(example):
            seen = example
        if passports is None:
            passports = "derived" if seen is None or self.encoded else "channel"
        if self._of_channels(passports):
            anchor = None if seen is None else tensors_digest(model.state_dict())
            sites = choose_enough(model, found, layers, bits=channels.BITS)
            most = shares(model, sites, layers, bits=channels.BITS)
            shapes, metrics = _channel_shapes(model, sites, seen, most)
        else:
            sites = choose(model, found, layers)
            shapes, metrics = tuple(_shape_of(site) for site in sites), {}
        if layers is None:
            mark.check_can_be_proved(self.name, shapes, mark.PROVABLE_DATED)
        triggers = trigger_shape(self.triggers, model, example) if self.triggers else None
        return Carriers(shapes, triggers, metrics=metrics, anchor=anchor)

    def _of_channels(self, passports: str | None) -> bool:
        kinds = ("derived",) if self.encoded else ("channel", "derived")
        if passports is not None and passports not in kinds:
            raise UnsuitableModelError(
                f"passports {passports!r:.40} are unknown to {self.name}; there are: "
                f"{', '.join(kinds)}"
            )
        return passports == "channel" and not self.encoded

    def check(self, model: nn.Module, key: Key, example: Example) -> None:
        """Nothing by itself: to put passports in is to find out whether they fit."""

    def put_in(self, model: nn.Module, key: Key, example: Example) -> Inserted:
        """Wrap the layers that `key` names, in place; V1 presents its passport from then on.

        Returned is also where V2 and V3 fork the batch; `example` needs all inputs for that.

        Raises:
            UnsuitableModelError: the key was made for another network, or V1 could not be released
                with it; the model is as it was.
        """
        secrets = secrets_of(key)
        inserted = surgery.insert(model, secrets, example, two_branches=self.two_branches)
        if not self.two_branches:
            try:
                surgery.check_releasable(model)
            except UnsuitableModelError:
                surgery.remove(model)
                raise
        if self.encoded:
            encode(model)
        self.rest(model)
        return inserted

    def begin(
        self, model: nn.Module, shown: Callable[[int], Tensor], *, trained: bool, show: Listener
    ) -> None:
        """Graft the key into a network that is trained (see `graft`), or begin with its bits right.

        Raises:
            HarmfulGraftError, UnsuitableModelError: `graft` refuses; the model is as it was.
        """
        if not trained:
            channels.begin([*passport_norms(model).values()])
            return
        limit = channels.Limit(self.harm, self.harm_error)
        try:
            graft(model, shown(GRAFTED_ON), limit=limit, show=show)
        except (HarmfulGraftError, UnsuitableModelError):
            surgery.remove(model)
            raise

    def training_of(self, key: Key, steps: int, batch: int) -> "Passport":
        """Without the private branch where it ends as the public one does, unless `late` is set."""
        scheme = cast(Passport, Mark.training_of(self, key, steps, batch))
        settles = of_channels(key)
        if self.late is None:
            return replace(scheme, late=1.0 if settles else 0.0)
        if self.late == 1 and not settles:
            raise BadRecipeError(
                "late is 1, so the private branch would never be trained; needed: passports of "
                "channels, with which it ends as the public one does, or below 1"
            )
        return scheme

    def end(self, model: nn.Module, shown: Callable[[int], Tensor]) -> None:
        """Let both branches of a network with passports of channels be one: see `settle`."""
        carried = any(norm.carries is not None for norm in passport_norms(model).values())
        if not (carried and (self.two_branches or self._settles)):
            return
        if settle(model, shown(GRAFTED_ON)) is None and self._settles:
            warnings.warn(_UNSETTLED, UnmarkedWarning, stacklevel=3)

    @property
    def _settles(self) -> bool:
        """Whether the private branch is not trained at all."""
        return self.late == 1

    def steps_of(
        self, key: Key, steps: int, normalise: Normalisation | None
    ) -> Callable[[nn.Module, Batch], Step]:
        """One branch, or both in one forward, as the paper's code does where its text alternates.

        γ is what the layers computed on their way.
        """
        start = round((self.late or 0.0) * steps) if self.two_branches or self._settles else 0
        find = found_once()

        def run(model: nn.Module, batch: Batch) -> Step:
            alone = batch.step < start or batch.step % self.private_every != 0
            inserted = find(model)
            with inserted.keeping():
                branches = self._branches(inserted, model, batch, alone=alone)
                return Step(branches, inserted.gammas(), inserted.signs())

        return run

    def term(
        self, signals: Float[Tensor, " bits"], signs: Float[Tensor, " bits"]
    ) -> Float[Tensor, ""]:
        """λ_r·R of equation 5, over the passport layers; a sign of 0 has no part in it."""
        carrying = signs != 0  # no mask is indexed with: that would wait for a device
        settled = (
            torch.where(carrying, signals, self.margin + 1),
            torch.where(carrying, signs, 1.0),
        )
        term = sign_loss(*settled, margin=self.margin)
        if self.decay and self.sign_weight:
            squares = torch.where(carrying, signals, 0.0).square().sum()
            term = term + self.decay / self.sign_weight * squares
        return self.sign_weight * term

    def forms(self, key: Key) -> Mapping[str, Tensor]:
        """By layer, what V multiplies a flattened filter with: m(P_γ), one for each group."""
        return {name: secret.mean_patch[0] for name, secret in secrets_of(key).items()}

    def evaluation(self, data: Images, normalise: Normalisation) -> Evaluation:
        """What to measure, after each epoch say, while the passports are inserted.

        "accuracy" is the network's as it will be used: presented for V1 (public, as long as that
        alone is trained), public for V2 and V3, whose "private_accuracy" is the presented one.
        "score" is the mean of the branches that are trained.
        """

        def evaluate(model: nn.Module) -> dict[str, float]:
            inserted = Inserted(model)
            with torch.no_grad():
                match = sign_match(inserted.gammas(), inserted.signs())
            numbers = {"sign_match": float(match)}
            if not self.two_branches:
                with on_branch(model, Branch.PUBLIC if self._settles else Branch.PRIVATE):
                    used = accuracy(model, data, normalise)
                return {**numbers, "accuracy": used, "score": used}
            with on_branch(model, Branch.PRIVATE):
                private = accuracy(model, data, normalise)
            with on_branch(model, Branch.PUBLIC):
                public = accuracy(model, data, normalise)
            score = public if self._settles else (public + private) / 2
            return {**numbers, "accuracy": public, "private_accuracy": private, "score": score}

        return evaluate

    def presented(
        self, model: nn.Module, key: Key, data: ImageSet, normalise: Normalisation
    ) -> nn.Module:
        """A copy that runs on the key's passports; `presented` of `signature` says how."""
        return presented(
            model,
            key,
            data,
            normalise,
            two_branches=self.two_branches,
            encoded=self.encoded,
        )

    @property
    def parts(self) -> frozenset[str]:
        """What there is to be forged: a passport, and triggers where there are some."""
        return frozenset({"passport", "triggers"} if self.triggers else {"passport"})

    def released(self, model: nn.Module) -> nn.Module:
        """A plain copy that holds no secret and costs what the plain network costs.

        V1: γ and β folded into the norms. V2, V3: the public branch.
        """
        copy = deepcopy(model)
        if not self.two_branches:
            surgery.fold(copy)
        surgery.remove(copy)
        return copy

    def rest(self, model: nn.Module) -> None:
        """Run the public network, or V1's on its passports."""
        if self.two_branches:
            surgery.withhold(model)
        else:
            surgery.present(model)

    def _branches(
        self, inserted: Inserted, model: nn.Module, batch: Batch, *, alone: bool
    ) -> tuple[tuple[Any, Any], ...]:
        """Outputs and labels of the branches that this step trains, public first.

        `alone`: the public branch without the private one, where there are two.
        """
        if alone or not self.two_branches:
            public = self.two_branches or self._settles
            inserted.run(Branch.PUBLIC if public else Branch.PRIVATE)
            return ((call(model, batch.images), batch.labels),)
        inserted.run(Branch.BOTH, self.private_share)
        both = call(model, batch.images)
        rows = length_of(both)
        images = public_count(rows, self.private_share)
        of_private = batch.labels
        if self.private_share < 1:
            of_private = rows_of(of_private, 2 * images - rows, images)
        return (
            (part_of(both, 0, images), batch.labels),
            (part_of(both, images, rows), of_private),
        )


V1 = Passport("passport-v1", two_branches=False)
V2 = Passport("passport-v2", two_branches=True)
V3 = Passport("passport-v3", two_branches=True, triggers=100)
PAN = Passport("pan", two_branches=True, encoded=True)


_UNSETTLED = (
    "training ended far from what the passports say: to make the private branch compute what the "
    "public one does would change more answers than is accepted. The bits are in, but with the key "
    "presented the accuracy is low; needed: embed with late below 1, 0.5 say, which trains it"
)


def _tells(example: Example) -> bool:
    """Whether there are inputs enough in it, and different ones, to see what layers receive."""
    if length_of(example) < SHOWN:
        return False
    inputs = [each for each in tensors_in(example) if each.dim() and len(each) >= SHOWN]
    return any(bool((each[1:] != each[:1]).any()) for each in inputs)


def _shape_of(site: Site) -> LayerShape:
    weight = tuple(filters(site.layer.get_parameter("weight"), site.geometry).shape)
    space = passport_space(site.space, weight[2:], site.geometry)
    passport = (weight[1] * site.geometry.groups, *space)
    return LayerShape(site.name, weight, passport, site.geometry)


def _channel_shapes(
    model: nn.Module, sites: Sequence[Site], seen: Example | None, most: Mapping[str, int]
) -> tuple[tuple[LayerShape, ...], dict[str, Any]]:
    watched: Mapping[str, Seen] = {}
    if seen is not None:
        with on_branch(model, Branch.PUBLIC):
            watched = watch(model, {site.name: site.layer for site in sites}, seen)
    found = [
        channels.shape_of(model, site, watched.get(site.name), most[site.name]) for site in sites
    ]
    metrics = {shape.name: metric for shape, metric in found if metric is not None}
    return tuple(shape for shape, _ in found), metrics


@torch.no_grad()
def bound_to(key: Key, model: nn.Module, seen: Example) -> Key:
    """The key of the same seed, name and layers for this very network, its *anchor*.

    Its passports lie in the directions in which the input of their layers varies, by `seen`, and
    its context names the network: so all that is derived is new.

    Raises:
        UnsuitableModelError: a layer of the key cannot carry passports of channels there.
    """
    most = {layer.name: layer.length for layer in key.context.layers}
    found = survey(model, part_of(seen, 0, 2))
    sites = [site for site in choose(model, found, [*most]) if site.name in most]
    shapes, metrics = _channel_shapes(model, sites, seen, most)
    anchor = tensors_digest(model.state_dict())
    context = replace(key.context, layers=shapes, anchor=anchor)
    return replace(key, context=context, metrics=metrics or None)


def draw_by_layer(
    scheme: Scheme,
    model: nn.Module,
    example: Example,
    *,
    owner: str = "unnamed",
    layers: Sequence[str] | None = None,
    seed: bytes | None = None,
) -> Key:
    """`draw_key` of any scheme, with one derived passport a layer if it has passports, as in 2019.

    What the paper's tables and the comparison with other schemes are made with.
    """
    if isinstance(scheme, Passport):
        return scheme.draw_key(
            model, example, owner=owner, layers=layers, seed=seed, passports="derived"
        )
    return scheme.draw_key(model, example, owner=owner, layers=layers, seed=seed)
