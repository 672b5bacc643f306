"""The oracle of attention against an independent formula, against torch, and against its own promises."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from attention_support import calls
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastseq.attn.random import keep_mask, philox
from fastseq.attn.reference import attention, attention_weights

F64 = torch.float64


def draw(*shape, requires_grad=False):
    return torch.randn(*shape, dtype=F64).requires_grad_(requires_grad)


def formula(q, k, v, *, scale, bias=None, mask=None, sinks=None, alibi_slopes=None, lengths_q=None, lengths_k=None,
            prefix_lengths=None, causal=False, bottom_right=True, window_left=-1, window_right=-1,
            softcap=0.0):  # fmt: skip
    """The definition, one query at a time, in numpy."""
    batch, heads, queries, _ = q.shape
    keys, group = k.shape[2], heads // k.shape[1]
    o, lse = np.zeros((batch, heads, queries, v.shape[3])), np.full((batch, heads, queries), -np.inf)
    for b, h in itertools.product(range(batch), range(heads)):
        rows = queries if lengths_q is None else int(lengths_q[b])
        columns = keys if lengths_k is None else int(lengths_k[b])
        shift = columns - rows if bottom_right else 0
        for i in range(rows):
            logits, values = [], []
            for j in range(columns):
                score = scale * float(q[b, h, i] @ k[b, h // group, j])
                score = softcap * math.tanh(score / softcap) if softcap > 0 else score
                score += 0.0 if bias is None else bias[b, h, i, j]
                score -= 0.0 if alibi_slopes is None else float(alibi_slopes[h]) * abs(i + shift - j)
                seen = not causal or j <= i + shift
                seen = seen and (window_left < 0 or j >= i + shift - window_left)
                seen = seen and (window_right < 0 or j <= i + shift + window_right)
                seen = seen or (prefix_lengths is not None and j < prefix_lengths[b])
                seen = seen and (mask is None or mask[b, h, i, j])
                if seen and score > -np.inf:
                    logits.append(score)
                    values.append(v[b, h // group, j])
            every = logits + ([] if sinks is None else [sinks[h]])
            if every:
                top = max(every)
                lse[b, h, i] = top + math.log(sum(math.exp(x - top) for x in every))
            for score, value in zip(logits, values, strict=True):
                o[b, h, i] += math.exp(score - lse[b, h, i]) * value
    return o, lse


@given(calls())
@hypothesis_settings(max_examples=150)
def test_reference_is_the_formula(call):
    q, k, v, options = call
    o, lse = attention(q, k, v, **options)
    want_o, want_lse = formula(
        *(x.numpy() for x in (q, k, v)),
        **{n: x.numpy() if isinstance(x, torch.Tensor) else x for n, x in options.items()},
    )
    np.testing.assert_allclose(o.numpy(), want_o, rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(lse.numpy(), want_lse, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(("masked", "causal"), [("none", False), ("none", True), ("bool", False), ("float", False)])
def test_reference_agrees_with_torch_in_value_and_gradient(masked, causal):
    inputs = [draw(2, 6, 5, 4, requires_grad=True), *(draw(2, 3, 7, 4, requires_grad=True) for _ in range(2))]
    mask = torch.rand(2, 1, 5, 7) < 0.6
    mask[..., 0] = True
    bias = draw(6, 5, 7, requires_grad=True)
    extra = {"none": {}, "bool": {"mask": mask}, "float": {"bias": bias}}[masked]
    o, _ = attention(*inputs, scale=0.5, causal=causal, bottom_right=False, **extra)
    with sdpa_kernel(SDPBackend.MATH):
        want = F.scaled_dot_product_attention(
            *inputs, attn_mask=next(iter(extra.values()), None), is_causal=causal, scale=0.5, enable_gqa=True
        )
    torch.testing.assert_close(o, want)
    wanted = [*inputs, bias] if masked == "float" else inputs
    for got, truth in zip(
        torch.autograd.grad(o.sin().sum(), wanted), torch.autograd.grad(want.sin().sum(), wanted), strict=True
    ):
        torch.testing.assert_close(got, truth)


def test_derivatives_to_the_second_order():
    inputs = [draw(2, 2, 3, 2, requires_grad=True), draw(2, 1, 4, 2, requires_grad=True)]
    inputs += [draw(2, 1, 4, 3, requires_grad=True), draw(1, 2, 3, 4, requires_grad=True), draw(2, requires_grad=True)]
    mask = torch.rand(2, 1, 3, 4) < 0.7
    options = {"scale": 0.7, "causal": True, "window_left": 2, "softcap": 2.0, "dropout_p": 0.2}

    def f(q, k, v, bias, sinks):
        return attention(q, k, v, bias=bias, sinks=sinks, mask=mask, seed=torch.tensor([5]), **options)

    assert torch.autograd.gradcheck(f, inputs)
    assert torch.autograd.gradgradcheck(f, inputs)


def test_row_that_sees_nothing_is_zero_and_has_zero_derivatives_to_the_second_order():
    q, k, v = (draw(1, 1, 3, 2, requires_grad=True) for _ in range(3))
    mask = torch.tensor([[True, True, False], [False, False, False], [False, True, True]])
    for extra in ({"mask": mask}, {"bias": torch.zeros(3, 3, dtype=F64).masked_fill(~mask, -math.inf)}):
        o, lse = attention(q, k, v, scale=1.0, **extra)
        assert torch.equal(o[0, 0, 1], torch.zeros(2, dtype=F64))
        assert lse[0, 0, 1] == -math.inf
        first = torch.autograd.grad(o.square().sum(), (q, k, v), create_graph=True)
        assert torch.equal(first[0][0, 0, 1], torch.zeros(2, dtype=F64))
        for second in torch.autograd.grad(sum(g.square().sum() for g in first), (q, k, v)):
            assert second.isfinite().all()
        assert torch.autograd.gradgradcheck(
            lambda q, k, v, extra=extra: attention(q, k, v, scale=1.0, **extra)[0], (q, k, v)
        )


def test_sink_is_one_more_logit_that_carries_no_value():
    q, k, v, sinks = draw(2, 3, 4, 5), draw(2, 3, 6, 5), draw(2, 3, 6, 5), draw(3)
    o, lse = attention(q, k, v, scale=0.4, sinks=sinks)
    plain, plain_lse = attention(q, k, v, scale=0.4)
    torch.testing.assert_close(lse, torch.logaddexp(plain_lse, sinks[None, :, None]))
    torch.testing.assert_close(o, plain * torch.exp(plain_lse - lse)[..., None])
    blind, blind_lse = attention(q, k, v, scale=0.4, sinks=sinks, mask=torch.zeros(1, dtype=torch.bool))
    assert torch.equal(blind, torch.zeros_like(blind))
    torch.testing.assert_close(blind_lse, sinks[None, :, None].expand_as(blind_lse))


@pytest.mark.parametrize("bottom_right", [False, True])
def test_packed_batch_is_its_sequences_one_by_one(bottom_right):
    lengths_q, lengths_k = [3, 0, 5, 1], [4, 2, 3, 0]
    cu_q, cu_k = (F.pad(torch.tensor(n).cumsum(0), (1, 0)).to(torch.int32) for n in (lengths_q, lengths_k))
    q, k, v = draw(10, 4, 3), draw(10, 2, 3), draw(10, 2, 5)  # one row of each belongs to no sequence
    options = {"scale": 0.6, "causal": True, "bottom_right": bottom_right, "alibi_slopes": torch.rand(4)}
    o, lse = attention(q, k, v, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, **options)
    for b in range(4):
        rows, columns = slice(cu_q[b], cu_q[b + 1]), slice(cu_k[b], cu_k[b + 1])
        parts = (x.transpose(0, 1)[None] for x in (q[rows], k[columns], v[columns]))
        want_o, want_lse = attention(*parts, **options)
        torch.testing.assert_close(o[rows], want_o[0].transpose(0, 1))
        torch.testing.assert_close(lse[:, rows], want_lse[0])
    assert torch.equal(o[9], torch.zeros(4, 5, dtype=F64))
    assert (lse[:, 9] == -math.inf).all()


def test_padding_is_never_met_even_where_it_is_nan():
    lengths_q, lengths_k = torch.tensor([2, 4]), torch.tensor([5, 1])
    clean = [draw(2, 2, 4, 3), draw(2, 1, 5, 3), draw(2, 1, 5, 2)]
    dirty = [x.clone() for x in clean]
    for b in range(2):
        dirty[0][b, :, lengths_q[b] :] = math.nan
        dirty[1][b, :, lengths_k[b] :] = math.nan
        dirty[2][b, :, lengths_k[b] :] = math.nan
    results = []
    for inputs in (clean, dirty):
        inputs = [x.requires_grad_() for x in inputs]
        o, lse = attention(*inputs, scale=0.5, lengths_q=lengths_q, lengths_k=lengths_k, causal=True)
        results.append([o, lse, *torch.autograd.grad(o.sin().sum(), inputs)])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_weights_are_what_multiplies_v():
    q, k, v = draw(2, 4, 3, 5), draw(2, 2, 6, 5), draw(2, 2, 6, 5)
    options = {"scale": 0.3, "causal": True, "dropout_p": 0.3, "seed": torch.tensor([7])}
    weights = attention_weights(q, k, **options)
    torch.testing.assert_close(weights @ v.repeat_interleave(2, 1), attention(q, k, v, **options)[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_are_computed_in_float32_and_rounded_once(dtype):
    q, k, v = (torch.randn(2, 3, 40, 16).to(dtype) for _ in range(3))
    o, lse = attention(q, k, v, scale=0.25)
    wide_o, wide_lse = attention(q.float(), k.float(), v.float(), scale=0.25)
    assert torch.equal(o, wide_o.to(dtype))
    assert torch.equal(lse, wide_lse)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(attention(q, k, v, scale=0.25)[0], o)


KNOWN = [  # "philox4x32 10" of the known answers that come with Random123
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN)
def test_philox_gives_the_known_answers(counter, key, answer):
    words = philox(*(tuple(torch.tensor(int(w, 16)) for w in text.split()) for text in (counter, key)))
    assert " ".join(f"{int(w):08x}" for w in words) == answer


def test_dropout_bit_is_a_pure_function_of_seed_and_place():
    def bits(seed, b, h, i, j):
        place = (torch.as_tensor(x, dtype=torch.int64) for x in (b, h, i, j))
        return keep_mask(torch.tensor([seed]), 0.4, *place)

    b, h, i, j = (torch.arange(n).view([-1 if a == d else 1 for a in range(4)]) for d, n in enumerate((2, 3, 5, 11)))
    whole = bits(2**40 + 9, b, h, i, j)
    for place in [(0, 0, 0, 0), (1, 2, 4, 10), (0, 1, 3, 7)]:
        assert whole[place] == bits(2**40 + 9, *place)
        words = philox(
            tuple(torch.tensor(x) for x in (place[3] // 4, place[2], place[1], place[0])),
            (torch.tensor(9), torch.tensor(2**8)),
        )
        assert bool(whole[place]) == (int(words[place[3] % 4]) >= int(0.4 * 2**32))
    assert not torch.equal(whole, bits(2**41 + 9, b, h, i, j))
    wide = bits(3, 0, 0, torch.arange(300)[:, None], torch.arange(300))
    assert abs(wide.double().mean().item() - 0.6) < 5 * (0.4 * 0.6 / 90000) ** 0.5


def test_dropout_scales_what_it_keeps_and_leaves_lse():
    q, k, v = draw(1, 2, 5, 3), draw(1, 2, 8, 3), torch.eye(8, dtype=F64).expand(1, 2, 8, 8)
    plain, lse = attention(q, k, v, scale=1.0)
    dropped, dropped_lse = attention(q, k, v, scale=1.0, dropout_p=0.25, seed=torch.tensor([1]))
    assert torch.equal(lse, dropped_lse)
    kept = dropped != 0
    assert 0 < kept.sum() < kept.numel()
    torch.testing.assert_close(dropped[kept], plain[kept] / 0.75)
    none, _ = attention(q, k, v, scale=1.0, dropout_p=1.0, seed=torch.tensor([1]))
    assert torch.equal(none, torch.zeros_like(none))


@pytest.mark.parametrize("causal", [False, True])
def test_a_window_as_wide_as_an_integer_is_no_limit(causal):
    q, k, v = draw(1, 2, 5, 3), draw(1, 2, 8, 3), draw(1, 2, 8, 3)
    widest = 2**63 - 1
    for wide, same in (((widest, widest), (-1, -1)), ((2, widest), (2, -1)), ((widest, 1), (-1, 1))):
        results = [
            attention(q, k, v, scale=1.0, causal=causal, window_left=left, window_right=right)
            for left, right in (wide, same)
        ]
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
