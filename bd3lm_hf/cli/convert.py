"""`bd3lm convert`."""

import argparse
from collections.abc import Sequence

from .common import given, make_parser


DESCRIPTION = """\
Bring a checkpoint into this package's format, with the code that loads it where this package is not installed.

SOURCE is a published checkpoint (folder or Hub id) or a Lightning .ckpt of the published training code. Published are
BD3-LM and MDLM, and adapted networks: SDAR and TraDo, Fast-dLLM v2, dLLM A2D and OPDLM, Efficient-DLM.

examples:
  bd3lm convert kuleshov-group/bd3lm-owt-block_size4 bd3lm-block4 --tokenizer gpt2
  bd3lm convert JetLM/SDAR-1.7B-Chat sdar --block_size 4
  bd3lm convert last.ckpt my-model --no-ema"""


def run(argv: Sequence[str]) -> None:
    """`bd3lm convert`."""
    parser = make_parser("convert", DESCRIPTION)
    parser.add_argument("source", metavar="SOURCE", help="A published checkpoint, or a .ckpt file.")
    parser.add_argument("destination", metavar="DEST", help="The folder to write, new or empty.")
    parser.add_argument("--tokenizer", help="Folder or Hub id of a tokenizer to save with it, mask token added.")
    parser.add_argument(
        "--ema",
        dest="use_ema",
        default=True,
        action=argparse.BooleanOptionalAction,
        help="Of a .ckpt, take the moving average of the weights rather than the weights.",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="Replace the model, or the file, that DEST is already."
    )
    sizes = ("num_attention_heads", "block_size", "max_position_embeddings", "mask_token_id")
    for name in sizes:
        parser.add_argument(f"--{name}", type=int, help="Of a .ckpt or an adapted network that does not say it.")
    parser.add_argument(
        "--shift_logits",
        choices=["false", "true", "noisy"],
        help="Of an adapted network: whether the output at a token scores the next one. (default: as its family does)",
    )
    args = parser.parse_args(argv)
    args.shift_logits = {"false": False, "true": True}.get(args.shift_logits, args.shift_logits)

    from ..hub.conversion import convert_checkpoint

    convert_checkpoint(
        args.source,
        args.destination,
        tokenizer=args.tokenizer,
        use_ema=args.use_ema,
        overwrite=args.overwrite,
        **given(args, [*sizes, "shift_logits"]),
    )
    print(f"saved to {args.destination}")
