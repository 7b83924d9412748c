"""`bd3lm generate --data`: rows of a file in bulk, in this process or on Ray."""

import argparse
import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .common import import_ray, load_model, loader_of
from .progress import DELAY


# Other arguments of `bd3lm generate`, which are of no use here.
OF_PROMPTS = ("prompts", "stream", "json", "num_return_sequences")
# Where on Ray.
PLACED = ("replicas", "num_cpus", "num_gpus")


def add_bulk_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what [`run_bulk`] reads."""
    bulk = parser.add_argument_group("rows of a file")
    bulk.add_argument("--data", metavar="FILE", help="A .jsonl file of rows with a `prompt` or `messages`.")
    bulk.add_argument(
        "--output", metavar="FILE", help="Where their results go; what is there already is gone on with."
    )
    bulk.add_argument("--overwrite", action="store_true", help="Begin anew, whatever --output holds.")
    bulk.add_argument("--max_length", type=int, help="Tokens of prompt and text together, of one row. (default: 2048)")
    bulk.add_argument("--ray", action="store_true", help="On Ray Data, in the cluster that Ray finds or starts.")
    bulk.add_argument("--replicas", type=int, help="Models on Ray. (default: 1)")
    bulk.add_argument("--num_cpus", type=float, help="CPUs of each of these, fractions too. (default: 1)")
    bulk.add_argument("--num_gpus", type=float, help="GPUs of each of these. (default: 1 where the cluster has any)")


def check_bulk_arguments(args: argparse.Namespace) -> None:
    """Raises a ValueError where arguments of rows and of prompts are mixed, or some are missing."""
    if args.data is None:
        for name in ("output", "overwrite", "max_length", "ray", *PLACED):
            if getattr(args, name) not in (None, False):
                raise ValueError(f"`{name}` must go with `data`, but got it without")
        return
    if args.output is None:
        raise ValueError("`data` must go with `output`, but got it without")
    for name in OF_PROMPTS:
        if getattr(args, name) not in (None, False, []):
            raise ValueError(f"`{name}` must not go with `data`, but got both")
    if not args.ray:
        for name in PLACED:
            if getattr(args, name) is not None:
                raise ValueError(f"`{name}` must go with `ray`, but got it without")
    for name in PLACED:
        value = getattr(args, name)
        if value is not None and not value > 0 and not (name == "num_gpus" and value == 0):
            raise ValueError(f"`{name}` must be above 0, but got {value}")


def run_bulk(args: argparse.Namespace, options: dict[str, Any]) -> None:
    """Writes the rows that have no result yet; `options` are settings of all rows."""
    try:
        from ..serving.bulk import ROWS_PER_SLOT, check_settings
        from ..serving.bulk_files import BulkOutput, digest_of_model
        from ..serving.engine import EngineLimits
    except ImportError as error:
        raise ImportError(f"bd3lm generate --data needs an extra: pip install 'bd3lm-hf[serve]' ({error})") from error
    from tqdm.auto import tqdm

    settings = {name: value for name, value in {**options, "seed": args.seed}.items() if value is not None}
    check_settings(settings)
    length = {} if args.max_length is None else {"max_length": args.max_length}
    limits = EngineLimits(num_slots=args.batch_size, max_queue=ROWS_PER_SLOT * args.batch_size, **length)
    if not Path(args.data).is_file():
        raise ValueError(f"`data` must be a file of rows, but got {args.data!r}")
    made_by = {
        "model": digest_of_model(args.model),
        "tokenizer": None if args.tokenizer is None else digest_of_model(args.tokenizer),
        "dtype": args.dtype,
        "max_length": limits.max_length,
        "settings": settings,
    }
    with BulkOutput(args.output, args.data, made_by, args.overwrite) as output, contextlib.ExitStack() as stack:
        if output.num_rows > len(output.done):
            results = _results(args, limits, settings, output.rows(), stack)
            progress = {"total": output.num_rows, "initial": len(output.done), "unit": " rows", "delay": DELAY}
            with tqdm(desc="Generating", **progress) as bar:
                for result in results:
                    bar.update(output.add(result))
        errors = f", {output.num_errors} of them with an `error`" if output.num_errors else ""
        print(f"{len(output.done)} rows in {args.output}{errors}")


def _results(
    args: argparse.Namespace, limits: Any, settings: dict[str, Any], rows: Any, stack: contextlib.ExitStack
) -> Iterator[dict]:
    """What comes of rows; the stack ends what is needed for that."""
    if args.ray:
        return _results_on_ray(args, limits, settings, rows)
    from ..serving.bulk import BulkWriter
    from ..serving.engine import Engine

    model, tokenizer = load_model(args)
    return BulkWriter(stack.enter_context(Engine(model, limits)), tokenizer, settings).write(rows)


def _results_on_ray(args: argparse.Namespace, limits: Any, settings: dict[str, Any], rows: Any) -> Iterator[dict]:
    import_ray()
    from ..serving.ray_data import Pool, results_on_ray

    placed = {name: value for name in PLACED if (value := getattr(args, name)) is not None}
    pool = Pool(loader_of(args), limits, **placed)
    yield from results_on_ray(pool, settings, rows)
