"""The modules."""

from rnnattn.nn.cells import GRUCell, LSTMCell, RNNCell
from rnnattn.nn.pooling import AttentionPool
from rnnattn.nn.recurrent import GRU, LSTM, RNN

__all__ = ["GRU", "LSTM", "RNN", "AttentionPool", "GRUCell", "LSTMCell", "RNNCell"]
