"""The way past the operators: taken for ordinary tensors, left as soon as a tensor is more than its numbers."""

from __future__ import annotations

import copy
import gc
import pickle
import sys
import threading
import types
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from support import flat, needs_native
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad, profiler
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import fastseq
from fastseq import direct, ops

pytestmark = needs_native

MODES = {
    "rnn_tanh": "RNN",
    "rnn_relu": "RNN",
    "gru": "GRU",
    "gru_reset_before": "GRU",
    "lstm": "LSTM",
    "lstm_coupled": "LSTM",
}


def arguments(cell="lstm", layers=1, shape=(4, 3, 5), hidden=17, dtype=torch.float32, **options):
    """What :func:`infer` and the operator take."""
    more = {"input_forget": True} if cell == "lstm_coupled" else {}
    layer = getattr(fastseq.nn, MODES[cell])(shape[-1], hidden, layers, dtype=dtype, **options, **more)
    weights = [p.detach() for p in layer._flat_weights]
    rows = layers * (2 if options.get("bidirectional") else 1)
    batch = () if len(shape) == 2 else (shape[0 if options.get("batch_first") else 1],)
    h = torch.randn(rows, *batch, options.get("proj_size") or hidden, dtype=dtype)
    c = torch.randn(rows, *batch, hidden, dtype=dtype) if ops.HAS_C[cell] else None
    tail = (cell, layers, bool(options.get("bidirectional")), bool(options.get("batch_first")))
    return [torch.randn(shape, dtype=dtype), h, c, weights, [], *tail]


PLAIN = (0, 0, False, None, None)
"""hidden, outputs, narrow, lengths and reset of a layer that computes with its own weights."""


def infer(x, h, c, weights, scales, cell, layers=1, bidirectional=False, batch_first=False, *sizes):
    """A stack by the native call."""
    layout, sizes = "batch_first" if batch_first else "layer", sizes or (0, 0)
    return direct.infer(
        weights, None, scales, x, h, c, cell, layout, layers, bidirectional, *sizes, *PLAIN[2:]
    )  # fmt: skip


def infer_cell(x, h, c, weights, cell, scales=None, hidden=0):
    """One step of a cell by the native call."""
    names = list(weights) if isinstance(weights, dict) else None
    return direct.infer(weights, names, scales, x, h, c, cell, "cell", 1, False, hidden, hidden, *PLAIN[2:])


def by_operator(args):
    """What the general path gives: the scan's operator, layer by layer."""
    x, h, c, weights, _, cell, num_layers, bidirectional, batch_first = args
    rows = num_layers * (2 if bidirectional else 1)
    width = len(weights) // rows
    options = {"num_layers": num_layers, "bidirectional": bidirectional, "batch_first": batch_first}
    options |= {"has_biases": width >= 4, "backend": "native"}
    if ops.HAS_C[cell]:
        hx = None if h is None else (h, c)
        options["input_forget"] = cell == "lstm_coupled"
        y, last = fastseq.functional.lstm(x, hx, weights, projected=width % 2 == 1, **options)
        return y, *last
    if cell.startswith("gru"):
        return fastseq.functional.gru(x, h, weights, reset_after=cell == "gru", **options)
    return fastseq.functional.rnn(x, h, weights, nonlinearity=cell[4:], **options)


def test_no_question_runs_python():
    assert isinstance(torch._C._len_torch_function_stack, types.BuiltinFunctionType), (
        "an interrupt would be raised in it, and lost"
    )


