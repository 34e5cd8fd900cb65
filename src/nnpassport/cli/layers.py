"""The command `layers`: what in a network can carry a passport, and what that would cost."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from nnpassport.cli.options import AsJson, Factory, Network, images_from
from nnpassport.cli.spread import spread
from nnpassport.cli.terminal import errors, print_result, print_table, progress_bar


@spread
def layers(
    *,
    model: Annotated[str | None, typer.Argument(help="Model folder (or use --model).")] = None,
    shape: Network,
    layer: Annotated[
        list[str] | None,
        typer.Option(
            help="Layers to protect, such as 'layer4.*'; repeatable (default: chosen for you)."
        ),
    ] = None,
    images: Annotated[
        str | None,
        typer.Option(
            help="Images like those on which the network was trained. A copy of the network "
            "is marked, and the change of its answers is measured."
        ),
    ] = None,
    images_split: Annotated[str | None, typer.Option(help="Split of --images.")] = None,
    factory: Factory = None,
    as_json: AsJson = False,
) -> None:
    """List which layers can carry a passport, which cannot and why, and what it would cost."""
    from nnpassport.scheme import UnsuitableModelError

    given = model or shape.architecture
    config = replace(shape, architecture=given).config(factory)
    network = config.build(trusted_factory=factory or None)
    seen = None
    if images is not None:
        if not Path(given).is_dir():
            raise typer.BadParameter("--images is for a trained network; give its model folder")
        network, seen = _trained(Path(given), config, factory, images, images_split)
    found = _survey(network, config)
    facts: dict[str, Any] = {"layers": found[0], "refused": found[1]}
    unsuitable = None
    try:
        facts |= _choice(network, config, layer, seen)
    except UnsuitableModelError as error:
        unsuitable = error
    print_result(facts, as_json, lambda: _show(facts))
    if unsuitable is not None:
        raise unsuitable


def _show(facts: dict[str, Any]) -> None:
    chosen = set(facts.get("chosen", ()))
    rows = [
        (
            f"{'→' if name in chosen else ' '} {name}",
            each["kind"],
            str(each["bits"]),
            f"{100 * each['harm']:.1f} %",
            f"{each['step_cost']:.2f}",
            each["before"],
        )
        for name, each in facts["layers"].items()
    ]
    print_table(("layer", "kind", "bits", "harm", "step", "before"), rows)
    for name, reason in facts["refused"].items():
        errors.print(f"  {name}: no passport; {reason}", markup=False)
    if chosen:
        errors.print(
            f"→ carries passports: {facts['bits']} bits, predicted harm "
            f"{100 * facts['harm']:.1f} % at most. Harm: of a layer's output, the share that a "
            "graft changes. Step: times the plain network's arithmetic, with this layer as the "
            "first, where the private branch is trained too: with one passport a layer, or --late "
            f"below 1. V2 and V3 fork the batch at {', '.join(facts['fork'])} then: a step takes "
            f"about {facts['step_cost']:.2f} times the plain network's arithmetic, otherwise as "
            "much as the plain network's.",
            markup=False,
        )
    if "measured" in facts:
        errors.print(f"Measured on held-out images: {facts['measured']['said']}.", markup=False)


def _survey(network: Any, config: Any) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    import torch

    from nnpassport.embedding.network.equations import filters
    from nnpassport.embedding.network.fork import step_costs
    from nnpassport.embedding.network.survey import predicted_harm, survey

    example = torch.zeros(2, *config.input_size)
    found = survey(network, example)
    costs = step_costs(network, example, {name: s.layer for name, s in found.sites.items()})
    sites = {
        name: {
            "kind": type(site.layer).__name__,
            "weight": list(site.layer.get_parameter("weight").shape),
            "bits": len(filters(site.layer.get_parameter("weight"), site.geometry)),
            "harm": predicted_harm(site),
            "step_cost": costs[name],
            "before": _follows(network, site),
        }
        for name, site in found.sites.items()
    }
    return sites, found.refused


def _follows(network: Any, site: Any) -> str:
    if site.norm is not None:
        return f"{type(network.get_submodule(site.norm)).__name__} {site.norm}"
    return site.activation or "neither norm nor activation"


def _choice(network: Any, config: Any, patterns: list[str] | None, seen: Any) -> dict[str, Any]:
    import torch

    from nnpassport.embedding.network.survey import predicted_harm, survey
    from nnpassport.embedding.schemes.passport import V2

    example = torch.zeros(2, *config.input_size)
    sites = survey(network, example).sites
    key = V2.draw_key(network, example, layers=patterns, passports="channel", seen=seen)
    fork = V2.insert(network, key, example).fork
    if fork is None:  # V2 always has one
        raise RuntimeError("two branches without a fork")
    chosen = [each.name for each in key.context.layers]
    return {
        "chosen": chosen,
        "bits": key.context.bits,
        "harm": max(predicted_harm(sites[name]) for name in chosen),
        "fork": list(fork.at),
        "followers": list(fork.followers),
        "step_cost": fork.step_cost,
        **({} if seen is None else _measured(network, seen)),
    }


def _measured(network: Any, seen: Any) -> dict[str, Any]:
    """What a mark does to the answers, and of each layer's output the share that it changes."""
    from nnpassport.embedding.schemes.channels import ANY
    from nnpassport.embedding.schemes.graft import graft_channels

    with progress_bar("grafting") as show:
        done = graft_channels(network, seen, limit=ANY, show=show)
    felt = {name: each.felt for name, each in done.layers.items()}
    return {"measured": {**done.harm._asdict(), "said": str(done.harm), "felt": felt}}


def _trained(folder: Path, config: Any, factory: str | None, source: str, split: str | None) -> Any:
    """The network of a model folder, and images as it takes them."""
    from nnpassport.data.images import Normalisation
    from nnpassport.embedding.checkpoint import load_model
    from nnpassport.embedding.schemes.passport import GRAFTED_ON

    network = load_model(folder, trusted_factory=factory).model
    pictures = images_from(source, split, config).sample(GRAFTED_ON, seed=0).images
    return network, Normalisation(config.mean, config.std)(pictures)
