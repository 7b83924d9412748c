"""`bd3lm serve`."""

import argparse
import contextlib
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .common import (
    add_model_arguments,
    from_anywhere,
    given,
    import_ray,
    load_model,
    loader_of,
    make_parser,
    port_number,
)


DESCRIPTION = """\
Serve a model by OpenAI's API, to many clients at once: chats, completions, gaps, streams.

Clients must give the key that is in the environment variable BD3LM_API_KEY; without it everybody is let in.

With --ray the same application runs on Ray Serve, in the cluster that Ray finds or else starts on this machine:
several copies of a model, or as many as are asked for, and several models. Where a copy dies, another one takes its
place, and takes over what it had not begun to answer.

examples:
  bd3lm serve bd3lm-demo
  bd3lm serve bd3lm-demo --port 8080 --num_slots 32 --max_length 1024
  bd3lm serve bd3lm-demo --adapter poems=my-poems --adapter code=my-code
  BD3LM_API_KEY=secret bd3lm serve bd3lm-demo --host 0.0.0.0
  bd3lm serve bd3lm-demo --ray --replicas 2 --max_replicas 8 --also my-model"""

API_KEY = "BD3LM_API_KEY"
LIMITS = {
    "num_slots": "Requests that are written at once. (default: 16)",
    "max_length": "Tokens of prompt and text together, of one request. (default: 2048)",
    "max_positions": "The same of all that are written at once. (default: what the slots hold)",
    "max_queue": "Requests that wait for a slot; more get the status 429. (default: 64)",
    "prefill_tokens": "Tokens of prompts that are read between two steps of the others. (default: 512)",
}
# Of Ray's alone.
PLACES = ("replicas", "max_replicas", "num_cpus", "num_gpus", "also")
APPLICATION = "bd3lm"


def make_serve_parser() -> argparse.ArgumentParser:
    """The parser of `bd3lm serve`."""
    parser = make_parser("serve", DESCRIPTION)
    add_model_arguments(parser)
    parser.add_argument("--host", default="127.0.0.1", help="Where to listen; 0.0.0.0 lets other machines in.")
    parser.add_argument("--port", type=port_number, default=8000)
    parser.add_argument("--name", help="What clients call the model. (default: the last part of MODEL)")
    for name, help_text in LIMITS.items():
        parser.add_argument(f"--{name}", type=int, help=help_text)
    parser.add_argument("--max_body", type=int, help="Bytes of a request's body. (default: 1048576)")
    parser.add_argument(
        "--adapter",
        action="append",
        metavar="NAME=FOLDER",
        help="A LoRA adapter of MODEL, which clients call by its name, a colon and NAME; may be given repeatedly.",
    )
    ray = parser.add_argument_group("Ray")
    ray.add_argument("--ray", action="store_true", help="Serve on Ray.")
    ray.add_argument("--replicas", type=int, help="Copies of each model. (default: 1)")
    ray.add_argument("--max_replicas", type=int, help="More copies, up to so many, while more is asked for.")
    ray.add_argument("--num_cpus", type=float, help="CPUs of each copy, fractions too. (default: 1)")
    ray.add_argument("--num_gpus", type=float, help="GPUs of each copy. (default: 0)")
    ray.add_argument("--also", action="append", metavar="[NAME=]MODEL", help="Another model; may be given repeatedly.")
    return parser


def run(argv: Sequence[str]) -> None:
    """`bd3lm serve`."""
    args = make_serve_parser().parse_args(argv)
    api_key = read_api_key()
    if args.ray:
        _serve_on_ray(args, api_key)
        return
    for name in PLACES:
        if getattr(args, name) is not None:
            raise ValueError(f"`{name}` must go with `ray`, but got it without")
    _import_serving()
    from ..serving.adapters import Adapters, parse_adapters
    from ..serving.api import ServerLimits, make_app
    from ..serving.engine import Engine, EngineLimits
    from ..serving.running import open_socket, serve

    limits = EngineLimits(**given(args, LIMITS))
    server_limits = ServerLimits(**given(args, ["max_body"]))
    folders = parse_adapters(args.adapter or [])
    with open_socket(args.host, args.port) as listening:
        model, tokenizer = load_model(args)
        name = args.name or Path(args.model).name
        engine = Engine(model, limits, Adapters(model, folders) if folders else None)
        app = make_app(engine, tokenizer, name, api_key, server_limits)
        print(f"{name} is served at http://{args.host}:{args.port}/v1", flush=True)
        serve(app, listening)


