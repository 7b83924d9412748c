"""`bd3lm adapt`."""

import argparse
from collections.abc import Sequence

from .common import given, make_parser


DESCRIPTION = """\
Make a block diffusion language model of an autoregressive one, to be trained with `bd3lm train --model DEST`.

The weights stay as they are and keep their names. With --block_size 1 the result writes what the source writes; larger
blocks have to be learnt.

examples:
  bd3lm adapt HuggingFaceTB/SmolLM2-135M-Instruct smollm2-block4
  bd3lm adapt Qwen/Qwen3-0.6B qwen3-block8 --block_size 8 --clean_attention causal
  bd3lm adapt Qwen/Qwen3-0.6B qwen3-sdar --for sdar               for SGLang and LMDeploy
  bd3lm adapt smollm2.Q4_1.gguf smollm2-block4 --tokenizer HuggingFaceTB/SmolLM2-135M-Instruct"""


def run(argv: Sequence[str]) -> None:
    """`bd3lm adapt`."""
    parser = make_parser("adapt", DESCRIPTION)
    parser.add_argument(
        "source", metavar="SOURCE", help="Folder, Hub id or .gguf file of a causal language model of Transformers."
    )
    parser.add_argument("destination", metavar="DEST", help="The folder to write.")
    parser.add_argument("--tokenizer", help="Folder or Hub id of the tokenizer. (default: the one beside the model)")
    parser.add_argument("--gguf_file", help="The .gguf file in SOURCE, if that is a folder or Hub id.")
    parser.add_argument("--block_size", type=int, help="Tokens denoised together. (default: 4)")
    parser.add_argument(
        "--mask_token",
        help="A token that no text uses, or a new one. (default: the tokenizer's, one kept for later, or a new one)",
    )
    parser.add_argument(
        "--shift_logits",
        action=argparse.BooleanOptionalAction,
        help="Whether the output at a token goes on scoring the next one. (default: yes; with --for sdar no)",
    )
    parser.add_argument("--no_shift_logits", dest="shift_logits", action="store_false", help=argparse.SUPPRESS)
    parser.add_argument(
        "--clean_attention",
        choices=["block", "causal"],
        help="What a clean token sees: its whole block, or what comes before it. (default: block)",
    )
    parser.add_argument(
        "--for", dest="target", choices=["sdar"], help="Choose what an engine requires: `sdar` of SGLang and LMDeploy."
    )
    parser.add_argument("--dtype", choices=["auto", "float32", "bfloat16", "float16"], help="Type of the weights.")
    parser.add_argument(
        "--overwrite", action="store_true", help="Replace the model, or the file, that DEST is already."
    )
    args = parser.parse_args(argv)

    from ..hub.adaptation import adapt_checkpoint

    names = ["tokenizer", "gguf_file", "block_size", "mask_token", "shift_logits", "clean_attention"]
    model, tokenizer = adapt_checkpoint(
        args.source, args.destination, overwrite=args.overwrite, **given(args, [*names, "target", "dtype"])
    )
    config = model.config
    print(
        f"saved to {args.destination}: {config.text_config.model_type}, {model.num_parameters():,} parameters, block "
        f"size {config.block_size}, mask token {tokenizer.mask_token} ({config.mask_token_id}), logits "
        f"{'shifted' if config.shift_logits else 'not shifted'}"
    )
