"""The command `bd3lm`; each of its commands is a file here, with a function `run` that takes the arguments."""

import argparse
import importlib.metadata
import sys
from collections.abc import Sequence
from importlib import import_module

from .common import HelpFormatter


DESCRIPTION = """\
Block diffusion language models: train, evaluate, sample, publish and convert them.

  bd3lm demo       train a small model on the Python standard library and watch it write (5 minutes on 2 CPU cores)
  bd3lm train      train a model on a text file, a folder, a Hub dataset or the built-in corpus
  bd3lm evaluate   perplexity and bits per byte of a text under a model
  bd3lm generate   continue prompts
  bd3lm quality    perplexity under a judge, entropy, diversity and lengths of samples
  bd3lm push       publish a trained model on the Hub, with a model card
  bd3lm plot       a sample as it is denoised, the attention pattern, noise schedules, training curves
  bd3lm app        a page in the browser on which one watches a model write, or a Space of it
  bd3lm convert    bring a published checkpoint, or one of the published training code, into this package's format
  bd3lm export     write an adapted network for a serving engine, or as the autoregressive model again

`bd3lm COMMAND --help` explains a command, with examples."""

COMMANDS = ("demo", "train", "evaluate", "generate", "quality", "push", "plot", "app", "convert", "export")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 2 for mistakes in what was asked for, told in one line on stderr."""
    parser = argparse.ArgumentParser(prog="bd3lm", description=DESCRIPTION, formatter_class=HelpFormatter)
    parser.add_argument("--version", action="version", version=importlib.metadata.version("bd3lm-hf"))
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help=", ".join(COMMANDS))
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="the command's own arguments")
    args = parser.parse_args(argv)
    show_traceback = "--traceback" in args.arguments
    arguments = [argument for argument in args.arguments if argument != "--traceback"]
    try:
        return import_module(f".{args.command}", __name__).run(arguments) or 0
    except (ValueError, OSError) as error:
        if show_traceback:
            raise
        print(f"bd3lm {args.command}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
