"""`bd3lm generate`."""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from .bulk import add_bulk_arguments, check_bulk_arguments, run_bulk
from .common import add_model_arguments, given, load_model, make_parser
from .errors import is_terminal


DESCRIPTION = """\
Continue prompts, block by block.

Prompts come from the command line, or one per line from stdin; without any, the model starts from nothing. A single
prompt in a terminal is shown as it is denoised. With --data they are rows of a file; a run that was interrupted goes
on where it was, by the same command.

examples:
  bd3lm generate bd3lm-demo "def main():"
  bd3lm generate bd3lm-demo "import os" --max_new_tokens 100 --temperature 0.8 --top_p 0.9 --seed 1
  bd3lm generate bd3lm-demo --sampler confidence --confidence_threshold 0.9 "class Parser:"
  bd3lm generate bd3lm-demo --infill "def main([MASK][MASK][MASK]):"
  bd3lm generate bd3lm-demo --json < prompts.txt > texts.jsonl
  bd3lm generate bd3lm-demo --data prompts.jsonl --output texts.jsonl --seed 1
  bd3lm generate bd3lm-demo --data prompts.jsonl --output texts.jsonl --ray --replicas 8"""

MAX_NEW_TOKENS = 256
# Arguments of `generate` that are passed on as they are; the model's generation configuration owns their defaults.
GENERATION_ARGUMENTS = {
    "temperature": (float, "Divides the logits; below 1 the model takes fewer risks."),
    "top_k": (int, "Sample from the k likeliest tokens."),
    "top_p": (float, "Sample from the likeliest tokens that have this probability together."),
    "min_p": (float, "Sample from tokens at least this likely, relative to the likeliest."),
    "repetition_penalty": (float, "Above 1, tokens that occurred become less likely."),
    "no_repeat_ngram_size": (int, "Write no sequence of this many tokens twice."),
    "num_return_sequences": (int, "Texts per prompt."),
    "sampler": (str, "Which tokens a step reveals: first_hitting, ancestral, confidence or entropy_bound."),
    "denoising_steps": (int, "Steps per block (ancestral, confidence)."),
    "noise_schedule": (str, "When tokens are revealed: loglinear, square, square_root, log or cosine (ancestral)."),
    "remask_cap": (float, "Largest probability that a revealed token is masked again at a step (ancestral)."),
    "confidence_threshold": (float, "Reveal every token that is at least this certain (confidence)."),
    "confidence": (str, "How sure the model is: probability, margin or negative_entropy (confidence)."),
    "entropy_bound": (
        float,
        "The most entropy of tokens revealed together, less the largest, in nats (entropy_bound).",
    ),
    "entropy_stop_threshold": (float, "End a text whose last tokens have less entropy than this, in nats."),
    "entropy_stop_window": (int, "How many last tokens --entropy_stop_threshold looks at."),
}


def run(argv: Sequence[str]) -> None:
    """`bd3lm generate`."""
    parser = make_parser("generate", DESCRIPTION)
    add_model_arguments(parser)
    parser.add_argument("prompts", metavar="PROMPT", nargs="*", help="Texts to continue. (default: lines of stdin)")
    parser.add_argument(
        "--max_new_tokens", type=int, help=f"Tokens to write. (default: {MAX_NEW_TOKENS}, with --infill none)"
    )
    parser.add_argument(
        "--do_sample", action=argparse.BooleanOptionalAction, help="Sample tokens, or take the likeliest."
    )
    for name, (value_type, help_text) in GENERATION_ARGUMENTS.items():
        parser.add_argument(f"--{name}", type=value_type, help=help_text)
    parser.add_argument(
        "--infill",
        action="store_true",
        help="Fill the mask tokens in the prompts; nothing is written after them without --max_new_tokens.",
    )
    parser.add_argument("--batch_size", type=int, default=16, help="Prompts continued at once.")
    parser.add_argument("--seed", type=int, help="Repeats a run exactly.")
    parser.add_argument(
        "--stream",
        action=argparse.BooleanOptionalAction,
        help="Show the text as it is denoised. (default: for a single text in a terminal)",
    )
    parser.add_argument("--json", action="store_true", help="Print one JSON object per text: prompt and text.")
    add_bulk_arguments(parser)
    args = parser.parse_intermixed_args(argv)

    check_bulk_arguments(args)
    prompts = read_prompts(args.prompts) if args.data is None else []
    single = len(prompts) == 1 and args.num_return_sequences in (None, 1) and not args.json
    if args.stream and not single:
        raise ValueError(f"stream takes a single text without --json; it got {len(prompts)} prompts")
    for name in ("batch_size", "num_return_sequences"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise ValueError(f"{name}={value} must be at least 1")

    options = given(args, ["do_sample", *GENERATION_ARGUMENTS])
    if args.infill:
        options |= {"infill": True, **given(args, ["max_new_tokens"])}
    else:
        options["max_new_tokens"] = MAX_NEW_TOKENS if args.max_new_tokens is None else args.max_new_tokens
    if args.data is not None:
        run_bulk(args, options)
        return

    from transformers import set_seed

    model, tokenizer = load_model(args)
    if args.seed is not None:
        set_seed(args.seed)
    if args.stream if args.stream is not None else single and is_terminal(sys.stdout):
        stream_text(model, tokenizer, prompts, options)
        return
    for prompt, text in write_texts(model, tokenizer, prompts, args.batch_size, options):
        print(json.dumps({"prompt": prompt, "text": text}, ensure_ascii=False) if args.json else text)


def read_prompts(given_prompts: list[str]) -> list[str]:
    """
    The prompts of the command line, or the lines of stdin; an empty one where there is none.

    Raises:
        ValueError: there are none and stdin is closed, or one is no text.
    """
    prompts = given_prompts
    if not prompts and (sys.stdin is None or sys.stdin.closed):
        raise ValueError("prompts must be given as arguments or on standard input, but that is closed")
    if not prompts and not is_terminal(sys.stdin):
        prompts = sys.stdin.read().splitlines()
    for number, prompt in enumerate(prompts):
        try:
            # Python keeps bytes that are no UTF-8 as characters of their own.
            prompt.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"prompts must be UTF-8 text, but prompt {number + 1} is {prompt[:80]!a}") from error
    return prompts or [""]


def stream_text(model: Any, tokenizer: Any, prompts: list[str], options: dict[str, Any]) -> None:
    """Shows a single text as it is denoised."""
    from transformers import TextDiffusionStreamer

    from ..data.tokenization import encode_prompts

    streamer = TextDiffusionStreamer(tokenizer, skip_special_tokens=True)
    model.generate(**encode_prompts(prompts, tokenizer).to(model.device), streamer=streamer, **options)


def write_texts(
    model: Any, tokenizer: Any, prompts: list[str], batch_size: int, options: dict[str, Any]
) -> Iterator[tuple[str, str]]:
    """Each prompt and what became of it, `num_return_sequences` times; what takes longer shows how far it is."""
    from ..data.tokenization import encode_prompts
    from .progress import GenerationProgress

    copies = options.get("num_return_sequences") or 1
    with GenerationProgress(model, len(prompts) * copies) as progress:
        for start in range(0, len(prompts), batch_size):
            batch = prompts[start : start + batch_size]
            inputs = encode_prompts(batch, tokenizer).to(model.device)
            with progress.of_batch(inputs["input_ids"].shape, len(batch) * copies, options) as streamer:
                sequences = model.generate(**inputs, streamer=streamer, **options)
            texts = tokenizer.batch_decode(sequences, skip_special_tokens=True)
            for index, text in enumerate(texts):
                yield batch[index * len(batch) // len(texts)], text
