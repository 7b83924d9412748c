"""
Training on a GPU, several ways, beside GPT-2 and the paper's formulation: `python -m benchmarks.gpu_training`.

A step is one forward and one backward pass over 16 random texts of 1,024 tokens, bfloat16 by autocast over float32
weights, without an optimizer; tokens are those of the text. Each way has a process of its own: all are compiled at the
same time, and whichever is ready runs, one after the other; the median of its steps counts.

    bd3lm:ATTENTION:MODE[:BUDGET]     the compiled static step under sdpa or flex_attention; MODE is that of
                                      `torch.compile` or "eager"; BUDGET as in `compile_training`
    gpt2, paper                       compiled; the paper's formulation has dense masks and the logits of all tokens
"""

import argparse
import fcntl
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch

from .common import SIZES, Size, machine, make_bd3lm, make_gpt2
from .dense import dense_loss


# What takes longest to compile begins first.
WAYS = ["bd3lm:flex_attention:reduce-overhead", "bd3lm:flex_attention:default", "paper", "gpt2"]
SYNCHRONIZATIONS = (
    "cudaStreamSynchronize",
    "cudaDeviceSynchronize",
    "cudaEventSynchronize",
    "aten::_local_scalar_dense",
)
LAUNCHES = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx", "cudaGraphLaunch")


def make_loss(way: str, size: Size, device: str):
    """(model, function of ids that gives the loss)."""
    name, attention, mode, budget = [*way.split(":"), None, None, None][:4]
    if name != "bd3lm":
        model = (make_gpt2(size) if name == "gpt2" else make_bd3lm(size)).to(device).train()
        if name == "gpt2":
            return model, torch.compile(lambda ids: model(input_ids=ids, labels=ids).loss)
        return model, torch.compile(lambda ids: dense_loss(model, ids))
    from bd3lm_hf.kernels.compiled import compile_training

    model = make_bd3lm(size, attention).to(device).train()
    # The ids of the first batches are looked at, for which the host waits.
    model._num_checks_left = 0
    backend, mode = None if mode == "eager" else "inductor", None if mode in ("default", "eager") else mode
    compile_training(model, backend, mode, **({} if budget is None else {"memory_budget": float(budget)}))
    return model, lambda ids: model(input_ids=ids, labels=ids).loss


def make_step(way: str, size: Size, device: str):
    model, loss_of = make_loss(way, size, device)
    ids = torch.randint(size.vocab_size - 1, (size.batch_size, size.length)).to(device)

    def step() -> None:
        with torch.autocast(device, torch.bfloat16):
            loss = loss_of(ids)
        loss.backward()
        model.zero_grad(set_to_none=True)

    return step


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def timed(step, repeats: int, device: str) -> float:
    """Median seconds of a step, one after the other, by the device's clock."""
    if device == "cpu":
        return launching_alone(step, device, repeats)
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    marks[0].record()
    for mark in marks[1:]:
        step()
        mark.record()
    synchronize(device)
    return median(before.elapsed_time(after) for before, after in zip(marks, marks[1:])) / 1e3


def launching_alone(step, device: str, repeats: int = 3) -> float:
    """Seconds that the host takes to launch one step while the device has nothing to do."""
    seconds = []
    for _ in range(repeats):
        synchronize(device)
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    return median(seconds)


