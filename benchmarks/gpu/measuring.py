"""Measuring a line: what has to be done before (compiling, capturing), and the figures after that."""

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from statistics import median

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from bd3lm_hf.kernels.compiled import compile_training

from ..common import peak_tflops
from ..dense import dense_loss
from .lines import Line
from .networks import GpuSize, flops_per_token, make_model


# What the host does, as the profiler calls it.
LAUNCHES = (
    "cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx", "cudaLaunchCooperativeKernel",
    "cudaGraphLaunch",
)  # fmt: skip
SYNCHRONIZATIONS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy")
# Kernels of a line that are kept, and letters of the name of one.
NUM_KERNELS, LONGEST_NAME = 16, 110
# After so many no other round is timed.
ENOUGH_SECONDS = 2.0
# Tokens of a text that is generated for the profiler, where its number is no part of what was compiled.
PROFILED_TOKENS = 64


@dataclass
class Prepared:
    """
    A line that is ready to be measured.

    Attributes:
        run: takes how many tokens to generate, of training steps to run, and returns the number of forwards of the
            network one after another, of training the number of steps.
        num_tokens: of text in one of these runs, per number that `run` takes.
        number: what `run` takes to be timed ...
        num_profiled: ... and to be counted, and before that to compile and capture what is to be.
        flops: per token.
    """

    run: Callable[[int], float]
    num_tokens: int
    number: int
    num_profiled: int
    flops: float


@dataclass
class Figures:
    """
    What was measured of a line; None is not known on the device.

    Attributes:
        tokens_per_second: the median of the rounds, fewer of what is slow.
        mfu: see `benchmarks/gpu/networks.py`, of `peak_tflops`, dense bfloat16 as the maker states it for the device.
        peak_memory: GiB that were allocated, the weights included.
        launches, synchronizations: of the host, per training step or per forward of generation.
        forwards_per_token: of generation, per text.
        kernels: of training, those that take longest on the device: (name, milliseconds, how often), per step.
    """

    tokens_per_second: float
    flops_per_token: float
    peak_tflops: float | None
    mfu: float | None
    peak_memory: float | None
    launches: float | None
    synchronizations: float | None
    forwards_per_token: float | None
    kernels: list[tuple[str, float, float]]


def prepare(line: Line, size: GpuSize, device: str) -> Prepared:
    """Makes the model of a line on a device and runs it twice, which compiles and captures what is to be."""
    prepared = (prepare_training if line.part == "training" else prepare_generation)(line, size, device)
    for _ in range(2):
        prepared.run(prepared.num_profiled)
    synchronize(device)
    if device == "cuda":
        # Others prepare beside it.
        torch.cuda.empty_cache()
    return prepared


def prepare_training(line: Line, size: GpuSize, device: str) -> Prepared:
    """Forward and backward passes over one batch, without an optimizer, bfloat16 by autocast over float32 weights."""
    model = make_model(line, size).to(device).train()
    # The ids of the first batches are looked at, for which the host waits.
    model._num_checks_left = 0
    shape = size.published.batch_size, size.published.length
    # The last id may be the mask token's.
    ids = torch.randint(model.config.get_text_config(decoder=True).vocab_size - 1, shape).to(device)
    loss_of = make_loss(line, model, device)

    def run(num_steps: int) -> float:
        for _ in range(num_steps):
            with torch.autocast(device, torch.bfloat16):
                loss = loss_of(ids)
            loss.backward()
            model.zero_grad(set_to_none=True)
        return num_steps

    return Prepared(run, ids.numel(), size.num_steps, 2, flops_per_token(line, model, shape[1]))


