"""A mark in ordinary answers: functions of an input, a class and a fair sign for each, and V.

The marked network computes z(x) + ε·g(x), where

    g_c(x) = Σ_i s_i·φ_i(x) / √n_c        over the n_c functions of class c

Nothing that is shown to a suspect is secret: inputs are ordinary ones. What is secret is which
functions φ_i there are, and above all their signs s_i ∈ {−1, +1}. V asks how a suspect's answers
lean towards each function, beyond what the network before the mark says:

    T_i = Σ_x φ_i(x)·r_c(x)        r_c: answers of class c less what the baseline predicts

and the sign of T_i is compared with s_i. Signs are read from the seed's stream after all the rest
is fixed: functions, inputs, baseline and context are bound into it. So for any suspect that was not
trained on them the signs are fair coins whatever T is, also where functions repeat, and

    S = Σ_i w_i·s_i·sign(T_i)          w_i: |T_i| as a whole number

is a sum of fair signs with weights that are known: its distribution is exact. A T_i of zero has
no weight and matches neither sign. `docs/judging.md` says who may choose the inputs.

Everything is NumPy in float64, so that a judge needs no torch.
"""

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from nnpassport.keys.chance import LOG10_ALPHA_UNCOMMITTED, log10_signs_tail
from nnpassport.keys.context import AnswersForm, Context, TriggerShape
from nnpassport.keys.derive import Stream, stream
from nnpassport.keys.key import Key
from nnpassport.keys.validity import FUNCTIONS, MAX_FEATURES
from nnpassport.scheme import UnreadableKeyError, UnsuitableModelError, Verdict

KINDS = FUNCTIONS
"""`layout`: where a picture is light and of which colour, a space that everybody knows. `filters`:
how strongly random filters answer in parts of it, a bank that the seed decides. `mirrored`: the
same of a picture and of its mirror image, so that both are one to them. `counts`: how often
something is there, words of a text say. `waves`: cosines of projections of a picture, each with a
direction and a frequency that the seed decides; of scheme `cosine` alone."""

UNITS = 64
"""Of a baseline's whole numbers in one of a centred log-probability."""
LEAST, MOST = 1e-12, 1e-2
"""Of what is added to each probability before its logarithm: half of the smallest that is answered,
as services round, and no less and no more than these."""
RESOLUTION = 64
"""What a typical |T_i| weighs, as a whole number; four times that is the most."""
CLIPPED = 3.0
"""Standard deviations beyond which a function is cut off."""
BAND = 16
"""Functions of a class are made of the widest directions in which features vary, one of each: the
first sixteen functions of the widest sixteen directions, and so on. Directions that natural
networks disagree about are so kept apart from those about which they do not."""
NO_ANSWER = -1
"""In place of a class where there is no answer."""

_WAVES = 6  # of a picture's side, in `layout`
_BANK, _SIDE, _STRIDE, _SCALES, _PLACES = 32, 5, 2, (1, 2), 2  # of `filters`
_LARGEST = 1e6  # score that is told from a larger one
_ROUNDED = 1.5  # what rounded probabilities may sum to
_BELOW = 1e-6  # zero by so little a probability is zero: sums of floats err
_PERCENT = (99.0, 101.0)  # what probabilities in percent sum to
_LOUDEST = 4.0  # times the median row's size, beside the baseline's: no row counts for more
_AT_ONCE = 256  # inputs whose patches are there at a time
_VARIES = 1e-6  # of the widest direction's variance, or it is none
_APART = 1e-3  # of the least that functions of one class are kept apart by
_WHOLE = 40  # inputs for each number that a whole baseline predicts with, at least
_EACH = 20  # inputs for each band of functions, at least
_FEWEST = 8  # inputs that say something
_FEW = 30  # counts whose products are features too: alone they have as many directions
_NOTHING = 1e-9  # of a score: so little is rounding
_SLOWEST, _FASTEST = 2.0, 8.0  # radians in a unit of a projection by a vector of length 1

Read = NDArray[np.float64]


class Coins(NamedTuple):
    """What the seed says of the functions: their classes and signs, each (coins)."""

    classes: NDArray[np.int64]
    signs: NDArray[np.float64]


