"""The loops of the GRU and the LSTM: forward, gates alone, and the way back from one state's cotangent to the last.

All arrays hold the gates side by side on their last axis. The units are in parts of ``own``, the last perhaps fewer:
``weight``, (parts, P, K, some), has of each the recurrent weights' columns in `panels`. One thread goes through all
parts, or thread ``me`` through its own, and all meet at every step (`hbp.backends._numba.meeting`); rounds have one
part. The way back is exact where each step adds its product with the weights, a round of Highway-BP where what was
pulled back before is added instead (`EXACT`, `ROUND`). In a round strong directions of the weights are part of the
residual path: ``left``, (N, r), ``right``, (r, H), with ``low``, (T, B, r), the last round's ``d left``, which what was
pulled back holds as well; r = 0 where there are none. A round may also measure what it changes: from ``before``, the
last round's cotangents of the states, it adds to ``sizes``, (B, 3), behind a factor, the sums of squares of change and
whole times that factor; (0, 3) where nobody asks.
"""

from hbp.backends._numba.loops.gru import gru_gates, gru_run, gru_steps
from hbp.backends._numba.loops.lstm import lstm_gates, lstm_memory, lstm_run, lstm_steps
from hbp.backends._numba.loops.parts import APART, EXACT, ROUND

__all__ = [
    "APART",
    "EXACT",
    "ROUND",
    "gru_gates",
    "gru_run",
    "gru_steps",
    "lstm_gates",
    "lstm_memory",
    "lstm_run",
    "lstm_steps",
]
