"""The commands `key …`: draw a secret key, and see what is not secret of one."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, final

import typer

from nnpassport.cli.options import (
    AsJson,
    Factory,
    Network,
    Out,
    Passphrase,
    Public,
    Setting,
    images_from,
    key_from,
    new_passphrase,
)
from nnpassport.cli.spread import spread
from nnpassport.cli.terminal import errors, print_rows

app = typer.Typer(help="Draw and inspect secret keys.", no_args_is_help=True)


@final
@dataclass(frozen=True, slots=True)
class Naming:
    """Whose key it is."""

    owner: Annotated[str, typer.Option(help="Your name, for the record.")] = "unnamed"
    signing: Annotated[
        Path | None,
        typer.Option(
            help="Your public key, PEM, from `claim keygen`. Nobody else can then claim this key."
        ),
    ] = None

    @property
    def name(self) -> str:
        """The owner's name, bound to the key that signs his claims if there is one."""
        if self.signing is None:
            return self.owner
        from nnpassport.claims.signing import bound_name, load_public_key

        return bound_name(self.owner, load_public_key(self.signing))


@final
@dataclass(frozen=True, slots=True)
class Secrets:
    """What is in a key beside what its seed gives."""

    text: Annotated[
        str | None,
        typer.Option(help="Text that the mark spells, ASCII (default: random bits)."),
    ] = None
    passports: Annotated[
        str | None,
        typer.Option(
            help="Kind of passport. One for each channel: channel (default). One for each "
            "layer: derived (default of pan), or the paper's random, image and shuffle."
        ),
    ] = None
    images: Annotated[
        str | None,
        typer.Option(
            help="Training images. With channel they show what the layers of the trained "
            "network in --model receive. With image and shuffle the passports are made "
            "of them."
        ),
    ] = None
    images_split: Annotated[str | None, typer.Option(help="Split of --images.")] = None
    plain: Annotated[
        Path | None, typer.Option(help="With --images: folder of a plain, trained network.")
    ] = None
    public: Public = None
    triggers: Annotated[
        Path | None,
        typer.Option(
            help="adi, V3: a published trigger set with its labels, Parquet (no p-value)."
        ),
    ] = None
    setting: Setting = None

    def drawn(self, config: Any, scheme: str, **asked: Any) -> Any:
        """A key with them; `asked` is what else `owner.draw_key` takes."""
        from nnpassport.catalog import read_settings
        from nnpassport.embedding import owner as ownership

        settings = read_settings(self.setting or ())
        source = None
        if self.images is not None:
            source = images_from(self.images, self.images_split, config)
        published = None if self.passports in {"channel", "derived"} else self.passports

        def draw(given: Mapping[str, float | str]) -> Any:
            return ownership.draw_key(
                config,
                scheme,
                text=self.text,
                passports=self.passports if published is None else "derived",
                seen=source,
                public=self.public or (),
                settings=given,
                **asked,
            )

        key = draw(settings)
        for name in settings:
            less = {n: value for n, value in settings.items() if n != name}
            if _form(draw(less)) == _form(key):
                errors.print("note:", style="yellow", end=" ")
                errors.print(f"{name} makes no difference to this key; `embed` takes --setting too")
        if published is not None:
            key = ownership.redraw_as_published(key, published, self.plain, source)
        elif source is not None and self.plain is not None:
            key = ownership.prepare_key(key, self.plain, source)
        if self.triggers is not None:
            key = ownership.with_trigger_file(key, self.triggers)
        ownership.check_pictures(key, config)
        return key


def _form(key: Any) -> tuple[Any, ...]:
    """What a scheme's settings can change of a key: nothing that is drawn or measured."""
    context = key.context
    layers = tuple((layer.name, layer.bits, layer.passport) for layer in context.layers)
    return context.triggers, context.answers, context.order, layers


@app.command()
@spread
def new(
    *,
    out: Out,
    scheme: Annotated[
        str, typer.Option(help="Name of the scheme; `nnpassport schemes` lists them.")
    ] = "passport-v2",
    network: Network,
    classes: Annotated[int, typer.Option(help="Number of classes of the task.")] = 10,
    layer: Annotated[
        list[str] | None,
        typer.Option(
            help="Layers to protect, such as 'layer4.*'; repeatable (default: the paper's)."
        ),
    ] = None,
    naming: Naming,
    secrets: Secrets,
    factory: Factory = None,
    passphrase: Passphrase = False,
) -> None:
    """Draw a secret key for a network of this shape, into a file only you can read."""
    from nnpassport.keys.keyfile import save_key

    owner, config = naming.name, network.config(factory, classes)
    folder = Path(network.architecture)
    trained = folder if folder.is_dir() else None
    drawn = secrets.drawn(config, scheme, owner=owner, layers=layer, trained=trained)
    save_key(drawn, out, passphrase=new_passphrase() if passphrase else None)
    _told(drawn, out)


def _told(key: Any, out: Path) -> None:
    """What was drawn, and what has to be known of it."""
    from nnpassport.keys.chance import LOG10_ALPHA_UNCOMMITTED, log10_binomial_tail
    from nnpassport.verification.anchor import needs_anchor

    context = key.context
    bits, pictures, order = context.bits, context.triggers, context.order
    what = [f"{len(context.layers)} layers, {bits} bits"] if context.layers else []
    what += [] if context.answers is None else [_functions(context.answers)]
    if order is not None:
        what = [f"{len(order.axes)} axes, {bits} units whose order is read"]
    what += [f"{pictures.count} pictures"] if pictures is not None else []
    errors.print(f"{out}: {'; '.join(what)}")
    counts = bool(bits) and key.derived and order is None
    weakest = log10_binomial_tail(bits, bits, 0.5) if counts else -math.inf
    if weakest > LOG10_ALPHA_UNCOMMITTED:
        errors.print("note:", style="yellow", end=" ")
        errors.print(
            f"{bits} bits reach 10^{weakest:.1f} at best, and "
            f"without a dated claim 10^{LOG10_ALPHA_UNCOMMITTED:.1f} is asked for; name more layers"
        )
    if needs_anchor(key):
        errors.print("`embed` binds it to the network before the mark; claim it after that.")
    errors.print("Keep it secret and keep it safe: without it nothing can be proved.")


def _functions(form: Any) -> str:
    return f"{form.coins} functions of kind {form.kind}, ε {form.strength / 1000:g}"


@app.command()
def show(
    path: Annotated[Path, typer.Argument(help="Key file.")],
    as_json: AsJson = False,
    passphrase: Passphrase = False,
) -> None:
    """Print what is not secret about a key: its scheme, owner, layers and fingerprint."""
    from nnpassport.verification.anchor import needs_anchor

    key = key_from(path, passphrase)
    layers = [f"{layer.name} {list(layer.weight)}" for layer in key.context.layers]
    order, answers = key.context.order, key.context.answers
    axes = None if order is None else [f"axis {a.number}: {a.units} units" for a in order.axes]
    facts = {
        "scheme": key.context.scheme,
        "owner": key.context.owner,
        "bits": key.context.bits,
        "derived": key.derived,
        "anchor": key.context.anchor or ("none yet" if needs_anchor(key) else None),
        "fingerprint": key.fingerprint,
        "layers": layers,
        **({} if axes is None else {"axes": axes}),
        **({} if answers is None else {"functions": _functions(answers)}),
    }
    there = {name: each for name, each in facts.items() if each is not None}
    rows = [(name, "\n".join(v) if isinstance(v, list) else str(v)) for name, v in there.items()]
    print_rows(facts, as_json, rows)
