"""
Tiny causal language models of Transformers and what they become: for the tests of adapted networks.

The dense reference of this file is a stock model of its own that is given masks built entry by entry from the rules of
block diffusion; it shares no line with the package.
"""

import math

import torch
from conftest import DEVICE
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    SmolLM3Config,
)

from bd3lm_hf import BlockDiffusionForMaskedLM


VOCAB_SIZE, MASK = 67, 66
# Positions that a layer with a sliding window sees: fewer than the texts of the tests have.
WINDOW = 5
TINY = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": None,
    "pad_token_id": 0,
}
MIXED = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
GEMMA_2 = {**MIXED, "query_pre_attn_scalar": 16, "final_logit_softcapping": 3.0, "attn_logit_softcapping": 2.0}
MIXTURE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
NO_DROPOUT = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
OWN_NAMES = {
    **NO_DROPOUT,
    "n_positions": 64,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 2,
    "bos_token_id": 0,
    "eos_token_id": None,
}
# Of each architecture: its configuration and the fields that differ from `TINY`; None for names of its own.
ARCHITECTURES = {
    "llama": (LlamaConfig, {}),
    "qwen2": (Qwen2Config, {}),
    "qwen3": (Qwen3Config, {"tie_word_embeddings": True}),
    "qwen3_moe": (Qwen3MoeConfig, MIXTURE),
    "mistral": (MistralConfig, {"sliding_window": WINDOW}),
    "smollm3": (SmolLM3Config, {"no_rope_layers": [1, 0]}),
    "gemma2": (Gemma2Config, GEMMA_2),
    "gemma3": (Gemma3TextConfig, {**MIXED, "query_pre_attn_scalar": 16}),
    "phi3": (Phi3Config, {}),
    "olmo2": (Olmo2Config, {}),
    "gpt_neox": (GPTNeoXConfig, {}),
    "gpt2": (GPT2Config, None),
    "granite": (GraniteConfig, {"logits_scaling": 4.0, "residual_multiplier": 0.5, "embedding_multiplier": 2.0}),
    "cohere": (CohereConfig, {"logit_scale": 0.25}),
}
# Gemma 2 bounds its attention scores, which sdpa can't.
CASES = [(name, kind) for name in ARCHITECTURES for kind in ("sdpa", "eager") if (name, kind) != ("gemma2", "sdpa")]

VARIANTS = [(shift, clean) for shift in (True, False, "noisy") for clean in ("block", "causal")]
# One with a single type of layers, one with two, and one with a table of positions.
THREE = ["llama", "gemma3", "gpt2"]
# Greedy text that repeats nothing depends on all before it.
GREEDY = {"sampler": "confidence", "do_sample": False, "no_repeat_ngram_size": 1}


def stock_model(name, attn_implementation="sdpa", seed=0, dtype=torch.float32, **overrides):
    """A tiny causal LM of Transformers in eval mode, whose scores depend on every token that they may see."""
    config_class, fields = ARCHITECTURES[name]
    fields = {"vocab_size": VOCAB_SIZE, **OWN_NAMES} if fields is None else {**TINY, **fields}
    config = config_class(**{**fields, **overrides})
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attn_implementation)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1:
                # The norms of Gemma add 1 themselves.
                is_scale = ("norm" in parameter_name or "ln_" in parameter_name) and not name.startswith("gemma")
                parameter.copy_(is_scale + 0.2 * noise)
            elif "embed" in parameter_name or "wte" in parameter_name or "wpe" in parameter_name:
                parameter.copy_(0.3 * noise)
            else:
                parameter.copy_(1.5 * noise / math.sqrt(parameter.shape[-1]))
    return model.to(DEVICE, dtype).eval()


