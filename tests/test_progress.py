"""Long acts say how far they are, and the command line shows it."""

import io
import time

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import nn

from nnpassport.alignment.solve import aligner
from nnpassport.attacks.moves import move
from nnpassport.cli import terminal
from nnpassport.embedding.axes import axes_of
from nnpassport.ground.progress import counted, heard_by, tell

EXAMPLE = torch.zeros(2, 8)


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 3)
    )


def heard(act):
    said = []
    with heard_by(lambda *each: said.append(each)):
        act()
    return said


def test_who_listens_hears_and_nobody_else_does():
    tell(1, 2, "to nobody")
    outer, inner = [], []
    with heard_by(lambda *each: outer.append(each)):
        tell(1, 2, "out")
        with heard_by(lambda *each: inner.append(each)):
            tell(1, 2, "in")
        with heard_by(None):
            tell(1, 2, "to nobody")
        assert list(counted("ab", "letters")) == ["a", "b"]
    tell(1, 2, "to nobody")
    assert inner == [(1, 2, "in")]
    assert outer == [(1, 2, "out"), (0, 2, "letters"), (1, 2, "letters"), (2, 2, "letters")]


def test_axes_moves_and_alignment_say_how_far_they_are():
    model = network()
    acts = {
        "trying the network's axes": lambda: axes_of(model, EXAMPLE),
        "free moves": lambda: move(model, EXAMPLE, torch.Generator().manual_seed(0)),
    }
    for what, act in acts.items():
        said = [(done, total) for done, total, told in heard(act) if told == what]
        assert said[0][0] == 0
        assert said[-1][0] == said[-1][1] > 1
    state = {name: each.numpy().astype(np.float64) for name, each in model.state_dict().items()}
    said = heard(lambda: aligner(axes_of(model, EXAMPLE), state).align(state))
    assert any(told.startswith("putting units in order, 1 of ") for *_, told in said)


@pytest.fixture
def screen(monkeypatch):
    """A terminal that keeps what is shown on it."""
    shown = io.StringIO()
    console = Console(file=shown, force_terminal=True, width=80, markup=False)
    monkeypatch.setattr(terminal, "errors", console)
    return shown


def test_what_takes_longer_than_a_moment_has_a_bar_and_nothing_is_left_of_it(screen, monkeypatch):
    with terminal.told_with_bars():
        tell(1, 3, "what is soon done")
    assert screen.getvalue() == ""
    monkeypatch.setattr(terminal, "_AT_ONCE", 0)
    with terminal.told_with_bars():
        tell(1, 3, "trying axes")
        time.sleep(0.2)
        assert "trying axes" in screen.getvalue()
        assert "1/3" in screen.getvalue()
        tell(3, 3, "trying axes")
        assert screen.getvalue().endswith("\x1b[1A\x1b[2K")  # the line is taken away
        with terminal.progress_bar("judge") as show:
            show(1, 2, "alice")
            tell(1, 5, "within")
            time.sleep(0.2)
        assert "within" in screen.getvalue()


def test_a_bar_that_stands_gives_way_to_another(screen, monkeypatch):
    monkeypatch.setattr(terminal, "_AT_ONCE", 0)

    def act():
        with terminal.told_with_bars():
            tell(1, 3, "trying axes")
            with terminal.progress_bar("training") as show:  # rich would refuse a second display
                show(1, 2)
            tell(2, 3, "trying axes")
            raise ValueError("ends in the middle")

    with pytest.raises(ValueError, match="ends in the middle"):
        act()
    assert terminal._alone._bars is None
