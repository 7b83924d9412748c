"""
What a GPU gives, in four minutes: `python -m benchmarks.gpu`.

Training: tokens of text per second of forward and backward, bfloat16 by autocast over float32 weights, and the most
memory that was allocated. Generation: new tokens per second in bfloat16, nucleus 0.9, after one run to warm up. Both
beside GPT-2 of the same width, depth and vocabulary. A line that fails says how; one that there was no time left for
says so.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from statistics import median

import torch

from .common import SIZES, Size, machine, make_bd3lm, make_gpt2


# Implementation of attention and whether the model is compiled, of each model.
TRAINING = [
    ("gpt2", "sdpa", False),
    ("bd3lm", "sdpa", False),
    ("bd3lm", "flex_attention", False),
    ("gpt2", "sdpa", True),
    ("bd3lm", "sdpa", True),
    ("bd3lm", "flex_attention", True),
]
PARALLEL = {"sampler": "confidence", "denoising_steps": 2}
# Model, texts at once, arguments of `generate`.
GENERATION = [
    ("gpt2", 1, {}),
    ("bd3lm", 1, {}),
    ("bd3lm", 1, PARALLEL),
    ("bd3lm", 1, {"cache_implementation": "static"}),
    ("gpt2", 32, {}),
    ("bd3lm", 32, {}),
    ("bd3lm", 32, PARALLEL),
    ("gpt2", 1, {"cache_implementation": "static"}),
]


def seconds_of(run: Callable[[], object], repeats: int, device: str) -> float:
    """The median; each run ends when the device has done its work."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return median(seconds)


def make_model(name: str, size: Size, attn_implementation: str = "sdpa") -> torch.nn.Module:
    return make_gpt2(size) if name == "gpt2" else make_bd3lm(size, attn_implementation)


def training(size: Size, device: str, repeats: int, name: str, attn_implementation: str, is_compiled: bool) -> str:
    model = make_model(name, size, attn_implementation).to(device).train()
    run_model = torch.compile(model) if is_compiled else model
    ids = torch.randint(size.vocab_size - 1, (size.batch_size, size.length)).to(device)

    def step() -> None:
        with torch.autocast(device, torch.bfloat16):
            loss = run_model(input_ids=ids, labels=ids).loss
        loss.backward()
        model.zero_grad(set_to_none=True)

    for _ in range(2):
        step()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    speed = size.batch_size * size.length / seconds_of(step, repeats, device)
    memory = torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else float("nan")
    return f"{speed:.0f} tokens/s, {memory:.1f} GiB"


@torch.no_grad()
def generation(size: Size, device: str, num_new: int, name: str, num_texts: int, arguments: dict) -> str:
    model = make_model(name, size).to(device, torch.bfloat16).eval()
    model.generation_config.eos_token_id = None
    prompt = torch.randint(size.vocab_size - 1, (num_texts, 32)).to(device)
    given = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": num_new, "do_sample": True, "top_p": 0.9}

    def run() -> torch.Tensor:
        return model.generate(prompt, top_k=0, **given, **arguments)

    assert run().shape[1] == 32 + num_new
    return f"{num_texts * num_new / seconds_of(run, 1, device):.0f} tokens/s"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--size", choices=SIZES, default="large")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--length", type=int, help="of the texts that are trained on (default: the size's)")
    parser.add_argument("--num_new_tokens", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=240.0, help="no line is begun after so many")
    arguments = parser.parse_args()
    size = replace(SIZES[arguments.size], batch_size=arguments.batch_size)
    size = replace(size, length=arguments.length or size.length)
    print(f"On {machine(arguments.device, 'bfloat16')}; {size}", flush=True)

    work = [("generation", generation, arguments.num_new_tokens, line) for line in GENERATION]
    work = [("training", training, arguments.repeats, line) for line in TRAINING] + work
    end = time.monotonic() + arguments.seconds
    for kind, measure, number, line in work:
        start = time.monotonic()
        if start > end:
            figures = "not run: no time left"
        else:
            try:
                figures = measure(size, arguments.device, number, *line)
            except Exception as error:
                figures = f"fails: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
        print(f"{kind} {' '.join(map(str, line))}: {figures} ({time.monotonic() - start:.0f} s)", flush=True)
        if arguments.device == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
