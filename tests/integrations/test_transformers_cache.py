"""``fastseq.integrations.transformers.Cache``: models of transformers generate from a cache that is read in place."""

from __future__ import annotations

import copy
import importlib.util
from typing import Any

import pytest
import torch

from fastseq import ArgumentError

if importlib.util.find_spec("transformers") is None:
    pytest.skip("transformers is not installed: pip install transformers", allow_module_level=True)

from transformers_support import LEFT, PADDINGS, TOKENS, build, given

from fastseq.integrations import caches
from fastseq.integrations import transformers as integration

MODELS = ["Llama", "Mistral", "GPT-2", "Gemma 2", "gpt-oss", "Qwen 3", "Phi 3", "Llama 4"]
GREEDY = {"max_new_tokens": 10, "min_new_tokens": 10, "do_sample": False}


def batch_of(family: str, padding: str) -> dict[str, torch.Tensor]:
    return {name: x for name, x in given(family, PADDINGS[padding]).items() if name != "position_ids"}


@pytest.fixture
def copies(monkeypatch):
    """How often keys and values were copied out of a cache."""
    made = []
    read = caches.Rows.read

    def counted(rows):
        made.append(rows.count)
        return read(rows)

    monkeypatch.setattr(caches.Rows, "read", counted)
    return made


@pytest.mark.parametrize("padding", ["no padding", "left padding"])
@pytest.mark.parametrize("family", MODELS)
def test_generated_tokens_are_eagers(family, padding, copies):
    """Windows (5) and chunks (4) are shorter than the prompt (13)."""
    model, batch = build(family), batch_of(family, padding)
    want = model.generate(**batch, **GREEDY)
    model.set_attn_implementation("fastseq")
    assert torch.equal(model.generate(**batch, **GREEDY, cache=integration.Cache(model.config)), want)
    assert len(want.unique()) > 3
    if family != "Llama 4":  # whose chunks come as a matrix
        assert not copies


def test_padding_within_a_window_is_hidden(copies):
    """While the window reaches back into padding, a ring is copied out; then it is read in place again."""
    model = build("Mistral", sliding_window=8)
    prompt = {"input_ids": TOKENS[:, :5], "attention_mask": LEFT[:, :5]}
    want = model.generate(**prompt, **GREEDY)
    model.set_attn_implementation("fastseq")
    assert torch.equal(model.generate(**prompt, **GREEDY, cache=integration.Cache(model.config)), want)
    assert copies
    assert max(copies) <= 8


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ["Llama", "Mistral"])
def test_other_implementations_get_copies(family, implementation, copies):
    model, batch = build(family), batch_of(family, "left padding")
    want = model.generate(**batch, **GREEDY)
    model.set_attn_implementation(implementation)
    assert torch.equal(model.generate(**batch, **GREEDY, cache=integration.Cache(model.config)), want)
    assert copies


@pytest.mark.parametrize("family", ["Llama", "Mistral", "Gemma 2"])
def test_beams_are_eagers(family):
    model, batch = build(family), batch_of(family, "left padding")
    want = model.generate(**batch, **GREEDY, num_beams=3)
    model.set_attn_implementation("fastseq")
    assert torch.equal(model.generate(**batch, **GREEDY, num_beams=3, cache=integration.Cache(model.config)), want)