def read_api_key() -> str | None:
    """The key of the environment; raises a ValueError for one that no header can hold."""
    api_key = os.environ.get(API_KEY)
    if api_key is not None and not (api_key and api_key.isascii() and api_key.isprintable()):
        raise ValueError(f"{API_KEY} must be a key of printable ASCII characters, but it is none")
    return api_key


def application(flags: dict[str, Any]) -> Any:
    """
    The application for a configuration file of Ray Serve, whose `import_path` this is: `args` are flags of `bd3lm
    serve` by their names, and `model`. The key is that of the environment of whoever builds it.
    """
    argv = [str(flags["model"])] if "model" in flags else []
    for name, value in flags.items():
        if name != "model":
            for item in value if isinstance(value, list) else [value]:
                argv += [f"--{name}"] if item is True else [f"--{name}", str(item)]
    return _application_of(make_serve_parser().parse_args(argv), read_api_key())


def _application_of(args: argparse.Namespace, api_key: str | None) -> Any:
    import_ray()
    _import_serving()
    from ..serving.adapters import parse_adapters
    from ..serving.api import ServerLimits
    from ..serving.engine import EngineLimits
    from ..serving.ray_serve import Placement, make_application

    limits = EngineLimits(**given(args, LIMITS))
    placed = given(args, ["replicas", "max_replicas", "num_cpus", "num_gpus"])
    own_name = args.name or Path(args.model).name
    models = {own_name: args.model}
    for text in args.also or []:
        name, is_named, model = text.partition("=")
        name, model = (name, model) if is_named else (Path(text).name, text)
        if name in models or not name or not model:
            raise ValueError(f"`also` must be of models with names of their own, but got {text!r}")
        models[name] = model
    adapters = {name: from_anywhere(folder) for name, folder in parse_adapters(args.adapter or []).items()}
    placements = {}
    for name, model in models.items():
        source = argparse.Namespace(**{**vars(args), "model": model})
        own = adapters if name == own_name else {}
        placements[name] = Placement(loader_of(source), limits, **placed, adapters=own)
    return make_application(placements, api_key, ServerLimits(**given(args, ["max_body"])))


def _serve_on_ray(args: argparse.Namespace, api_key: str | None) -> None:
    app = _application_of(args, api_key)
    import ray
    from ray import serve

    from ..serving.running import open_socket

    # Ray would take the next port or say nothing.
    open_socket(args.host, args.port).close()
    ray.init(log_to_driver=False, logging_level="error", include_dashboard=False)
    try:
        serve.start(proxy_location="EveryNode", http_options={"host": args.host, "port": args.port})
        serve.run(app, name=APPLICATION, route_prefix="/", logging_config={"log_level": "WARNING"})
        print(f"{args.name or Path(args.model).name} is served at http://{args.host}:{args.port}/v1", flush=True)
        while True:
            time.sleep(3600)
    except ray.exceptions.RayError as error:
        raise RuntimeError(f"Ray Serve ended: {error}") from error
    finally:
        # Where it did not start there is nothing to end.
        with contextlib.suppress(ray.exceptions.RayError, serve.exceptions.RayServeException):
            serve.delete(APPLICATION)
        ray.shutdown()


def _import_serving() -> None:
    try:
        from ..serving import api, engine, running  # noqa: F401
    except ImportError as error:
        raise ImportError(f"bd3lm serve needs its extra: pip install 'bd3lm-hf[serve]' ({error})") from error
