"""The modules."""

from rnnattn.nn.cells import LSTMCell
from rnnattn.nn.pooling import AttentionPool
from rnnattn.nn.recurrent import LSTM

__all__ = ["LSTM", "AttentionPool", "LSTMCell"]
