"""A packed batch takes memory by its rows, however much its sequences differ in length; its results are torch.nn's."""

from __future__ import annotations

import os
import random
import subprocess
import sys

import pytest
import torch
from support import BACKENDS, DTYPES, assert_within_budget, flat, needs_native
from test_recurrent_layers import IDS, LAYERS, gradients, initial, twins
from torch.nn.utils.rnn import PackedSequence, pack_sequence

import fastseq
from fastseq.recurrent import packed

SKEWED = {
    "one long": [120, *[2] * 9],
    "two long, unsorted": [3, 90, 3, 1, 3, 88, 3, 2, 1, 1, 1, 1],
    "halves": [64, 32, 16, 8, 4, 2, 1],
    "long and even": [70, *[3] * 30],
}


def parts_of(batch: PackedSequence) -> int:
    return len(packed.cut(batch.data, batch.batch_sizes))


@pytest.fixture
def _cut_early(monkeypatch):
    """Batches that a test can afford are cut as large ones are."""
    monkeypatch.setattr(packed, "FEW_ROWS", 4)


def skewed(lengths: list[int], dtype=torch.float64) -> PackedSequence:
    batch = pack_sequence([torch.randn(n, 5, dtype=torch.float64) for n in lengths], enforce_sorted=False)
    return PackedSequence(batch.data.to(dtype).requires_grad_(), *batch[1:])


@pytest.mark.usefixtures("_cut_early")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", [{}, {"bidirectional": True, "num_layers": 2}], ids=str)
@pytest.mark.parametrize("lengths", SKEWED.values(), ids=SKEWED)
@pytest.mark.parametrize(("name", "kwargs"), LAYERS, ids=IDS)
def test_a_skewed_pack_is_torch_nn_in_value_and_gradient(name, kwargs, lengths, layout, backend):
    ours, theirs = twins(name, 5, 7, **layout, **kwargs)
    batch = skewed(lengths)
    assert parts_of(batch) > 1
    given = initial(ours, len(lengths))
    starts = [s.requires_grad_() for s in flat(given)]
    for hx in (None, given):
        inputs = [batch.data] if hx is None else [batch.data, *starts]
        with fastseq.use_backend(backend):
            y, *last = ours(batch, hx)
            mine = [y.data, *flat(last)]
            mine_grads = gradients(ours, mine, *inputs)
        z, *last = theirs(batch, hx)
        assert torch.equal(y.batch_sizes, z.batch_sizes)
        assert torch.equal(y.unsorted_indices, z.unsorted_indices)
        expected = [z.data, *flat(last)]
        for a, b in zip([*mine, *mine_grads], [*expected, *gradients(theirs, expected, *inputs)], strict=True):
            torch.testing.assert_close(a, b)


@needs_native
@pytest.mark.usefixtures("_cut_early")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("name", "kwargs"), LAYERS, ids=IDS)
def test_a_skewed_pack_is_as_exact_as_torch(name, kwargs, dtype):
    ours, theirs = twins(name, 5, 7, dtype=dtype, **kwargs)
    _, truth = twins(name, 5, 7, **kwargs)
    truth.load_state_dict(ours.state_dict())
    batch = skewed(SKEWED["one long"], dtype)
    assert parts_of(batch) > 1
    exact = PackedSequence(batch.data.detach().double().requires_grad_(), *batch[1:])
    results = []
    for layer, given in ((ours, batch), (theirs, batch), (truth, exact)):
        y, *last = layer(given)
        values = [y.data, *flat(last)]
        results.append([*values, *gradients(layer, values, given.data)])
    for a, b, c in zip(*results, strict=True):
        assert_within_budget(a, b, c)


@pytest.mark.usefixtures("_cut_early")
@pytest.mark.parametrize("backend", ["reference", pytest.param("native", marks=needs_native)])
def test_all_states_of_a_skewed_pack_are_those_of_each_sequence_alone(backend):
    lstm = fastseq.nn.LSTM(5, 7, num_layers=2, bidirectional=True).double()
    sequences = [torch.randn(n, 5).double() for n in SKEWED["two long, unsorted"]]
    with fastseq.use_backend(backend):
        y, _, c = lstm(pack_sequence(sequences, enforce_sorted=False), return_all_states=True)
        alone = [lstm(x, return_all_states=True) for x in sequences]
    for own, values in ((0, y), (2, c)):
        expected = pack_sequence([a[own] for a in alone], enforce_sorted=False)
        torch.testing.assert_close(values.data, expected.data)


@needs_native
@pytest.mark.usefixtures("_cut_early")
def test_dropout_between_layers_acts_on_every_part():
    ours, theirs = twins("GRU", 5, 7, num_layers=2, dropout=1.0)
    batch = skewed(SKEWED["halves"])
    torch.testing.assert_close(ours(batch)[0].data, theirs(batch)[0].data)


