"""
Training speed and memory beside the dense two-stream pass and GPT-2: `python -m benchmarks.training`.

A step is one forward and one backward pass over a batch of random tokens; bfloat16 means autocast over float32
weights. The dense reference (`benchmarks/dense.py`) is the same network in the paper's own formulation: the 2L x 2L
mask, all queries in every layer and the logits of all positions.

MFU is the FLOPs of the matrix products that a formulation needs, over what the device could do in the time. Per token
of text, with P the weights of all layers' projections and E those of the output projection,

    GPT-2   6 (P + E)       + 12 layers hidden (length / 2)
    BD3-LM  6 (2 P + E / 2) + 12 layers hidden (length / 2) 2

since BD3-LM runs two streams through the layers, each token of which sees half the text on average, and predicts the
masked half of the tokens alone.
"""

import argparse
import dataclasses

import torch

from .common import (
    SIZES,
    Size,
    benchmark_parser,
    interleaved_medians,
    machine,
    make_bd3lm,
    make_gpt2,
    peak_memory_mib,
    print_own_peak_memory,
    print_table,
)
from .dense import dense_loss


NAMES = {"bd3lm": "BD3-LM", "dense": "BD3-LM, dense formulation", "gpt2": "GPT-2"}
# bfloat16 with float32 accumulation, dense matrices, as the makers state it.
PEAK_TFLOPS = {"H200": 989, "H100": 989, "A100": 312, "L40S": 362, "L4": 121}


def parse_arguments() -> argparse.Namespace:
    parser = benchmark_parser(__doc__, NAMES)
    parser.add_argument("--batch_size", type=int, help="in place of the size's own")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", nargs="+", choices=["float32", "bfloat16"], default=["float32", "bfloat16"])
    parser.add_argument("--compile", action="store_true", help="torch.compile all of them")
    parser.add_argument(
        "--attn_implementation", choices=["sdpa", "flex_attention"], default="sdpa", help="of the BD3-LM"
    )
    parser.add_argument("--peak_tflops", type=float, help="of the device, for the MFU; known for some GPUs")
    return parser.parse_args()


def make_step(name: str, size: Size, dtype: str, arguments: argparse.Namespace):
    """A function that runs one training step of the model called `name` and returns the loss."""
    model = make_gpt2(size) if name == "gpt2" else make_bd3lm(size, arguments.attn_implementation)
    model = model.train().to(arguments.device)
    ids = torch.randint(size.vocab_size - 1, (size.batch_size, size.length), device=arguments.device)

    def plain_loss(ids: torch.Tensor) -> torch.Tensor:
        return dense_loss(model, ids) if name == "dense" else model(input_ids=ids, labels=ids).loss

    loss_of = torch.compile(plain_loss) if arguments.compile else plain_loss

    def step() -> float:
        with torch.autocast(arguments.device, dtype=torch.bfloat16, enabled=dtype == "bfloat16"):
            loss = loss_of(ids)
        loss.backward()
        model.zero_grad()
        # Waits for the device.
        return loss.item()

    return step


def flops_per_token(name: str, size: Size) -> float:
    """See the head of this file."""
    projections = 12 * size.hidden_size**2 * size.num_layers
    output_projection = size.hidden_size * size.vocab_size
    attention = 12 * size.num_layers * size.hidden_size * size.length / 2
    if name == "gpt2":
        return 6 * (projections + output_projection) + attention
    return 6 * (2 * projections + output_projection / 2) + 2 * attention


def peak_tflops(arguments: argparse.Namespace) -> float | None:
    if arguments.peak_tflops is not None or arguments.device == "cpu":
        return arguments.peak_tflops
    words = torch.cuda.get_device_name().replace("-", " ").split()
    return next((peak for name, peak in PEAK_TFLOPS.items() if name in words), None)


def print_memory(size: Size, arguments: argparse.Namespace) -> None:
    """For the fresh process of `peak_memory_mib`."""
    if arguments.memory_of_one_step:
        step = make_step(arguments.model, size, arguments.dtype[0], arguments)
        if arguments.device != "cpu":
            # What compiling takes is not of the step.
            step()
            torch.cuda.reset_peak_memory_stats()
        step()
    print_own_peak_memory(arguments.device)


def main() -> None:
    arguments = parse_arguments()
    sizes = {name: SIZES[name] for name in arguments.sizes}
    if arguments.batch_size is not None:
        sizes = {name: dataclasses.replace(size, batch_size=arguments.batch_size) for name, size in sizes.items()}
    if arguments.memory_of_one_step or arguments.memory_of_imports:
        return print_memory(sizes[arguments.sizes[0]], arguments)

    peak = peak_tflops(arguments)
    flags = ["--device", arguments.device, "--attn_implementation", arguments.attn_implementation]
    flags += ["--compile"] if arguments.compile else []
    print(f"Training on {machine(arguments.device, ' and '.join(arguments.dtype))}\n")
    rows = []
    for size_name, size in sizes.items():
        for dtype in arguments.dtype:
            steps = {name: make_step(name, size, dtype, arguments) for name in NAMES}
            seconds = interleaved_medians(steps, arguments.repeats)
            del steps
            for name, label in NAMES.items():
                memory = peak_memory_mib(
                    "benchmarks.training",
                    *("--sizes", size_name, "--model", name, "--dtype", dtype),
                    *("--batch_size", str(size.batch_size), *flags),
                )
                tokens_per_second = size.batch_size * size.length / seconds[name]
                figures = [f"{tokens_per_second:.0f}"]
                figures += [f"{seconds[other] / seconds[name]:.2f}" for other in ("gpt2", "dense")]
                if peak is not None:
                    figures.append(f"{flops_per_token(name, size) * tokens_per_second / (peak * 1e12):.1%}")
                rows.append([size_name, str(size.batch_size), dtype, label, *figures, f"{memory:.0f}"])
    header = ["size", "batch", "precision", "model", "tokens/s", "x GPT-2", "x dense"]
    print_table([*header, *(["MFU"] if peak is not None else []), "peak memory, MiB"], rows)


if __name__ == "__main__":
    main()
