"""
`python -m benchmarks.post_training arms`: does distillation from the source cost less than likelihood?

Equal tokens for each arm, several seeds, block size 4. An arm reads the same rows in the same order as the others with
its seed; where it writes texts itself, it writes as many tokens as the rows have, of which the beginnings are not
predicted. Each run writes a file of its own, so that an interrupted comparison goes on where it was; `arms.json` holds
all of them. The table gives means over seeds with standard errors: nats per token of held-out text (the bound), and
the judge's nats per token of texts that the model has written at two tokens per forward, greedily and by nucleus
sampling. The judge is the source.
"""

import json
import statistics
from collections.abc import Sequence
from typing import Any

from bd3lm_hf.training.distillation import BD3LMDistillationArguments, BD3LMDistillationTrainer
from benchmarks.adaptation.workbench import LENGTH, Recipe, Workbench, comparison_parser, has_fast_bf16, mean, runs

from ..common import machine
from .writing import WAYS, below, nats, written_in_ways


PROMPT_LENGTH = LENGTH // 4
# No end of a text: packed rows go on after it, too, and so all arms read equal tokens.
ROLLOUTS = {"sampler": "confidence", "confidence_threshold": 0.9, "eos_token_id": None}
# All rows of a step are written together, and so they are trained on together, too.
ON_POLICY = {"rollout_prompt_length": PROMPT_LENGTH, "rollout_arguments": ROLLOUTS}
ON_POLICY |= {"gradient_accumulation_steps": 1, "gradient_checkpointing": True}
TOKENS_PER_FORWARD = 2


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
    parser = comparison_parser(__doc__, list(ARMS), 50_000)
    # A teacher takes memory, too.
    parser.set_defaults(gradient_accumulation_steps=2)
    args = parser.parse_args(argv)
    bench = Workbench(args)

    def run_one(name: str, seed: int) -> dict[str, Any]:
        return run_arm(bench, ARMS[name], args.num_tokens, seed)

    document = {
        "machine": machine(args.device, "bfloat16" if has_fast_bf16(args.device) else "float32"),
        "num_tokens": args.num_tokens,
        "prompt_length": PROMPT_LENGTH,
        "num_texts": args.num_held_out,
        "source": bench.nats(bench.judge)["nats"],
        "runs": runs(bench.folder, "arm", args.arms, args.seeds, run_one),
    }
    (bench.folder / "arms.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    print(table(document))
    return 0


def run_arm(bench: Workbench, recipe: Recipe, num_tokens: int, seed: int) -> dict[str, Any]:
    """Nats per token of held-out text and of written text after one run."""
    model, tokenizer = bench.adapted(recipe)
    # Rows of the packed text without their documents, which rollouts have none of: the same for every arm.
    data = bench.text["train"].select_columns(["input_ids"])
    results = bench.train(model, tokenizer, recipe, num_tokens, seed, data)
    texts = written_in_ways(bench, model, PROMPT_LENGTH, [TOKENS_PER_FORWARD], seed)
    return {**results, "nats": nats(bench, model), "written": texts}


def table(document: dict[str, Any]) -> str:
    """The arms as Markdown."""
    number = str(TOKENS_PER_FORWARD)
    columns = " | ".join(f"the judge's, {way} | new runs" for way in WAYS)
    lines = [
        f"The source has {document['source']:.3f} nats per token of held-out text. `new runs`: of runs of 4 tokens of "
        "a written text, the share that differ.",
        "",
        f"| trained by | nats per token of held-out text | {columns} |",
        f"|---|---|{'---|---|' * len(WAYS)}",
    ]
    for name, by_seed in document["runs"].items():
        cells = [mean([result["nats"] for result in by_seed.values()])]
        for way in WAYS:
            texts = [result["written"][way][number] for result in by_seed.values()]
            cells.append(mean([text["nats"] for text in texts]))
            cells.append(f"{statistics.mean(text['new_runs'] for text in texts):.2f}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", *differences(document)])


def differences(document: dict[str, Any]) -> list[str]:
    """By how much each arm is below likelihood, seed by seed."""
    arms, number, lines = document["runs"], str(TOKENS_PER_FORWARD), []
    base = arms.get("likelihood", {})
    for name in (name for name in arms if base and name != "likelihood"):
        held_out = [base[seed]["nats"] - result["nats"] for seed, result in arms[name].items()]
        lines.append(f"{name}: {mean(held_out)} nats per token of held-out text below likelihood.")
        for way in WAYS:
            of_base, of_arm = (
                {seed: result["written"][way][number] for seed, result in arms[one].items()}
                for one in ("likelihood", name)
            )
            lines.append(f"{name}, written texts, {way}: {below(of_base, of_arm)} below likelihood.")
    return lines
