"""What users of torch's attention take for granted, beside its numbers: autocast, inputs changed in place, distributed
contexts, a quick import, and explanations that hold."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from support import BACKENDS, needs_native
from torch import nn

import fastseq
from fastseq import attention, scaled_dot_product_attention, use_backend
from fastseq.nn import MultiheadAttention

HALVES = [torch.bfloat16, torch.float16]


def layers(*args, **options):
    """torch's layer and ours with the same weights."""
    theirs, ours = nn.MultiheadAttention(*args, **options), MultiheadAttention(*args, **options)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


# --- autocast ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask_dtype", [*HALVES, torch.float32], ids=str)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_takes_a_mask_of_any_floating_dtype(backend, dtype, mask_dtype):
    q, mask = torch.randn(2, 4, 9, 16), torch.randn(9, 9).to(mask_dtype)
    with use_backend(backend), torch.autocast("cpu", dtype=dtype):
        theirs = F.scaled_dot_product_attention(q, q, q, attn_mask=mask)
        found = [scaled_dot_product_attention(q, q, q, attn_mask=mask), attention(q, q, q, bias=mask)]
    for o in found:
        assert o.dtype == theirs.dtype == dtype
        torch.testing.assert_close(o, theirs, rtol=0.05, atol=0.05)


@needs_native
def test_autocast_takes_sinks_and_slopes_of_the_other_half():
    q, per_head = torch.randn(2, 4, 9, 16), torch.rand(4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for name in ("sinks", "alibi_slopes"):
            half = per_head.half()
            got = attention(q, q, q, **{name: half})
            assert got.dtype == torch.bfloat16
            assert torch.equal(got, attention(q, q, q, **{name: half.float()}))


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("mask_dtype", [*HALVES, torch.float32], ids=str)
def test_autocast_of_the_layer_takes_masks_of_any_floating_dtype(mask_dtype, need_weights):
    theirs, ours = layers(16, 4)
    x = torch.randn(9, 2, 16)
    masks = {"attn_mask": torch.randn(9, 9).to(mask_dtype), "key_padding_mask": torch.randn(2, 9).to(mask_dtype)}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected, got = (layer(x, x, x, need_weights=need_weights, **masks) for layer in (theirs, ours))
    assert got[0].dtype == expected[0].dtype
    torch.testing.assert_close(got[0], expected[0], rtol=0.05, atol=0.05)


def test_a_mask_of_the_least_float32_hides_no_more_under_autocast():
    """Rounded to bfloat16 it would be -inf, and a row of it would see no key."""
    q, v = torch.randn(1, 1, 2, 8), torch.randn(1, 1, 2, 8)
    mask = torch.full((2, 2), torch.finfo(torch.float32).min)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        o = scaled_dot_product_attention(q, q, v, attn_mask=mask)
    torch.testing.assert_close(o, v.mean(2, keepdim=True).expand_as(v).bfloat16(), rtol=0.02, atol=0.02)


# --- changes in place -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("sizes", [{}, {"kdim": 12, "vdim": 8}], ids=["one size", "own sizes"])
def test_inputs_of_a_batch_first_layer_may_be_changed_after_the_call(sizes, need_weights):
    gradients = []
    for layer in layers(16, 4, batch_first=True, **sizes):
        torch.manual_seed(0)
        leaves = [torch.randn(3, 5, n, requires_grad=True) for n in (16, sizes.get("kdim", 16), sizes.get("vdim", 16))]
        inputs = [x * 1 for x in leaves]
        y, _ = layer(*inputs, need_weights=need_weights)
        for x in inputs:
            x.zero_()
        gradients.append(torch.autograd.grad(y.square().sum(), [*layer.parameters(), *leaves], allow_unused=True))
    for got, expected in zip(gradients[1], gradients[0], strict=True):
        torch.testing.assert_close(got, expected)


def test_a_residual_may_be_added_in_place():
    for layer in layers(16, 4, batch_first=True):
        x = torch.randn(3, 5, 16, requires_grad=True) * 1
        x += layer(x, x, x)[0]
        x.sum().backward()


def test_a_frozen_layer_copies_no_input(monkeypatch):
    layer = MultiheadAttention(16, 4, batch_first=True).requires_grad_(False)
    x = torch.randn(3, 5, 16, requires_grad=True)
    monkeypatch.setattr(torch.Tensor, "clone", lambda self: pytest.fail("an input was copied"))
    layer(x, x, x)


# --- context_parallel -------------------------------------------------------------------------------------------------

SHARDED = """
import os, sys
import torch, torch.distributed as dist, torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.experimental import context_parallel
import fastseq
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
mesh = init_device_mesh("cpu", (1,))
q = torch.randn(1, 2, 8, 4)
layer, x = fastseq.nn.MultiheadAttention(8, 2), torch.randn(5, 1, 8)

def outcome(function, *args):
    try:
        function(*args)
        return "ran"
    except BaseException as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]

calls = {
    "torch": (F.scaled_dot_product_attention, q, q, q), "ours": (fastseq.scaled_dot_product_attention, q, q, q),
    "attention": (fastseq.attention, q, q, q), "layer": (layer, x, x, x),
    "without weights": (lambda: layer(x, x, x, need_weights=False),),
}
with context_parallel(mesh, buffers=[q], buffer_seq_dims=[2]):
    calls["torch"] = (F.scaled_dot_product_attention, q, q, q)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            for name, call in calls.items():
                print(name, "|", outcome(*call))
    with fastseq.use_backend("native"):
        print("named", "|", outcome(*calls["ours"]))
print("after", "|", *(outcome(*call) for name, call in calls.items() if name != "torch"))
dist.destroy_process_group()
"""


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch is built without torch.distributed")
def test_context_parallel_is_left_to_torch_or_refused():
    """There q, k and v are shards of a longer sequence: whoever attends to one alone returns wrong numbers."""
    run = subprocess.run([sys.executable, "-c", SHARDED], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    lines = [line.split(" | ") for line in run.stdout.splitlines() if " | " in line]
    assert len(lines) == 12, run.stdout
    for n in (0, 5):
        assert lines[n][0] == "torch"
        assert lines[n + 1] == ["ours", lines[n][1]]
    for name, outcome in lines[:-1]:
        if name in ("attention", "layer", "without weights", "named"):
            assert outcome.startswith("BackendError: inside torch's context_parallel q, k and v are shards"), name
    assert lines[-1][1] == "ran ran ran ran"


# --- explanations and imports -----------------------------------------------------------------------------------------


@needs_native
def test_the_layer_is_explained_by_the_backend_that_runs_it():
    """A small call in inference is one native call, weights included; weights past it are torch's products."""
    layer, x = MultiheadAttention(16, 4), torch.randn(5, 2, 16)
    with torch.no_grad():
        assert "attention on cpu runs on: native" in fastseq.explain(layer, x, x, x)
        long = torch.randn(300, 1, 16)  # more keys than the native call makes weights of
        told = fastseq.explain(layer, long, long, long)
    assert "attention on cpu runs on: torch" in told
    assert "native: its kernels do not return the weights (need_weights=True)" in told
    assert "named" not in told
    assert "attention on cpu runs on: native" in fastseq.explain(lambda: layer(x, x, x, need_weights=False))
    with use_backend("torch"):
        assert "runs on: torch (named: torch)" in fastseq.explain(layer, x, x, x)


def test_importing_fastseq_does_not_import_the_compiler():
    """torch._dynamo alone takes seconds."""
    code = "import sys, torch; before = 'torch._dynamo' in sys.modules; import fastseq; print(before, {})"
    code = code.format("'torch._dynamo' in sys.modules")
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300)
    assert run.stdout.split() in (["False", "False"], ["True", "True"])


def test_attention_with_a_learned_mask_does_not_import_the_compiler():
    code = (
        "import sys, torch, fastseq; q = torch.randn(1, 1, 2, 4); mask = torch.nn.Parameter(torch.zeros(2, 2)); "
        "before = 'torch._dynamo' in sys.modules; "
        "fastseq.scaled_dot_product_attention(q, q, q, attn_mask=mask).sum().backward(); "
        "print(before, 'torch._dynamo' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300)
    assert run.stdout.split() in (["False", "False"], ["True", "True"])
