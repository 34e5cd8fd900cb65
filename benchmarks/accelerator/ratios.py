"""What a mark costs on this device: plain, V1, V2, V3 of four networks, as `nnpassport bench`.

Started by `run.py`; alone:

    python benchmarks/accelerator/ratios.py OUT.json --minutes 2 [--compiled]
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from nnpassport.lab.bench import collect, plan, render
from nnpassport.lab.bench.cases import NETWORKS, Case
from nnpassport.lab.results import write_json

COMPARED = {"plain", "V1", "V2", "V3", "eager"}


def cases(*, compiled: bool, small: bool) -> tuple[Case, ...]:
    """Training steps at batch 256 in bfloat16, and inference of what is released."""
    networks = NETWORKS[:1] if small else NETWORKS
    chosen = plan(networks, (256,), ("bfloat16",), compiled=(compiled,), tasks=("train", "infer"))
    trained = [c for c in chosen if c.task == "train" and c.network in COMPARED]
    # Trainings of all networks first: that is what the paper has numbers of.
    found = trained + [c for c in chosen if c.task == "infer" and "presented" not in c.network]
    return tuple(replace(c, batch=8, width=0.125) if small else c for c in found)


def main() -> int:
    """As a script."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--minutes", type=float, default=2.0)
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--small", action="store_true")
    options = parser.parse_args()
    results = collect(
        cases(compiled=options.compiled, small=options.small),
        repeats=3 if options.small else 7,
        minutes=options.minutes,
        memory=False,
    )
    write_json(options.out, results)
    print(render(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
