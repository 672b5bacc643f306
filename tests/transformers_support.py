"""Small random models of transformers, and batches for them."""

from __future__ import annotations

from typing import Any

import torch

from fastseq.integrations import transformers as integration

import transformers  # isort: skip - after the integration, which in a checkout hides our folder kernels from it

integration.register()

DECODER = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
LAYERS = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 5}
ENCODER = {name: DECODER[name] for name in list(DECODER)[:5]} | {"max_position_embeddings": 64, "pad_token_id": 0}
T5 = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0,
      "decoder_start_token_id": 0, "relative_attention_num_buckets": 8}  # fmt: skip
WHISPER = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 2, "encoder_attention_heads": 4,
           "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "vocab_size": 64,
           "max_source_positions": 20, "max_target_positions": 48, "num_mel_bins": 8, "pad_token_id": 0,
           "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2, "begin_suppress_tokens": None,
           "suppress_tokens": None}  # fmt: skip
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "Llama": ("LlamaForCausalLM", "LlamaConfig", DECODER),
    "GPT-2": ("GPT2LMHeadModel", "GPT2Config", {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4,
              "n_positions": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "resid_pdrop": 0.0,
              "embd_pdrop": 0.0, "attn_pdrop": 0.0}),
    "Mistral": ("MistralForCausalLM", "MistralConfig", {**DECODER, "sliding_window": 5}),
    "Gemma 2": ("Gemma2ForCausalLM", "Gemma2Config", {**DECODER, **LAYERS, "attn_logit_softcapping": 2.0,
                "query_pre_attn_scalar": 4}),
    "gpt-oss": ("GptOssForCausalLM", "GptOssConfig", {**DECODER, **LAYERS, "num_local_experts": 2,
                "num_experts_per_tok": 1}),
    "Qwen 3": ("Qwen3ForCausalLM", "Qwen3Config", DECODER),
    "Phi 3": ("Phi3ForCausalLM", "Phi3Config", {**DECODER, "sliding_window": 6}),
    "Llama 4": ("Llama4ForCausalLM", "Llama4TextConfig", {**DECODER, "attention_chunk_size": 4, "moe_layers": [],
                "intermediate_size_mlp": 48, "layer_types": ["chunked_attention", "full_attention"],
                "no_rope_layers": [1, 0]}),
    "BERT": ("BertModel", "BertConfig", ENCODER | {"attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0}),
    "ModernBERT": ("ModernBertModel", "ModernBertConfig", ENCODER | {"local_attention": 6,
                   "global_attn_every_n_layers": 2, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1,
                   "sep_token_id": 2}),
    "T5": ("T5ForConditionalGeneration", "T5Config", T5),
    "Whisper": ("WhisperForConditionalGeneration", "WhisperConfig", WHISPER),
    "ViT": ("ViTModel", "ViTConfig", {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
            "num_attention_heads": 4, "image_size": 16, "patch_size": 4}),
}  # fmt: skip
"""Class, configuration, and its values."""
DECODERS = [name for name, (kind, *_) in FAMILIES.items() if "Causal" in kind or "LMHead" in kind]
GENERATING = [*DECODERS, "T5", "Whisper"]
PADDED = [*DECODERS, "BERT", "ModernBERT", "T5"]

TOKENS = torch.randint(3, 64, (3, 13), generator=torch.Generator().manual_seed(1))
FRAMES = torch.randn(3, 8, 40, generator=torch.Generator().manual_seed(1))
LEFT = (torch.arange(13) >= torch.tensor([[4], [0], [1]])).long()
PADDINGS = {"no padding": None, "left padding": LEFT, "right padding": LEFT.flip(1)}


def build(family: str, **options: Any) -> Any:
    """A model of the family, of weights large enough that attention looks at few keys."""
    kind, config, values = FAMILIES[family]
    torch.manual_seed(0)
    config = getattr(transformers, config)(**values | options)
    model = getattr(transformers, kind)._from_config(config, attn_implementation="eager")
    if family == "gpt-oss":
        model.set_experts_implementation("eager")  # its faster ones take no float64
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1 or name.endswith("sinks"):
                weight.normal_(0.0, 0.1 if family == "T5" else 0.3)
    return model.eval()


def given(family: str, padding: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """A batch for a model of the family."""
    if family == "ViT":
        return {"pixel_values": FRAMES.flatten()[: 3 * 256].view(1, 3, 16, 16)}
    if family == "Whisper":
        return {"input_features": FRAMES, "decoder_input_ids": TOKENS[:, :7]}
    batch = {"input_ids": TOKENS}
    if padding is not None:
        batch["attention_mask"] = padding
    if family == "T5":
        batch["decoder_input_ids"] = TOKENS[:, :7]
    elif padding is not None and family in DECODERS:
        batch["position_ids"] = (padding.cumsum(-1) - 1).clamp(min=0)
    return batch
