"""A case made ready to run."""

from collections.abc import Callable
from dataclasses import replace

import torch

from nnpassport.lab.bench.acts import act
from nnpassport.lab.bench.cases import Case, check
from nnpassport.lab.bench.loop import loop
from nnpassport.lab.bench.steps import inference, training_step
from nnpassport.scheme import OwnershipError

_GRAPHS = 64  # that one process may compile of one function; all networks of a class are one


class NotCompiledError(OwnershipError):
    """A network that this machine's compiler does not take."""


def prepare(case: Case, device: str) -> Callable[[], object]:
    """A function that runs the case once: `case.steps` training steps, one forward, one act.

    What is compiled has been compiled when this returns.

    Raises:
        BadRecipeError: there is no such task, or no such network to do it with.
        NotCompiledError: compiling, or running what was compiled, failed.
    """
    check(case)
    if case.task in {"act", "long act"}:
        # Beside an inference, for scale.
        plain = replace(case, task="infer")
        return inference(plain, device) if case.network == "plain" else act(case)
    if case.task == "loop":
        return loop(case, device)
    run = inference(case, device) if case.task == "infer" else training_step(case, device)
    return _warmed(case, run) if case.compiled and case.network != "eager" else run


def _warmed(case: Case, run: Callable[[], object]) -> Callable[[], object]:
    def patched() -> object:
        # Past its limit of graphs the compiler would go on uncompiled, and say nothing.
        with torch._dynamo.config.patch(recompile_limit=_GRAPHS, fail_on_recompile_limit_hit=True):
            return run()

    try:
        for _ in range(2):
            patched()
    except Exception as error:  # a compiler of another's may raise anything
        first = str(error).strip().splitlines() or [""]
        raise NotCompiledError(
            f"{case.architecture} {case.network} did not compile: {type(error).__name__}: "
            f"{first[0][:200]}; needed: a C++ compiler that torch.compile can call, or --no-compile"
        ) from error
    return patched
