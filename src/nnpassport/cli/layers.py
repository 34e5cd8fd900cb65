"""The command `layers`: what in a network can carry a passport, and what that would cost."""

import json
from typing import Annotated, Any

import typer

from nnpassport.cli.options import (
    Architecture,
    Arguments,
    AsJson,
    Channels,
    Factory,
    Norm,
    Size,
    config_from,
)
from nnpassport.cli.terminal import errors, print_table


def layers(
    model: Annotated[str | None, typer.Argument(help="Model folder (or use --model).")] = None,
    architecture: Architecture = "alexnet",
    norm: Norm = "group",
    arguments: Arguments = None,
    size: Size = 32,
    channels: Channels = 3,
    layer: Annotated[
        list[str] | None,
        typer.Option(help="Layers to protect, such as 'layer4.*'; repeatable (default: ours)."),
    ] = None,
    factory: Factory = None,
    as_json: AsJson = False,
) -> None:
    """What in a network can carry a passport, what cannot and why, and what training would cost."""
    from nnpassport.scheme import UnsuitableModelError

    given = model or architecture
    config = config_from(given, norm, arguments, None, (channels, size, size), factory)
    network = config.build(trusted_factory=factory or None)
    found = _survey(network, config)
    facts: dict[str, Any] = {"layers": found[0], "refused": found[1]}
    unsuitable = None
    try:
        facts |= _choice(network, config, layer)
    except UnsuitableModelError as error:
        unsuitable = error
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
    else:
        _show(facts)
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
            each["before"],
        )
        for name, each in facts["layers"].items()
    ]
    print_table(("layer", "kind", "bits", "harm", "before"), rows)
    for name, reason in facts["refused"].items():
        errors.print(f"  {name}: no passport; {reason}", markup=False)
    if chosen:
        errors.print(
            f"→ carries passports: {facts['bits']} bits. Harm: of a layer's output, the share that "
            "a graft is predicted to change. V2 and V3 fork the batch at "
            f"{', '.join(facts['fork'])}: a step takes about {facts['step_cost']:.2f} times the "
            "plain network's arithmetic.",
            markup=False,
        )


def _survey(network: Any, config: Any) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    import torch

    from nnpassport.embedding.network.equations import filters
    from nnpassport.embedding.network.survey import predicted_harm, survey

    found = survey(network, torch.zeros(2, *config.input_size))
    sites = {
        name: {
            "kind": type(site.layer).__name__,
            "weight": list(site.layer.get_parameter("weight").shape),
            "bits": len(filters(site.layer.get_parameter("weight"), site.geometry)),
            "harm": predicted_harm(site),
            "before": _follows(network, site),
        }
        for name, site in found.sites.items()
    }
    return sites, found.refused


def _follows(network: Any, site: Any) -> str:
    if site.norm is not None:
        return f"{type(network.get_submodule(site.norm)).__name__} {site.norm}"
    return site.activation or "neither norm nor activation"


def _choice(network: Any, config: Any, patterns: list[str] | None) -> dict[str, Any]:
    import torch

    from nnpassport.embedding.schemes.passport import V2

    example = torch.zeros(2, *config.input_size)
    key = V2.draw_key(network, example, layers=patterns)
    fork = V2.insert(network, key, example)
    if fork is None:  # V2 always has one
        raise RuntimeError("two branches without a fork")
    return {
        "chosen": [each.name for each in key.context.layers],
        "bits": key.context.bits,
        "fork": list(fork.at),
        "followers": list(fork.followers),
        "step_cost": fork.step_cost,
    }
