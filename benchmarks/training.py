"""
Training speed and memory beside dense two-stream passes and GPT-2: `python -m benchmarks.training`.

A step is one forward and one backward pass over a batch of random tokens; bfloat16 means autocast over float32
weights. Beside it, in the same run: GPT-2; the same model without the package's kernels, as it is by remote code
alone; with gradient checkpointing; and three dense forms of the same network. `benchmarks/dense.py` is the paper's own
formulation (the 2L x 2L mask in SDPA, all queries in every layer, shifts and gates per token, logits of all
positions), by the kernels' matrix products and by those of `nn.Linear`, as the published code has it; `eager` is this
package's reference attention, which holds all scores under the dense mask.

MFU is the FLOPs of the matrix products that a formulation needs, over what the device could do in the time. Per token
of text, with P the weights of all layers' projections and E those of the output projection,

    GPT-2   6 (P + E)       + 12 layers hidden (length / 2)
    BD3-LM  6 (2 P + E / 2) + 12 layers hidden (length / 2) 2

since BD3-LM runs two streams through the layers, each token of which sees half the text on average, and predicts the
masked half of the tokens alone.
"""

import argparse
import dataclasses
import sys
from contextlib import nullcontext

import torch

from bd3lm_hf import kernels
from bd3lm_hf.kernels.cpu_linear import linear

from .common import (
    SIZES,
    Size,
    benchmark_parser,
    interleaved_medians,
    machine,
    make_bd3lm,
    make_gpt2,
    peak_memory_mib,
    peak_tflops,
    print_own_peak_memory,
    print_table,
)
from .dense import dense_loss


NAMES = {
    "bd3lm": "BD3-LM",
    "remote": "BD3-LM, remote code alone",
    "checkpointed": "BD3-LM, gradient checkpointing",
    "dense": "BD3-LM, dense formulation",
    "plain_dense": "BD3-LM, dense formulation by `nn.Linear`",
    "eager": "BD3-LM, `eager`",
    "gpt2": "GPT-2",
}


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
    attn_implementation = "eager" if name == "eager" else arguments.attn_implementation
    model = make_gpt2(size) if name == "gpt2" else make_bd3lm(size, attn_implementation)
    model = model.train().to(arguments.device)
    if name == "checkpointed":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    linears = {"plain_dense": torch.nn.functional.linear}
    if arguments.device == "cpu":
        linears["dense"] = linear
    ids = torch.randint(size.vocab_size - 1, (size.batch_size, size.length), device=arguments.device)

    def plain_loss(ids: torch.Tensor) -> torch.Tensor:
        if "dense" in name:
            return dense_loss(model, ids, linears.get(name, torch.nn.functional.linear))
        return model(input_ids=ids, labels=ids).loss

    loss_of = torch.compile(plain_loss) if arguments.compile else plain_loss

    def step() -> float:
        with kernels.detached() if name == "remote" else nullcontext():
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

    peak = arguments.peak_tflops
    if peak is None and arguments.device != "cpu":
        peak = peak_tflops(torch.cuda.get_device_name())
    flags = ["--device", arguments.device, "--attn_implementation", arguments.attn_implementation]
    flags += ["--compile"] if arguments.compile else []
    print(f"Training on {machine(arguments.device, ' and '.join(arguments.dtype))}\n")
    rows = []
    for size_name, size in sizes.items():
        for dtype in arguments.dtype:
            steps = {name: make_step(name, size, dtype, arguments) for name in NAMES}
            seconds = interleaved_medians(steps, arguments.repeats)
            del steps
            memory = {
                name: peak_memory_mib(
                    "benchmarks.training",
                    *("--sizes", size_name, "--model", name, "--dtype", dtype),
                    *("--batch_size", str(size.batch_size), *flags),
                )
                for name in NAMES
            }
            for name, label in NAMES.items():
                tokens_per_second = size.batch_size * size.length / seconds[name]
                figures = [f"{tokens_per_second:.0f}", f"{seconds[name] / seconds['bd3lm']:.2f}"]
                figures += [f"{memory[name]:.0f}", f"{memory['bd3lm'] / memory[name]:.2f}"]
                if peak is not None:
                    figures.append(f"{flops_per_token(name, size) * tokens_per_second / (peak * 1e12):.1%}")
                rows.append([size_name, str(size.batch_size), dtype, label, *figures])
                print(" ".join(rows[-1]), file=sys.stderr)
    header = ["size", "batch", "precision", "model", "tokens/s", "BD3-LM's speed, x this"]
    header += ["peak memory, MiB", "BD3-LM's memory, x this"]
    print_table([*header, *(["MFU"] if peak is not None else [])], rows)


if __name__ == "__main__":
    main()
