"""What the benchmarks share: the sizes, the models, fair timing, and the table."""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
import transformers
from transformers import GPT2Config, GPT2LMHeadModel

from bd3lm_hf import BD3LMConfig, BD3LMForMaskedLM


@dataclass(frozen=True)
class Size:
    """One of the two sizes that the benchmarks are run at."""

    hidden_size: int
    num_layers: int
    num_heads: int
    vocab_size: int
    length: int
    batch_size: int


# bfloat16 with float32 accumulation, dense matrices, in TFLOP/s, as the makers state it; the first that fits counts.
PEAK_TFLOPS = {
    "H100 PCIe": 756,
    "H100 NVL": 835,
    "GH200": 989,
    "H200": 989,
    "H100": 989,
    "B200": 2250,
    "A100": 312,
    "L40S": 362,
    "L4": 121,
}
SIZES = {"small": Size(384, 6, 6, 8192, 512, 4), "large": Size(768, 12, 12, 50258, 1024, 1)}
BLOCK_SIZE = 4


def make_bd3lm(size: Size, attn_implementation: str = "sdpa", block_size: int = BLOCK_SIZE) -> BD3LMForMaskedLM:
    """A BD3-LM without dropout; its closed gates are opened a little, so that no branch is trivially zero."""
    torch.manual_seed(0)
    config = BD3LMConfig(
        vocab_size=size.vocab_size,
        hidden_size=size.hidden_size,
        num_hidden_layers=size.num_layers,
        num_attention_heads=size.num_heads,
        max_position_embeddings=size.length,
        block_size=block_size,
        hidden_dropout=0.0,
    )
    model = BD3LMForMaskedLM._from_config(config, attn_implementation=attn_implementation)
    for name, parameter in model.named_parameters():
        if "adaln" in name or "lm_head" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    return model


def make_gpt2(size: Size) -> GPT2LMHeadModel:
    """Transformers' GPT-2 of the same width, depth and vocabulary, without dropout."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=size.vocab_size,
        n_positions=size.length,
        n_embd=size.hidden_size,
        n_layer=size.num_layers,
        n_head=size.num_heads,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPT2LMHeadModel(config)


def interleaved_medians(steps: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """
    Median seconds of each step, all of them run in turn, so that a busy machine is busy for all; one warm-up each.
    """
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for repeat in range(repeats + 1):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if repeat:
                seconds[name].append(time.perf_counter() - start)
        print(f"  round {repeat}/{repeats}", file=sys.stderr)
    return {name: median(values) for name, values in seconds.items()}


def peak_memory_mib(module: str, *arguments: str) -> float:
    """
    Peak memory of a fresh process that runs one step of a benchmark, its weights included.

    On a CPU it is the resident memory, less that of importing the packages. glibc is told to give back what is freed:
    left to itself it keeps some, and how much differs by hundreds of MiB from run to run of the same program.
    """
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**20)}

    def measure(*extra: str) -> float:
        command = [sys.executable, "-m", module, *arguments, *extra]
        output = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
        return json.loads(output.splitlines()[-1])

    return measure("--memory-of-one-step") - measure("--memory-of-imports")


def benchmark_parser(description: str, names: Iterable[str]) -> argparse.ArgumentParser:
    """The flags that all benchmarks have; the hidden ones are those that `peak_memory_mib` gives its processes."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--repeats", type=int, default=5, help="timed rounds; the median counts")
    parser.add_argument("--model", choices=names, help=argparse.SUPPRESS)
    parser.add_argument("--memory-of-one-step", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--memory-of-imports", action="store_true", help=argparse.SUPPRESS)
    return parser


def benchmark_arguments(description: str, names: Iterable[str]) -> argparse.Namespace:
    """The flags of a benchmark that has no others."""
    return benchmark_parser(description, names).parse_args()


def resident_memory_mib() -> float:
    """What this process holds in memory now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def print_own_peak_memory(device: str = "cpu") -> None:
    """For the fresh process of `peak_memory_mib`: its peak memory in MiB, resident or allocated on the device."""
    status = Path("/proc/self/status")
    if device != "cpu":
        mebibytes = torch.cuda.max_memory_allocated() / 2**20
    elif status.exists():
        # `ru_maxrss` would carry over the peak of the process that started this one.
        lines = status.read_text().splitlines()
        mebibytes = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 2**10
    else:
        mebibytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    print(json.dumps(mebibytes))


def machine(device: str = "cpu", dtype: str = "float32") -> str:
    """The machine named by its kind, and the versions that matter."""
    versions = f"{dtype}, torch {torch.__version__.split('+')[0]}, transformers {transformers.__version__}"
    if device != "cpu":
        return f"{torch.cuda.get_device_name()}, {versions}"
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [
            line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")
        ]
        model = names[0] if names else model
    return f"{torch.get_num_threads()} threads of {model}, {versions}"


def peak_tflops(device_name: str) -> float | None:
    """What a GPU of this name could do in dense bfloat16, in TFLOP/s, if that is known."""
    words = device_name.replace("-", " ").split()
    return next((peak for name, peak in PEAK_TFLOPS.items() if set(name.split()) <= set(words)), None)


def print_table(header: list[str], rows: list[list[str]]) -> None:
    """A Markdown table on standard output."""
    print("| " + " | ".join(header) + " |")
    print("|" + " --- |" * len(header))
    for row in rows:
        print("| " + " | ".join(row) + " |", flush=True)
