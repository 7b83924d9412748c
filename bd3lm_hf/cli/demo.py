"""`bd3lm demo`: the main job from end to end, in five minutes on two CPU cores."""

import os
import shlex
import subprocess
import sys
from collections.abc import Sequence

from .common import make_parser
from .train import train_arguments, train_model


# What the demo asks of `bd3lm train`; everything else is that command's default.
TRAINING_FLAGS = {
    "data": "builtin",
    "max_bytes": 4_000_000,
    "max_eval_sequences": 128,
    "vocab_size": 2048,
    "length": 128,
    "block_size": 4,
    "hidden_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "hidden_dropout": 0,
    "tie_word_embeddings": True,
    # A narrow model learns to attend much sooner from weights of the order of 1 / sqrt(hidden_size).
    "initializer_range": 0.08,
    "noise_interval": (0.3, 1.0),
    "per_device_train_batch_size": 8,
    "learning_rate": 3e-3,
    "max_steps": 1200,
    "save_strategy": "no",
}
# The demo has failed if the model is not at least this much better than word frequencies alone.
MAX_SHARE_OF_UNIGRAM_PERPLEXITY = 1 / 3

PROMPT = "def "
# Runs in a process of its own, as a reader of the Hub would: only the saved folder says what the model is.
SAMPLE_SCRIPT = """
import signal
import sys

signal.signal(signal.SIGINT, signal.SIG_DFL)  # what started this tells of an interruption
sys.modules["bd3lm_hf"] = None  # import bd3lm_hf raises ImportError from here on

from transformers import AutoModelForMaskedLM, AutoTokenizer, TextDiffusionStreamer, set_seed

folder, prompt = sys.argv[1:]


class LineStreamer(TextDiffusionStreamer):
    '''The drafts of a block on a line of their own, for an output that cannot be overwritten.'''

    def put_draft(self, value, **kwargs):
        print(" ->" if self._has_draft else "  ", repr(self.tokenizer.decode(value)), end="", flush=True)
        self._has_draft = True

    def _clear_draft(self):
        if self._has_draft:
            print()
            self._has_draft = False

    def on_finalized_text(self, text, stream_end=False):
        pass


tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForMaskedLM.from_pretrained(folder, trust_remote_code=True)
set_seed(0)
streamer_class = TextDiffusionStreamer if sys.stdout.isatty() else LineStreamer
output = model.generate(
    **tokenizer(prompt, return_tensors="pt"),
    max_new_tokens=96,
    do_sample=True,
    top_p=0.9,
    streamer=streamer_class(tokenizer),
)
print(f"the finished text:\\n{tokenizer.decode(output[0], skip_special_tokens=True)}")
"""


def run_demo(output_dir: str, flags: Sequence[str] = ()) -> int:
    """
    Train a small model on the Python standard library, save it, load it without this package and sample from it.

    Args:
        output_dir: Where the model is saved.
        flags: Further arguments for `bd3lm train`; they override `TRAINING_FLAGS`.

    Returns:
        0, or 1 if the model's perplexity is more than `MAX_SHARE_OF_UNIGRAM_PERPLEXITY` of a unigram model's.
    """
    argv = []
    for name, value in {**TRAINING_FLAGS, "output_dir": output_dir}.items():
        values = value if isinstance(value, tuple) else (value,)
        argv += [f"--{name}", *map(str, values)]
    argv += flags
    print(f"bd3lm train {shlex.join(argv)}", flush=True)
    metrics = train_model(*train_arguments(argv))

    print("\nIn a new process, without this package: the model loads by its own code and writes.", flush=True)
    subprocess.run(
        [sys.executable, "-c", SAMPLE_SCRIPT, output_dir, PROMPT],
        check=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )

    before, after = (metrics[name]["perplexity"] for name in ("before", "after"))
    unigram = metrics["unigram_perplexity"]
    bound = MAX_SHARE_OF_UNIGRAM_PERPLEXITY * unigram
    print(
        f"\nperplexity of held-out text: {before:.1f} before training, {after:.1f} after; unigram model {unigram:.1f}"
    )
    if after > bound:
        print(f"the demo asks for at most {bound:.1f}, a third of the unigram model's", file=sys.stderr)
        return 1
    return 0


def run(argv: Sequence[str]) -> int:
    """`bd3lm demo`: its own flag, and any of `bd3lm train`."""
    parser = make_parser(
        "demo", "Train a small block diffusion model on the Python standard library, and watch it write."
    )
    parser.add_argument("--output_dir", default="bd3lm-demo", help="Where the model is saved.")
    args, training_flags = parser.parse_known_args(argv)

    return run_demo(args.output_dir, training_flags)
