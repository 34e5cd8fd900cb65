"""What a mark costs beside the plain network: training, inference, memory, acts on keys, the loop.

`choose` and `plan` name what there is to measure; `run` measures and writes; `measure`, `collect`
and `render` are its parts.
"""

from nnpassport.lab.bench.cases import FULL, QUICK, Case, cases, plan
from nnpassport.lab.bench.networks import lower_bound
from nnpassport.lab.bench.page import render
from nnpassport.lab.bench.report import choose, collect, run
from nnpassport.lab.bench.timing import Measurement, measure, peak_memory

__all__ = [
    "FULL",
    "QUICK",
    "Case",
    "Measurement",
    "cases",
    "choose",
    "collect",
    "lower_bound",
    "measure",
    "peak_memory",
    "plan",
    "render",
    "run",
]
