"""
`python -m benchmarks.post_training few_steps`: what do training on a sampler's path or texts, and confidence, bring?

From a model that is adapted already (`--start`; without it one is trained first) and equal tokens for each arm, the
curve of quality against tokens per forward: the source's nats per token of texts written at 1, 2 and 4 tokens per
forward, greedily and by nucleus sampling, beside the likelihood of held-out text. Each run writes a file of its own,
so that an interrupted comparison goes on where it was; `few_steps.json` holds all of them.
"""

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedModel

from bd3lm_hf import BlockDiffusionForMaskedLM
from bd3lm_hf.training.few_steps import BD3LMFewStepArguments, BD3LMFewStepTrainer
from bd3lm_hf.training.rollouts import own_texts
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
from .writing import WAYS, below, fast_bf16, nats, written_in_ways


FEW_STEPS = {"trainer_class": BD3LMFewStepTrainer, "arguments_class": BD3LMFewStepArguments}
# None: the model as it starts.
ARMS = {
    "untrained": None,
    "likelihood": Recipe(),
    "path": Recipe(**FEW_STEPS),
    "confidence": Recipe(training={"confidence_loss_weight": 1.0}),
    "own text": Recipe(),
    "path, own text": Recipe(**FEW_STEPS),
    "path, reverse": Recipe(training={"divergence": "reverse"}, **FEW_STEPS),
}
# Those that learn what the model itself writes at one token per forward, the likeliest ones: what its sampler gives in
# several steps, as a text (sequence-level distillation; Kim and Rush, arXiv 1606.07947).
OWN_TEXT = ("own text", "path, own text")
DEFAULT_ARMS = ("untrained", "likelihood", "path", "confidence", "own text")
TOKENS_PER_FORWARD = (1, 2, 4)
PROMPT_LENGTH = LENGTH // 2
START_TOKENS = 240_000


def run(argv: Sequence[str] | None = None) -> int:
    """Runs what is missing, then prints the tables."""
    parser = comparison_parser(__doc__, list(ARMS), 24_000)
    # A teacher takes memory, too.
    parser.set_defaults(arms=list(DEFAULT_ARMS), gradient_accumulation_steps=2)
    parser.add_argument("--start", help="Folder of an adapted model with its tokenizer; by default one is trained.")
    parser.add_argument("--start_tokens", type=int, default=START_TOKENS, help="Tokens that the start is trained on.")
    args = parser.parse_args(argv)
    bench = Workbench(args)
    start = Path(args.start) if args.start else train_start(bench)

    def run_one(name: str, seed: int) -> dict[str, Any]:
        return run_arm(bench, start, ARMS[name], seed, own_text=name in OWN_TEXT)

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


def run_arm(bench: Workbench, start: Path, recipe: Recipe | None, seed: int, own_text: bool = False) -> dict[str, Any]:
    """What the model scores and writes after one run."""
    model = BlockDiffusionForMaskedLM.from_pretrained(start, dtype=torch.float32).to(bench.args.device)
    model.config.block_size = BLOCK_SIZE
    results: dict[str, Any] = {}
    if recipe is not None:
        tokenizer = AutoTokenizer.from_pretrained(start)
        data = written_by_itself(bench, model, seed) if own_text else None
        results = bench.train(model, tokenizer, recipe, bench.args.num_tokens, seed, data)
    model.eval()
    results["written"] = written_in_ways(bench, model, PROMPT_LENGTH, TOKENS_PER_FORWARD, seed)
    return {**results, "nats": nats(bench, model)}


def written_by_itself(bench: Workbench, model: PreTrainedModel, seed: int) -> list[dict[str, list[int]]]:
    """As many tokens as are trained on: beginnings of training texts, not predicted, and how the model goes on."""
    num_rows = max(bench.args.batch_size, bench.args.num_tokens // LENGTH)
    rows = bench.text["train"].shuffle(seed=seed).select(range(num_rows))
    with fast_bf16(bench.args.device):
        return own_texts(model, rows, PROMPT_LENGTH, bench.args.num_held_out, eos_token_id=None)


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
        lines += differences(document, way)
        lines.append("")
    return "\n".join(lines)


def differences(document: dict[str, Any], way: str) -> list[str]:
    """By how much each arm's text at two tokens per forward is below that of the other arms that it is compared to."""
    texts = {
        name: {seed: result["written"][way]["2"] for seed, result in by_seed.items()}
        for name, by_seed in document["runs"].items()
    }
    return [
        f"{name}, at two tokens per forward: {below(texts[base], of_arm)} below {base}."
        for name, of_arm in texts.items()
        for base in ("untrained", "likelihood")
        if base in texts and name not in ("untrained", base)
    ]