def make_loss(line: Line, model, device: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """From ids [batch, length] to the loss; compiled as a line has it, on a GPU."""

    def loss_of(ids: torch.Tensor) -> torch.Tensor:
        return dense_loss(model, ids) if line.model == "paper" else model(input_ids=ids, labels=ids).loss

    if not line.is_fast or device != "cuda":
        return loss_of
    if line.model == "block diffusion":
        compile_training(model, **line.arguments)
        return loss_of
    return torch.compile(loss_of)


def prepare_generation(line: Line, size: GpuSize, device: str) -> Prepared:
    """Nucleus sampling with p = 0.9, in bfloat16 on a GPU."""
    model = make_model(line, size).to(device, torch.bfloat16 if device == "cuda" else torch.float32).eval()
    # Texts of one length, so that the figures are of equal work.
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    config = model.config.get_text_config(decoder=True)
    prompt = torch.randint(config.vocab_size - 1, (line.num_texts, size.prompt_length)).to(device)
    given = {"attention_mask": torch.ones_like(prompt), "do_sample": True, "top_p": 0.9, "top_k": 0, **line.arguments}
    if line.is_fast:
        given["cache_implementation"] = "static"

    @torch.no_grad()
    def run(num_tokens: int) -> float:
        output = model.generate(prompt, max_new_tokens=num_tokens, return_dict_in_generate=True, **given)
        if output.sequences.shape[1] != size.prompt_length + num_tokens:
            raise RuntimeError(f"{output.sequences.shape[1] - size.prompt_length} tokens came, not {num_tokens}")
        forwards = getattr(output, "num_forward_passes", None)
        return float(num_tokens if forwards is None else torch.as_tensor(forwards).float().max())

    # The length of a static cache follows from the number of tokens.
    number = size.num_new_tokens
    profiled = number if line.is_fast else min(number, PROFILED_TOKENS)
    return Prepared(run, line.num_texts, number, profiled, flops_per_token(line, model, size.prompt_length + number))


def measure(line: Line, prepared: Prepared, size: GpuSize, device: str) -> Figures:
    """Times a prepared line, and counts what the host does, with nothing else at work on the device."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(size.num_rounds):
        synchronize(device)
        start = time.perf_counter()
        num_runs = prepared.run(prepared.number)
        synchronize(device)
        seconds.append(time.perf_counter() - start)
        if sum(seconds) > ENOUGH_SECONDS:
            break
    speed = prepared.num_tokens * prepared.number / median(seconds)
    peak = peak_tflops(torch.cuda.get_device_name()) if device == "cuda" else None
    memory = torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else None
    launches, synchronizations, kernels = counts(prepared, line, device)
    return Figures(
        tokens_per_second=speed,
        flops_per_token=prepared.flops,
        peak_tflops=peak,
        mfu=None if peak is None else speed * prepared.flops / (peak * 1e12),
        peak_memory=memory,
        launches=launches,
        synchronizations=synchronizations,
        forwards_per_token=num_runs / prepared.number if line.part == "generation" else None,
        kernels=kernels,
    )


def counts(prepared: Prepared, line: Line, device: str) -> tuple[float | None, float | None, list]:
    """Launches and synchronizations of the host per step or forward, and the kernels of a step: none on a CPU."""
    if device != "cuda":
        return None, None, []
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
        with record_function("measured"):
            num_runs = prepared.run(prepared.num_profiled)
        synchronize(device)
    # Of generation there are too many events to be added up in the time that there is.
    kernels = longest_kernels(recorded.key_averages(), num_runs) if line.part == "training" else []
    return *counts_of(recorded.events(), num_runs), kernels


def longest_kernels(events, num_runs: float) -> list[tuple[str, float, float]]:
    """Of the sums that a profiler has made: name, milliseconds and number of a kernel, per run, the longest first."""
    kernels = [event for event in events if event.self_device_time_total > 0 and not event.cpu_time_total]
    kernels.sort(key=lambda event: -event.self_device_time_total)
    return [
        (event.key[:LONGEST_NAME], event.self_device_time_total / num_runs / 1e3, event.count / num_runs)
        for event in kernels[:NUM_KERNELS]
    ]


def counts_of(events, num_runs: float) -> tuple[float, float]:
    """
    Launches and synchronizations per run, of the events of a profiler; what was not begun within the event "measured"
    is the profiler's own.
    """
    whole = next(event.time_range for event in events if event.name == "measured")
    number = Counter(event.name for event in events if whole.start <= event.time_range.start <= whole.end)
    return tuple(sum(number[name] for name in names) / num_runs for names in (LAUNCHES, SYNCHRONIZATIONS))


def synchronize(device: str) -> None:
    """Waits for the device."""
    if device == "cuda":
        torch.cuda.synchronize()


def figures_of(line: Line, size: GpuSize, device: str) -> dict:
    """Prepares and measures a line in this process."""
    return asdict(measure(line, prepare(line, size, device), size, device))
