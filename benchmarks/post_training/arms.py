"""
`python -m benchmarks.post_training arms`: does distillation from the source cost less than likelihood?

Equal tokens for each arm, several seeds, block size 4. Each run writes a file of its own, so that an interrupted
comparison goes on where it was; the table gives means over seeds with standard errors: nats per token of held-out
text (the bound), and the judge's nats per token of texts that the model has written, at two tokens per forward. The
judge is the source.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel, set_seed

from bd3lm_hf import BD3LMTrainer, BD3LMTrainingArguments
from bd3lm_hf.training.distillation import BD3LMDistillationArguments, BD3LMDistillationTrainer
from benchmarks.adaptation.arms import mean
from benchmarks.adaptation.workbench import BLOCK_SIZE, LENGTH, Recipe, Workbench, has_fast_bf16, workbench_parser


LEARNING_RATE = 1e-4
PROMPT_LENGTH = LENGTH // 4
ROLLOUTS = {"sampler": "confidence", "confidence_threshold": 0.9}


@dataclass
class Arm:
    """What is trained: by likelihood, or with these arguments of distillation."""

    distillation: dict[str, Any] | None = field(default=None)


ON_POLICY = {"rollout_prompt_length": PROMPT_LENGTH, "rollout_arguments": ROLLOUTS}
ARMS = {
    "likelihood": Arm(),
    "distillation on data": Arm({}),
    "on-policy": Arm({"on_policy_fraction": 1.0, **ON_POLICY}),
    "half and half": Arm({"on_policy_fraction": 0.5, **ON_POLICY}),
    "on-policy, reverse": Arm({"on_policy_fraction": 1.0, "divergence": "reverse", **ON_POLICY}),
}


def run(argv: Sequence[str] | None = None) -> int:
    """Runs what is missing, then prints the table."""
    parser = workbench_parser(__doc__)
    parser.add_argument("--num_tokens", type=int, default=50_000, help="Tokens of training of each run.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    args = parser.parse_args(argv)
    bench = Workbench(args)
    results: dict[str, list[dict[str, float]]] = {name: [] for name in args.arms}
    for seed in args.seeds:
        for name in args.arms:
            path = bench.folder / f"post-{name.replace(' ', '-').replace(',', '')}-{seed}.json"
            if not path.is_file():
                path.write_text(json.dumps(run_arm(bench, ARMS[name], args.num_tokens, seed)), encoding="utf-8")
            results[name].append(json.loads(path.read_text(encoding="utf-8")))
            print(f"{name}, seed {seed}: {results[name][-1]}", flush=True)
    print(table(results, bench.nats(bench.load_source())["nats"]))
    return 0


def run_arm(bench: Workbench, arm: Arm, num_tokens: int, seed: int) -> dict[str, float]:
    """Nats per token of held-out text and of written text after one run."""
    model, tokenizer = bench.adapted(Recipe())
    set_seed(seed)
    batch_size = bench.args.batch_size
    num_steps = max(1, num_tokens // (batch_size * LENGTH))
    fields = {
        "output_dir": str(bench.folder / "run"),
        "max_steps": num_steps,
        "per_device_train_batch_size": batch_size,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "cosine",
        "warmup_steps": num_steps // 10,
        "noise_interval": [0.3, 1.0],
        "fix_noise_interval": True,
        "ema_decay": 0.0,
        "save_strategy": "no",
        "report_to": "none",
        "seed": seed,
        "use_cpu": bench.args.device == "cpu",
        "bf16": has_fast_bf16(bench.args.device),
    }
    # Rows of the packed text without their documents, which rollouts have none of: the same for every arm.
    data = bench.text["train"].select_columns(["input_ids"])
    options = {"model": model, "train_dataset": data, "processing_class": tokenizer}
    if arm.distillation is None:
        trainer = BD3LMTrainer(args=BD3LMTrainingArguments(**fields), **options)
    else:
        trainer = BD3LMDistillationTrainer(args=BD3LMDistillationArguments(**fields, **arm.distillation), **options)
    trainer.train()
    model.eval()
    return {"nats": bench.nats(model, BLOCK_SIZE)["nats"], "written_nats": written_nats(bench, model)}


@torch.no_grad()
def written_nats(bench: Workbench, model: PreTrainedModel) -> float:
    """The source's nats per token of what the model writes after the beginnings of held-out texts."""
    ids = torch.tensor(bench.text["held_out"]["input_ids"], device=model.device)
    prompts = ids[:, :PROMPT_LENGTH]
    num_new = LENGTH - PROMPT_LENGTH
    options = {"sampler": "confidence", "tokens_per_step": 2, "seed": 0, "eos_token_id": None}
    judge, totals = bench.load_source(), []
    for part in prompts.split(bench.args.batch_size):
        texts = model.generate(part, attention_mask=torch.ones_like(part), max_new_tokens=num_new, **options)
        scores = judge(texts).logits[:, PROMPT_LENGTH - 1 : -1].float().log_softmax(-1)
        totals.append(-scores.gather(-1, texts[:, PROMPT_LENGTH:, None]).mean((1, 2)))
    return torch.cat(totals).mean().item()


def table(results: dict[str, list[dict[str, float]]], source: float) -> str:
    """The arms as Markdown."""
    lines = [
        f"The source has {source:.3f} nats per token of held-out text.",
        "",
        "| trained by | nats per token of held-out text | the judge's, of written text |",
        "|---|---|---|",
    ]
    for name, runs in results.items():
        cells = [mean([run[key] for run in runs]) for key in ("nats", "written_nats")]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)
