"""Moves along axes of channels, made on networks that run, in place."""

import numpy as np

from nnpassport.alignment import channels
from nnpassport.embedding.network.channels import network_of, with_arrays


def take(model, axis, source):
    """As many channels as `source` names, each a copy of an old one."""
    _moved(model, lambda network: channels.take(network, axis, np.asarray(source)))


def negate(model, producer, sign):
    """Channels times ±1 between a layer and its norm."""
    _moved(model, lambda network: channels.negate(network, producer, np.asarray(sign)))


def _moved(model, move):
    network = network_of(model)
    move(network)
    vars(model).update(vars(with_arrays(model, network)))
