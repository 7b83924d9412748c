"""`bd3lm export`."""

from collections.abc import Sequence

from .common import make_parser


DESCRIPTION = """\
Write an adapted network in a format of others.

  sdar       what SGLang (0.5.x) and LMDeploy (0.16 and later) serve as SDARForCausalLM: a Qwen3 without shift whose
             mask token has the id 151669; `bd3lm adapt --for sdar` chooses these at the start
  causal-lm  the folder of the stock autoregressive class

examples:
  bd3lm export my-sdar served --format sdar
  bd3lm export my-adapted-llama llama-again --format causal-lm"""


def run(argv: Sequence[str]) -> None:
    """`bd3lm export`."""
    parser = make_parser("export", DESCRIPTION)
    parser.add_argument("model", metavar="MODEL", help="Folder or Hub id of an adapted model.")
    parser.add_argument("destination", metavar="DEST", help="The folder to write.")
    parser.add_argument("--format", required=True, choices=["sdar", "causal-lm"], help="See above.")
    parser.add_argument("--tokenizer", help="Folder or Hub id of a tokenizer. (default: the one beside the model)")
    parser.add_argument(
        "--overwrite", action="store_true", help="Replace the model, or the file, that DEST is already."
    )
    args = parser.parse_args(argv)

    from ..hub.export import export_checkpoint

    export_checkpoint(args.model, args.destination, args.format, tokenizer=args.tokenizer, overwrite=args.overwrite)
    print(f"saved to {args.destination}")
