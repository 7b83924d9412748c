"""`bd3lm quality`."""

import json
from collections.abc import Sequence
from pathlib import Path

from .common import check_output, choose_device, given, make_parser


DESCRIPTION = """\
How good samples are: perplexity under a judge, token entropy, diversity, repetition and length.

The samples are the lines of a text file, or the rows of a table, which may hold line breaks (`bd3lm generate --json`
writes such a one). All figures count the tokens of the judge's tokenizer. Where EOS is spelled out at the end of
samples, the share of those that end with it is told.

examples:
  bd3lm quality samples.jsonl --judge gpt2-large
  bd3lm quality samples.txt --judge gpt2 --window 1024 --stride 512 --json quality.json"""


def run(argv: Sequence[str]) -> None:
    """`bd3lm quality`."""
    parser = make_parser("quality", DESCRIPTION)
    parser.add_argument("samples", metavar="FILE", help="A text file, or a .jsonl, .json, .csv or .parquet table.")
    parser.add_argument("--judge", required=True, help="Folder or Hub id of an autoregressive model.")
    parser.add_argument("--text_column", default="text", help="The column of a table that holds the samples.")
    parser.add_argument("--window", type=int, help="Tokens that the judge reads at once. (default: its context)")
    parser.add_argument("--stride", type=int, help="Tokens that its window slides by. (default: half a window)")
    parser.add_argument("--batch_size", type=int, help="Windows per forward pass. (default: 8)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: the accelerator, if there is one)")
    parser.add_argument(
        "--dtype", choices=["auto", "float32", "bfloat16", "float16"], default="auto", help="Type of the weights."
    )
    parser.add_argument("--json", metavar="FILE", help="Write the figures to this file as well.")
    args = parser.parse_args(argv)
    check_output(args.json)
    texts = read_samples(args.samples, args.text_column)

    from transformers import AutoModelForCausalLM

    from ..data.replacing import write_text
    from ..data.tokenization import read_tokenizer
    from ..evaluation.loading import load_whole
    from ..evaluation.quality import generative_perplexity, sample_statistics

    device = choose_device(args)
    tokenizer = read_tokenizer(args.judge)
    judge = load_whole(AutoModelForCausalLM, args.judge, device=device, dtype=args.dtype)
    perplexity = generative_perplexity(texts, judge, tokenizer, **given(args, ["window", "stride", "batch_size"]))
    samples = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    # Text that was decoded without special tokens does not tell what ended it.
    tells_end = any(tokenizer.eos_token_id in ids for ids in samples)
    statistics = sample_statistics(
        samples,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id if tells_end else None,
        pad_token_id=tokenizer.pad_token_id,
    )
    print(perplexity)
    print(statistics)
    if args.json:
        figures = {
            "judge": args.judge,
            "generative_perplexity": perplexity.to_dict(),
            "statistics": statistics.to_dict(),
        }
        write_text(args.json, json.dumps(figures, indent=2) + "\n")


def read_samples(path: str, text_column: str = "text") -> list[str]:
    """
    The samples of a file: the rows of a table, or the lines of a text file but blank ones.

    Raises:
        ValueError: if there is no such file or column, it cannot be read or is not UTF-8, or holds no sample.
    """
    from ..data.documents import load_documents
    from ..data.text_files import TABLE_FORMATS

    if not Path(path).is_file():
        raise ValueError(f"samples={path!r} is no file; it takes a text file or a table")
    rows = load_documents(path, text_column=text_column)["text"][:]
    missing = [index for index, text in enumerate(rows) if text is None]
    if missing:
        raise ValueError(f"samples={path!r}: row {missing[0]} has nothing in the column {text_column!r}")
    if Path(path).suffix in TABLE_FORMATS:
        return rows
    return [line for line in rows[0].split("\n") if line.strip()]
