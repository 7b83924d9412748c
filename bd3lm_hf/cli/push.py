"""`bd3lm push`."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from .common import given, make_parser


DESCRIPTION = """\
Publish a trained model or adapter on the Hub, in one commit: weights, the code that loads them, tokenizer,
configurations, metrics, and a model card written from what was recorded in training. Nothing else is sent.

CHECKPOINT is the output folder of `bd3lm train` or BD3LMTrainer, one of its checkpoints, or anything that
`save_pretrained` wrote. The token is that of `hf auth login`, or HF_TOKEN.

examples:
  bd3lm push my-model user/my-model --license apache-2.0 --language en
  bd3lm push my-model user/my-model --private --likelihood wikitext=likelihood.json
  bd3lm push my-adapter user/my-adapter --base_model user/my-model
  bd3lm push my-model user/my-model --dry_run          show what would be published, and the card"""


def run(argv: Sequence[str]) -> None:
    """`bd3lm push`."""
    parser = make_parser("push", DESCRIPTION)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="The folder of a saved model or adapter.")
    parser.add_argument("repo_id", metavar="REPO_ID", help="Where to publish it: user/name.")
    parser.add_argument("--private", action=argparse.BooleanOptionalAction, help="Let only the owner read it.")
    parser.add_argument("--revision", help="The branch to commit to. (default: main)")
    parser.add_argument("--commit_message", default="Upload model", help="The commit's message.")
    parser.add_argument("--tokenizer", help="Folder or Hub id of a tokenizer, if none lies beside the model.")
    parser.add_argument(
        "--base_model", help="Hub id of the model that training went on from, or of an adapter's base."
    )
    parser.add_argument("--license", help="Identifier of the licence of the weights, e.g. apache-2.0.")
    parser.add_argument("--language", nargs="+", help="Codes of the languages of the data, e.g. en.")
    parser.add_argument("--dataset", nargs="+", help="Names or Hub ids of the training data.")
    parser.add_argument("--tags", nargs="+", help="Further tags.")
    parser.add_argument("--widget_prompts", nargs="+", metavar="PROMPT", help="Prompts for the Hub's widget.")
    parser.add_argument(
        "--likelihood",
        nargs="+",
        metavar="NAME=FILE",
        default=[],
        help="Name of a text, and what `bd3lm evaluate --json FILE` wrote of it.",
    )
    parser.add_argument("--sampler_results", metavar="FILE", help="A JSON list of rows, for a table of samplers.")
    parser.add_argument("--card", metavar="FILE", help="A model card in place of the generated one.")
    parser.add_argument("--dry_run", action="store_true", help="Print the files and the card, and publish nothing.")
    args = parser.parse_args(argv)

    from ..data.tokenization import load_tokenizer
    from ..hub.published_files import CARD_FILE, left_out
    from ..hub.publishing import prepare_files, push_to_hub

    options = given(args, ["base_model", "license", "language", "dataset", "tags", "widget_prompts"])
    if args.tokenizer is not None:
        options["tokenizer"] = load_tokenizer(args.tokenizer)
    if args.sampler_results is not None:
        options["sampler_results"] = _read_json("sampler_results", args.sampler_results)
    if args.card is not None:
        options["card"] = Path(args.card).read_text(encoding="utf-8")
    options["likelihoods"] = {}
    for item in args.likelihood:
        name, separator, path = item.partition("=")
        if not (name and separator and path):
            raise ValueError(f"--likelihood takes NAME=FILE, but got {item!r}")
        options["likelihoods"][name] = _read_json("likelihood", path)

    from ..evaluation.loading import check_json_files

    check_json_files(args.checkpoint)
    if args.dry_run:
        files = prepare_files(args.checkpoint, args.repo_id, **options)
        for name, file in files.items():
            size = len(file) if isinstance(file, bytes) else file.stat().st_size
            print(f"{size:>15,}  {name}")
        if others := left_out(args.checkpoint, files):
            print(f"not published: {', '.join(others)}")
        print(f"\n{files[CARD_FILE].decode()}")
        return
    commit = push_to_hub(
        args.checkpoint,
        args.repo_id,
        commit_message=args.commit_message,
        **given(args, ["private", "revision"]),
        **options,
    )
    print(f"published at {commit.commit_url}")


def _read_json(name: str, path: str):
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"--{name}: {path} is no JSON: {error}") from error
    kind, words = (dict, "a JSON object") if name == "likelihood" else (list, "a JSON list")
    if not isinstance(content, kind):
        raise ValueError(f"--{name}: {path} must hold {words}, but got {json.dumps(content)[:80]}")
    return content
