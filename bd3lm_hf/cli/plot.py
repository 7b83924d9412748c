"""`bd3lm plot`."""

import argparse
from collections.abc import Callable, Sequence

from .common import HelpFormatter, add_model_arguments, check_output, given, load_model, make_parser
from .generate import GENERATION_ARGUMENTS


DESCRIPTION = """\
Plots, written as PNG, SVG or PDF, whichever the name of --output ends in.

  denoising   when each token of a sample was revealed, and how probable it was then
  attention   who attends to whom in the two-stream pass of training
  schedules   noise schedules, their loss weights, and how much a block's loss varies under them
  training    training curves out of trainer_state.json

examples:
  bd3lm plot denoising bd3lm-demo "def main(" --max_new_tokens 24 --sampler confidence --output denoising.png
  bd3lm plot attention --length 16 --block_size 4 --output attention.svg
  bd3lm plot schedules --noise_interval 0.3 0.8 --output schedules.png
  bd3lm plot training bd3lm-demo --output training.png"""

KINDS = {
    "denoising": "when each token of a sample was revealed, and how probable it was then",
    "attention": "who attends to whom in the two-stream pass of training",
    "schedules": "noise schedules, their loss weights, and how much a block's loss varies under them",
    "training": "training curves out of trainer_state.json",
}


def run(argv: Sequence[str]) -> None:
    """`bd3lm plot`."""
    parser = make_parser("plot", DESCRIPTION)
    kinds = parser.add_subparsers(dest="kind", metavar="KIND", required=True, help=", ".join(KINDS))

    def add_kind(name: str, draw: Callable) -> argparse.ArgumentParser:
        kind = kinds.add_parser(name, description=KINDS[name], formatter_class=HelpFormatter, allow_abbrev=False)
        kind.add_argument("--output", default=f"{name}.png", help="The file to write.")
        kind.add_argument("--dpi", type=int, default=150, help="Dots per inch of a PNG.")
        kind.set_defaults(draw=draw)
        return kind

    denoising = add_kind("denoising", _denoising)
    add_model_arguments(denoising)
    denoising.add_argument("prompt", metavar="PROMPT", nargs="?", default="", help="Text to continue.")
    denoising.add_argument("--max_new_tokens", type=int, default=32, help="Tokens to write.")
    denoising.add_argument(
        "--do_sample", action=argparse.BooleanOptionalAction, help="Sample tokens, or take the likeliest."
    )
    for name, (value_type, help_text) in GENERATION_ARGUMENTS.items():
        if name != "num_return_sequences":
            denoising.add_argument(f"--{name}", type=value_type, help=help_text)
    denoising.add_argument("--seed", type=int, help="Repeats a run exactly.")

    attention = add_kind("attention", _attention)
    attention.add_argument("--length", type=int, help="Tokens of each stream. (default: 16)")
    attention.add_argument("--block_size", type=int, help="Tokens per block. (default: 4)")
    attention.add_argument("--window", type=int, help="Earlier blocks that are seen. (default: all)")

    schedules = add_kind("schedules", _schedules)
    schedules.add_argument(
        "--schedules",
        nargs="+",
        metavar="NAME",
        help="Which: loglinear, square, square_root, log or cosine. (default: all)",
    )
    schedules.add_argument(
        "--noise_interval",
        type=float,
        nargs=2,
        metavar=("BETA", "OMEGA"),
        help="Where t is drawn from. (default: 0.001 1)",
    )
    schedules.add_argument("--max_block_size", type=int, help="Largest block size. (default: 1024)")

    training = add_kind("training", _training)
    training.add_argument("trainer_state", metavar="FOLDER", help="A folder with trainer_state.json, or that file.")

    args = parser.parse_args(argv)
    if args.dpi < 1:
        raise ValueError(f"--dpi must be at least 1, but got {args.dpi}")
    from ..data.replacing import replaced_file

    check_output(args.output)
    figure = args.draw(args)
    with replaced_file(args.output) as path:
        figure.savefig(path, dpi=args.dpi)
    print(f"saved to {args.output}")


def _denoising(args: argparse.Namespace):
    from ..data.tokenization import encode_prompts
    from ..plots import plot_denoising

    model, tokenizer = load_model(args)
    options = given(
        args, ["max_new_tokens", "do_sample", "seed", *sorted(set(GENERATION_ARGUMENTS) & set(vars(args)))]
    )
    inputs = encode_prompts([args.prompt], tokenizer).to(model.device)
    output = model.generate(**inputs, return_dict_in_generate=True, output_reveal=True, **options)
    return plot_denoising(output, tokenizer, block_size=model.config.block_size)


def _attention(args: argparse.Namespace):
    from ..plots import plot_attention_pattern

    return plot_attention_pattern(**given(args, ["length", "block_size", "window"]))


def _schedules(args: argparse.Namespace):
    from ..plots import plot_noise_schedules

    if args.noise_interval is not None:
        args.noise_interval = tuple(args.noise_interval)
    return plot_noise_schedules(**given(args, ["schedules", "noise_interval", "max_block_size"]))


def _training(args: argparse.Namespace):
    from ..plots import plot_training

    return plot_training(args.trainer_state)
