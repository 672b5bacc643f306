"""Layers with the constructor, attributes, state_dict and call of their torch.nn namesakes."""

from fastseq.nn.attention import MultiheadAttention
from fastseq.nn.cells import GRUCell, LSTMCell, RNNCell
from fastseq.nn.encoder import TransformerEncoderLayer
from fastseq.nn.recurrent import GRU, LSTM, RNN

__all__ = ["GRU", "LSTM", "RNN", "GRUCell", "LSTMCell", "MultiheadAttention", "RNNCell", "TransformerEncoderLayer"]
