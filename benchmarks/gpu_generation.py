"""
Generation on a GPU, beside `generate` of GPT-2 and of the network that an adapted one comes from:

    python -m benchmarks.gpu_generation --seconds 70

Every line stands for itself: one that fails says why, and the next goes on. Random weights, bfloat16.
"""

import argparse
import time
import traceback
from collections import Counter

import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from bd3lm_hf import BD3LMConfig, BD3LMForMaskedLM, BlockDiffusionForMaskedLM
from bd3lm_hf.kernels import cuda_graphs


VOCAB_SIZE = 50258
SIZES = {"vocab_size": VOCAB_SIZE, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12}
SMOLLM2 = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "intermediate_size": 1536,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
DTYPE = torch.bfloat16
# Samplers of so many tokens per forward.
ONE = {"sampler": "first_hitting"}


def per_forward(number):
    return ONE if number == 1 else {"sampler": "confidence", "tokens_per_step": number}


def quiet(model):
    """Without an end, so that all texts are equally long, and with weights that are far from uniform."""
    generator = torch.Generator(model.device).manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "adaln" in name or "lm_head" in name:
                parameter.normal_(0, 0.02, generator=generator)
    model.generation_config.eos_token_id = model.generation_config.bos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.eval()


def ours(block_size):
    config = BD3LMConfig(**SIZES, max_position_embeddings=1024, block_size=block_size, hidden_dropout=0.0)
    with torch.device("cuda"):
        torch.manual_seed(0)
        return quiet(BD3LMForMaskedLM._from_config(config, attn_implementation="sdpa", dtype=DTYPE))


def gpt2():
    config = GPT2Config(vocab_size=VOCAB_SIZE, bos_token_id=None, eos_token_id=None)
    with torch.device("cuda"):
        torch.manual_seed(0)
        return quiet(GPT2LMHeadModel._from_config(config, attn_implementation="sdpa", dtype=DTYPE))


def llama():
    with torch.device("cuda"):
        torch.manual_seed(0)
        return quiet(LlamaForCausalLM._from_config(LlamaConfig(**SMOLLM2), attn_implementation="sdpa", dtype=DTYPE))


def prompts(batch_size):
    generator = torch.Generator("cuda").manual_seed(1)
    return torch.randint(1, 40000, (batch_size, 16), device="cuda", generator=generator)


def speed(model, batch_size, num_new, rounds=2, **arguments):
    """Tokens per second, the best of some rounds; seconds of the calls before, which compile and capture."""
    arguments = {"do_sample": True, "top_p": 0.9, "top_k": 0, **arguments}
    ids, times = prompts(batch_size), []
    mask = torch.ones_like(ids)
    start = time.perf_counter()
    model.generate(ids, attention_mask=mask, max_new_tokens=min(num_new, 48), **arguments)
    model.generate(ids, attention_mask=mask, max_new_tokens=num_new, **arguments)
    torch.cuda.synchronize()
    first = time.perf_counter() - start
    for _ in range(rounds):
        start = time.perf_counter()
        model.generate(ids, attention_mask=mask, max_new_tokens=num_new, **arguments)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return batch_size * num_new / min(times), first


class Report:
    """Runs parts one after the other until the time is up, and prints a line for each."""

    def __init__(self, seconds):
        self.end = time.perf_counter() + seconds

    def line(self, name, part, *args, **kwargs):
        """Prints what a part returns, or the end of its error."""
        if time.perf_counter() > self.end:
            print(f"{name}: no time left", flush=True)
            return
        start = time.perf_counter()
        try:
            result = part(*args, **kwargs)
        except Exception:
            lines = [line[:300] for line in traceback.format_exc().strip().splitlines()]
            result = "failed\n    " + "\n    ".join([*lines[-14:]])
        print(f"{name}: {result}  [{time.perf_counter() - start:.1f} s]", flush=True)


def speed_line(make, batch_size, num_new, **arguments):
    rate, first = speed(make(), batch_size, num_new, **arguments)
    return f"{rate:8.0f} tokens/s (first calls {first:.1f} s)"


def equality(make, **arguments):
    """Whether captured steps give the tokens of the same steps without a graph, and those of the dynamic cache."""
    model, ids = make(), prompts(2)
    given = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 64, "seed": 3, "top_p": 0.9, **arguments}
    static = {"cache_implementation": "static"}
    captured = [model.generate(ids, **given, **static) for _ in range(2)]
    dynamic = model.generate(ids, **given)
    capturing, cuda_graphs.why_not_captured = cuda_graphs.why_not_captured, lambda *_: "they are compared"
    try:
        eager = model.generate(ids, **given, **static)
    finally:
        cuda_graphs.why_not_captured = capturing
    devices, cuda_graphs.DEVICES = cuda_graphs.DEVICES, ()
    try:
        plain = model.generate(ids, **given)
    finally:
        cuda_graphs.DEVICES = devices
    same = {"again": captured[1], "not captured": eager, "dynamic": dynamic, "the model's own layers": plain}
    return {name: f"{(other == captured[0]).float().mean():.3f}" for name, other in same.items()}


