"""Tiny causal language models of Transformers, their tokenizer and what is adapted from them."""

import torch
from conftest import DEVICE
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from bd3lm_hf import BlockDiffusionForMaskedLM


SPECIAL_TOKENS = ("<s>", "</s>", "<pad>")
CHAT_TEMPLATE = "{% for message in messages %}<s>{{ message['content'] }}</s>{% endfor %}"
# What some kinds of networks need beside the sizes.
FIELDS = {"qwen3": {"head_dim": 8}}


def byte_tokenizer(*further_tokens):
    """A tokenizer of single bytes with special tokens and a chat template, and without a mask token, as most have."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*SPECIAL_TOKENS, *alphabet, *further_tokens])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    bos_token, eos_token, pad_token = SPECIAL_TOKENS
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=bos_token, eos_token=eos_token, pad_token=pad_token
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def causal_lm(model_type="llama", seed=0, attn_implementation="sdpa", **overrides):
    """A causal language model of Transformers whose attention is far from uniform, in eval mode on `DEVICE`."""
    fields = {
        "vocab_size": 23,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
        "tie_word_embeddings": False,
    }
    config = AutoConfig.for_model(model_type, **{**fields, **FIELDS.get(model_type, {}), **overrides})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attn_implementation)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.mul_(8 if "embed" not in name else 20)
    return model.to(DEVICE).eval()


def adapted_lm(seed=0, model_type="llama", overrides=None, **options):
    """What [`causal_lm`] becomes with these options of `from_causal_lm`; its last id is the mask token's."""
    source = causal_lm(model_type, seed, **(overrides or {}))
    options = {"mask_token_id": source.config.vocab_size - 1, **options}
    return BlockDiffusionForMaskedLM.from_causal_lm(source, **options)


def save_causal_lm(folder, tokenizer=None, **overrides):
    """Writes a causal language model and its tokenizer into a folder, as people have them."""
    tokenizer = byte_tokenizer() if tokenizer is None else tokenizer
    model = causal_lm(**{"vocab_size": len(tokenizer), **overrides})
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
