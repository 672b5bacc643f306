"""A user's program, for the type checker: what public names take and return. `make lint` checks it, nothing runs it."""

from typing import assert_type

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

import fastseq

x = torch.randn(5, 3, 8)
packed = pack_sequence([x[0]])

rnn = fastseq.nn.RNN(8, 16, 2, "relu", dropout=0.1, device="cpu", dtype=torch.float32)
assert_type(rnn(x), tuple[Tensor, Tensor])
gru = fastseq.nn.GRU(8, 16, num_layers=2, batch_first=True, bidirectional=True, reset_after=False)
assert_type(gru(x, None, lengths=torch.tensor([5, 2, 4])), tuple[Tensor, Tensor])
assert_type(gru(packed), tuple[PackedSequence, Tensor])
lstm = fastseq.nn.LSTM(8, 16, proj_size=4)
y, (h, c) = lstm(x, reset=torch.zeros(5, 3, dtype=torch.bool))
assert_type(y, Tensor)
assert_type(c, Tensor)
assert_type(lstm(x, (h, c), return_all_states=True), tuple[Tensor, tuple[Tensor, Tensor], Tensor])
assert_type(lstm(packed)[0], PackedSequence)
assert_type(fastseq.nn.GRUCell(8, 16, reset_after=False)(x[0]), Tensor)
assert_type(fastseq.nn.LSTMCell(8, 16)(x[0]), tuple[Tensor, Tensor])
assert_type(fastseq.nn.MultiheadAttention(8, 2)(x, x, x), tuple[Tensor, Tensor | None])

q = torch.randn(2, 4, 5, 16)
assert_type(fastseq.attention(q, q, q, causal=True, window=(3, 0)), Tensor)
assert_type(fastseq.attention(q, q, q, return_lse=True, softcap=30.0), tuple[Tensor, Tensor])
assert_type(fastseq.scaled_dot_product_attention(q, q, q, is_causal=True), Tensor)

model = nn.Sequential(nn.Linear(8, 8), nn.LSTM(8, 16))
report = fastseq.patch(model, weights="int8", functional=True)
assert_type(report, fastseq.Report)
assert_type([change.name for change in report.changed], list[str])
with fastseq.use_backend("native"):
    assert_type(fastseq.explain(model, x), str)

fastseq.nn.GRU(8, 16, hidden=3)  # type: ignore[arg-type]
fastseq.attention(q, q, q, is_causal=True)  # type: ignore[call-overload]
lstm(x, h)  # type: ignore[call-overload]
