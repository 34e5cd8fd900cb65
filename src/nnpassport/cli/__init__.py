"""The command line."""

from nnpassport.cli.app import main

__all__ = ["main"]
