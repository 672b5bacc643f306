"""fastseq.patch(weights=): inference reads smaller copies of the weights; everything else is as it was."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from support import flat, needs_native
from test_direct import infer, infer_cell
from torch import nn

import fastseq
from fastseq.nn.compressed import KINDS, compress

pytestmark = needs_native

LAYERS = [
    ("RNN", {"nonlinearity": "relu"}),
    ("RNN", {}),
    ("GRU", {}),
    ("GRU", {"reset_after": False}),
    ("LSTM", {}),
    ("LSTM", {"proj_size": 9}),
    ("LSTM", {"input_forget": True}),
    ("LSTM", {"input_forget": True, "proj_size": 9}),
]
CELLS = [
    ("RNNCell", {}),
    ("GRUCell", {}),
    ("GRUCell", {"reset_after": False}),
    ("LSTMCell", {}),
    ("LSTMCell", {"input_forget": True}),
]
LAYOUTS = [{}, {"num_layers": 2, "bidirectional": True, "batch_first": True}, {"bias": False}]


def plain(weight, kind):
    """A weight as its copy means it, in its own dtype."""
    copied, scale = compress(weight, kind)
    return copied.to(weight.dtype) * (1 if scale is None else scale[:, None])


def meant(layer, kind):
    """A twin in float64 whose weights are what the copies mean."""
    twin = copy.deepcopy(layer)
    with torch.no_grad():
        for parameter in twin.parameters():
            if parameter.dim() == 2:
                parameter.copy_(plain(parameter, kind))
    return twin.double()


def state_of(layer, shape):
    lstm = "LSTM" in type(layer).__name__
    hidden = layer.hidden_size
    if isinstance(layer, nn.RNNCellBase):
        h, c = (torch.randn(*shape[:-1], hidden) for _ in range(2))
    else:
        rows = layer.num_layers * (2 if layer.bidirectional else 1)
        batch = () if len(shape) == 2 else (shape[0 if layer.batch_first else 1],)
        h, c = torch.randn(rows, *batch, layer.proj_size or hidden), torch.randn(rows, *batch, hidden)
    return (h, c) if lstm else h


def double(state):
    return tuple(s.double() for s in state) if isinstance(state, tuple) else state.double()


def assert_close_to_meaning(layer, kind, shapes):
    fastseq.patch(layer, weights=kind)
    truth, full = meant(layer, kind), copy.deepcopy(layer)
    full._compressed = None
    for shape in shapes:
        x, state = torch.randn(shape), state_of(layer, shape)
        with torch.no_grad():
            for hx in (None, state):
                want = flat(truth(x.double(), None if hx is None else double(hx)))
                for y, t, other in zip(flat(layer(x, hx)), want, flat(full(x, hx)), strict=True):
                    assert y.dtype == torch.float32
                    torch.testing.assert_close(y.double(), t, rtol=2e-5, atol=2e-5)
                    assert y.numel() < 50 or not torch.equal(y, other), "the copies were not read"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize(("name", "kwargs"), LAYERS, ids=str)
def test_a_layer_computes_with_what_its_copies_mean(name, kwargs, layout, kind, isa):
    for features, hidden in ((17, 33), (64, 128)):
        layer = getattr(fastseq.nn, name)(features, hidden, **kwargs, **layout)
        assert_close_to_meaning(layer, kind, [(1, 1, features), (3, features), (5, 3, features), (4, 40, features)])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("name", "kwargs"), CELLS, ids=str)
def test_a_cell_computes_with_what_its_copies_mean(name, kwargs, kind, isa):
    for features, hidden in ((17, 33), (64, 300)):
        cell = getattr(fastseq.nn, name)(features, hidden, **kwargs)
        assert_close_to_meaning(cell, kind, [(features,), (1, features), (3, features), (40, features)])


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_work_split_among_threads(kind, threads):
    torch.set_num_threads(threads)
    for name, kwargs in LAYERS:
        layer = getattr(fastseq.nn, name)(300, 257, **kwargs)
        assert_close_to_meaning(layer, kind, [(1, 1, 300), (3, 2, 300), (2, 33, 300)])


def test_the_copies_are_as_near_as_their_format_allows():
    weight = torch.randn(65, 129) * torch.logspace(-6, 6, 65)[:, None]
    weight[3] = 0
    assert torch.equal(plain(weight, "bfloat16"), weight.bfloat16().float())
    rounded, scale = compress(weight, "int8")
    assert scale is not None
    assert rounded.dtype == torch.int8
    assert rounded.abs().amax(1)[weight.any(1)].eq(127).all()
    error = (rounded.double() * scale.double()[:, None] - weight.double()).abs()
    assert (error <= 0.5001 * scale.double()[:, None]).all()
    assert not error[3].any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["RNN", "GRU", "LSTM", "RNNCell", "GRUCell", "LSTMCell"])
def test_training_reads_the_weights_themselves(name, kind):
    plain_layer = getattr(nn, name)(5, 7)
    layer = copy.deepcopy(plain_layer)
    fastseq.patch(layer, weights=kind)
    x = torch.randn(3, 5)
    expected, found = flat(plain_layer(x)), flat(layer(x))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
    for a, b in zip(
        torch.autograd.grad(found[0].sum(), list(layer.parameters())),
        torch.autograd.grad(expected[0].sum(), list(plain_layer.parameters())),
        strict=True,
    ):
        torch.testing.assert_close(a, b)
    assert layer.state_dict().keys() == plain_layer.state_dict().keys()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["GRU", "LSTMCell"])
def test_the_copies_follow_their_weights(name, kind):
    layer = getattr(fastseq.nn, name)(5, 17)
    fastseq.patch(layer, weights=kind)
    x = torch.randn(3, 5)

    def fresh():
        twin = pickle.loads(pickle.dumps(layer))
        with torch.no_grad():
            return flat(twin(x))

    def assert_follows():
        with torch.no_grad():
            assert all(torch.equal(a, b) for a, b in zip(flat(layer(x)), fresh(), strict=True))

    assert_follows()
    before = fresh()[0]
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    flat(layer(x))[0].sum().backward()
    optimizer.step()
    assert_follows()
    assert not torch.equal(fresh()[0], before)
    layer.load_state_dict({key: torch.randn_like(value) for key, value in layer.state_dict().items()})
    assert_follows()
    first = next(name for name, _ in layer.named_parameters())
    shape = getattr(layer, first).shape
    for _ in range(3):  # freed and made again: the same address may come back
        delattr(layer, first)
        setattr(layer, first, nn.Parameter(torch.randn(shape)))
        assert_follows()
    layer.double()
    with torch.no_grad():
        assert flat(layer(x.double()))[0].dtype == torch.float64
    layer.float()
    assert_follows()
    with torch.inference_mode():
        twin = getattr(fastseq.nn, name)(5, 17)  # without version counters
        fastseq.patch(twin, weights=kind)
        assert flat(twin(x))[0].isfinite().all()


class WritesThroughData(torch.optim.Optimizer):
    """As many outside torch do."""

    def __init__(self, parameters, lr):
        super().__init__(parameters, {"lr": lr})

    def step(self):
        for parameter in self.param_groups[0]["params"]:
            parameter.data.sub_(parameter.grad, alpha=self.param_groups[0]["lr"])


@pytest.mark.parametrize("whose", ["the layer's parameters", "the storage that they share"])
@pytest.mark.parametrize(
    "optimizer",
    [
        WritesThroughData,
        lambda parameters, lr: torch.optim.SGD(parameters, lr, fused=True),
        lambda parameters, lr: torch.optim.Adam(parameters, lr, fused=True),
    ],
    ids=["data", "fused SGD", "fused Adam"],
)
@pytest.mark.parametrize("name", ["GRU", "LSTMCell"])
def test_the_copies_follow_optimizers_that_leave_versions_alone(name, optimizer, whose):
    layer = getattr(fastseq.nn, name)(5, 17)
    parameters = list(layer.parameters())
    if whose != "the layer's parameters":
        whole = nn.Parameter(torch.cat([p.detach().flatten() for p in parameters]))
        for parameter, part in zip(parameters, whole.detach().split([p.numel() for p in parameters]), strict=True):
            parameter.data = part.view(parameter.shape)
        whole.grad = torch.ones_like(whole)
    fastseq.patch(layer, weights="bfloat16")
    step = optimizer(parameters if whose == "the layer's parameters" else [whole], lr=0.1).step
    x = torch.randn(3, 5)
    flat(layer(x))[0].sum().backward()
    with torch.no_grad():
        before = flat(layer(x))  # after the gradient, before the step
        versions = [p._version for p in parameters]
        step()
        assert [p._version for p in parameters] == versions
        found = flat(layer(x))
        for a, b, c in zip(found, flat(copy.deepcopy(layer)(x)), before, strict=True):
            assert torch.equal(a, b)
            assert not torch.equal(a, c)


@pytest.mark.parametrize("name", ["GRU", "LSTMCell"])
def test_copies_of_inference_tensors_follow_load_state_dict(name):
    with torch.inference_mode():
        layer = getattr(fastseq.nn, name)(5, 17)
        fastseq.patch(layer, weights="int8")
        x = torch.randn(3, 5)
        before = flat(layer(x))[0]
        layer.load_state_dict({key: 2 * value for key, value in layer.state_dict().items()})
        assert not torch.equal(flat(layer(x))[0], before)
        assert torch.equal(flat(layer(x))[0], flat(copy.deepcopy(layer)(x))[0])


def test_an_optimizer_of_other_weights_leaves_copies_alone():
    layer, other = fastseq.nn.GRU(5, 17), nn.Linear(5, 17)
    fastseq.patch(layer, weights="int8")
    x = torch.randn(3, 5)
    with torch.no_grad():
        layer(x)
    made = layer._compressed._made
    other(x).sum().backward()
    torch.optim.Adam(other.parameters(), fused=True).step()
    assert layer._compressed._made is made


def test_copies_of_a_layer_have_their_own():
    layer = fastseq.nn.GRU(5, 17)
    fastseq.patch(layer, weights="int8")
    x = torch.randn(4, 2, 5)
    with torch.no_grad():
        want = layer(x)[0]
        for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert torch.equal(twin(x)[0], want)
            twin.weight_hh_l0.zero_()
            assert not torch.equal(twin(x)[0], want)
    assert torch.equal(layer(x)[0].detach(), fastseq.functional.gru(x, None, layer._flat_weights)[0].detach())


@pytest.mark.parametrize("kind", KINDS)
def test_patch_reports_and_unpatch_restores(kind):
    model = nn.ModuleDict(
        {"a": nn.LSTM(5, 7), "b": nn.GRU(5, 7).double(), "c": nn.GRUCell(5, 7), "d": nn.MultiheadAttention(8, 2)}
    )
    names = {name: set(vars(module)) for name, module in model.items()}
    x = torch.randn(3, 5)
    with torch.no_grad():
        before = model["a"](x)[0]
        report = fastseq.patch(model, weights=kind)
        assert f"2 layers with {kind} weights in inference; 1 layer not, having no float32 weights" in str(report)
        assert f"weights='{kind}' in inference" in repr(model["a"])
        assert not torch.equal(model["a"](x)[0], before)
        assert not fastseq.patch(model)  # None leaves what is there
        assert f"weights='{kind}' in inference" in repr(model["a"])
        fastseq.unpatch(model)
        assert torch.equal(model["a"](x)[0], before)
    assert {name: set(vars(module)) for name, module in model.items()} == names


def test_the_general_ways_read_the_weights_themselves():
    layer = fastseq.nn.GRU(5, 17)
    x, lengths = torch.randn(4, 2, 5), torch.tensor([4, 4])
    with torch.no_grad():
        full = layer(x)[0]
        fastseq.patch(layer, weights="int8")
        assert not torch.equal(layer(x)[0], full)
        torch.testing.assert_close(layer(x, lengths=lengths)[0], full)
        with fastseq.use_backend("torch"):
            torch.testing.assert_close(layer(x)[0], full)
        torch.testing.assert_close(torch.compile(layer, backend="eager")(x)[0], full)


@torch.no_grad()
def test_weights_that_cannot_be_read_are_declined():
    w = [p.detach() for p in fastseq.nn.GRU(5, 17).parameters()]
    pack = torch.ops.fastseq.pack_weights
    small = [pack(p.to(torch.int8), 3, 0) if p.dim() == 2 else p for p in w]
    half = [pack(p.to(torch.bfloat16), 3, 0) if p.dim() == 2 else p for p in w]
    x, scale = torch.randn(3, 2, 5), torch.ones(51)
    y = infer(x, None, None, small, [scale, scale], "gru", 1, False, False, 17, 17)[0]
    assert y.shape == (3, 2, 17)
    step = infer_cell(x[0], None, None, small, "gru", [scale, scale], 17)[0]
    torch.testing.assert_close(step, y[0])
    sizes = (17, 17)
    bad = [
        (x, small, [], sizes),
        (x, small, [scale], sizes),
        (x, small, [scale, scale[:-1]], sizes),
        (x, small, [scale, scale.double()], sizes),
        (x, half, [scale, scale], sizes),
        (x, [half[0], small[1], *w[2:]], [], sizes),
        (x, [half[0], *w[1:]], [], sizes),
        (x, [w[0], half[1], *w[2:]], [], sizes),
        (x, [*half[:2], w[2].bfloat16(), w[3]], [], sizes),
        (x.double(), half, [], sizes),
        (x.bfloat16(), small, [scale, scale], sizes),
        (x, half, [], ()),
        (x, half, [], (33, 17)),
        (x, half, [], (17, 33)),
        (x[:, :, :4], [half[0][:3], *half[1:]], [], sizes),
        (x, [half[0].mT, *half[1:]], [], sizes),
        (x, w, [], sizes),
        (x, [p.to(torch.bfloat16) if p.dim() == 2 else p for p in w], [], sizes),
    ]
    for given, weights, scales, hidden_and_outputs in bad:
        arguments = (given, None, None, weights, scales, "gru", 1, False, False, *hidden_and_outputs)
        assert infer(*arguments) is None
    assert infer_cell(x[0], None, None, small, "gru", None, 17) is None
    assert infer_cell(x[0], None, None, half, "gru") is None
    for wrong in (w[0], torch.zeros(50, 5, dtype=torch.int8), torch.zeros(51, dtype=torch.int8)):
        with pytest.raises(RuntimeError, match="pack_weights"):
            pack(wrong, 3, 0)


@pytest.mark.parametrize(("dtype", "word"), [(torch.bfloat16, 2), (torch.int8, 4)], ids=str)
@pytest.mark.parametrize(("hidden", "columns"), [(1, 1), (17, 5), (33, 64)])
def test_packed_weights_lie_as_documented(hidden, columns, dtype, word, isa):
    for gates, apart in ((1, 0), (4, 0), (2, 1)):
        weight = torch.randint(-127, 128, (columns, (gates + apart) * hidden)).to(dtype).T  # column-major
        packed = torch.ops.fastseq.pack_weights(weight, gates, apart)
        lanes = packed.shape[1]
        vectors, words = -(-hidden // lanes), -(-columns // word)
        expected = torch.zeros(gates + apart, vectors * lanes, words * word, dtype=dtype)
        expected[:, :hidden, :columns] = weight.reshape(gates + apart, hidden, columns)
        parts = [
            part.reshape(-1, vectors, lanes, words, word).permute(1, 3, 0, 2, 4).flatten(0, 2)
            for part in expected.split([gates, apart])
        ]
        assert torch.equal(packed, torch.cat(parts))


def test_copies_follow_the_instruction_set():
    layer = fastseq.nn.LSTM(5, 17)
    fastseq.patch(layer, weights="bfloat16")
    x = torch.randn(3, 2, 5)
    found = {}
    with torch.no_grad():
        for name in ("baseline", "auto", "baseline"):
            isa = torch.ops.fastseq.native_isa(name)
            y = layer(x)[0]
            assert torch.equal(found.setdefault(isa, y), y)
            torch.testing.assert_close(y, found["baseline"], rtol=1e-5, atol=1e-6)
    full = torch.nn.LSTM(5, 17)
    full.load_state_dict(layer.state_dict())
    with torch.no_grad():
        assert not torch.equal(full(x)[0], y), "the copies were not read"


def test_a_change_is_noticed():
    layer = fastseq.nn.GRU(5, 17, num_layers=2)
    fastseq.patch(layer, weights="bfloat16")
    x = torch.randn(3, 2, 5)
    copies = layer._compressed
    assert copies.nbytes == 0
    changes = [
        lambda: layer.weight_hh_l1.mul_(2),
        lambda: setattr(layer.weight_ih_l0, "data", torch.randn_like(layer.weight_ih_l0)),
        lambda: setattr(layer, "weight_ih_l1", nn.Parameter(torch.randn(51, 17))),
        lambda: layer.load_state_dict({k: torch.randn_like(v) for k, v in layer.state_dict().items()}),
        lambda: layer.bias_hh_l1.add_(1),
        lambda: torch.ops.fastseq.native_isa("baseline"),
    ]
    with torch.no_grad():
        before = layer(x)[0]
        for change in changes:
            made = copies._made
            assert torch.equal(layer(x)[0], before)
            assert copies._made is made, "made again without a change"
            change()
            before = layer(x)[0]
            assert copies._made is not made
            assert torch.equal(before, copy.deepcopy(layer)(x)[0])
        size = sum(p.numel() * 2 for p in layer.parameters() if p.dim() == 2)
        assert size <= copies.nbytes <= 1.5 * size + 4096


def test_copies_wait_until_they_are_of_use():
    layer = fastseq.nn.GRU(5, 17)
    fastseq.patch(layer, weights="int8")
    x = torch.randn(3, 2, 5)
    layer(x)
    with torch.no_grad():
        torch.func.vmap(layer)(x[None])
        with torch.autocast("cpu"):
            layer(x)
        with fastseq.use_backend("torch"):
            layer(x)
        assert layer._compressed.nbytes == 0
        layer(x)
    assert layer._compressed.nbytes > 0


@pytest.mark.parametrize(
    ("dtype", "kind"), [(torch.bfloat16, "bfloat16"), (torch.int8, "int8"), (torch.qint8, "int8")], ids=str
)
def test_a_dtype_names_the_weights_too(dtype, kind):
    layer = torch.nn.LSTM(3, 4)
    fastseq.patch(layer, weights=dtype)
    assert f"weights={kind!r}" in repr(layer)
    with pytest.raises(ValueError, match=r"weights: got torch\.float16"):
        fastseq.patch(layer, weights=torch.float16)
