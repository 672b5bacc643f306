"""Small random models of Hugging Face transformers."""

from __future__ import annotations

import zlib
from typing import Any

import torch

import fastseq
from bench.cases import VOCABULARY, Model

SIZES = {"vocab_size": VOCABULARY, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4,
         "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 2048,
         "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
WINDOW = {"sliding_window": 128, "layer_types": ["sliding_attention", "full_attention"] * 2}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", {}),
    "gemma2": ("Gemma2ForCausalLM", WINDOW),
    "gpt_oss": ("GptOssForCausalLM", WINDOW | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "bert": ("BertForMaskedLM", {}),
    "modernbert": ("ModernBertForMaskedLM", {"local_attention": 64}),
}


def build(case: Model, implementation: str, dtype: torch.dtype) -> Any:
    """The case's model; its weights are drawn from the seed of its kind."""
    fastseq.integrations.transformers.register()
    import transformers

    name, options = KINDS[case.kind]
    kind = getattr(transformers, name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(zlib.crc32(case.kind.encode()))
        model = kind._from_config(kind.config_class(**SIZES | options), attn_implementation=implementation)
    if case.kind == "gpt_oss":
        model.set_experts_implementation("eager")  # its faster ones take no float64, in which the truth is
    return model.to(dtype).train(case.training)
