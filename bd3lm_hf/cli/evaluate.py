"""`bd3lm evaluate`."""

import argparse
from collections.abc import Sequence

from .common import DATA_HELP, SOURCE_OPTIONS, add_model_arguments, check_output, given, make_parser


DESCRIPTION = """\
Perplexity and bits per byte of a text under a block diffusion model, or under an autoregressive one.

The text is packed into sequences of --length tokens; every token but the BOS in front of each is predicted. With
--window each document is a sequence of its own, read through a window that slides over it.

At block size 1 and for an autoregressive model the figures are those of the model, otherwise an upper bound: computed
by --estimator exact, estimated by the others. Several processes, started by `accelerate launch -m bd3lm_hf.cli
evaluate ...`, share the work.

examples:
  bd3lm evaluate bd3lm-demo --data corpus.txt --json likelihood.json
  bd3lm evaluate my-model --data wikitext103 --split validation
  bd3lm evaluate kuleshov-group/bd3lm-owt-block_size16 --tokenizer gpt2 --data corpus.txt --target_error 0.01
  bd3lm evaluate gpt2 --data documents.jsonl --window 1024 --stride 512"""


def run(argv: Sequence[str]) -> None:
    """`bd3lm evaluate`."""
    parser = make_parser("evaluate", DESCRIPTION)
    add_model_arguments(parser)
    parser.add_argument("--data", required=True, help=f"What to score: {DATA_HELP}")
    for name, help_text in SOURCE_OPTIONS.items():
        parser.add_argument(f"--{name}", help=help_text)
    parser.add_argument(
        "--corpus",
        help="Read --data as a copy of this corpus, detokenized and split as in papers: wikitext2, wikitext103, ptb, "
        "lm1b, lambada, ag_news, scientific_papers_pubmed, scientific_papers_arxiv, openwebtext or text8. --data "
        "takes these names, too, for the copies on the Hub.",
    )
    parser.add_argument("--length", type=int, help="Tokens per packed sequence. (default: the model's context)")
    parser.add_argument(
        "--window",
        type=int,
        nargs="?",
        const=0,
        help="Score each document by itself, this many tokens at once, in whole blocks. (without a number: the "
        "model's context)",
    )
    parser.add_argument(
        "--stride", type=int, help="Tokens, in whole blocks, that the window slides by. (default: half a window)"
    )
    parser.add_argument("--max_eval_sequences", type=int, help="Score this many sequences. (default: all)")
    parser.add_argument(
        "--estimator",
        type=_estimator_name,
        help="All masks of a block (exact), masks drawn by their number of tokens (stratified), or the paper's draws "
        "(monte_carlo). (default: exact for block sizes up to 4, else stratified)",
    )
    parser.add_argument("--num_draws", type=int, help="Draws of the noise, four copies each. (default: 2)")
    parser.add_argument(
        "--target_error", type=float, help="Draw until the error over draws is this, in nats per token."
    )
    parser.add_argument("--max_draws", type=int, help="Most draws for --target_error. (default: 64)")
    parser.add_argument("--batch_size", type=int, help="Sequences per forward pass. (default: 8)")
    parser.add_argument("--seed", type=int, default=0, help="Seed of the noise, and of drawing sequences.")
    parser.add_argument("--json", metavar="FILE", help="Write the figures to this file as well.")
    args = parser.parse_args(argv)
    if args.window is None and args.stride is not None or None not in (args.window, args.length):
        raise ValueError(
            "--stride takes --window, and --window excludes --length, but got "
            f"--length {args.length} --window {args.window} --stride {args.stride}"
        )

    check_output(args.json)

    from accelerate import PartialState

    from ..data.corpora import load_corpus
    from ..data.documents import draw_sequences, pack_documents
    from ..data.tokenization import encode_documents
    from ..evaluation.likelihood import evaluate_likelihood, load_for_evaluation

    model, tokenizer = load_for_evaluation(
        args.model, **given(args, ["tokenizer", "device", "dtype", "attn_implementation"])
    )
    documents = load_corpus(args.data, **given(args, ["corpus", *SOURCE_OPTIONS]))
    options = given(args, ["stride", "estimator", "num_draws", "target_error", "max_draws", "batch_size"])
    if args.window is None:
        length = args.length if args.length is not None else getattr(model.config, "max_position_embeddings", None)
        if length is None:
            raise ValueError("--length must be given for this model, whose configuration names no context length")
        sequences = pack_documents(documents, tokenizer, length, drop_remainder=False)
        if args.max_eval_sequences is not None:
            sequences = draw_sequences(sequences, args.max_eval_sequences, args.seed)
        input_ids, num_bytes = sequences["input_ids"], sum(sequences["num_bytes"])
    else:
        if args.max_eval_sequences is not None:
            documents = draw_sequences(documents, args.max_eval_sequences, args.seed)
        texts = documents["text"]
        input_ids, num_bytes = encode_documents(texts, tokenizer), sum(len((text or "").encode()) for text in texts)
        options["window"] = args.window or None
    likelihood = evaluate_likelihood(model, input_ids, seed=args.seed, num_bytes=num_bytes, **options)
    if PartialState().is_main_process:
        print(likelihood)
        if args.json:
            likelihood.to_json(args.json)


def _estimator_name(name: str) -> str:
    # `choices` would import the estimators, and torch, to show the help.
    from ..evaluation.estimators import ESTIMATOR_NAMES

    if name not in ESTIMATOR_NAMES:
        raise argparse.ArgumentTypeError(f"invalid choice: {name!r} (choose from {', '.join(ESTIMATOR_NAMES)})")
    return name
