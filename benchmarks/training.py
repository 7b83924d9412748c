"""
Training speed and memory beside the dense two-stream pass and GPT-2: `python -m benchmarks.training`.

A step is one forward and one backward pass over a batch of random tokens. The dense reference is the same network with
the 2L x 2L mask, all queries in every layer and the logits of all positions, as the paper's formulation has it.
"""

import torch

from bd3lm_hf import NOISE_SCHEDULES, BD3LMForMaskedLM, forward_process, sample_timesteps, subs_log_probs
from bd3lm_hf.modeling.attention_bd3lm import DensePattern, TwoStreamLayout

from .common import (
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


NAMES = {"bd3lm": "BD3-LM", "dense": "BD3-LM, dense mask and full logits", "gpt2": "GPT-2"}


class DenseLayout(TwoStreamLayout):
    """Both streams whole under one dense mask, whatever the attention implementation."""

    def pattern(self, implementation: str, last_layer: bool) -> DensePattern:
        return DensePattern("sdpa", self._dense_mask(last_layer))


def dense_loss(model: BD3LMForMaskedLM, x_0: torch.Tensor) -> torch.Tensor:
    """The training loss, computed the plain way."""
    config = model.config
    batch_size, length = x_0.shape
    t = sample_timesteps(batch_size, length // config.block_size, config.noise_interval)
    t = t.repeat_interleave(config.block_size, dim=1)
    schedule = NOISE_SCHEDULES[config.noise_schedule]
    maskable = torch.arange(length)[None].expand(x_0.shape) > 0
    x_t = forward_process(x_0, schedule.mask_probability(t), config.mask_token_id, maskable)
    _, code = model.model.text_code(x_0, None, None, None)
    layout = DenseLayout(code, code, config.block_size, config.window_in_blocks)
    logits = model(x_t, clean_input_ids=x_0, layout=layout).logits
    log_probs = subs_log_probs(logits, x_t, config.mask_token_id).gather(-1, x_0[..., None]).squeeze(-1)
    return -(schedule.loss_weight(t) * log_probs).sum() / maskable.sum()


def make_step(name: str, size_name: str):
    """The model called `name` and a function that runs one training step of it."""
    size = SIZES[size_name]
    model = (make_gpt2 if name == "gpt2" else make_bd3lm)(size).train()
    ids = torch.randint(size.vocab_size - 1, (size.batch_size, size.length))

    def step() -> None:
        loss = dense_loss(model, ids) if name == "dense" else model(input_ids=ids, labels=ids).loss
        loss.backward()
        model.zero_grad()

    return step


def main() -> None:
    arguments = benchmark_arguments(__doc__, NAMES)
    if arguments.memory_of_one_step:
        make_step(arguments.model, arguments.sizes[0])()
    if arguments.memory_of_one_step or arguments.memory_of_imports:
        return print_own_peak_memory()

    print(f"Training on {machine()}\n")
    rows = []
    for size_name in arguments.sizes:
        size = SIZES[size_name]
        seconds = interleaved_medians({name: make_step(name, size_name) for name in NAMES}, arguments.repeats)
        for name, label in NAMES.items():
            memory = peak_memory_mib("benchmarks.training", "--sizes", size_name, "--model", name)
            tokens_per_second = size.batch_size * size.length / seconds[name]
            ratio = seconds["gpt2"] / seconds[name]
            rows.append([size_name, label, f"{tokens_per_second:.0f}", f"{ratio:.2f}", f"{memory:.0f}"])
    print_table(["size", "model", "tokens/s", "x GPT-2", "peak memory, MiB"], rows)


if __name__ == "__main__":
    main()
