"""Attention and MultiheadAttention past the operators: the same numbers, and left as soon as a tensor is more than
its numbers."""

from __future__ import annotations

import copy

import pytest
import torch
from support import fast_paths, needs_native
from test_direct import Counting, Dispatch, Functions, leaves_nothing_behind
from torch.autograd import forward_ad
from torch.nn.utils import parametrize, prune

import fastseq
from fastseq import ArgumentError, direct, use_backend
from fastseq.attn.call import AttentionCall

pytestmark = needs_native

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def heads(batch, heads_q, queries, dim, dtype=torch.float32):
    """``[B, H, T, D]``, laid out as a projection leaves it: heads beside each other in a row."""
    return torch.randn(batch, queries, heads_q, dim, dtype=dtype).transpose(1, 2)


def by_operator(q, k, v, bias, mask, settings):
    bias, mask = (x if x is None else x.reshape((1,) * (4 - x.dim()) + x.shape) for x in (bias, mask))
    scale, causal, bottom_right, window, softcap, _ = settings
    left, right = window or (-1, -1)
    call = AttentionCall(
        q, k, v, bias, mask, scale=q.shape[-1] ** -0.5 if scale is None else scale, causal=causal,
        bottom_right=bottom_right, window_left=left, window_right=right, softcap=softcap,
    )  # fmt: skip
    return torch.ops.fastseq.attention_forward.native(*call)[0]


def call(queries=5, keys=7, dtype=torch.float32, heads_k=4, dim=16, dim_v=16, batch=2, **options):
    """Arguments of ``direct.attend``."""
    given = {"scale": None, "causal": False, "bottom_right": True, "window": None, "softcap": 0.0, "grouped": True}
    pairs = [options.pop(name, None) for name in ("bias", "mask")]
    q, k = heads(batch, 4, queries, dim, dtype), heads(batch, heads_k, keys, dim, dtype)
    return [q, k, heads(batch, heads_k, keys, dim_v, dtype), *pairs, tuple({**given, **options}.values())]


