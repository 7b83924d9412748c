"""`bd3lm serve`."""

import os
from collections.abc import Sequence
from pathlib import Path

from .common import add_model_arguments, given, load_model, make_parser, port_number


DESCRIPTION = """\
Serve a model by OpenAI's API, to many clients at once: chats, completions, gaps, streams.

Clients must give the key that is in the environment variable BD3LM_API_KEY; without it everybody is let in.

examples:
  bd3lm serve bd3lm-demo
  bd3lm serve bd3lm-demo --port 8080 --num_slots 32 --max_length 1024
  BD3LM_API_KEY=secret bd3lm serve bd3lm-demo --host 0.0.0.0"""

API_KEY = "BD3LM_API_KEY"
LIMITS = {
    "num_slots": "Requests that are written at once. (default: 16)",
    "max_length": "Tokens of prompt and text together, of one request. (default: 2048)",
    "max_positions": "The same of all that are written at once. (default: what the slots hold)",
    "max_queue": "Requests that wait for a slot; more get the status 429. (default: 64)",
    "prefill_tokens": "Tokens of prompts that are read between two steps of the others. (default: 512)",
}


def run(argv: Sequence[str]) -> None:
    """`bd3lm serve`."""
    parser = make_parser("serve", DESCRIPTION)
    add_model_arguments(parser)
    parser.add_argument("--host", default="127.0.0.1", help="Where to listen; 0.0.0.0 lets other machines in.")
    parser.add_argument("--port", type=port_number, default=8000)
    parser.add_argument("--name", help="What clients call the model. (default: the last part of MODEL)")
    for name, help_text in LIMITS.items():
        parser.add_argument(f"--{name}", type=int, help=help_text)
    parser.add_argument("--max_body", type=int, help="Bytes of a request's body. (default: 1048576)")
    args = parser.parse_args(argv)
    api_key = os.environ.get(API_KEY)
    if api_key is not None and not (api_key and api_key.isascii() and api_key.isprintable()):
        raise ValueError(f"{API_KEY} must be a key of printable ASCII characters, but it is none")

    try:
        from ..serving.api import ServerLimits, make_app
        from ..serving.engine import Engine, EngineLimits
        from ..serving.running import open_socket, serve
    except ImportError as error:
        raise ImportError(f"bd3lm serve needs its extra: pip install 'bd3lm-hf[serve]' ({error})") from error

    limits = EngineLimits(**given(args, LIMITS))
    server_limits = ServerLimits(**given(args, ["max_body"]))
    with open_socket(args.host, args.port) as listening:
        model, tokenizer = load_model(args)
        name = args.name or Path(args.model).name
        app = make_app(Engine(model, limits), tokenizer, name, api_key, server_limits)
        print(f"{name} is served at http://{args.host}:{args.port}/v1", flush=True)
        serve(app, listening)
