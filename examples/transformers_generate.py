"""A model of Hugging Face transformers generates on fastseq's attention: the same tokens as on torch's.

    pip install torch transformers .
    python examples/transformers_generate.py

The model is a small Llama of random weights, so nothing is fetched. With your own, give `attn_implementation="fastseq"`
to `from_pretrained`.
"""

import argparse

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import fastseq


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tokens", type=int, default=48)
    options = parser.parse_args()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=500, hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=2, initializer_range=0.2, bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    prompts = torch.randint(1, 500, (3, 20))
    padding = torch.ones_like(prompts)
    padding[1, :7] = 0  # prompts of 20, 13 and 18 tokens, padded on the left
    padding[2, :2] = 0
    given = {"attention_mask": padding, "max_new_tokens": options.tokens, "do_sample": False}

    model.set_attn_implementation("sdpa")
    theirs = model.generate(prompts, **given)[:, 20:]
    fastseq.integrations.transformers.register()
    model.set_attn_implementation("fastseq")
    ours = model.generate(prompts, **given)[:, 20:]
    print("first tokens of each prompt:", *(row[:8].tolist() for row in ours))
    print(f"attention of torch and of fastseq: {(ours == theirs).sum()} of {ours.numel()} tokens are equal")

    cache = fastseq.integrations.transformers.Cache(model.config)  # appended and read in place
    cached = model.generate(prompts, **given, cache=cache)[:, 20:]
    print(f"with a cache that is read in place: {(cached == ours).sum()} of {ours.numel()} tokens are equal")


if __name__ == "__main__":
    main()
