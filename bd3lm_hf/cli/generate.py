"""`bd3lm generate`."""

import argparse
import json
import sys
from collections.abc import Sequence

from .common import add_model_arguments, given, load_model, make_parser


DESCRIPTION = """\
Continue prompts, block by block.

Prompts come from the command line, or one per line from stdin; without any, the model starts from nothing. A single
prompt in a terminal is shown as it is denoised.

examples:
  bd3lm generate bd3lm-demo "def main():"
  bd3lm generate bd3lm-demo "import os" --max_new_tokens 100 --temperature 0.8 --top_p 0.9 --seed 1
  bd3lm generate bd3lm-demo --sampler confidence --confidence_threshold 0.9 "class Parser:"
  bd3lm generate bd3lm-demo --json < prompts.txt > texts.jsonl"""

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
    parser.add_argument("--max_new_tokens", type=int, default=256, help="Tokens to write.")
    parser.add_argument(
        "--do_sample", action=argparse.BooleanOptionalAction, help="Sample tokens, or take the likeliest."
    )
    for name, (value_type, help_text) in GENERATION_ARGUMENTS.items():
        parser.add_argument(f"--{name}", type=value_type, help=help_text)
    parser.add_argument("--batch_size", type=int, default=16, help="Prompts continued at once.")
    parser.add_argument("--seed", type=int, help="Repeats a run exactly.")
    parser.add_argument(
        "--stream",
        action=argparse.BooleanOptionalAction,
        help="Show the text as it is denoised. (default: for a single text in a terminal)",
    )
    parser.add_argument("--json", action="store_true", help="Print one JSON object per text: prompt and text.")
    args = parser.parse_intermixed_args(argv)

    from_stdin = not args.prompts and not sys.stdin.isatty()
    prompts = (sys.stdin.read().splitlines() if from_stdin else args.prompts) or [""]
    single = len(prompts) == 1 and args.num_return_sequences in (None, 1) and not args.json
    if args.stream and not single:
        raise ValueError(f"stream takes a single text without --json; it got {len(prompts)} prompts")
    stream = args.stream if args.stream is not None else single and sys.stdout.isatty()
    if args.batch_size < 1:
        raise ValueError(f"batch_size={args.batch_size} must be at least 1")

    from tqdm.auto import tqdm
    from transformers import TextDiffusionStreamer, set_seed

    from ..data.tokenization import encode_prompts

    model, tokenizer = load_model(args)
    if args.seed is not None:
        set_seed(args.seed)
    options = given(args, ["max_new_tokens", "do_sample", *GENERATION_ARGUMENTS])
    starts = range(0, len(prompts), args.batch_size)
    for start in tqdm(starts, desc="Generating", unit=" batches", disable=len(starts) < 2):
        batch = prompts[start : start + args.batch_size]
        streamer = TextDiffusionStreamer(tokenizer, skip_special_tokens=True) if stream else None
        inputs = encode_prompts(batch, tokenizer).to(model.device)
        sequences = model.generate(**inputs, streamer=streamer, **options)
        if stream:
            continue
        texts = tokenizer.batch_decode(sequences, skip_special_tokens=True)
        texts_per_prompt = len(texts) // len(batch)
        for index, text in enumerate(texts):
            prompt = batch[index // texts_per_prompt]
            print(json.dumps({"prompt": prompt, "text": text}, ensure_ascii=False) if args.json else text)