@needs_native
@pytest.mark.usefixtures("_cut_early")
@pytest.mark.parametrize(("name", "kwargs"), LAYERS, ids=IDS)
def test_second_derivatives_of_a_skewed_pack(name, kwargs):
    layer = getattr(fastseq.nn, name)(
        2, 3, bidirectional=True, **{**kwargs, **({"proj_size": 2} if "proj_size" in kwargs else {})}
    )
    layer = layer.double()
    batch = pack_sequence([torch.randn(n, 2).double() for n in (9, 1, 1, 1)])
    assert parts_of(batch) > 1

    def last(data):
        y, state = layer(PackedSequence(data, *batch[1:]))
        return y.data.sin(), *flat(state)

    data = batch.data.clone().requires_grad_()
    if kwargs.get("nonlinearity") != "relu":  # which has no second derivative where it bends
        assert torch.autograd.gradgradcheck(last, data)
    assert torch.autograd.gradcheck(last, data, check_forward_ad=True)


@needs_native
@pytest.mark.usefixtures("_cut_early")
@pytest.mark.parametrize("kind", SKEWED)
def test_torch_func_differentiates_a_pack(kind):
    lstm = fastseq.nn.LSTM(5, 7, bidirectional=True).double()
    batch = skewed(SKEWED[kind])

    def loss(parameters, data):
        packed = PackedSequence(data, *batch[1:])
        return torch.func.functional_call(lstm, parameters, (packed,))[0].data.square().sum()

    parameters, data = dict(lstm.named_parameters()), batch.data.clone().requires_grad_()
    expected = torch.autograd.grad(loss(parameters, data), [*parameters.values(), data])
    found, of_data = torch.func.grad(loss, argnums=(0, 1))(parameters, data)
    for a, b in zip([*found.values(), of_data], expected, strict=True):
        torch.testing.assert_close(a, b)


def test_parts_are_padded_to_twice_their_rows_at_most():
    draw = random.Random(0)
    for _ in range(300):
        longest = draw.choice([1, 5, 50, 500])
        power = draw.choice([0.3, 1, 4, 20])
        lengths = sorted((1 + int(longest * draw.random() ** power) for _ in range(draw.randint(1, 200))), reverse=True)
        sizes = torch.tensor([sum(n > step for n in lengths) for step in range(lengths[0])])
        rows = int(sizes.sum())
        parts = packed.cut(torch.empty(rows, 0), sizes)
        assert torch.equal(torch.cat([part.batch_sizes for part in parts]), sizes)
        assert [part.rows for part in parts] == [int(part.batch_sizes.sum()) for part in parts]
        padded = sum(part.batch_sizes.shape[0] * int(part.batch_sizes[0]) for part in parts)
        assert padded <= 2 * (rows + packed.FEW_ROWS), lengths
        assert all(part.even == (part.batch_sizes[0] == part.batch_sizes[-1]) for part in parts)


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux for the memory of a process, in KiB")
@needs_native
@pytest.mark.parametrize(
    "layer", ["LSTM(64, 128)", "GRU(64, 128, 2, bidirectional=True)", "LSTM(64, 128, proj_size=64)"]
)
def test_training_on_a_skewed_pack_takes_memory_by_its_rows(layer):
    """1,508 rows of about 10 KiB each in training, for one layer and direction; padded they would be 128,000."""
    code = f"""
import resource, torch, fastseq
from torch.nn.utils.rnn import pack_sequence

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024

layer = fastseq.nn.{layer}
def train(lengths):
    batch = pack_sequence([torch.randn(n, 64) for n in lengths])
    batch.data.requires_grad_()
    layer(batch)[0].data.sum().backward()

train([3, 2])  # what is loaded and kept at the first call
before = peak()
train([1000] + [4] * 127)
print(peak() - before)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=240, check=False, env={**os.environ}
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 200, f"training took {done.stdout.strip()} MiB more"


@pytest.mark.parametrize(
    ("batch_sizes", "kwargs", "message"),
    [
        ([2, 3, 1], {}, "must not grow"),
        ([3, 2], {}, "add up to the input's 6 rows"),
        ([4, 2, 0], {}, "must end with at least 1"),
        ([3.0, 2.0, 1.0], {}, "int64"),
        ([3, 2, 1], {"lengths": torch.tensor([3])}, "in place of lengths and reset"),
    ],
)
def test_batch_sizes_that_do_not_fit_are_refused(batch_sizes, kwargs, message):
    weights = list(fastseq.nn.GRU(5, 7)._parameters.values())
    with pytest.raises(ValueError, match=message):
        fastseq.functional.gru(torch.randn(6, 5), None, weights, batch_sizes=torch.tensor(batch_sizes), **kwargs)


def test_batch_sizes_need_a_packed_input():
    weights = list(fastseq.nn.GRU(5, 7)._parameters.values())
    with pytest.raises(ValueError, match="input must be packed"):
        fastseq.functional.gru(torch.randn(3, 2, 5), None, weights, batch_sizes=torch.tensor([2, 2, 2]))
    with pytest.raises(TypeError, match="batch_sizes must be an int64 Tensor"):
        fastseq.functional.gru(torch.randn(6, 5), None, weights, batch_sizes=[3, 2, 1])


def test_the_functional_form_takes_a_packs_data():
    gru = fastseq.nn.GRU(5, 7)
    batch = pack_sequence([torch.randn(n, 5) for n in (4, 3, 1)])
    y, h_n = fastseq.functional.gru(batch.data, None, list(gru.parameters()), batch_sizes=batch.batch_sizes)
    expected, last = gru(batch)
    torch.testing.assert_close(y, expected.data)
    torch.testing.assert_close(h_n, last)
