"""
`python -m benchmarks.post_training arms`: does distillation from the source cost less than likelihood?

Equal tokens for each arm, several seeds, block size 4. Each run writes a file of its own, so that an interrupted
comparison goes on where it was; the table gives means over seeds with standard errors: nats per token of held-out
text (the bound), and the judge's nats per token of texts that the model has written, at two tokens per forward. The
judge is the source.
"""

from collections.abc import Sequence
from typing import Any

from bd3lm_hf.training.distillation import BD3LMDistillationArguments, BD3LMDistillationTrainer
from benchmarks.adaptation.workbench import BLOCK_SIZE, LENGTH, Recipe, Workbench, comparison_parser, mean, runs

from .writing import written


PROMPT_LENGTH = LENGTH // 4
ROLLOUTS = {"sampler": "confidence", "confidence_threshold": 0.9}
ON_POLICY = {"rollout_prompt_length": PROMPT_LENGTH, "rollout_arguments": ROLLOUTS}
WRITING = {"tokens_per_step": 2, "seed": 0}


def distillation(**training: Any) -> Recipe:
    """Training by what the source predicts, with these arguments."""
    return Recipe(
        training=training, trainer_class=BD3LMDistillationTrainer, arguments_class=BD3LMDistillationArguments
    )


ARMS = {
    "likelihood": Recipe(),
    "distillation on data": distillation(),
    "on-policy": distillation(on_policy_fraction=1.0, **ON_POLICY),
    "half and half": distillation(on_policy_fraction=0.5, **ON_POLICY),
    "on-policy, reverse": distillation(on_policy_fraction=1.0, divergence="reverse", **ON_POLICY),
}


def run(argv: Sequence[str] | None = None) -> int:
    """Runs what is missing, then prints the table."""
    args = comparison_parser(__doc__, list(ARMS), 50_000).parse_args(argv)
    bench = Workbench(args)

    def run_one(name: str, seed: int) -> dict[str, Any]:
        return run_arm(bench, ARMS[name], args.num_tokens, seed)

    results = runs(bench.folder, "post", args.arms, args.seeds, run_one)
    print(table(results, bench.nats(bench.load_source())["nats"]))
    return 0


def run_arm(bench: Workbench, recipe: Recipe, num_tokens: int, seed: int) -> dict[str, float]:
    """Nats per token of held-out text and of written text after one run."""
    model, tokenizer = bench.adapted(recipe)
    # Rows of the packed text without their documents, which rollouts have none of: the same for every arm.
    data = bench.text["train"].select_columns(["input_ids"])
    bench.train(model, tokenizer, recipe, num_tokens, seed, data)
    texts = written(bench, model, PROMPT_LENGTH, bench.args.batch_size, **WRITING)
    return {"nats": bench.nats(model, BLOCK_SIZE)["nats"], "written_nats": texts["nats"]}


def table(results: dict[str, dict[str, dict[str, float]]], source: float) -> str:
    """The arms as Markdown."""
    lines = [
        f"The source has {source:.3f} nats per token of held-out text.",
        "",
        "| trained by | nats per token of held-out text | the judge's, of written text |",
        "|---|---|---|",
    ]
    for name, by_seed in results.items():
        cells = [mean([result[key] for result in by_seed.values()]) for key in ("nats", "written_nats")]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)