def profile(make, num_new, num_forwards, rows=15, **arguments):
    """What the GPU and the host do in a call, and how often: launches and synchronisations per forward."""
    model, ids = make(), prompts(1)
    given = {"attention_mask": torch.ones_like(ids), "max_new_tokens": num_new, "top_p": 0.9, **arguments}
    for _ in range(2):
        model.generate(ids, **given)
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        model.generate(ids, **given)
        torch.cuda.synchronize()
    calls = Counter({event.key: event.count for event in profiler.key_averages() if event.key.startswith("cuda")})
    on_gpu = [event for event in profiler.key_averages() if event.device_type == torch.autograd.DeviceType.CUDA]
    calls["kernels on the GPU"] = sum(event.count for event in on_gpu)
    calls["us on the GPU"] = int(sum(event.self_device_time_total for event in on_gpu))
    per_call = {name: f"{count / num_forwards:.1f}" for name, count in calls.most_common(9)}
    table = profiler.key_averages().table(sort_by="self_cuda_time_total", row_limit=rows, max_name_column_width=60)
    kept = [line[:62] + line[-92:] for line in table.splitlines()]
    return f"per forward {per_call}\n" + "\n".join(kept)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=70.0)
    report = Report(parser.parse_args().seconds)
    print(torch.cuda.get_device_name(), torch.__version__, flush=True)
    models = {}

    def kept(name, make, *args):
        if name not in models:
            models[name] = make(*args)
        return lambda: models[name]

    static = {"cache_implementation": "static"}
    bd3lm4, bd3lm16 = kept("bd3lm4", ours, 4), kept("bd3lm16", ours, 16)
    gpt, smollm2 = kept("gpt2", gpt2), kept("llama", llama)
    adapted = kept("adapted", lambda: quiet(BlockDiffusionForMaskedLM.from_causal_lm(llama(), block_size=4)))
    line, speeds = report.line, speed_line
    line("GPT-2, dynamic, batch 1", speeds, gpt, 1, 96, rounds=1)
    line("ours 4, dynamic, batch 1, 1 per forward", speeds, bd3lm4, 1, 192)
    line("ours 4, static, batch 1, 1 per forward", speeds, bd3lm4, 1, 384, **static)
    line("ours 4, static, batch 1, 2 per forward", speeds, bd3lm4, 1, 384, **static, **per_forward(2))
    line("ours 4, static, batch 1, 4 per forward", speeds, bd3lm4, 1, 384, **static, **per_forward(4))
    line("ours 16, static, batch 1, 1 per forward", speeds, bd3lm16, 1, 384, **static)
    line("ours 16, static, batch 1, 4 per forward", speeds, bd3lm16, 1, 384, **static, **per_forward(4))
    line("equal tokens, ours", equality, bd3lm4)
    line("GPT-2, dynamic, batch 32", speeds, gpt, 32, 64, rounds=1)
    line("ours 4, dynamic, batch 32, 1 per forward", speeds, bd3lm4, 32, 96, rounds=1)
    line("ours 4, static, batch 32, 1 per forward", speeds, bd3lm4, 32, 96, rounds=1, **static)
    line("ours 16, static, batch 32, 1 per forward", speeds, bd3lm16, 32, 96, rounds=1, **static)
    line("ours 16, static, batch 32, 4 per forward", speeds, bd3lm16, 32, 96, rounds=1, **static, **per_forward(4))
    line("profile of ours 4, static", profile, bd3lm4, 64, 64, **static)
    line("Llama of SmolLM2's shape, stock, dynamic", speeds, smollm2, 1, 64, rounds=1)
    line("adapted 4, dynamic, 1 per forward", speeds, adapted, 1, 64, rounds=1)
    line("adapted 4, static, 1 per forward", speeds, adapted, 1, 96, rounds=1, **static)
    line("adapted 4, static, 4 per forward", speeds, adapted, 1, 192, rounds=1, **static, **per_forward(4))
    line("equal tokens, adapted", equality, adapted)
    line("profile of ours 4, dynamic", profile, bd3lm4, 32, 32)
    line("GPT-2, static, batch 1", speeds, gpt, 1, 192, rounds=1, **static)
    line("profile of adapted 4, static", profile, adapted, 32, 32, rows=8, **static)
    line("GPT-2, static, batch 32", speeds, gpt, 32, 96, rounds=1, **static)
    line("Llama of SmolLM2's shape, stock, static", speeds, smollm2, 1, 96, rounds=1, **static)


if __name__ == "__main__":
    main()
