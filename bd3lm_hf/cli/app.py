"""`bd3lm app`."""

import time
from collections.abc import Sequence
from pathlib import Path

from .common import add_model_arguments, load_model, make_parser, port_number


DESCRIPTION = """\
Watch a model write, in the browser: prompts, gaps, samplers, tokens per forward and perplexity.

With --space, a folder is written in its place that can be uploaded as a Space, with the model in it.

examples:
  bd3lm app bd3lm-demo
  bd3lm app bd3lm-demo --port 8080
  bd3lm app bd3lm-demo --space my-space"""


def run(argv: Sequence[str]) -> None:
    """`bd3lm app`."""
    parser = make_parser("app", DESCRIPTION)
    add_model_arguments(parser)
    parser.add_argument("--host", default="127.0.0.1", help="Where to listen; 0.0.0.0 lets other machines in.")
    parser.add_argument("--port", type=port_number, help="(default: the first free one from 7860 on)")
    parser.add_argument("--space", metavar="FOLDER", help="Write a Space into this new folder and start nothing.")
    parser.add_argument("--overwrite", action="store_true", help="Replace a Space that lies in that folder.")
    args = parser.parse_args(argv)

    if args.space is not None:
        from ..data.replacing import check_folder
        from ..hub.space import write_space

        check_folder("--space", args.space, args.overwrite)
        write_space(args.space, *load_model(args), name=Path(args.model).name, overwrite=args.overwrite)
        print(f"saved to {args.space}; `hf upload USER/NAME {args.space} --repo-type space` uploads it")
        return

    from transformers import pipeline

    from ..app import launch_options, make_page

    model, tokenizer = load_model(args)
    filler = pipeline("text-infilling", model=model, tokenizer=tokenizer, device=model.device)
    page = make_page(filler, Path(args.model).name)
    # gradio's own waiting ends well whatever interrupts it.
    page.launch(server_name=args.host, server_port=args.port, prevent_thread_lock=True, **launch_options())
    try:
        while page.is_running:
            time.sleep(0.2)
    finally:
        page.close()