def test_every_mode_is_noticed_in_every_thread():
    def plain_and_not():
        assert direct.is_plain()
        for name, mode in direct._modes():
            with mode:
                assert not direct.is_plain(), name
        for mode in (torch.no_grad(), torch.inference_mode(), torch.set_grad_enabled(True)):
            with mode:
                assert direct.is_plain()
        with forward_ad.dual_level():
            assert not direct.is_plain()
        inside = []
        torch.func.vmap(lambda x: (inside.append(direct.is_plain()), x)[1])(torch.ones(2))
        torch.func.functionalize(lambda x: (inside.append(direct.is_plain()), x)[1])(torch.ones(2))
        with FakeTensorMode():
            inside.append(direct.is_plain())
        torch.set_autocast_enabled("cuda", True)  # no call of ours on the CPU changes, but it is asked as torch asks
        inside.append(direct.is_plain())
        torch.set_autocast_enabled("cuda", False)
        assert inside == [False] * 4
        assert direct.is_plain()
        return True

    assert plain_and_not()
    with ThreadPoolExecutor(1) as thread:
        assert thread.submit(plain_and_not).result()


def test_it_is_on_with_this_torch():
    assert all(getattr(direct, name) is not None for name in direct._NAMES.split())


def test_a_trial_that_fails_turns_it_off_and_says_which(monkeypatch):
    assert direct.MISSING is None
    with monkeypatch.context() as patched:
        patched.delattr(torch._C, "_dispatch_keys")
        assert "_dispatch_keys" in direct._bind()
    with monkeypatch.context() as patched:
        patched.setattr(torch._C, "_len_torch_function_stack", lambda: 1)
        assert "a thread without any mode is taken" in direct._bind()
    with monkeypatch.context() as patched:
        inference, _ = direct._mode_keys()
        patched.setattr(direct, "_mode_keys", lambda: (inference, 0))
        assert "autocast is taken for another" in direct._bind()
    with monkeypatch.context() as patched:
        patched.setattr(profiler, "_run_on_profiler_start", lambda: None)
        assert "a profile is taken for another" in direct._bind()
    with monkeypatch.context() as patched:
        patched.setattr(direct, "_samples", lambda: ())
        assert "address of a tensor" in direct._bind()
    with monkeypatch.context() as patched:
        patched.setattr(direct, "_IMPL_WORDS", 4)
        assert "dispatch keys" in direct._bind()
    with monkeypatch.context() as patched:
        keys = direct._plain_keys()
        patched.setattr(
            direct, "_plain_keys", lambda: (keys[0], torch._C._dispatch_keys(torch._neg_view(torch.ones(2))).raw_repr())
        )
        assert "more than its numbers" in direct._bind()
    with monkeypatch.context() as patched:
        patched.setattr(direct, "_plain_keys", lambda: (0, 0))
        assert "address and shape" in direct._bind()
    assert direct._bind() is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("cell", MODES)
def test_the_operators_bits(cell, dtype):
    projected = [{"proj_size": 4}] if ops.HAS_C[cell] else []
    for options in ({}, {"bidirectional": True, "batch_first": True}, {"bias": False}, *projected):
        for shape in ((4, 3, 5), (1, 1, 5), (6, 5), (3, 0, 5)):
            if shape == (3, 0, 5) and options.get("batch_first"):
                continue  # no steps
            for layers in (1, 2):
                args = arguments(cell, layers, shape, dtype=dtype, **options)
                for given in (args, [args[0], None, None, *args[3:]]):
                    with torch.no_grad():
                        found = infer(*given)
                    assert found is not None
                    for a, b in zip(found, by_operator(given), strict=True):
                        assert a.shape == b.shape
                        assert a.dtype == b.dtype
                        assert a.stride() == b.stride() or not a.numel()
                        assert torch.equal(a, b)


@pytest.mark.parametrize("cell", MODES)
def test_a_layer_is_its_parameters(cell):
    x, h, c, weights, scales, *shape = arguments(cell, layers=2, bidirectional=True)
    names = [f"w{i}" for i in range(len(weights))]
    parameters = dict(zip(names, weights, strict=True))
    equal = ["".join(name) for name in names]  # equal, not the same
    with torch.no_grad():
        want = infer(x, h, c, weights, scales, *shape)
        tail = (None, x, h, c, shape[0], "layer", *shape[1:3], *PLAIN)
        for given in (names, equal):
            found = direct.infer(parameters, given, *tail)
            assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))
        others = [
            (parameters, names[:-1]),
            (parameters, [*names, "more"]),
            (parameters, [*names[1:], names[0]]),
            (parameters, tuple(names)),
            (parameters, None),
            ({**parameters, "w0": None}, names),
            ({**parameters, "w0": weights[0].double()}, names),
            ({**parameters, "mask": weights[0]}, names),
            (list(parameters.items()), names),
            ({}, []),
        ]
        for given in others:
            assert direct.infer(*given, *tail) is None
        assert direct.infer(parameters, names, *tail[:-1]) is None
    assert direct.infer(parameters, names, *tail) is None, "gradients are on"


