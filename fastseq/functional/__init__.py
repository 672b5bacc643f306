"""The layers as functions: documented, checked, and sent to the backend that should run them."""

from fastseq.functional.recurrent import gru, gru_cell, lstm, lstm_cell, rnn, rnn_cell

__all__ = ["gru", "gru_cell", "lstm", "lstm_cell", "rnn", "rnn_cell"]