@pytest.mark.parametrize("family", ["Llama", "Mistral", "Gemma 2"])
@pytest.mark.parametrize("chunk", [1, 4])
def test_a_prompt_may_come_in_chunks(family, chunk, copies):
    model = build(family)
    mask = torch.ones(3, 12, dtype=torch.long)
    mask[0, :3] = mask[1, 5:7] = 0
    found = []
    for name, cache in (("eager", None), ("fastseq", integration.Cache(model.config, capacity=20))):
        model.set_attn_implementation(name)
        cache = cache or integration.transformers.DynamicCache(config=model.config)
        with torch.no_grad():
            parts = [
                model(TOKENS[:, i : i + chunk], attention_mask=mask[:, : i + chunk], cache=cache).logits
                for i in range(0, 12, chunk)
            ]
        found.append(torch.cat(parts, 1)[mask.bool()])
    torch.testing.assert_close(found[1], found[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["Llama", "Mistral"])
def test_int8_is_near(family, copies):
    """Of a prompt and then tokens one at a time: the logits differ by what 8 bits cost."""
    model = build(family)
    found = []
    for name, options in (("eager", {}), ("fastseq", {}), ("fastseq", {"dtype": torch.int8})):
        model.set_attn_implementation(name)
        cache = integration.Cache(model.config, **options)
        with torch.no_grad():
            parts = [model(TOKENS[:, i : max(i + 1, 8)], cache=cache).logits for i in (0, *range(8, 13))]
        found.append(torch.cat(parts, 1))
    exact, ours, small = found
    torch.testing.assert_close(ours, exact, atol=1e-5, rtol=1e-5)
    apart = float((small - exact).norm() / exact.norm())
    assert 1e-4 < apart < 0.05


def test_a_cache_goes_on_where_its_copy_goes_on():
    model = build("Gemma 2")
    model.set_attn_implementation("fastseq")
    cache = integration.Cache(model.config)
    with torch.no_grad():
        model(TOKENS[:, :8], cache=cache)
        twin = copy.deepcopy(cache)
        first = model(TOKENS[:, 8:9], cache=cache).logits
        assert torch.equal(model(TOKENS[:, 8:9], cache=twin).logits, first)
        cache.reset()
        assert cache.get_seq_length() == 0
        again = [model(TOKENS[:, a:b], cache=cache).logits for a, b in ((0, 8), (8, 9))]
    torch.testing.assert_close(again[1], first)


def test_a_cache_is_cropped_and_its_rows_are_chosen():
    model = build("Llama")
    model.set_attn_implementation("fastseq")
    cache = integration.Cache(model.config)
    with torch.no_grad():
        model(TOKENS[:, :8], cache=cache)
        want = model(TOKENS[:, 8:9], cache=cache).logits
        model(TOKENS[:, 9:12], cache=cache)
        cache.crop(-4)
        assert cache.get_seq_length() == 8
        torch.testing.assert_close(model(TOKENS[:, 8:9], cache=cache).logits, want)
        cache.crop(-1)
        cache.batch_select_indices(torch.tensor([2, 0]))
        cache.batch_repeat_interleave(2)
        got = model(TOKENS[[2, 2, 0, 0], 8:9], cache=cache).logits
    torch.testing.assert_close(got, want[[2, 2, 0, 0]])


def test_what_a_cache_cannot_do_is_refused():
    model = build("Mistral")
    model.set_attn_implementation("fastseq")
    cache = integration.Cache(model.config)
    with pytest.raises(ArgumentError, match=r"keeps no gradient: call the model under torch\.no_grad\(\)"):
        model(TOKENS, cache=cache)
    assert cache.get_seq_length() == 0
    with torch.no_grad():
        model(TOKENS, cache=cache)
        with pytest.raises(ArgumentError, match="a layer with a sliding window has forgotten"):
            cache.crop(-1)
        with pytest.raises(ArgumentError, match=r"k must be \[3, 2, t, 8\]"):
            model(TOKENS[:2, :1], cache=cache)
        full = integration.Cache(build("Llama").config, capacity=12)
        llama = build("Llama")
        with pytest.raises(ArgumentError, match="full: it has room for 12 positions a sequence, 13 are needed"):
            llama(TOKENS, cache=full)
        assert full.get_seq_length() == 0
        llama(TOKENS[:, :12], cache=full)


def test_layers_that_are_not_known_are_named():
    config = integration.transformers.MambaConfig(num_hidden_layers=1)
    with pytest.raises(ArgumentError, match="config has layers that keep a LinearAttentionLayer"):
        integration.Cache(config)


def test_keys_of_an_earlier_step_are_not_read():
    layer: Any = caches.Layer(None, window=3)
    rows = torch.randn(1, 2, 1, 8)
    layer.update(rows, rows)
    old, _ = layer.update(rows, rows)
    layer.update(rows, rows)
    with pytest.raises(RuntimeError, match="of an earlier step"):
        old + 1