def adapt(name, attn_implementation="sdpa", block_size=4, seed=0, overrides=None, dtype=torch.float32, **kwargs):
    """A block diffusion model made of `stock_model`, whose last id is the mask token."""
    stock = stock_model(name, attn_implementation, seed, dtype, **(overrides or {}))
    model = BlockDiffusionForMaskedLM.from_causal_lm(stock, block_size=block_size, mask_token_id=MASK, **kwargs)
    # Of training mode alone is it said that a block's first token is read in the noised stream.
    return model.train(kwargs.get("shift_logits") == "noisy")


def random_ids(num_rows, length, seed=0):
    """Ids [num_rows, length] without the mask token."""
    return torch.randint(MASK, (num_rows, length), generator=torch.Generator().manual_seed(seed))


def dense_logits(stock, ids, block_size, clean_length=0, position_ids=None):
    """
    Raw outputs [1, length, vocab] of a stock model over one row of ids [1, length] where each token sees the tokens of
    its block and of earlier ones. The first `clean_length` tokens see nothing after themselves: a causal clean text.
    """
    length = ids.shape[1]
    positions = list(range(length)) if position_ids is None else position_ids

    def sees(query, key, window):
        is_block = positions[key] // block_size <= positions[query] // block_size
        is_causal = query >= clean_length or key <= query
        return is_block and is_causal and (window is None or positions[query] - positions[key] < window)

    def mask_of(window):
        rows = [[0.0 if sees(i, j, window) else -1e30 for j in range(length)] for i in range(length)]
        return torch.tensor(rows, dtype=torch.float32)[None, None].clamp(min=torch.finfo(stock.dtype).min)

    window, kinds = getattr(stock.config, "sliding_window", None), getattr(stock.config, "layer_types", None) or []
    mask = mask_of(window)
    if len(set(kinds)) > 1:
        mask = {"full_attention": mask_of(None), "sliding_attention": mask}
    elif kinds == ["full_attention"] * len(kinds) and kinds:
        mask = mask_of(None)
    positions = torch.tensor([positions])
    return stock(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits


def dense_scores(stock, config, x_t, x_0, block):
    """
    Scores of the tokens of one block of a row [1, length], by passes over nothing but what they depend on: the clean
    text before the block, then the block as `x_t` has it; shifted as the model's `config` has it.
    """
    size, shift, is_causal = config.block_size, config.shift_logits, config.clean_attention == "causal"
    start, end = block * size, min((block + 1) * size, x_t.shape[1])

    def outputs(clean_end, noisy_end):
        ids = torch.cat([x_0[:, :clean_end], x_t[:, clean_end:noisy_end]], dim=1)
        return dense_logits(stock, ids, size, clean_end if is_causal else 0)[0]

    own = outputs(start, end)
    if not shift:
        return own[start:end]
    if start == 0:
        first = own[:1]
    elif shift == "noisy":
        first = outputs(start - size, start)[start - 1 : start]
    else:
        first = outputs(start, start)[start - 1 : start]
    return torch.cat([first, own[start : end - 1]])


def close(actual, expected):
    # float32, whose rounding is coarser where a device adds in pieces of its own.
    atol = 1e-5 if DEVICE.type == "cpu" else 5e-5
    torch.testing.assert_close(actual, expected, atol=atol, rtol=1e-5)


def noised(ids, seed=1):
    masked = torch.rand(ids.shape, generator=torch.Generator().manual_seed(seed)).to(ids.device) < 0.5
    return ids.masked_fill(masked, MASK)


def left_padded(rows):
    """Prompts of several lengths [length] as one batch."""
    width = max(map(len, rows))
    ids, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
    for row, prompt in enumerate(rows):
        ids[row, width - len(prompt) :], mask[row, width - len(prompt) :] = prompt, 1
    return {"input_ids": ids, "attention_mask": mask}


def greedy(model, ids, max_new_tokens=10, **kwargs):
    """The text, and the raw scores that it was read from [new tokens, batch, vocab]."""
    kwargs |= {"max_new_tokens": max_new_tokens, "return_dict_in_generate": True, "output_logits": True}
    output = model.generate(ids, **{**GREEDY, **kwargs})
    return output.sequences, torch.stack(output.logits)