@pytest.mark.parametrize("cell", MODES)
def test_a_cell_is_its_parameters(cell):
    x, h, c, weights, *_ = arguments(cell, shape=(1, 3, 5))
    x, h, c = x[0], h[0], None if c is None else c[0]
    parameters = dict(zip(("weight_ih", "weight_hh", "bias_ih", "bias_hh"), weights, strict=True))
    with torch.no_grad():
        for given in (parameters, {**parameters, "bias_ih": None, "bias_hh": None}):
            want = infer_cell(x, h, c, [w for w in given.values() if w is not None], cell)
            found = infer_cell(x, h, c, given, cell)
            assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))
        names = list(parameters)
        tail = (None, x, h, c, cell, "cell", 1, False, *PLAIN)
        for name in names:
            given = {key: value for key, value in parameters.items() if key != name}
            assert direct.infer(given, names, *tail) is None
            assert direct.infer({**parameters, name: None}, names, *tail) is None
        assert direct.infer(parameters, names, *tail[:6], 2, *tail[7:]) is None
        assert direct.infer(parameters, names, *tail[:5], "row", *tail[6:]) is None
    assert direct.infer(parameters, names, *tail) is None, "gradients are on"


def test_results_share_no_memory():
    for cell in MODES:
        x, h, c, *rest = arguments(cell, shape=(1, 2, 5))
        with torch.no_grad():
            found = infer(x, h, c, *rest)
        places = {t.untyped_storage().data_ptr() for t in (*found, x, h, *([] if c is None else [c]))}
        assert len(places) == len(found) + (2 if c is None else 3)


def test_strange_strides():
    x, h, c, *rest = arguments(shape=(6, 3, 5))
    weights = [torch.empty(*w.shape[:-1], 2 * w.shape[-1])[..., ::2].copy_(w) for w in rest[0]]
    odd_h = torch.empty(3, 1, 34)[..., ::2].transpose(0, 1).copy_(h)
    with torch.no_grad():
        found = infer(x.transpose(0, 1).contiguous().transpose(0, 1), odd_h, c, weights, *rest[1:])
    assert all(torch.equal(a, b) for a, b in zip(found, by_operator([x, h, c, *rest]), strict=True))


def test_a_negated_view_is_read_as_what_it_means():
    spectrum = torch.randn(4, 3, 5, dtype=torch.complex64)
    negated = spectrum.conj().imag
    assert negated.is_neg()
    layer = fastseq.nn.GRU(5, 17)
    with torch.no_grad():
        assert torch.equal(layer(negated)[0], layer(negated.resolve_neg())[0])
        one = torch.randn(1, 1, 1, dtype=torch.complex64).conj().imag
        assert one.is_neg()
        small = fastseq.nn.RNN(1, 3)
        assert torch.equal(small(one)[0], small(one.resolve_neg())[0])


def test_tensors_that_are_no_elements_in_memory_take_the_operator():
    layer, cell = fastseq.nn.GRU(5, 17), fastseq.nn.GRUCell(5, 17)
    x = torch.randn(4, 3, 5)
    zeros = torch._efficientzerotensor((4, 3, 5))  # a tangent that forward mode knows to be 0
    assert zeros._is_zerotensor()
    with torch.no_grad():
        assert torch.equal(layer(zeros)[0], layer(torch.zeros(4, 3, 5))[0])
        assert torch.equal(cell(zeros[0]), cell(torch.zeros(3, 5)))
        for strange, key in ((x.to_sparse(), "SparseCPU"), (x.to_mkldnn(), "MkldnnCPU")):
            with pytest.raises(NotImplementedError, match=key):
                layer(strange)
        assert layer(x[:, :0])[0].shape == (4, 0, 17)