OPTIONS = {
    "plain": {},
    "causal": {"causal": True},
    "top left": {"causal": True, "bottom_right": False},
    "window": {"window": (3, -1)},
    "both limits": {"window": (2, 1), "causal": True},
    "softcap": {"softcap": 3.0},
    "whole numbers": {"softcap": 2, "scale": 1},
    "negative scale": {"scale": -0.3},
    "not grouped": {"grouped": False},
    "grouped": {"heads_k": 2},
    "Dv": {"dim_v": 9, "dim": 24},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_attention_has_the_operators_bits(options, dtype):
    for queries, keys in ((1, 1), (5, 7), (1, 70), (70, 70), (70, 3)):
        args = call(queries, keys, dtype, **options)
        with torch.no_grad():
            found = direct.attend(*args)
        assert found is not None
        assert torch.equal(found, by_operator(*args))
        assert found.stride() == by_operator(*args).stride()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bias_and_mask_of_every_broadcast_shape(dtype):
    for shape in ((2, 4, 5, 7), (2, 1, 1, 7), (1, 4, 5, 1), (4, 5, 7), (5, 7), (1, 7), (7,), (), (1, 1, 1, 1)):
        bias = torch.randn(shape[::-1]).permute(tuple(reversed(range(len(shape)))))
        mask = bias > -0.5
        for given in ({"bias": bias.to(dtype)}, {"bias": bias}, {"mask": mask}, {"bias": bias, "mask": mask}):
            args = call(dtype=dtype, **given)
            with torch.no_grad():
                found = direct.attend(*args)
            assert found is not None
            assert torch.equal(found, by_operator(*args))


def test_a_row_that_sees_no_key_gives_0():
    mask = torch.ones(5, 7, dtype=torch.bool)
    mask[2] = False
    with torch.no_grad():
        o = direct.attend(*call(mask=mask))
    assert not o[:, :, 2].any()
    assert o[:, :, 1].all()


def test_attention_declines_whatever_is_not_plain():
    args = call()
    q, k, v, bias, mask, settings = args
    with torch.no_grad():
        assert direct.attend(*args) is not None
        for mode in (Functions(), Dispatch(), torch.autocast("cpu", torch.bfloat16), torch.profiler.profile()):
            with mode:
                assert direct.attend(*args) is None
        assert torch.func.vmap(lambda q: torch.tensor(direct.attend(q, *args[1:]) is None))(q[None]).all()
        bad = [
            [q.as_subclass(Counting), *args[1:]],
            [None, *args[1:]],
            [3, *args[1:]],
            [q, k.double(), *args[2:]],
            [q.to("meta"), *args[1:]],
            [q.to_sparse(), *args[1:]],
            [q[0], k[0], v[0], *args[3:]],
            [q[:1], *args[1:]],
            [q[:0], k[:0], v[:0], *args[3:]],
            [q, k[:, :, :0], v[:, :, :0], *args[3:]],
            [q, k[..., :8], *args[2:]],
            [q, k[:, :3], v[:, :3], *args[3:]],
            [q, k[:, :2], *args[2:]],
            [q, k, v[:, :, :3], *args[3:]],
            [q[..., ::2], k[..., ::2], *args[2:]],
            [q, k[:, :2], v[:, :2], bias, mask, (*settings[:5], False)],
            [q.long(), k.long(), v.long(), *args[3:]],
            [q, k, v, torch.randn(5, 6), mask, settings],
            [q, k, v, torch.randn(1, 2, 4, 5, 7), mask, settings],
            [q, k, v, torch.randn(5, 7).double(), mask, settings],
            [q, k, v, torch.ones(5, 7, dtype=torch.bool), mask, settings],
            [q, k, v, bias, torch.ones(5, 7), settings],
            [q, k, v, bias, torch.ones(5, 6, dtype=torch.bool), settings],
            call(scale=float("nan")),
            call(scale=torch.tensor(1.0)),
            call(causal=1),
            call(bottom_right=None),
            *(call(window=window) for window in ((3,), (3, -2), (True, 1), [3, 1], 3)),
            call(softcap=-1.0),
            call(softcap=float("inf")),
            [*args[:5], settings[:-1]],
            [*args[:5], None],
            args[:-1],
            [],
        ]
        for given in bad:
            assert direct.attend(*given) is None
        if direct.attend(q.conj(), *args[1:]) is not None:  # of real numbers that is the tensor itself
            assert q.conj() is q


def spied(monkeypatch, *names):
    """A list of the functions of ``direct`` that did not decline, as they are called from now on."""
    calls: list[str] = []

    def spy(name, real):
        def call(*args):
            found = real(*args)
            if found is not None:
                calls.append(name)
            return found

        return call

    for name in names:
        monkeypatch.setattr(direct, name, spy(name, getattr(direct, name)))
    return calls


@pytest.fixture
def taken(monkeypatch):
    """Calls of inference that took the fast path, as they go."""
    return spied(monkeypatch, "attend", "attend_kept", "multihead")


def caches(k, v):
    """A cache of each layout with these keys and values."""
    for options in ({}, {"page_size": 3}, {"window": 5}, {"dtype": torch.int8}, {"dtype": torch.int8, "page_size": 4}):
        cache = fastseq.KVCache(*k.shape[:2], k.shape[3], dim_v=v.shape[3], **options)
        cache.append(k, v)
        yield cache


def test_who_takes_the_short_way(taken):
    q, k, v = call()[:3]
    layer, x = fastseq.nn.MultiheadAttention(16, 4, dropout=0.5), torch.randn(5, 2, 16)
    every = (
        lambda: fastseq.attention(q, k, v),
        lambda: fastseq.attention(q, k, v, bias=torch.randn(5, 7), causal=True, window=(2, 0), softcap=2.0, scale=0.1),
        lambda: fastseq.attention(q, k, v, sinks=torch.randn(4), bias=torch.randn(2, 4, 5, 7)),
        lambda: fastseq.scaled_dot_product_attention(q, k, v),
        lambda: fastseq.scaled_dot_product_attention(q, k[:, :2], v[:, :2], enable_gqa=True, is_causal=True),
        lambda: fastseq.scaled_dot_product_attention(q, k, v, torch.ones(5, 7, dtype=torch.bool)),
        lambda: fastseq.attention(q, k, v, lengths_k=torch.tensor([7, 2]), lengths_q=torch.tensor([0, 5])),
        *(lambda c=c: fastseq.attention(q, cache=c, causal=True) for c in caches(k, v)),
        lambda: layer.eval()(x, x, x),
    )
    not_one = (
        lambda: fastseq.attention(q, k, v, dropout_p=0.5),
        lambda: fastseq.attention(q, k, v, return_lse=True),
        lambda: fastseq.attention(q, k, v, lengths_k=torch.tensor([7, 2], dtype=torch.int32)),
        lambda: fastseq.attention(q, k, v, alibi_slopes=torch.rand(4)),
        lambda: fastseq.attention(q, k, v, backend="reference"),
        lambda: fastseq.scaled_dot_product_attention(q, k, v, dropout_p=0.5),
        lambda: fastseq.scaled_dot_product_attention(q[0], k[0], v[0]),
        lambda: layer.train()(x, x, x),
    )
    with torch.no_grad():
        for number, f in enumerate(every):
            f()
            assert len(taken) == number + 1
        with use_backend("native"):
            every[0]()
        assert len(taken) == len(every) + 1
        taken.clear()
        for f in not_one:
            f()
        for name in ("reference", "torch"):
            with use_backend(name):
                for f in every[:1] + every[3:]:  # torch has no softcap and no sinks
                    f()
        assert "runs on: native " in fastseq.explain(*every[:1])
        assert not taken
        assert "runs on: native " in fastseq.explain(every[-1])
        assert taken == ["multihead"], "only the native call can tell whether it takes the arguments"
        taken.clear()
    for f in every:
        f()
    assert "multihead" not in taken, "gradients are on"


@pytest.mark.parametrize("grad", [False, True])
def test_a_cache_is_read_the_same_both_ways(grad):
    q, k, v = call()[:3]
    for cache in caches(k, v):
        q.requires_grad_(grad)
        with torch.set_grad_enabled(grad):
            for options in ({}, {"softcap": 3.0, "scale": 0.2}, {"sinks": torch.randn(4)}):
                fast = fastseq.attention(q, cache=cache, causal=True, **options)
                with fast_paths(required=False):
                    slow = fastseq.attention(q, cache=cache, causal=True, **options)
                assert torch.equal(fast, slow)
                assert fast.stride() == slow.stride()
                assert fast.requires_grad == slow.requires_grad == grad


def test_what_a_cache_or_lengths_cannot_be_is_said():
    q, k, v = call()[:3]
    with torch.no_grad():
        for match, options in {
            "lengths_k must": {"lengths_k": torch.tensor([8, 2])},
            "lengths_q must": {"lengths_q": torch.tensor([5, -1])},
            "lengths_k": {"lengths_k": torch.tensor([3])},
            "lengths_k is missing": {"block_table": torch.zeros(2, 2, dtype=torch.int32)},
            "sinks": {"sinks": torch.randn(3)},
        }.items():
            with pytest.raises(ArgumentError, match=match):
                fastseq.attention(q, k, v, **options)
        pools = k.transpose(1, 2), v.transpose(1, 2)
        for page in (2, -1):
            table = torch.full((2, 2), page, dtype=torch.int32)
            with pytest.raises(ArgumentError, match="block_table must name pages"):
                fastseq.attention(q, *pools, block_table=table, lengths_k=torch.tensor([1, 1]))
        cache = fastseq.KVCache(2, 4, 16)
        cache.append(k, k)
        with pytest.raises(ArgumentError, match="features"):
            fastseq.attention(q[..., :8], cache=cache)
        with pytest.raises(ArgumentError):
            fastseq.attention(q[:1], cache=cache)


def test_errors_stay_what_they_are():
    q, k, v = call()[:3]
    with torch.no_grad():
        for match, options in {
            "window must be a pair": {"window": 3},
            "align must be": {"align": "middle"},
            "scale must be a finite": {"scale": float("nan")},
            "softcap must be": {"softcap": -1.0},
            "mask": {"mask": torch.ones(4, 7, dtype=torch.bool)},
        }.items():
            with pytest.raises(ArgumentError, match=match):
                fastseq.attention(q, k, v, **options)
        with pytest.raises(ArgumentError, match="enable_gqa"):
            fastseq.scaled_dot_product_attention(q, k[:, :2], v[:, :2])
        mask = torch.ones(5, 7, dtype=torch.bool)
        with pytest.raises(ArgumentError, match="attn_mask must not be given with is_causal"):
            fastseq.scaled_dot_product_attention(q, k, v, mask, is_causal=True)
        layer, x = fastseq.nn.MultiheadAttention(16, 4), torch.randn(5, 2, 16)
        with pytest.raises(ArgumentError, match="features"):
            layer(x[..., :3], x, x)
        with pytest.raises(ArgumentError, match="same batch"):
            layer(x, x[:, :1], x[:, :1])
        with pytest.raises(ArgumentError, match="key_padding_mask must be"):
            layer(x, x, x, key_padding_mask=torch.zeros(2, 4, dtype=torch.bool))


LAYERS = {
    "plain": {},
    "batch first": {"batch_first": True},
    "no bias": {"bias": False, "batch_first": True},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("of", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("inputs", ["one", "two", "three", "unbatched"])
def test_a_layer_is_its_slow_way(inputs, of, dtype, taken, monkeypatch):
    layer = fastseq.nn.MultiheadAttention(24, 4, dtype=dtype, **of).eval()
    torch.nn.init.normal_(layer.out_proj.weight, std=0.3)
    if layer.in_proj_bias is not None:
        torch.nn.init.normal_(layer.in_proj_bias), torch.nn.init.normal_(layer.out_proj.bias)
    queries, keys, batch = 6, 6 if inputs == "one" else 9, 3
    lay = (lambda t: (t, 24)) if inputs == "unbatched" else (
        (lambda t: (batch, t, 24)) if of.get("batch_first") else (lambda t: (t, batch, 24))
    )  # fmt: skip
    x, y, z = torch.randn(lay(queries), dtype=dtype), *torch.randn(2, *lay(keys), dtype=dtype)
    given = {"one": (x, x, x), "two": (x, y, y), "three": (x, y, z), "unbatched": (x, y, y)}[inputs]
    alone = inputs == "unbatched"
    padding = torch.rand(*(() if alone else (batch,)), keys) < 0.3
    pairs = torch.rand((1 if alone else batch) * 4, queries, keys) < 0.3
    weighed = dtype in (torch.float32, torch.float64)
    tolerance = {torch.float64: 1e-12, torch.float32: 2e-5, torch.float16: 1e-2, torch.bfloat16: 6e-2}[dtype]
    for options in (
        {},
        {"is_causal": True},
        {"key_padding_mask": padding},
        {"key_padding_mask": torch.randn(padding.shape).to(dtype)},
        {"attn_mask": pairs},
        {"attn_mask": torch.randn(queries, keys).to(dtype), "key_padding_mask": padding},
        {"attn_mask": torch.ones(queries, keys, dtype=torch.bool).triu(1), "is_causal": True},
    ):
        for need, average in ((False, True), (True, True), (True, False)):
            options |= {"need_weights": need, "average_attn_weights": average}
            taken.clear()
            with torch.no_grad():
                found, weights = layer(*given, **options)
            assert ("multihead" in taken) == (weighed or not need)
            with torch.no_grad(), monkeypatch.context() as away:
                away.setattr(direct, "multihead", direct._decline)
                want, want_weights = layer(*given, **options)
            torch.testing.assert_close(found, want, rtol=tolerance, atol=tolerance)
            assert found.is_contiguous()
            assert (weights is None) == (want_weights is None) == (not need)
            if need:
                torch.testing.assert_close(weights, want_weights, rtol=tolerance, atol=tolerance)


def test_many_keys_have_their_weights_the_slow_way(taken):
    layer = fastseq.nn.MultiheadAttention(8, 2, batch_first=True).eval()
    with torch.no_grad():
        for keys, short in ((256, True), (257, False)):
            x = torch.randn(2, keys, 8)
            taken.clear()
            _, weights = layer(x, x, x)
            assert bool(taken) == short
            torch.testing.assert_close(weights.sum(-1), torch.ones(2, keys))
            want = torch.nn.MultiheadAttention.forward(layer, x, x, x)[1]
            torch.testing.assert_close(weights, want)


def test_layers_that_are_no_plain_layer_take_the_slow_way(taken):
    x, y = torch.randn(5, 2, 16), torch.randn(7, 2, 12)
    make = fastseq.nn.MultiheadAttention
    plain = make(16, 4).eval()
    with torch.no_grad():
        plain(x, x, x)
        assert taken.pop()
        other = make(16, 4).eval()
        del other.in_proj_weight
        other.in_proj_weight = torch.randn(48, 16)  # no parameter any more
        pruned = make(16, 4).eval()
        pruned.out_proj.weight = torch.nn.Parameter(torch.randn(10, 16))
        pruned.out_proj.bias = torch.nn.Parameter(torch.randn(10))
        masked, bent = (make(16, 4, add_bias_kv=True).eval() for _ in range(2))  # whose bias_k is a parameter no more
        prune.random_unstructured(masked, "bias_k", 0.5)
        parametrize.register_parametrization(bent, "bias_k", torch.nn.Softsign())
        mixed = make(16, 4).eval()
        mixed.out_proj.double()
        for layer, given in (
            (make(16, 4, add_bias_kv=True).eval(), (x, x, x)),
            (make(16, 4, add_zero_attn=True).eval(), (x, x, x)),
            (make(16, 4, kdim=12, vdim=12).eval(), (x, y, y)),
            (make(16, 4, dropout=0.5), (x, x, x)),
            (other, (x, x, x)),
            (masked, (x, x, x)),
            (bent, (x, x, x)),
            (pruned, (x, x, x)),
            (plain, (x.transpose(0, 1).contiguous().transpose(0, 1),) * 3),
            (plain, (x[:, :0],) * 3),
            (plain, (x.as_subclass(Counting),) * 3),
        ):
            layer(*given, need_weights=False)
            assert "multihead" not in taken
        with pytest.raises(RuntimeError):
            mixed(x, x, x, need_weights=False)
        for mode in (Functions(), Dispatch(), torch.autocast("cpu", torch.bfloat16), torch.profiler.profile()):
            with mode:
                plain(x, x, x, need_weights=False)
                assert "multihead" not in taken
        assert torch.func.vmap(lambda x: plain(x, x, x, need_weights=False)[0])(torch.stack([x, x])).shape[0] == 2
        assert "multihead" not in taken
    plain(x, x, x, need_weights=False)
    assert "multihead" not in taken, "gradients are on"


def test_replaced_weights_are_seen():
    layer, x = fastseq.nn.MultiheadAttention(16, 4).eval(), torch.randn(5, 2, 16)
    with torch.no_grad():
        first = layer(x, x, x)[0]
        layer.out_proj.weight = torch.nn.Parameter(torch.zeros(16, 16))
        assert torch.equal(layer(x, x, x)[0], layer.out_proj.bias.expand(5, 2, 16))
        state = {"out_proj.bias": torch.ones(16)}
        assert torch.equal(torch.func.functional_call(layer, state, (x, x, x))[0], torch.ones(5, 2, 16))
        twin = copy.deepcopy(layer)
        twin.in_proj_weight.mul_(2)
        twin.out_proj.weight.normal_()
        assert not torch.equal(twin(x, x, x)[0], first)
        assert layer.double()(*[x.double()] * 3)[0].dtype == torch.float64


def test_nothing_is_left_behind():
    args = call(mask=torch.ones(5, 7, dtype=torch.bool))
    layer, x = fastseq.nn.MultiheadAttention(16, 4).eval(), torch.randn(5, 2, 16)
    own, out = layer._parameters, layer.out_proj._parameters
    with torch.no_grad():

        def rounds():
            for _ in range(300):
                direct.attend(*args)
                direct.attend(args[0].double(), *args[1:])
                direct.multihead(own, out, x, x, x, None, None, 4, False, False, True, True)
                direct.multihead(own, out, x, x, x, None, None, 4, False, False, True, False)
                direct.multihead(own, out, x, x, x, None, None, 4, False, False, False, True)
                direct.multihead(own, own, x, x, x, None, None, 4, False, False, False, True)
                direct.multihead(own, out, x, x, x, None, None, 5, False, False, False, True)

        leaves_nothing_behind(rounds, [*args[:5], x, own, out, *own.values(), *out.values()])


def test_results_share_no_memory():
    layer, x = fastseq.nn.MultiheadAttention(16, 4).eval(), torch.randn(5, 2, 16)
    with torch.no_grad():
        for average in (True, False):
            found = [t for _ in range(2) for t in layer(x, x, x, average_attn_weights=average)]
            assert len({t.untyped_storage().data_ptr() for t in (*found, x)}) == 5


def test_tangents_go_on_without_gradients():
    q, k, v = call(dtype=torch.float64)[:3]
    ours, theirs = (of.MultiheadAttention(16, 4, dtype=torch.float64) for of in (fastseq.nn, torch.nn))
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(5, 2, 16, dtype=torch.float64)

    def tangent(f, x):
        with torch.no_grad(), forward_ad.dual_level():
            return forward_ad.unpack_dual(f(forward_ad.make_dual(x, x.cos()))).tangent

    for need in (False, True):
        want = tangent(lambda x: theirs(x, x, x)[0], x)  # with weights: torch's fused kernel has no forward mode
        torch.testing.assert_close(tangent(lambda x, need=need: ours(x, x, x, need_weights=need)[0], x), want)
    want = tangent(lambda q: torch.softmax(q @ k.mT / 4, -1) @ v, q)
    for f in (fastseq.attention, fastseq.scaled_dot_product_attention):
        torch.testing.assert_close(tangent(lambda q, f=f: f(q, k, v), q), want)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_pass_in_silence(capfd):
    layer, x = fastseq.nn.MultiheadAttention(16, 4, batch_first=True).eval(), torch.randn(2, 5, 16)
    with torch.no_grad():
        nested = torch.nested.nested_tensor(list(x))
        found = layer(nested, nested, nested, need_weights=False)[0]
        torch.testing.assert_close(found.to_padded_tensor(0.0), layer(x, x, x, need_weights=False)[0])
        heads = torch.nested.nested_tensor(list(x.view(2, 1, 5, 16)))
        found = fastseq.scaled_dot_product_attention(heads, heads, heads)
        torch.testing.assert_close(found.to_padded_tensor(0.0), fastseq.scaled_dot_product_attention(*[x[:, None]] * 3))
    assert capfd.readouterr().err == ""
