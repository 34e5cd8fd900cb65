"""Make a layer solvable that has more filters than a filter has numbers; outputs stay."""

import numpy as np
import torch
from scipy.optimize import linprog
from torch import Tensor, nn

from nnpassport.attacks.passports import system_of
from nnpassport.keys.context import LayerShape

_BATCH_NORMS = nn.modules.batchnorm._BatchNorm
_LARGEST = 1e3  # of a direction, beside which the smallest γ has to be at least 1


@torch.no_grad()
def stretch(
    model: nn.Module, layer: LayerShape, norm_name: str | None, rng: torch.Generator
) -> bool:
    """Rescale the layer's filters, in place, so that some passport induces its γ and β exactly.

    With W ∈ ℝ^(out × in) and out > in no passport reaches every γ. But a filter in front of a batch
    norm may be scaled by any s > 0, which its statistics undo. So any m with the *signs* of γ will
    do, a linear program: then s = γ / (W·m). The shift that m' induces replaces β, and the
    difference goes into the running mean. Outputs in evaluation mode stay as they were.

    Returns whether it could be done: not without batch norm with statistics, and not where no m
    has these signs. If not, the model is as it was.
    """
    norm = None if norm_name is None else model.get_submodule(norm_name)
    if not isinstance(norm, _BATCH_NORMS) or not norm.affine or norm.running_mean is None:
        return False
    if layer.geometry.groups != 1:
        return False
    host = model.get_submodule(layer.name).get_parameter("weight")
    system = system_of(host, layer)[0][0]
    gamma = norm.weight.detach().cpu().double()
    move = _with_signs(system.numpy(), gamma.sign().numpy())
    if move is None:
        return False
    variance, mean = norm.get_buffer("running_var"), norm.get_buffer("running_mean")
    factors = _factors(gamma, system @ torch.from_numpy(move), variance.double(), norm.eps).to(host)
    host.mul_(factors.view(-1, *[1] * (host.dim() - 1)))
    if model.get_submodule(layer.name)._parameters.get("bias") is not None:
        model.get_submodule(layer.name).get_parameter("bias").mul_(factors)
    before = (variance + norm.eps).sqrt()
    mean.mul_(factors)
    variance.mul_(factors.square())
    norm.weight.mul_((variance + norm.eps).sqrt() / (factors * before))
    _shift(norm, system_of(host, layer)[0][0])
    return True


def _factors(gamma: Tensor, induced: Tensor, variance: Tensor, epsilon: float) -> Tensor:
    """Solve s·induced = γ', where γ' is γ as it has to be after scaling, ε being what it is."""
    induced = induced * (gamma / induced).median()  # m may have any length: factors around 1
    before = (variance + epsilon).sqrt()
    factors = gamma / induced
    for _ in range(50):  # a contraction while ε is small beside the variances
        factors = gamma * (factors.square() * variance + epsilon).sqrt() / (factors * before)
        factors = factors / induced
    return factors


def _with_signs(system: np.ndarray, signs: np.ndarray) -> np.ndarray | None:
    """A direction z with sign(S·z) = signs, as far from zero as may be; None if there is none.

    maximise t   subject to   signs_i · (S·z)_i ≥ t,   |z| ≤ 10³,   t ≤ 1
    """
    if not signs.all():
        return None  # a γ of zero would need a filter of zero
    rows, columns = system.shape
    constraints = np.hstack([-signs[:, None] * system, np.ones((rows, 1))])
    goal = np.zeros(columns + 1)
    goal[-1] = -1
    bounds = [(-_LARGEST, _LARGEST)] * columns + [(None, 1.0)]
    found = linprog(goal, A_ub=constraints, b_ub=np.zeros(rows), bounds=bounds, method="highs")
    return found.x[:-1] if found.status == 0 and found.x[-1] > 1e-6 else None


def _shift(norm: nn.Module, system: Tensor) -> None:
    """Replace β by the nearest shift that a passport induces, and let the running mean undo it."""
    weight, bias = norm.get_parameter("weight"), norm.get_parameter("bias")
    wanted = bias.detach().cpu().double()
    move = torch.linalg.lstsq(system, wanted[:, None], driver="gelsd").solution
    induced = (system @ move)[:, 0].to(bias)
    deviation = (norm.get_buffer("running_var") + float(norm.eps)).sqrt()  # type: ignore[arg-type]
    norm.get_buffer("running_mean").add_((induced - bias) * deviation / weight)
    bias.copy_(induced)
