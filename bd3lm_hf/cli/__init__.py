"""The command `bd3lm`; each of its commands is a file here, with a function `run` that takes the arguments."""

import argparse
import importlib.metadata
import sys
from collections.abc import Sequence
from importlib import import_module

from .common import VERBOSE, HelpFormatter, OneLineParser
from .errors import describe, discard_unwritten, is_told, open_stderr, report


DESCRIPTION = """\
Block diffusion language models: train, evaluate, sample, publish and convert them.

  bd3lm demo       train a small model on the Python standard library and watch it write (5 minutes on 2 CPU cores)
  bd3lm train      train a model on a text file, a folder, a Hub dataset or the built-in corpus
  bd3lm evaluate   perplexity and bits per byte of a text under a model
  bd3lm generate   continue prompts, or the rows of a file
  bd3lm serve      answer many clients at once, by OpenAI's API
  bd3lm quality    perplexity under a judge, entropy, diversity and lengths of samples
  bd3lm push       publish a trained model on the Hub, with a model card
  bd3lm plot       a sample as it is denoised, the attention pattern, noise schedules, training curves
  bd3lm app        a page in the browser on which one watches a model write, or a Space of it
  bd3lm convert    bring a published checkpoint, or one of the published training code, into this package's format
  bd3lm adapt      make a block diffusion model of an autoregressive one, such as Llama, Qwen3 or SmolLM2
  bd3lm export     write an adapted network for a serving engine, or as the autoregressive model again

`bd3lm COMMAND --help` explains a command, with examples."""

COMMANDS = (
    "demo",
    "train",
    "evaluate",
    "generate",
    "serve",
    "quality",
    "push",
    "plot",
    "app",
    "convert",
    "adapt",
    "export",
)


# By the convention of shells: 128 and the number of the signal.
INTERRUPTED, READER_LEFT = 130, 141


def main(argv: Sequence[str] | None = None) -> int:
    """
    Run the command and return its exit code: 2 for mistakes in what was asked for, and for what the machine lacks, and
    130 for Ctrl-C, each told in one line on stderr. `--verbose` shows the traceback as well.
    """
    parser = OneLineParser(prog="bd3lm", description=DESCRIPTION, formatter_class=HelpFormatter)
    parser.add_argument("--version", action="version", version=importlib.metadata.version("bd3lm-hf"))
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help=", ".join(COMMANDS))
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="the command's own arguments")
    args = parser.parse_args(argv)
    # What comes after `--` is no flag.
    end = args.arguments.index("--") if "--" in args.arguments else len(args.arguments)
    flags, rest = args.arguments[:end], args.arguments[end:]
    name, is_verbose = f"bd3lm {args.command}", not set(VERBOSE).isdisjoint(flags)
    with open_stderr():
        try:
            if sys.stdout is None:
                raise ValueError("standard output must be open, but is closed; `> /dev/null` discards what is printed")
            arguments = [flag for flag in flags if flag not in VERBOSE] + rest
            code = import_module(f".{args.command}", __name__).run(arguments) or 0
            # What is printed may not arrive.
            sys.stdout.flush()
            return code
        except KeyboardInterrupt:
            report(f"{name}: interrupted", is_verbose)
            return INTERRUPTED
        except Exception as error:
            if sys.stdout is not None and discard_unwritten(sys.stdout) and isinstance(error, BrokenPipeError):
                return READER_LEFT
            if not is_told(error):
                raise
            report(f"{name}: error: {describe(error)}", is_verbose)
            return 2
