"""The layers as functions: documented, checked, and sent to the backend that should run them."""

from fastseq.attn.functional import attention, scaled_dot_product_attention
from fastseq.attn.merge import merge_attention
from fastseq.recurrent.functional import gru, gru_cell, lstm, lstm_cell, rnn, rnn_cell

__all__ = [
    "attention",
    "gru",
    "gru_cell",
    "lstm",
    "lstm_cell",
    "merge_attention",
    "rnn",
    "rnn_cell",
    "scaled_dot_product_attention",
]
