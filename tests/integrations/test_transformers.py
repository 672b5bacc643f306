"""Small random models of transformers on fastseq's attention, beside transformers' own eager attention."""

from __future__ import annotations

import copy
import importlib.util
import subprocess
import sys
from collections import Counter
from typing import Any

import pytest
import torch

import fastseq
from fastseq import ArgumentError

if importlib.util.find_spec("transformers") is None:
    pytest.skip("transformers is not installed: pip install transformers", allow_module_level=True)

from transformers_support import DECODERS, FAMILIES, GENERATING, LEFT, PADDED, PADDINGS, TOKENS, build, given

from fastseq.integrations import masks
from fastseq.integrations import transformers as integration

import transformers  # isort: skip - after the integration, which in a checkout hides our folder kernels from it
from transformers import masking_utils  # isort: skip


def answer(model: Any, name: str, kept: torch.Tensor | None = None, **batch: Any) -> dict[str, torch.Tensor]:
    """The model's first output, of tokens that are kept, and the gradients of all parameters."""
    model.set_attn_implementation(name)
    model.zero_grad()
    out = model(**batch)[0]
    out = out if kept is None else out[kept.bool()]
    out.sin().sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"y": out.detach(), **gradients}


def assert_alike(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    """Equal up to rounding. A gradient may vanish (of a key's bias), so it is held to the largest of them all."""
    assert got.keys() == want.keys()
    largest = max(float(d.abs().max()) for name, d in want.items() if name != "y")
    for name in want:
        scale = largest if name != "y" else float(want["y"].abs().max())
        assert float((got[name] - want[name]).abs().max()) < 1e-5 * scale, name


def assert_as_eager(model: Any, kept: torch.Tensor | None = None, **batch: Any) -> None:
    assert_alike(answer(model, "fastseq", kept, **batch), answer(model, "eager", kept, **batch))


@pytest.fixture
def matrices(monkeypatch):
    """How many masks were made as matrices of more than one query."""
    made: Counter[str] = Counter()
    make = masking_utils.sdpa_mask

    def counted(*args, **kwargs):
        if kwargs.get("q_length", args[1] if args else None) > 1:
            made["matrix"] += 1
        return make(*args, **kwargs)

    monkeypatch.setattr(masking_utils, "sdpa_mask", counted)
    return made


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_values_and_gradients_are_eagers(family, padding):
    if padding != "no padding" and family not in PADDED:
        pytest.skip("this model takes no padding mask")
    mask = PADDINGS[padding]
    kept = None if family == "T5" else mask
    assert_as_eager(build(family), kept, **given(family, mask))


@pytest.mark.parametrize("padding", ["no padding", "left padding"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("family", GENERATING)
def test_generated_tokens_are_eagers(family, cache, padding):
    """Windows (5) and chunks (4) are shorter than the prompt (13), and the prompt than the caches (23)."""
    if padding != "no padding" and family not in PADDED:
        pytest.skip("this model takes no padding mask")
    model, batch = build(family), given(family, PADDINGS[padding])
    batch = {name: x for name, x in batch.items() if name not in ("decoder_input_ids", "position_ids")}
    options = {"max_new_tokens": 10, "min_new_tokens": 10, "do_sample": False}
    options["cache_implementation"] = None if cache == "dynamic" else cache
    found = []
    for name in ("fastseq", "eager"):
        model.set_attn_implementation(name)
        found.append(model.generate(**batch, **options))
    assert torch.equal(*found)
    assert len(found[0].unique()) > 3


@pytest.mark.parametrize("family", DECODERS)
def test_packed_documents_do_not_see_each_other(family, matrices):
    model = build(family)
    positions = torch.cat([torch.arange(5), torch.arange(6), torch.arange(2)])[None]
    got = answer(model, "fastseq", input_ids=TOKENS[:1], position_ids=positions, use_cache=False)
    assert not matrices
    assert_alike(got, answer(model, "eager", input_ids=TOKENS[:1], position_ids=positions, use_cache=False))
    if family == "gpt-oss":
        return  # does not give its masks the positions: there are no documents in it
    model.set_attn_implementation("fastseq")
    alone = model(TOKENS[:1, 5:11])[0]
    torch.testing.assert_close(got["y"][:, 5:11], alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_limits_are_not_made_into_a_matrix(family, matrices):
    model = build(family)
    model.set_attn_implementation("fastseq")
    for padding in PADDINGS.values() if family in PADDED else (None,):
        model(**given(family, padding))
    assert not matrices
    if family in GENERATING:
        batch = {name: x for name, x in given(family, None).items() if name != "decoder_input_ids"}
        model.generate(**batch, max_new_tokens=3, do_sample=False)
        if family != "Llama 4":  # whose chunks are a matrix where the cache is longer than the prompt
            model.generate(**batch, max_new_tokens=3, do_sample=False, cache_implementation="static")
        assert not matrices
    if family != "ViT":  # which has no mask
        model.set_attn_implementation("eager")
        model(**given(family, LEFT if family in PADDED else None))
        assert matrices


def test_chunks_with_padding_between_their_tokens():
    mask = torch.ones(3, 13, dtype=torch.long)
    mask[1, 5:7] = mask[2, :2] = mask[2, 11] = 0
    assert_as_eager(build("Llama 4"), mask, input_ids=TOKENS, attention_mask=mask)


@pytest.mark.parametrize("chunk", [1, 4])
def test_a_cache_that_is_filled_by_several_tokens_at_a_time(chunk):
    """With padding on the left, and with a hole in it."""
    for family in ("Llama", "Mistral", "Gemma 2"):
        model = build(family)
        mask = torch.ones(3, 12, dtype=torch.long)
        mask[0, :3] = mask[1, 5:7] = 0
        found = []
        for name in ("fastseq", "eager"):
            model.set_attn_implementation(name)
            for cache in (
                transformers.DynamicCache(config=model.config),
                transformers.StaticCache(config=model.config, max_cache_len=20),
            ):
                parts = [
                    model(TOKENS[:, i : i + chunk], attention_mask=mask[:, : i + chunk], cache=cache).logits
                    for i in range(0, 12, chunk)
                ]
                found.append(torch.cat(parts, 1)[mask.bool()].detach())
        for got in found[1:]:
            torch.testing.assert_close(got, found[0], atol=1e-5, rtol=1e-5)


def test_masks_of_the_users_own():
    model, rng = build("Llama"), torch.Generator().manual_seed(2)
    mask = torch.rand(3, 1, 13, 13, generator=rng) < 0.5
    mask |= torch.eye(13, dtype=torch.bool)
    added = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    want = answer(model, "eager", input_ids=TOKENS, attention_mask=added)
    for own in (mask, added):
        assert_alike(answer(model, "fastseq", input_ids=TOKENS, attention_mask=own), want)


def test_mask_functions_that_are_not_known_become_the_matrix():
    embeds = torch.empty(3, 13, 32)
    config = build("Llama").config

    def first(batch, head, q, k):
        return k < 3

    for option in ("or_mask_function", "and_mask_function"):
        config._attn_implementation = "fastseq"
        got = masking_utils.create_causal_mask(config, embeds, LEFT, None, **{option: first})
        config._attn_implementation = "sdpa"
        want = masking_utils.create_causal_mask(config, embeds, LEFT, None, **{option: first})
        assert type(got) is torch.Tensor
        assert torch.equal(got, want)
    assert masks.read(masking_utils.and_masks(masking_utils.causal_mask_function, first)) is None


def test_a_mask_that_is_read_is_the_matrix():
    """Models slice, move and change masks; attention then follows what they made of it."""
    want = masking_utils.sdpa_mask(3, 13, 13, attention_mask=LEFT.bool(), allow_is_causal_skip=False)

    def made():
        return integration.make_mask(3, 13, 13, attention_mask=LEFT.bool())

    assert isinstance(made(), masks.LimitsMask)
    assert made().shape == want.shape
    assert made().dtype == torch.bool
    assert torch.equal(made()[:, :, -2:], want[:, :, -2:])
    assert torch.equal(torch.where(made(), 0.0, 1.0), torch.where(want, 0.0, 1.0))
    assert torch.equal(made().clone(), want)
    assert isinstance(made().detach(), masks.LimitsMask)
    assert torch.equal(copy.deepcopy(made()), want)
    changed = made()
    changed[:, :, :, 0] = True
    q, module = torch.randn(3, 2, 13, 8), torch.nn.Module()
    got, _ = integration.attend(module, q, q, q, changed)
    want[:, :, :, 0] = True
    torch.testing.assert_close(got, fastseq.attention(q, q, q, mask=want).transpose(1, 2))


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant):
    model = build("Gemma 2").train()
    want = answer(model, "eager", LEFT, **given("Gemma 2", LEFT))
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert_alike(answer(model, "fastseq", LEFT, **given("Gemma 2", LEFT)), want)


def test_dropout_is_drawn_in_training_alone():
    model = build("Llama", attention_dropout=0.5)
    assert_as_eager(model, input_ids=TOKENS)
    model.train().set_attn_implementation("fastseq")
    torch.manual_seed(3)
    first, second = model(TOKENS).logits, model(TOKENS).logits
    torch.manual_seed(3)
    assert torch.equal(model(TOKENS).logits, first)
    assert not torch.allclose(first, second)
    q, module = (
        torch.randn(1, 2, 4, 8),
        torch.nn.Module().eval(),
    )  # some layers hand their dropout over in evaluation too
    assert torch.equal(
        integration.attend(module, q, q, q, None, dropout=0.5)[0], integration.attend(module, q, q, q, None)[0]
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_types_are_as_near_to_the_truth_as_eager(dtype):
    padding = LEFT.flip(1)  # on the left eager's rows that see nothing are NaN in float64
    for family in ("Llama", "Gemma 2", "T5"):
        model, batch = build(family), given(family, padding)
        kept = None if family == "T5" else padding
        truth = answer(model.double(), "eager", kept, **batch)["y"]
        model.to(dtype)
        errors = [float((answer(model, n, kept, **batch)["y"] - truth).norm()) for n in ("fastseq", "eager")]
        assert errors[0] <= 1.5 * errors[1] + 1e-6 * float(truth.norm())


def test_a_sink_for_each_query():
    """As the Inkling models have it: a logit [B, H, Tq, 1] that takes weight and gives nothing."""
    module = torch.nn.Module()
    module.num_key_value_groups = 2
    q, k, v = (torch.randn(2, h, 7, 8, requires_grad=True) for h in (4, 2, 2))
    sinks, bias = torch.randn(2, 4, 7, 1, requires_grad=True), torch.randn(1, 4, 7, 7, requires_grad=True)
    scores = q @ k.repeat_interleave(2, 1).transpose(2, 3) * 0.3 + bias
    weights = torch.cat([scores, sinks], -1).softmax(-1)[..., :-1]
    want = (weights @ v.repeat_interleave(2, 1)).transpose(1, 2)
    got, _ = integration.attend(
        module, q, k, v, None, scaling=0.3, is_causal=False, sinks=sinks, position_bias=bias
    )  # fmt: skip
    torch.testing.assert_close(got, want)
    leaves, d_o = (q, k, v, sinks, bias), torch.randn_like(want)
    for d, d_want in zip(
        torch.autograd.grad(got, leaves, d_o), torch.autograd.grad(want, leaves, d_o), strict=True
    ):  # fmt: skip
        torch.testing.assert_close(d, d_want)


@pytest.mark.parametrize("family", ["Llama", "Gemma 2"])
def test_a_compiled_forward_is_one_graph_and_makes_no_matrix(family, monkeypatch):
    torch._dynamo.reset()
    model = build(family)
    want = {name: model(**given(family, mask)).logits for name, mask in PADDINGS.items()}
    model.set_attn_implementation("fastseq")
    monkeypatch.setattr(masking_utils, "sdpa_mask", None)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for name in ("no padding", "left padding"):
        kept = torch.ones_like(TOKENS).bool() if PADDINGS[name] is None else PADDINGS[name].bool()
        got = compiled(**given(family, PADDINGS[name])).logits
        torch.testing.assert_close(got[kept], want[name][kept], atol=1e-5, rtol=1e-5)


def test_generate_with_a_compiled_forward_and_a_static_cache():
    torch._dynamo.reset()
    model = build("Mistral")
    options = {"max_new_tokens": 6, "do_sample": False, "cache_implementation": "static", "attention_mask": LEFT}
    want = model.generate(TOKENS, **options)
    model.set_attn_implementation("fastseq")
    model.forward = torch.compile(model.forward, backend="aot_eager")
    assert torch.equal(model.generate(TOKENS, **options), want)


def test_weights_are_not_there_and_that_is_said(caplog):
    model = build("BERT")
    model.set_attn_implementation("fastseq")
    with pytest.raises(ValueError, match="output_attentions"):
        model.config.output_attentions = True


def test_what_changes_the_result_and_is_not_known_is_refused():
    q = torch.randn(1, 2, 4, 8)
    with pytest.raises(ArgumentError, match=r"chooses its keys by indices=.*attn_implementation='sdpa'"):
        integration.attend(torch.nn.Module(), q, q, q, None, indices=torch.zeros(1))


@pytest.mark.parametrize("name", ["", "sdpa", "my_flash_attention", "owner/kernel", None])
def test_names_that_transformers_has_for_its_own_are_refused(name):
    with pytest.raises(ArgumentError, match="name must be a text without any of"):
        integration.register(name)


def test_it_is_imported_only_when_asked_for():
    code = "import sys, fastseq; assert 'transformers' not in sys.modules; fastseq.integrations.transformers.register()"
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="there is: onnx, transformers"):
        fastseq.integrations.tensorflow  # noqa: B018


def test_patch_says_how_a_model_of_transformers_comes_here():
    model = build("Llama")
    assert 'attn_implementation="fastseq"' in str(fastseq.patch(model))
    model.set_attn_implementation("fastseq")
    assert "transformers" not in str(fastseq.patch(model))