class Functions(NamedTuple):
    """φ(x) = clip((features(x) − mean) @ matrix), of unit variance on the key's inputs.

    Attributes:
        form: of the context.
        size: of an input, (channels height width).
        bank: filters, or a projection of counts or (pixels coins) of waves; empty for `layout`.
        mean: (features).
        matrix: (features coins).
    """

    form: AnswersForm
    size: tuple[int, int, int]
    bank: Read
    mean: Read
    matrix: Read

    def __call__(self, inputs: NDArray[np.uint8]) -> Read:
        """φ (inputs coins)."""
        found = features(self.form.kind, inputs, self.bank)
        return np.clip((found - self.mean) @ self.matrix, -CLIPPED, CLIPPED)


def form_of(context: Context) -> tuple[AnswersForm, TriggerShape]:
    """The form of a mark in answers, and the shape of its inputs.

    Raises:
        UnreadableKeyError: the key has no such mark.
    """
    if context.answers is None or context.triggers is None:
        raise UnreadableKeyError(
            f"the key of {context.scheme:.80} has no mark in ordinary answers; needed: one of the "
            "scheme answers; draw a new key"
        )
    return context.answers, context.triggers


def inputs_of(key: Key) -> tuple[NDArray[np.uint8], Read]:
    """The inputs that a key is bound to (count *size), and its baseline's scores (count classes).

    Raises:
        UnreadableKeyError: the key has none yet.
    """
    form_of(key.context)
    if key.trigger_images is None or key.baseline is None:
        raise UnreadableKeyError(
            "the key of answers has no inputs yet: ordinary ones, and what the network before the "
            "mark says of them; needed: `prepared` of the scheme, or `key new --images DATA "
            "--plain MODEL_FOLDER`"
        )
    return key.trigger_images, key.baseline / float(UNITS)


