"""Gated recurrent cells with hand-written linearisations, one definition for every array library."""

from hbp.cells._gru import GRUParameters, GRUPullback, gru
from hbp.cells._lstm import LSTMParameters, LSTMPullback, lstm

__all__ = ["GRUParameters", "GRUPullback", "LSTMParameters", "LSTMPullback", "gru", "lstm"]
