"""`bd3lm app`."""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .common import add_model_arguments, load_model, make_parser, port_number
from .serve import read_api_key


DESCRIPTION = """\
Watch a model write, in the browser: prompts, gaps, samplers, tokens per forward and perplexity.

With --space, a folder is written in its place that can be uploaded as a Space, with the model in it.

With --server, the page asks a `bd3lm serve` for several visitors at once, and MODEL is the name of one of its models
(by default the first). The key that it wants is taken from the environment variable BD3LM_API_KEY.

examples:
  bd3lm app bd3lm-demo
  bd3lm app bd3lm-demo --port 8080
  bd3lm app bd3lm-demo --space my-space
  bd3lm app --server http://127.0.0.1:8000"""


def run(argv: Sequence[str]) -> None:
    """`bd3lm app`."""
    parser = make_parser("app", DESCRIPTION)
    add_model_arguments(parser, nargs="?")
    parser.add_argument("--host", default="127.0.0.1", help="Where to listen; 0.0.0.0 lets other machines in.")
    parser.add_argument("--port", type=port_number, help="(default: the first free one from 7860 on)")
    parser.add_argument("--server", metavar="URL", help="Ask this server, and load no model.")
    parser.add_argument("--space", metavar="FOLDER", help="Write a Space into this new folder and start nothing.")
    parser.add_argument("--overwrite", action="store_true", help="Replace a Space that lies in that folder.")
    args = parser.parse_args(argv)

    if args.server is None and args.model is None:
        raise ValueError("`model` must be a checkpoint, or `server` an address, but got neither")
    if args.space is not None:
        _write_space(args)
        return
    from ..app import launch_options

    page = _page(args) if args.server is None else _server_page(args)
    # gradio's own waiting ends well whatever interrupts it.
    page.launch(server_name=args.host, server_port=args.port, prevent_thread_lock=True, **launch_options())
    try:
        while page.is_running:
            time.sleep(0.2)
    finally:
        page.close()


def _write_space(args: argparse.Namespace) -> None:
    if args.server is not None:
        raise ValueError("`space` must not go with `server`, but got both")
    from ..data.replacing import check_folder
    from ..hub.space import write_space

    check_folder("--space", args.space, args.overwrite)
    write_space(args.space, *load_model(args), name=Path(args.model).name, overwrite=args.overwrite)
    print(f"saved to {args.space}; `hf upload USER/NAME {args.space} --repo-type space` uploads it")


def _page(args: argparse.Namespace) -> Any:
    from transformers import pipeline

    from ..app import make_page

    model, tokenizer = load_model(args)
    filler = pipeline("text-infilling", model=model, tokenizer=tokenizer, device=model.device)
    return make_page(filler, Path(args.model).name)


def _server_page(args: argparse.Namespace) -> Any:
    for name in ("tokenizer", "device", "attn_implementation"):
        if getattr(args, name) is not None:
            raise ValueError(f"`{name}` must not go with `server`, which has the model, but got both")
    from ..app.remote import Client, make_server_page

    return make_server_page(Client(args.server, read_api_key(), args.model))
