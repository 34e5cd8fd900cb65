"""What a mark costs beside the plain network: time of a training step and of inference, memory.

`run` measures and writes; `measure`, `collect` and `render` are its parts.
"""

from nnpassport.bench.networks import FULL, QUICK, Cell, cells, lower_bound
from nnpassport.bench.report import collect, render, run
from nnpassport.bench.timing import Measurement, measure, peak_memory

__all__ = [
    "FULL",
    "QUICK",
    "Cell",
    "Measurement",
    "cells",
    "collect",
    "lower_bound",
    "measure",
    "peak_memory",
    "render",
    "run",
]
