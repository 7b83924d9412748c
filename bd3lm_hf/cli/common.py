"""What the commands share."""

import argparse
import functools
from collections.abc import Callable, Sequence
from pathlib import Path


# Two names of one flag.
VERBOSE = ("--verbose", "--traceback")
LARGEST_PORT = 65535
# Arguments of `load_documents`, which owns their defaults, and what they are.
SOURCE_OPTIONS = {
    "split": "The split of a Hub dataset, e.g. 'train[:10%%]'. (default: train)",
    "dataset_config": "The configuration of a Hub dataset that has several.",
    "text_column": "The column of a Hub dataset or table that holds the text. (default: text)",
}
DATA_HELP = (
    "a text file, a folder of them (.txt, .md, .rst, .py), a table (.jsonl, .json, .csv, .parquet), the id of a "
    "dataset on the Hub, or the Python sources that are here: `builtin`, the standard library's, or `packages`, those "
    "of installed packages as well."
)


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Examples keep their lines; a default is shown where there is one."""

    def _get_help_string(self, action):
        text = action.help or ""
        if action.default in (None, False, argparse.SUPPRESS) or "%(default)" in text:
            return text
        return f"{text} (default: %(default)s)"


class OneLineParser(argparse.ArgumentParser):
    """Says in one line what is wrong with the arguments; `--help` shows them all."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())} (`{self.prog} --help` explains)\n")


def make_parser(command: str, description: str, parser_class: type[argparse.ArgumentParser] = OneLineParser, **kwargs):
    """The parser of a command, of whatever class, with what all commands take."""
    if not issubclass(parser_class, OneLineParser):
        parser_class = type(parser_class.__name__, (OneLineParser, parser_class), {})
    parser = parser_class(
        prog=f"bd3lm {command}", description=description, formatter_class=HelpFormatter, allow_abbrev=False, **kwargs
    )
    # `main` reads it; it stands here for the help.
    parser.add_argument(*VERBOSE, action="store_true", help="Show where an error was raised.")
    return parser


def add_model_arguments(parser: argparse.ArgumentParser, nargs: str | None = None) -> None:
    """Adds what [`load_model`] reads; with "?" as `nargs` it may do without a model."""
    parser.add_argument("model", metavar="MODEL", nargs=nargs, help="Folder or Hub id of a checkpoint.")
    parser.add_argument("--tokenizer", help="Folder or Hub id of a tokenizer. (default: the one beside the model)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: the accelerator, if there is one)")
    parser.add_argument(
        "--dtype", choices=["auto", "float32", "bfloat16", "float16"], default="auto", help="Type of the weights."
    )
    parser.add_argument(
        "--attn_implementation", help="eager, sdpa, flex_attention or flash_attention_2. (default: Transformers')"
    )


def load_model(args: argparse.Namespace):
    """The model that the arguments name, whole and in evaluation mode on its device, and its tokenizer."""
    from ..data.tokenization import check_tokenizer, load_tokenizer
    from ..evaluation.loading import check_json_files
    from ..evaluation.networks import load_language_model

    device = choose_device(args)
    check_json_files(args.model)
    tokenizer = load_tokenizer(args.tokenizer or args.model)
    options = given(args, ["attn_implementation"])
    model = load_language_model(args.model, device=device, dtype=args.dtype, **options)
    check_tokenizer(tokenizer, model.config)
    return model, tokenizer


def loader_of(args: argparse.Namespace) -> Callable[[], tuple]:
    """[`load_model`] of these arguments for a process of another working folder, which may be on another machine."""
    names = ("model", "tokenizer", "device", "dtype", "attn_implementation")
    source = argparse.Namespace(**{name: getattr(args, name) for name in names})
    for name in ("model", "tokenizer"):
        path = getattr(source, name)
        if path is not None:
            setattr(source, name, from_anywhere(path))
    return functools.partial(load_model, source)


def from_anywhere(path: str) -> str:
    """A path for a process of another working folder; what is none here stays, the id of a model on the Hub."""
    return str(Path(path).resolve()) if Path(path).exists() else path


def import_ray() -> None:
    """Raises an ImportError that names the extra where Ray is missing."""
    try:
        import ray.data
        import ray.serve  # noqa: F401
    except ImportError as error:
        raise ImportError(f"--ray needs an extra: pip install 'bd3lm-hf[ray]' ({error})") from error


def choose_device(args: argparse.Namespace):
    """The device that was asked for, or else the accelerator, if there is one, or the processor."""
    import torch

    from ..evaluation.loading import check_device

    if args.device is not None:
        return check_device(args.device)
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def port_number(text: str) -> int:
    """The port that a flag names."""
    number = int(text) if text.isdecimal() else 0
    if not 1 <= number <= LARGEST_PORT:
        raise argparse.ArgumentTypeError(f"must be from 1 to {LARGEST_PORT}, but got {text!r}")
    return number


def check_output(path: str | None) -> None:
    """
    Whether a file can be written there, before hours are spent on what is to be in it.

    Raises:
        ValueError: it is a folder, or in none that is there.
    """
    if path is not None and (Path(path).is_dir() or not Path(path).parent.is_dir()):
        raise ValueError(f"the file to write must be in a folder that is there, and be none itself, but got {path!r}")


def given(args, names: Sequence[str]) -> dict:
    """The arguments that were given; the defaults of the others belong to whom they are passed to."""
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}