class Counting(torch.Tensor):
    pass


class Functions(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


class Dispatch(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


def test_it_declines_whatever_is_not_plain():
    args = arguments()
    x, h, c, weights, *tail = args
    with torch.no_grad():
        assert infer(*args) is not None
        for mode in (Functions(), Dispatch(), torch.autocast("cpu", torch.bfloat16), torch.profiler.profile()):
            with mode:
                assert infer(*args) is None
        assert infer(*args) is not None
        assert torch.func.vmap(lambda x: torch.tensor(infer(x, *args[1:]) is None))(x[None]).all()
        bad = [
            [x.as_subclass(Counting), *args[1:]],
            [x, h, c, [weights[0].as_subclass(Counting), *weights[1:]], *tail],
            [x, h, c, [*weights[:3], None], *tail],
            [x, h, c, weights[:3], *tail],
            [None, *args[1:]],
            [3, *args[1:]],
            [x.double(), *args[1:]],
            [x.to("meta"), *args[1:]],
            [x[0, 0], *args[1:]],
            [x[:0], *args[1:]],
            [x[..., :4], *args[1:]],
            [x, h[..., :4], c, weights, *tail],
            [x, h, c.double(), weights, *tail],
            [x, h, c, weights, [], "elman", *tail[2:]],
            [x, h, c, weights, [], 5, *tail[2:]],
            [x, h, c, weights, [], "lstm", "one", *tail[3:]],
            [x, h, c, weights, [], "lstm", 0, *tail[3:]],
            [x, h, c, weights, [x[0, 0]], *tail[1:]],
            [x, h, c, [w.to(torch.int8) if w.dim() == 2 else w for w in weights], [], *tail[1:]],
            [x, h, c, [w.half() for w in weights], [], *tail[1:]],
        ]
        for given in bad:
            assert infer(*given) is None
        assert infer_cell(x[0], h[0], c[0], weights, "lstm") is not None
        assert infer_cell(x[0], h[0], c[0], [None, *weights[1:]], "lstm") is None
        assert infer_cell(None, h[0], c[0], weights, "lstm") is None
        assert direct.infer() is None
    assert infer(*args) is None, "gradients are on"


def test_a_profiler_sees_the_operator():
    layer, x = fastseq.nn.GRU(5, 17), torch.randn(4, 3, 5)
    with torch.no_grad(), torch.profiler.profile() as profile:
        layer(x)
    assert "fastseq::layers_forward" in {event.key for event in profile.key_averages()}


def test_a_trace_holds_the_operator_not_its_result():
    layer = fastseq.nn.LSTM(5, 17).eval().requires_grad_(False)
    first, second = torch.randn(4, 3, 5), torch.randn(4, 3, 5)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(layer, (first,))
        torch.testing.assert_close(traced(second)[0], layer(second)[0])


def test_a_fake_tensor_passes():
    from torch._subclasses import FakeTensorMode

    layer = fastseq.nn.GRU(5, 17)
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True) as mode:
        y, _ = layer(mode.from_tensor(torch.randn(4, 3, 5)))
    assert y.shape == (4, 3, 17)


def test_swapped_and_replaced_weights_are_seen():
    args, other = arguments(), arguments()
    with torch.no_grad():
        infer(*args)
        for mine, theirs in zip(args[3], other[3], strict=True):
            torch.utils.swap_tensors(mine, theirs)
        other[3].clear()
        gc.collect()
        assert all(torch.equal(a, b) for a, b in zip(infer(*args), by_operator(args), strict=True))
        layer, x = fastseq.nn.RNN(5, 17), torch.randn(4, 3, 5)
        layer(x)
        for name in ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"):
            setattr(layer, name, torch.nn.Parameter(torch.zeros_like(getattr(layer, name))))
        assert not layer(x)[0].any()
        layer.double().weight_ih_l0.fill_(1)
        assert layer(x.double())[0].dtype == torch.float64
        state = {name: torch.zeros_like(p) for name, p in layer.named_parameters()}
        assert not torch.func.functional_call(layer, state, (x.double(),))[0].any()
        assert layer(x.double())[0].any()


def leaves_nothing_behind(rounds, things):
    """Many calls leave neither a reference to what they were given nor new objects."""
    things = [t for t in things if t is not None]  # None is everybody's: its count is not these calls'
    rounds()
    gc.collect()
    counts, objects = [sys.getrefcount(t) for t in things], len(gc.get_objects())
    rounds()
    gc.collect()
    assert [sys.getrefcount(t) for t in things] == counts
    assert len(gc.get_objects()) - objects < 50


def test_nothing_is_left_behind():
    args = arguments()
    names = ["weight_ih", "weight_hh", "bias_ih", "bias_hh"]
    parameters = dict(zip(names, args[3], strict=True))
    with torch.no_grad():

        def rounds():
            for _ in range(300):
                infer(*args)
                infer(args[0].double(), *args[1:])
                direct.infer(parameters, names, None, *args[:3], "lstm", "layer", 1, False, *PLAIN)
                direct.infer(parameters, names[1:], None, *args[:3], "lstm", "layer", 1, False, *PLAIN)
                infer_cell(args[0][0], args[1][0], args[2][0], parameters, "lstm")

        tensors = [args[0], args[1], args[2], *args[3], args[3], names, parameters, *names, "lstm"]
        leaves_nothing_behind(rounds, tensors)


def test_threads_share_a_layer_while_its_weights_are_replaced():
    layer = fastseq.nn.LSTM(64, 128).eval()
    x = torch.randn(60, 2, 64)  # long enough for the interpreter's lock to be let go
    with torch.no_grad():
        want = layer(x)[0]
    wrong: list[str] = []

    def call():
        with torch.no_grad():
            for _ in range(30):
                if not torch.equal(layer(x)[0], want):
                    wrong.append("differs")

    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        for name in ("weight_ih_l0", "weight_hh_l0"):  # same values, fresh objects
            setattr(layer, name, torch.nn.Parameter(getattr(layer, name).detach().clone()))
    assert not wrong


def test_copies_of_a_used_layer():
    layer, x = fastseq.nn.GRU(5, 17), torch.randn(4, 3, 5)
    with torch.no_grad():
        want = layer(x)[0]
        for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert all(torch.equal(a, b) for a, b in zip(flat(twin(x)), flat(layer(x)), strict=True))
            layer.weight_hh_l0.mul_(2)
            assert torch.equal(twin(x)[0], want)
            layer.weight_hh_l0.div_(2)


@pytest.mark.parametrize("direct_too", [True, False])
@pytest.mark.parametrize("kind", ["RNN", "LSTM", "GRUCell", "LSTMCell"])
def test_tangents_go_on_without_gradients(kind, direct_too, monkeypatch):
    ours, theirs = (getattr(of, kind)(5, 7).double() for of in (fastseq.nn, torch.nn))
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn((3, 5) if "Cell" in kind else (4, 3, 5), dtype=torch.float64)
    if not direct_too:
        for name in direct._NAMES.split():
            monkeypatch.setattr(direct, name, direct._decline)

    def tangent(layer):
        with torch.no_grad(), forward_ad.dual_level():
            found = layer(forward_ad.make_dual(x, x.cos()))
            return forward_ad.unpack_dual(found if kind == "GRUCell" else found[0]).tangent

    torch.testing.assert_close(tangent(ours), tangent(theirs))


def calls_of(kept):
    """Calls that read one tensor each, by name; ``kept`` makes of an ordinary tensor the one that is read."""

    def layer(name, place):
        module = getattr(fastseq.nn, name)(4, 6)
        cell = name.endswith("Cell")
        shape = (3, 6) if cell else (1, 3, 6)
        state = [torch.randn(shape), torch.randn(shape)]
        given = torch.randn(3, 4) if cell else torch.randn(5, 3, 4)
        if place == "input":
            given = kept(given)
        elif place == "state":
            state[0] = kept(state[0])
        elif place == "memory":
            state[1] = kept(state[1])
        else:
            parameter = torch.nn.Parameter(kept(getattr(module, place).detach()), requires_grad=False)
            setattr(module, place, parameter)
        return lambda: module(given, tuple(state) if name.startswith("LSTM") else state[0])

    def attend(place, **options):
        given = {n: torch.randn(2, 2, 5, 4) for n in "qkv"} | {"bias": torch.randn(2, 2, 5, 5)}
        given[place] = kept(given[place])
        return lambda: fastseq.attention(**given, **options)

    def multihead(place, **options):
        module = fastseq.nn.MultiheadAttention(8, 2, **options)
        given = [torch.randn(5, 3, 8) for _ in range(3)]
        if place in ("query", "key", "value"):
            n = ("query", "key", "value").index(place)
            given[n] = kept(given[n])
        else:
            owner = module.out_proj if place.startswith("out_proj") else module
            name = place.removeprefix("out_proj.")
            setattr(owner, name, torch.nn.Parameter(kept(getattr(owner, name).detach()), requires_grad=False))
        return lambda: module(*given)

    found = {}
    for name in ("RNN", "GRU", "LSTM", "RNNCell", "GRUCell", "LSTMCell"):
        weights = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        own = weights if name.endswith("Cell") else [f"{w}_l0" for w in weights]
        for place in ("input", "state", *("memory",) * name.startswith("LSTM"), *own):
            found[f"{name}-{place}"] = layer(name, place)
    for place in ("q", "k", "v", "bias"):
        found[f"attention-{place}"] = attend(place)
        found[f"attention-lse-{place}"] = attend(place, return_lse=True)
    for place in ("query", "key", "value", "in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias"):
        found[f"MultiheadAttention-{place}"] = multihead(place)
        found[f"MultiheadAttention-batch-first-{place}"] = multihead(place, batch_first=True)
    return found


def freed(x):
    x = x.clone()
    x.untyped_storage().resize_(0)
    return x


def shortened(x):
    x = x.clone()
    x.untyped_storage().resize_(x.nbytes - 4)
    return x


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("kind", [freed, shortened])
def test_a_tensor_without_its_memory_is_refused(kind, grad):
    for name, call in calls_of(kind).items():
        if kind is shortened and name.startswith("MultiheadAttention"):
            continue  # torch's own product reads those, and looks for freed memory only
        with torch.set_grad_enabled(grad), pytest.raises(RuntimeError, match=r"memory|storage|allocated"):
            print(name, call())


@pytest.mark.parametrize("grad", [True, False])
def test_a_tensor_on_the_meta_device_beside_others_is_refused(grad):
    for name, call in calls_of(lambda x: x.to("meta")).items():
        with torch.set_grad_enabled(grad), pytest.raises(RuntimeError, match="meta"):
            print(name, call())


def zero_slice(x):
    return torch._efficientzerotensor((2, *x.shape), dtype=x.dtype)[1]


def negated(x):
    return torch._neg_view(x)


def imaginary(x):
    """x as the imaginary part of a conjugate, whose negative bit is set, and whose only stride of note is 1."""
    pair = torch.complex(torch.zeros_like(x), -x).conj()
    return pair.imag


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("kind", [zero_slice, negated, imaginary])
def test_a_tensor_that_is_more_than_its_numbers_is_read_as_torch_does(kind, grad):
    torch.manual_seed(0)
    calls = calls_of(kind)
    torch.manual_seed(0)
    plain = calls_of(lambda x: kind(x).clone())
    for name, call in calls.items():
        with torch.set_grad_enabled(grad):
            for a, b in zip(flat(call()), flat(plain[name]()), strict=True):
                torch.testing.assert_close(a, b, msg=name)