def profile(step, device: str, num_rows: int) -> str:
    """What a step consists of: synchronizations, launches, and the kernels that take longest."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]
    with profiler(activities=activities) as record:
        for _ in range(3):
            step()
        synchronize(device)
    counts = Counter(event.name for event in record.events())
    lines = [
        "  a step: " + ", ".join(f"{name} {counts[name] / 3:.1f}" for name in (*SYNCHRONIZATIONS, *LAUNCHES)),
    ]
    if device == "cuda":
        kernels = [
            event for event in record.key_averages() if event.self_device_time_total > 0 and not event.cpu_time_total
        ]
        kernels = kernels or [event for event in record.key_averages() if event.self_device_time_total > 0]
        kernels.sort(key=lambda event: -event.self_device_time_total)
        lines.append(f"  on the GPU {sum(event.self_device_time_total for event in kernels) / 3000:.1f} ms, of which")
        lines += [
            f"    {event.self_device_time_total / 3000:7.2f} ms {event.count / 3:6.1f} x {event.key[:110]}"
            for event in kernels[:num_rows]
        ]
    return "\n".join(lines)


def run_way(way: str, size: Size, device: str, repeats: int, lock_file: str) -> None:
    """For a process of its own: compiles beside others, then runs alone, and prints figures and a profile."""
    start = time.monotonic()
    step = make_step(way, size, device)
    for _ in range(3):
        step()
    synchronize(device)
    compiled = time.monotonic() - start
    with open(lock_file) as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        step()
        if device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        seconds, launched = timed(step, repeats, device), launching_alone(step, device)
        memory = torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else float("nan")
        speed = size.batch_size * size.length / seconds
        print(
            f"{way}: {speed:.0f} tokens/s, {seconds * 1e3:.1f} ms a step, peak {memory:.1f} GiB, launched in "
            f"{launched * 1e3:.1f} ms, compiled in {compiled:.0f} s",
            flush=True,
        )
        if not way.startswith("bd3lm"):
            return
        try:
            print(profile(step, device, 16), flush=True)
        except Exception:
            print("  no profile: " + " | ".join(traceback.format_exc().splitlines()[-3:]), flush=True)


def run_ways(ways: list[str], arguments: argparse.Namespace, end: float) -> None:
    """Runs some ways, each in a process of its own, and prints what each prints as soon as it is at its end."""
    flags = ["--size", arguments.size, "--device", arguments.device, "--repeats", str(arguments.repeats)]
    flags += ["--batch_size", str(arguments.batch_size)]
    environment = {"TORCHINDUCTOR_COMPILE_THREADS": "4", **os.environ}
    with tempfile.NamedTemporaryFile() as lock, tempfile.TemporaryDirectory() as folder:
        running = {}
        for way in ways:
            command = [sys.executable, "-m", "benchmarks.gpu_training", "--way", way, "--lock_file", lock.name, *flags]
            with open(f"{folder}/{way}", "w") as output:
                running[way] = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
        while running:
            time.sleep(0.2)
            for way, process in [*running.items()]:
                is_late = time.monotonic() > end
                if process.poll() is None and not is_late:
                    continue
                process.kill()
                status = "stopped: no time left" if process.wait() and is_late else process.returncode
                print_way(way, status, Path(folder, way).read_text().splitlines())
                del running[way]


def print_way(way: str, status: int | str, lines: list[str]) -> None:
    starts = (f"{way}: ", "  a step", "  on the", "    ", "  no profile")
    figures = [line for line in lines if line.startswith(starts)]
    if figures and figures[0].startswith(way):
        print("\n".join(figures), flush=True)
    if status != 0:
        print(f"{way}: fails ({status}); its last lines:\n    " + "\n    ".join(lines[-25:]), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--size", choices=SIZES, default="large")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=92.0, help="ways that take longer are stopped")
    parser.add_argument("--ways", nargs="+", default=WAYS, help="see above")
    parser.add_argument("--way", help=argparse.SUPPRESS)
    parser.add_argument("--lock_file", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    size = replace(SIZES[arguments.size], batch_size=arguments.batch_size)
    if arguments.way:
        return run_way(arguments.way, size, arguments.device, arguments.repeats, arguments.lock_file)
    print(f"On {machine(arguments.device, 'bfloat16')}; {size}", flush=True)
    start = time.monotonic()
    run_ways(arguments.ways, arguments, start + arguments.seconds)
    print(f"({time.monotonic() - start:.0f} s)", flush=True)


if __name__ == "__main__":
    main()
