"""The whole story on embedded data: mark a network, release it, claim it, and try to cheat."""

from nnpassport.lab.demo.page import COMMANDS, FILES
from nnpassport.lab.demo.result import DemoResult, ruling, table
from nnpassport.lab.demo.stages import STAGES
from nnpassport.lab.demo.story import Budget, demo

__all__ = [
    "COMMANDS",
    "FILES",
    "STAGES",
    "Budget",
    "DemoResult",
    "demo",
    "ruling",
    "table",
]
