"""
`python -m benchmarks.post_training few_steps`: what do training on a sampler's path, and confidence, bring?

From a model that is adapted already (`--start`; without it one is trained first) and equal tokens for each arm, the
curve of quality against tokens per forward: the source's nats per token of texts written at 1, 2 and 4 tokens per
forward, greedily and by nucleus sampling, beside the likelihood of held-out text. Each run writes a file of its own,
so that an interrupted comparison goes on where it was; `few_steps.json` holds all of them.
"""

import contextlib
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedModel

from bd3lm_hf import BlockDiffusionForMaskedLM, evaluate_likelihood
from bd3lm_hf.training.few_steps import BD3LMFewStepArguments, BD3LMFewStepTrainer
from benchmarks.adaptation.workbench import (
    BLOCK_SIZE,
    LENGTH,
    Recipe,
    Workbench,
    comparison_parser,
    has_fast_bf16,
    mean,
    runs,
)

from ..common import machine
from .writing import written


FEW_STEPS = {"trainer_class": BD3LMFewStepTrainer, "arguments_class": BD3LMFewStepArguments}
# None: the model as it starts.
ARMS = {
    "untrained": None,
    "likelihood": Recipe(),
    "path": Recipe(**FEW_STEPS),
    "confidence": Recipe(training={"confidence_loss_weight": 1.0}),
    "path, reverse": Recipe(training={"divergence": "reverse"}, **FEW_STEPS),
}
DEFAULT_ARMS = ("untrained", "likelihood", "path", "confidence")
TOKENS_PER_FORWARD = (1, 2, 4)
PROMPT_LENGTH = LENGTH // 2
WAYS = {"greedy": {"do_sample": False}, "nucleus 0.9": {"do_sample": True, "top_p": 0.9}}
START_TOKENS = 240_000


def run(argv: Sequence[str] | None = None) -> int:
    """Runs what is missing, then prints the tables."""
    parser = comparison_parser(__doc__, list(ARMS), 24_000)
    parser.set_defaults(arms=list(DEFAULT_ARMS))
    parser.add_argument("--start", help="Folder of an adapted model with its tokenizer; by default one is trained.")
    parser.add_argument("--start_tokens", type=int, default=START_TOKENS, help="Tokens that the start is trained on.")
    args = parser.parse_args(argv)
    bench = Workbench(args)
    start = Path(args.start) if args.start else train_start(bench)

    def run_one(name: str, seed: int) -> dict[str, Any]:
        return run_arm(bench, start, ARMS[name], seed)

    document = {
        "machine": machine(args.device, "bfloat16" if has_fast_bf16(args.device) else "float32"),
        "num_tokens": args.num_tokens,
        "prompt_length": PROMPT_LENGTH,
        "num_texts": args.num_held_out,
        "runs": runs(bench.folder, "few", args.arms, args.seeds, run_one),
    }
    (bench.folder / "few_steps.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    print(table(document))
    return 0


def train_start(bench: Workbench) -> Path:
    """The folder of the source adapted by likelihood, which is trained once."""
    folder = bench.folder / "start"
    if not (folder / "config.json").is_file():
        model, tokenizer = bench.adapted(Recipe())
        bench.train(model, tokenizer, Recipe(), bench.args.start_tokens, seed=0)
        tokenizer.save_pretrained(folder)
        model.save_pretrained(folder)
    return folder


def run_arm(bench: Workbench, start: Path, recipe: Recipe | None, seed: int) -> dict[str, Any]:
    """What the model scores and writes after one run."""
    model = BlockDiffusionForMaskedLM.from_pretrained(start, dtype=torch.float32).to(bench.args.device)
    model.config.block_size = BLOCK_SIZE
    results: dict[str, Any] = {}
    if recipe is not None:
        tokenizer = AutoTokenizer.from_pretrained(start)
        results = bench.train(model, tokenizer, recipe, bench.args.num_tokens, seed)
    model.eval()
    with fast_bf16(bench.args.device):
        results["written"] = {
            name: {str(number): written_by(bench, model, number, seed, **way) for number in TOKENS_PER_FORWARD}
            for name, way in WAYS.items()
        }
        return {**results, "nats": nats(bench, model)}


def written_by(bench: Workbench, model: PreTrainedModel, number: int, seed: int, **way: Any) -> dict[str, float]:
    """What is written at so many tokens per forward; other seeds draw other texts."""
    options = {"tokens_per_step": number, "seed": seed * bench.args.num_held_out, **way}
    return written(bench, model, PROMPT_LENGTH, bench.args.num_held_out, **options)


def nats(bench: Workbench, model: PreTrainedModel) -> float:
    """Nats per token of held-out text, from one draw that is the same for every run."""
    options = {"estimator": "stratified", "num_draws": 1, "batch_size": bench.args.batch_size, "progress": False}
    return evaluate_likelihood(model, bench.text["held_out"]["input_ids"], **options).nelbo


def fast_bf16(device: str) -> contextlib.AbstractContextManager:
    """Autocast, as in training, where the device is faster for it."""
    return torch.autocast(device, torch.bfloat16) if has_fast_bf16(device) else contextlib.nullcontext()


def table(document: dict[str, Any]) -> str:
    """The arms as Markdown: means over seeds with standard errors."""
    numbers = [str(number) for number in TOKENS_PER_FORWARD]
    lines = []
    for way in WAYS:
        lines += [
            f"{way}: the source's nats per token of written text, and the share of new runs of 4 tokens at 2 per "
            "forward",
            "",
            f"| trained by | {' | '.join(f'{number} per forward' for number in numbers)} | new runs | held-out text |",
            f"|---|{'---|' * (len(numbers) + 2)}",
        ]
        for name, by_seed in document["runs"].items():
            results = by_seed.values()
            cells = [mean([result["written"][way][number]["nats"] for result in results]) for number in numbers]
            cells.append(f"{statistics.mean(result['written'][way]['2']['new_runs'] for result in results):.2f}")
            cells.append(mean([result["nats"] for result in results]))
            lines.append(f"| {name} | {' | '.join(cells)} |")
        lines.append("")
        lines += [f"{line}" for line in differences(document, way)]
        lines.append("")
    return "\n".join(lines)


def differences(document: dict[str, Any], way: str) -> list[str]:
    """By how much each arm's text at two tokens per forward is below that of likelihood, seed by seed."""
    arms = document["runs"]
    if "likelihood" not in arms:
        return []
    lines = []
    for name in (name for name in arms if name not in ("untrained", "likelihood")):
        values = [
            arms["likelihood"][seed]["written"][way]["2"]["nats"] - run["written"][way]["2"]["nats"]
            for seed, run in arms[name].items()
        ]
        lines.append(f"{name}, at two tokens per forward: {mean(values)} nats per token below likelihood.")
    return lines
