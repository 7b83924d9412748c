"""`bd3lm evaluate`."""

from collections.abc import Sequence

from .common import DATA_HELP, SOURCE_OPTIONS, add_model_arguments, given, load_model, make_parser


DESCRIPTION = """\
Perplexity and bits per byte of a text under a model.

The text is cut into sequences of --length tokens; every token but the BOS in front of each is predicted. At block
size 1 the figures are exact, otherwise an upper bound, estimated with --num_draws draws of the noise.

examples:
  bd3lm evaluate bd3lm-demo --data corpus.txt --json likelihood.json
  bd3lm evaluate my-model --data Salesforce/wikitext --dataset_config wikitext-103-raw-v1 --split test
  bd3lm evaluate kuleshov-group/bd3lm-owt-block_size4 --tokenizer gpt2 --data corpus.txt --num_draws 16"""


def run(argv: Sequence[str]) -> None:
    """`bd3lm evaluate`."""
    from ..data import draw_sequences, load_documents, pack_documents
    from ..evaluation import evaluate_likelihood

    parser = make_parser("evaluate", DESCRIPTION)
    add_model_arguments(parser)
    parser.add_argument("--data", required=True, help=f"What to score: {DATA_HELP}")
    for name, help_text in SOURCE_OPTIONS.items():
        parser.add_argument(f"--{name}", help=help_text)
    parser.add_argument("--length", type=int, help="Tokens per sequence. (default: the model's context)")
    parser.add_argument("--max_eval_sequences", type=int, help="Score this many sequences. (default: all)")
    parser.add_argument("--num_draws", type=int, help="Draws of the noise. (default: 4)")
    parser.add_argument("--batch_size", type=int, help="Sequences per forward pass. (default: 8)")
    parser.add_argument("--seed", type=int, default=0, help="Seed of the noise, and of drawing sequences.")
    parser.add_argument("--json", metavar="FILE", help="Write the figures to this file as well.")
    args = parser.parse_args(argv)

    model, tokenizer = load_model(args)
    documents = load_documents(args.data, **given(args, SOURCE_OPTIONS))
    length = model.config.max_position_embeddings if args.length is None else args.length
    sequences = pack_documents(documents, tokenizer, length, drop_remainder=False)
    if args.max_eval_sequences is not None:
        sequences = draw_sequences(sequences, args.max_eval_sequences, args.seed)
    likelihood = evaluate_likelihood(
        model,
        sequences["input_ids"],
        seed=args.seed,
        num_bytes=sum(sequences["num_bytes"]),
        **given(args, ["batch_size", "num_draws"]),
    )
    print(likelihood)
    if args.json:
        likelihood.to_json(args.json)