def coins_of(key: Key) -> Coins:
    """Classes in turn, and signs of the stream `answer-signs`, to which all else is bound."""
    form, shape = form_of(key.context)
    data = stream(key.seed, key.context, "answer-signs", bound=key.bound)((form.coins + 7) // 8)
    bits = np.unpackbits(np.frombuffer(data, np.uint8))[: form.coins]
    signs = bits.astype(np.float64) * 2 - 1
    return Coins(np.arange(form.coins) % shape.classes, signs)


def functions_of(key: Key) -> Functions:
    """The key's functions, made to vary alike and apart on the inputs that it is bound to."""
    form, shape = form_of(key.context)
    inputs, _ = inputs_of(key)
    draw = stream(key.seed, key.context, "answer-functions", bound=key.bound)
    bank = _bank(form, shape.size, stream(key.seed, key.context, "answer-bank"))
    found = features(form.kind, inputs, bank)
    mean = found.mean(0)
    centred, classes = found - mean, coins_of(key).classes
    matrix = np.zeros((found.shape[1], form.coins))
    if form.kind == "waves":
        for each in range(min(shape.classes, form.coins)):
            own = np.flatnonzero(classes == each)
            matrix[np.ix_(own, own)] = _apart(centred[:, own], np.eye(len(own)))
        return Functions(form, shape.size, bank, mean, matrix)
    bands = widest(centred, -(-form.coins // shape.classes))
    for each in range(min(shape.classes, form.coins)):
        for at, own in enumerate(_parts_of(np.flatnonzero(classes == each))):
            numbers = np.frombuffer(draw(len(own) * found.shape[1]), np.int8) + 0.5
            columns = bands[at % len(bands)] @ numbers.reshape(len(own), -1).T
            matrix[:, own] = _apart(centred, columns)
    return Functions(form, shape.size, bank, mean, matrix)


def key_function(
    functions: Functions, coins: Coins, inputs: NDArray[np.uint8], classes: int
) -> Read:
    """ε·g (inputs classes): what the key says that the marked network adds to its scores."""
    return functions(inputs) @ shares(functions.form, coins, classes)


def shares(form: AnswersForm, coins: Coins, classes: int) -> Read:
    """What each function adds to each class's score, (coins classes)."""
    counts = np.maximum(np.bincount(coins.classes, minlength=classes), 1)
    table = np.zeros((form.coins, classes))
    table[np.arange(form.coins), coins.classes] = coins.signs / np.sqrt(counts[coins.classes])
    return table * (form.strength / 1000)


# Features of inputs


def features(kind: str, inputs: NDArray[np.uint8], bank: Read) -> Read:
    """Numbers that functions are made of (inputs features), at most 512 of each input."""
    if kind == "layout":
        return _flat(inputs) @ layout_waves(tuple(inputs.shape[1:]))
    if kind == "waves":
        return np.cos(_flat(inputs) @ bank)
    if kind == "mirrored":
        mirror = inputs[..., ::-1]
        return (features("filters", inputs, bank) + features("filters", mirror, bank)) / 2
    if kind == "filters":
        parts = [
            _filtered(inputs[at : at + _AT_ONCE], bank) for at in range(0, len(inputs), _AT_ONCE)
        ]
        return np.concatenate(parts)
    roots = np.sqrt(inputs.reshape(len(inputs), -1).astype(np.float64))
    first, second = pairs_of(roots.shape[1])
    return np.concatenate([roots @ bank, roots[:, first] * roots[:, second]], axis=1)


def pairs_of(counts: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Which roots of so few counts are multiplied with which; none of more than 30."""
    first, second = np.triu_indices(counts if counts <= _FEW else 0)
    return first, second


def layout_waves(size: tuple[int, ...]) -> Read:
    """Products of the slowest cosines of both sides, for each channel (pixels features)."""
    channels, height, width = size
    rows, columns = _waves(height), _waves(width)
    plane = np.einsum("hu,wv->hwuv", rows, columns).reshape(height * width, -1)
    return np.kron(np.eye(channels), plane)[:, :MAX_FEATURES] / math.sqrt(height * width)


def filter_sides() -> tuple[int, int, int, tuple[int, ...]]:
    """Of the bank: side of a filter, stride, places a side, how far pictures are scaled down."""
    return _SIDE, _STRIDE, _PLACES, _SCALES


def _waves(side: int) -> Read:
    places = (np.arange(side) + 0.5) * (math.pi / side)
    return np.cos(np.outer(places, np.arange(min(side, _WAVES))))


def _bank(form: AnswersForm, size: tuple[int, int, int], draw: Stream) -> Read:
    if form.kind == "layout":
        return np.zeros((0, 0))
    if form.kind == "waves":
        return _directions(form.coins, math.prod(size), draw)
    if form.kind == "counts":
        count = min(size[2], MAX_FEATURES)
        bits = np.unpackbits(np.frombuffer(draw((size[2] * count + 7) // 8), np.uint8))
        signs = bits[: size[2] * count].reshape(size[2], count) * 2.0 - 1
        return np.asarray(signs / math.sqrt(size[2]) if size[2] > count else np.eye(count))
    shape = (len(_SCALES), _BANK, size[0] * _SIDE * _SIDE)
    filters = np.frombuffer(draw(math.prod(shape)), np.int8).reshape(shape) + 0.5
    filters = filters - filters.mean(-1, keepdims=True)
    return np.asarray(filters / np.linalg.norm(filters, axis=-1, keepdims=True))


def _directions(coins: int, pixels: int, draw: Stream) -> Read:
    """Vectors of length 1, each times a frequency of its own (pixels coins)."""
    vectors = np.frombuffer(draw(coins * pixels), np.int8).reshape(coins, pixels) + 0.5
    steps = (np.frombuffer(draw(coins), np.uint8) + 0.5) / 256
    frequencies = _SLOWEST + (_FASTEST - _SLOWEST) * steps
    lengths = np.linalg.norm(vectors, axis=1)
    return np.asarray(vectors.T * (frequencies / lengths))


def _filtered(inputs: NDArray[np.uint8], bank: Read) -> Read:
    """|filter ∗ picture|, averaged over the quarters of it, at each scale."""
    found = []
    for scale, filters in zip(_SCALES, bank, strict=True):
        pixels = _scaled(inputs / 255.0, scale)
        pad = _SIDE // 2
        padded = np.pad(pixels, ((0, 0), (0, 0), (pad, pad), (pad, pad)))
        windows = np.lib.stride_tricks.sliding_window_view(padded, (_SIDE, _SIDE), axis=(2, 3))
        windows = windows[:, :, ::_STRIDE, ::_STRIDE].transpose(0, 2, 3, 1, 4, 5)
        count, height, width = windows.shape[:3]
        said = np.abs(windows.reshape(count * height * width, -1) @ filters.T)
        said = said.reshape(count, height, width, -1)
        found += [part.mean((1, 2)) for part in _quarters(said)]
    return np.concatenate(found, axis=1)


def _scaled(pixels: Read, scale: int) -> Read:
    height, width = (side // scale * scale for side in pixels.shape[2:])
    if scale == 1 or min(height, width) < scale:
        return pixels
    cut = pixels[:, :, :height, :width]
    blocks = cut.reshape(*cut.shape[:2], height // scale, scale, width // scale, scale)
    return np.asarray(blocks.mean((3, 5)))


def _quarters(said: Read) -> list[Read]:
    rows, columns = (max(1, -(-side // _PLACES)) for side in said.shape[1:3])
    places = [
        said[:, at * rows : (at + 1) * rows, to * columns : (to + 1) * columns]
        for at in range(_PLACES)
        for to in range(_PLACES)
    ]
    return [part for part in places if part.size]


def _flat(inputs: NDArray[np.uint8]) -> Read:
    return inputs.reshape(len(inputs), -1) / 255.0


def widest(centred: Read, most: int) -> list[Read]:
    """C^-½ on each band of the `most` widest directions of the features' second moments C.

    Each is (features features), and does not depend on how directions within a band are told apart.
    """
    values, vectors = np.linalg.eigh(centred.T @ centred / len(centred))
    values, vectors = values[::-1], vectors[:, ::-1]
    vary = int((values > _VARIES * max(float(values[0]), 1e-12)).sum())
    kept = max(1, min(most, vary, len(centred) // 4))
    scaled = vectors / np.sqrt(np.maximum(values, 1e-12))
    return [scaled[:, part] @ vectors[:, part].T for part in _parts_of(np.arange(kept))]


def _parts_of(numbers: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    return [numbers[at : at + BAND] for at in range(0, len(numbers), BAND)]


def _apart(centred: Read, columns: Read) -> Read:
    """The columns, turned as little as may be, so that what they read varies alike and apart."""
    moments = columns.T @ (centred.T @ centred / len(centred)) @ columns
    scale = np.sqrt(np.maximum(np.diag(moments), 1e-18))
    columns, moments = columns / scale, moments / np.outer(scale, scale)
    values, vectors = np.linalg.eigh(moments)
    columns = columns @ (vectors / np.sqrt(np.maximum(values, 0) + _APART)) @ vectors.T
    read = centred @ columns
    return np.asarray(columns / np.maximum(read.std(0), 1e-9))


# What was answered


class Said(NamedTuple):
    """Answers as scores less their mean over the classes, and how that was done.

    Attributes:
        scores: (inputs classes); a row of NaN where nothing was answered.
        floor: what was added to probabilities before their logarithm; None of scores.
    """

    scores: Read
    floor: float | None = None


def centred_scores(scores: Any) -> Said:
    """Scores less their mean over the classes, of scores or probabilities (inputs classes).

    Rows that are not negative and sum to about 1 at most are probabilities, of which the logarithm
    is taken; others are scores before a softmax. Of a row with gaps (NaN), the best five of a
    hundred say, what is left of the probability is shared among the gaps, and in place of a score
    is the least that was given. A row of gaps alone stays one. Whole rows that all sum to about 100
    are probabilities in percent.
    """
    found = np.array(scores, np.float64)
    given = np.isfinite(found)
    there = given.any(1)
    found = np.clip(found, -_LARGEST, _LARGEST)
    known = np.where(given, found, 0.0)
    if _in_percent(known[there], given[there]):
        found, known = found / 100, known / 100
    likely = ((known >= -_BELOW) & (known <= 1 + _BELOW)).all()
    likely = likely and (known.sum(1) <= _ROUNDED).all()
    floor = None
    if likely and there.any():
        rest = np.clip(1 - known.sum(1), 0, None) / np.maximum((~given).sum(1), 1)
        chances = np.where(given, np.maximum(known, 0), rest[:, None])
        positive = chances[chances > 0]
        floor = min(MOST, max(LEAST, float(positive.min()) / 2)) if positive.size else MOST
        filled = np.log(chances + floor)
    else:
        least = np.where(given, found, np.inf).min(1)
        filled = np.where(given, found, np.where(np.isfinite(least), least, 0.0)[:, None])
    filled -= filled.mean(1, keepdims=True)
    filled[~there] = np.nan
    return Said(filled, floor)


def _in_percent(known: Read, given: NDArray[np.bool_]) -> bool:
    sums = known.sum(1)
    about = (sums >= _PERCENT[0]) & (sums <= _PERCENT[1])
    return bool(len(known) and given.all() and about.all() and (known >= -100 * _BELOW).all())


def levelled(said: Said, baseline: Read) -> Said:
    """The same, where no row is louder beside its baseline's than four times the median of all.

    Whoever multiplies a few of his answers by a thousand changes no label, and would else be read
    in nothing but these. No sign plays a part.
    """
    sizes, usual = _sizes(said.scores), _sizes(baseline)
    loud = sizes / (usual + max(float(np.median(usual)), _NOTHING))
    heard = loud[sizes > _NOTHING]  # of NaN this is false
    if not len(heard):
        return said
    most = _LOUDEST * float(np.median(heard))
    return said._replace(scores=said.scores * (most / np.maximum(loud, most))[:, None])


def _sizes(scores: Read) -> Read:
    return np.asarray(np.sqrt(np.square(scores).mean(1)))


def _floored(before: Read, floor: float | None) -> tuple[Read, Read]:
    """A baseline's scores as if they had been answered with that floor, and its probabilities."""
    chances = np.exp(before - before.max(1, keepdims=True))
    chances /= chances.sum(1, keepdims=True)
    if floor is None:
        return before, chances
    logs = np.log(chances + floor)
    return logs - logs.mean(1, keepdims=True), chances


def baseline_from(scores: Any) -> NDArray[np.int16]:
    """What a key keeps of its baseline's scores: centred, in units of 1/64."""
    whole = np.rint(np.nan_to_num(centred_scores(scores).scores) * UNITS)
    return np.clip(whole, -(2**15) + 1, 2**15 - 1).astype(np.int16)


def shown_labels(labels: Any, classes: int) -> Read:
    """One label each as scores (inputs columns): 1 for it, and a row of NaN where there is none.

    Labels are any whole numbers from 0; those that come up most have a column, four for each
    class at most.
    """
    named = np.asarray(labels, np.int64)
    usual = named.max(initial=0) < classes
    known, counts = np.unique(named[named >= 0], return_counts=True)
    kept = np.arange(classes) if usual else np.sort(known[np.argsort(-counts)[: 4 * classes]])
    table = (named[:, None] == kept).astype(np.float64)
    table[named < 0] = np.nan
    return table


def in_order(said: Read, baseline: Read) -> Read:
    """The columns of `said` (inputs columns) in the baseline's order of classes (inputs classes).

    Which column is which class is what agrees best with the baseline, one to one: a service may
    call its classes anything, in any order. No sign plays a part, so it costs nothing. Classes for
    which no column is left say nothing.
    """
    there = ~np.isnan(said).any(1)
    if not there.any():
        return said
    wanted = np.exp(baseline[there] - baseline[there].max(1, keepdims=True))
    wanted = wanted / wanted.sum(1, keepdims=True)
    shown, classes = said[there] - said[there].mean(0), wanted.shape[1]
    agree = shown.T @ (wanted - wanted.mean(0))
    if agree.shape == (classes, classes) and (agree.argmax(1) == np.arange(classes)).all():
        return said
    from scipy.optimize import linear_sum_assignment  # noqa: PLC0415 - slow to import

    columns, places = linear_sum_assignment(agree, maximize=True)
    ordered = np.zeros((len(said), classes))
    ordered[:, places] = said[:, columns]
    ordered[~there] = np.nan
    return ordered


class Leanings(NamedTuple):
    """T of every function, and how many inputs were answered."""

    numbers: Read
    answered: int


def leanings(said: Said, baseline: Read, functions: Read, classes: NDArray[np.int64]) -> Leanings:
    """T_i of answers (inputs classes), NaN rows left out, of φ (inputs coins) of these classes.

    Both are taken less what the baseline (inputs classes) says of them, by least squares: T is then
    how answers lean beyond it. What it says is also what its probabilities owe to each band of
    functions, since another network of the same task leans there more, or less, than it does.
    Nothing here depends on a sign.
    """
    there = ~np.isnan(said.scores).any(1)
    answered = int(there.sum())
    numbers = np.zeros(functions.shape[1])
    if answered < _FEWEST:
        return Leanings(numbers, answered)
    answers, phi = said.scores[there], functions[there]
    parts = _floored(baseline[there], said.floor)
    whole = answered >= _WHOLE * (2 * baseline.shape[1] + 1)
    for each in range(min(answers.shape[1], len(classes))):
        own = np.flatnonzero(classes == each)
        beside = parts if whole else tuple(part[:, [each]] for part in parts)
        owed = _owed(phi[:, own], parts[1][:, each])
        if answered >= _EACH * owed.shape[1]:
            beside = (*beside, owed)
        known = np.linalg.qr(np.concatenate([np.ones((answered, 1)), *beside], axis=1))[0]
        left = answers[:, each] - known @ (known.T @ answers[:, each])
        size = float(np.sqrt(np.square(left).mean()))
        if size > _NOTHING:
            numbers[own] = (phi[:, own] - known @ (known.T @ phi[:, own])).T @ left / size
    return Leanings(numbers, answered)


def _owed(phi: Read, chances: Read) -> Read:
    """Of probabilities (inputs), what each band of φ (inputs coins) explains (inputs bands)."""
    centred, beyond = phi - phi.mean(0), chances - chances.mean()
    found = [centred[:, part] @ (centred[:, part].T @ beyond) for part in _parts_of(_all(phi))]
    table = np.stack(found, axis=1)
    return np.asarray(table / np.maximum(table.std(0), 1e-12))


def _all(phi: Read) -> NDArray[np.int64]:
    return np.arange(phi.shape[1])


def weights_of(numbers: Read) -> list[int]:
    """|T_i| as whole numbers, about 64 each and at most 256."""
    size = float(np.sqrt(np.square(numbers).mean()))
    if not size > 0:
        return [0] * len(numbers)
    found = np.minimum(np.rint(np.abs(numbers) * (RESOLUTION / size)), 4 * RESOLUTION)
    return [int(each) for each in found]


def verdict_of(
    key: Key,
    found: Leanings,
    what: str,
    *,
    log10_alpha: float = LOG10_ALPHA_UNCOMMITTED,
) -> Verdict:
    """The exact verdict on leanings that were read of a suspect; see the module."""
    signs = coins_of(key).signs
    read, weights = np.sign(found.numbers), weights_of(found.numbers)
    matches = int((read == signs).sum())
    total = sum(w * int(s) for w, s in zip(weights, (read * signs).tolist(), strict=True))
    return Verdict(
        scheme=key.context.scheme,
        bits=len(signs),
        matches=matches,
        log10_tail=log10_signs_tail(weights, total) if key.derived else None,
        log10_alpha=log10_alpha,
        found=f"{what} of {found.answered} inputs lean towards {matches} of {len(signs)} functions "
        "as the key's signs have it, weighed by how far",
        chance=0.5,
    )


def read_answers(
    answers: Any,
    key: Key,
    *,
    labels: bool = False,
    log10_alpha: float = LOG10_ALPHA_UNCOMMITTED,
    functions: Functions | None = None,
) -> Verdict:
    """V on what a suspect answers to the inputs that the key is bound to, in their order.

    `answers` are scores or probabilities (count classes), NaN where there are none; or, with
    `labels`, a class for each (count), −1 where there is none. Fewer rows are of the first inputs.

    Raises:
        UnreadableKeyError: the key has no inputs yet.
        UnsuitableModelError: the answers are of other inputs or classes.
    """
    inputs, baseline = inputs_of(key)
    functions = functions_of(key) if functions is None else functions
    return read_on(answers, inputs, baseline, key, functions, labels, log10_alpha)


def read_on(
    answers: Any,
    inputs: NDArray[np.uint8],
    baseline: Read,
    key: Key,
    functions: Functions,
    labels: bool,
    log10_alpha: float,
) -> Verdict:
    """The same on any inputs, of which the baseline's centred scores are given.

    Exact only where whoever chose them did not know the key's signs.
    """
    count, columns = len(answers), baseline.shape[1]
    if count > len(inputs):
        raise _other_answers((count,), len(inputs), columns)
    before = baseline[:count]
    if labels:
        said = Said(shown_labels(answers, columns))
    else:
        table = np.asarray(answers, np.float64)
        if table.ndim != 2 or table.shape[1] < 2:
            raise _other_answers(table.shape, len(inputs), columns)
        said = levelled(centred_scores(table), before)
    leans = leanings(
        said._replace(scores=in_order(said.scores, before)),
        before,
        functions(inputs[:count]),
        coins_of(key).classes,
    )
    return verdict_of(key, leans, "labels" if labels else "scores", log10_alpha=log10_alpha)


def _other_answers(shape: tuple[int, ...], inputs: int, classes: int) -> UnsuitableModelError:
    return UnsuitableModelError(
        f"answers of shape {shape} were given for {inputs} inputs in {classes} classes; needed: a "
        "row for each input, and a column for each class or one label"
    )
