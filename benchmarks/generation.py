"""
Generation speed and memory beside a plain loop and GPT-2's `generate`: `python -m benchmarks.generation`.

Nucleus sampling with p = 0.9, random weights, one text at a time unless a row says how many. The plain loop is the
same network and sampler with a commit pass of its own after each block and the logits of every position of the block
at every step. What is called remote code alone is the model without the package's kernels.
"""

import sys
from contextlib import nullcontext

import torch
from transformers import DynamicCache, TopPLogitsWarper

from bd3lm_hf import BD3LMForMaskedLM, CommitCache, kernels

from .common import (
    BLOCK_SIZE,
    SIZES,
    benchmark_arguments,
    interleaved_medians,
    machine,
    make_bd3lm,
    make_gpt2,
    peak_memory_mib,
    print_own_peak_memory,
    print_table,
)


NAMES = {
    "bd3lm": "BD3-LM, `first_hitting`",
    "bd3lm_16": "BD3-LM, `first_hitting`, block size 16",
    "bd3lm_batch": "BD3-LM, `first_hitting`, 8 texts",
    "parallel": "BD3-LM, `confidence`, 2 steps per block",
    "remote": "BD3-LM, remote code alone",
    "plain": "BD3-LM, plain loop",
    "gpt2": "GPT-2",
    "gpt2_batch": "GPT-2, 8 texts",
}
BATCH_SIZE = 8
PROMPT_LENGTH = 64
NUM_NEW_TOKENS = {"small": 256, "large": 64}
TOP_P = 0.9


@torch.no_grad()
def plain_loop(model: BD3LMForMaskedLM, prompt: torch.Tensor, num_new_tokens: int) -> int:
    """First-hitting sampling, block by block, the plain way; returns the number of forwards."""
    config, cache, nucleus = model.config, DynamicCache(), TopPLogitsWarper(TOP_P)
    model(prompt, cache=cache)
    num_forwards = 1
    for _ in range(num_new_tokens // config.block_size):
        block = torch.full((1, config.block_size), config.mask_token_id)
        for _ in range(config.block_size):
            logits = model(block, cache=CommitCache(cache, 0)).logits.float()
            logits[..., config.mask_token_id] = -torch.inf
            scores = nucleus(None, logits.flatten(0, 1))
            tokens = torch.multinomial(scores.softmax(-1), 1).view(1, -1)
            masked = (block == config.mask_token_id).nonzero()[:, 1]
            chosen = masked[torch.randint(len(masked), (1,))]
            block[:, chosen] = tokens[:, chosen]
        model(block, cache=cache)
        num_forwards += config.block_size + 1
    return num_forwards


def make_run(name: str, size_name: str, num_new_tokens: int):
    """A function that generates with the model called `name` and returns its forwards per token."""
    size = SIZES[size_name]
    is_gpt2 = name.startswith("gpt2")
    block_size = 16 if name == "bd3lm_16" else BLOCK_SIZE
    model = (make_gpt2(size) if is_gpt2 else make_bd3lm(size, block_size=block_size)).eval()
    model.generation_config.eos_token_id = None
    prompt = torch.randint(size.vocab_size - 1, (num_texts(name), PROMPT_LENGTH))
    arguments = {
        "attention_mask": torch.ones_like(prompt),
        "max_new_tokens": num_new_tokens,
        "do_sample": True,
        "top_p": TOP_P,
        "top_k": 0,
        "return_dict_in_generate": True,
    }
    if name == "parallel":
        arguments |= {"sampler": "confidence", "denoising_steps": 2}

    def run() -> float:
        if name == "plain":
            return plain_loop(model, prompt, num_new_tokens) / num_new_tokens
        with kernels.detached() if name == "remote" else nullcontext():
            output = model.generate(prompt, **arguments)
        assert output.sequences.shape[1] == PROMPT_LENGTH + num_new_tokens
        return 1.0 if is_gpt2 else float(output.num_forward_passes[0]) / num_new_tokens

    return run


def num_texts(name: str) -> int:
    return BATCH_SIZE if name.endswith("batch") else 1


def main() -> None:
    arguments = benchmark_arguments(__doc__, NAMES)
    if arguments.memory_of_one_step:
        make_run(arguments.model, arguments.sizes[0], 2 * BLOCK_SIZE)()
    if arguments.memory_of_one_step or arguments.memory_of_imports:
        return print_own_peak_memory()

    print(f"Generation on {machine()}\n")
    rows = []
    for size_name in arguments.sizes:
        num_new_tokens = NUM_NEW_TOKENS[size_name]
        runs = {name: make_run(name, size_name, num_new_tokens) for name in NAMES}
        forwards = {name: run() for name, run in runs.items()}
        seconds = interleaved_medians(runs, arguments.repeats)
        for name, label in NAMES.items():
            memory = peak_memory_mib("benchmarks.generation", "--sizes", size_name, "--model", name)
            tokens_per_second = {other: num_texts(other) * num_new_tokens / seconds[other] for other in NAMES}
            ratio = tokens_per_second[name] / tokens_per_second["gpt2"]
            figures = [f"{tokens_per_second[name]:.1f}", f"{ratio:.2f}", f"{forwards[name]:.2f}", f"{memory:.0f}"]
            rows.append([size_name, label, *figures])
            print(" ".join(rows[-1]), file=sys.stderr)
    print_table(["size", "model", "tokens/s", "x GPT-2", "forwards per token", "peak memory, MiB"], rows)


if __name__ == "__main__":
    main()
