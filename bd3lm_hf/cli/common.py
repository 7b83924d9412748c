"""What the commands share."""

import argparse
from collections.abc import Callable, Sequence


# Arguments of `load_documents`, which owns their defaults, and what they are.
SOURCE_OPTIONS = {
    "split": "The split of a Hub dataset, e.g. 'train[:10%%]'. (default: train)",
    "dataset_config": "The configuration of a Hub dataset that has several.",
    "text_column": "The column of a Hub dataset or table that holds the text. (default: text)",
}
DATA_HELP = (
    "a text file, a folder of them (.txt, .md, .rst, .py), a table (.jsonl, .json, .csv, .parquet), the id of a "
    "dataset on the Hub, or `builtin`: the Python standard library's own source."
)


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Examples keep their lines; a default is shown where there is one."""

    def _get_help_string(self, action):
        text = action.help or ""
        if action.default in (None, False, argparse.SUPPRESS) or "%(default)" in text:
            return text
        return f"{text} (default: %(default)s)"


def make_parser(command: str, description: str, parser_class: Callable = argparse.ArgumentParser, **kwargs):
    """The parser of a command, of whatever class, with what all commands take."""
    parser = parser_class(
        prog=f"bd3lm {command}", description=description, formatter_class=HelpFormatter, allow_abbrev=False, **kwargs
    )
    # `main` reads it; it stands here for the help.
    parser.add_argument("--traceback", action="store_true", help="Show where an error was raised.")
    return parser


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what [`load_model`] reads."""
    parser.add_argument("model", metavar="MODEL", help="Folder or Hub id of a checkpoint.")
    parser.add_argument("--tokenizer", help="Folder or Hub id of a tokenizer. (default: the one beside the model)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: the accelerator, if there is one)")
    parser.add_argument(
        "--dtype", choices=["auto", "float32", "bfloat16", "float16"], default="auto", help="Type of the weights."
    )
    parser.add_argument(
        "--attn_implementation", help="eager, sdpa, flex_attention or flash_attention_2. (default: Transformers')"
    )


def load_model(args: argparse.Namespace):
    """The model that the arguments name, in evaluation mode on its device, and its tokenizer."""
    import torch

    from ..data.tokenization import check_tokenizer, load_tokenizer
    from ..evaluation.networks import load_language_model

    tokenizer = load_tokenizer(args.tokenizer or args.model)
    model = load_language_model(args.model, dtype=args.dtype, **given(args, ["attn_implementation"])).eval()
    check_tokenizer(tokenizer, model.config)
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return model.to(args.device or accelerator or "cpu"), tokenizer


def given(args, names: Sequence[str]) -> dict:
    """The arguments that were given; the defaults of the others belong to whom they are passed to."""
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}
