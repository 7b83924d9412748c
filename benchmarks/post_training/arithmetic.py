"""
`python -m benchmarks.post_training grpo` and `... dpo`: sums, whose answers can be checked.

A tiny BD3-LM is trained from scratch, by likelihood, on text in which every sum of two digits is answered half of the
time and left open otherwise, and so does both. GRPO then rewards right answers, DPO prefers them to wrong ones, on
four fifths of the sums; the others are held out. Before and after: the share of right answers among those that the
model draws, the margin of held-out pairs (DPO), and nats per token of held-out text: of answered sums, and of all.
Each seed writes a file of its own; `grpo.json` and `dpo.json` hold all of them.
"""

import argparse
import json
import random
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    get_cosine_schedule_with_warmup,
    set_seed,
)
from trl import DPOConfig, GRPOConfig

from bd3lm_hf import BD3LMConfig, BD3LMForMaskedLM, evaluate_likelihood
from bd3lm_hf.training.preference import BD3LMDPOTrainer, BD3LMGRPOTrainer
from benchmarks.adaptation.workbench import mean, runs

from ..common import machine


SPECIAL_TOKENS = ("<pad>", "<eos>", "<mask>")
CHARACTERS = "0123456789+=?"
LEFT_OPEN = "???"
# An answer and its end fill a block.
DIGITS = range(10)
HELD_OUT = 5
BLOCK_SIZE, PROMPT_LENGTH = 4, 4
NUM_SAMPLES = 8
LIKELIHOOD_STEPS, POST_TRAINING_STEPS = 700, 80
PLAIN = {"use_cpu": True, "bf16": False, "report_to": [], "save_strategy": "no", "disable_tqdm": True}


def run(kind: str, argv: Sequence[str] | None = None) -> int:
    """Runs what is missing, then prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", default="bd3lm-arithmetic", help="Where everything is written.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--likelihood_steps", type=int, default=LIKELIHOOD_STEPS, help="Steps of the start.")
    parser.add_argument("--steps", type=int, default=POST_TRAINING_STEPS, help="Steps of what follows.")
    args = parser.parse_args(argv)
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    results = runs(folder, "arithmetic", [kind], args.seeds, partial(run_seed, args=args, folder=folder))
    document = {
        "machine": machine("cpu", "float32"),
        "steps": args.steps,
        "likelihood_steps": args.likelihood_steps,
        "runs": results[kind],
    }
    (folder / f"{kind}.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    print(table(document))
    return 0


def run_grpo(argv: Sequence[str] | None = None) -> int:
    """[`run`] with GRPO."""
    return run("grpo", argv)


def run_dpo(argv: Sequence[str] | None = None) -> int:
    """[`run`] with DPO."""
    return run("dpo", argv)


def run_seed(kind: str, seed: int, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """What one model does before and after."""
    tokenizer, sums = sum_tokenizer(), split_sums()
    start = trained_start(tokenizer, sums, args.likelihood_steps, seed)
    trainer = TRAINERS[kind](start, tokenizer, sums, args.steps, seed, str(folder / "run"))
    figures = {"before": measured(trainer, tokenizer, sums)}
    trainer.train()
    return {**figures, "after": measured(trainer, tokenizer, sums)}


def sum_tokenizer() -> PreTrainedTokenizerBase:
    """One token for each character."""
    vocabulary = {token: index for index, token in enumerate([*SPECIAL_TOKENS, *CHARACTERS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=SPECIAL_TOKENS[0]))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    backend.decoder = decoders.Fuse()
    pad_token, eos_token, mask_token = SPECIAL_TOKENS
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=pad_token, eos_token=eos_token, mask_token=mask_token
    )


def split_sums() -> dict[str, list[tuple[str, str]]]:
    """(prompt, answer) of all sums, shuffled: those to train on, and every fifth, which is held out."""
    sums = [(f"{a}+{b}=", f"{a + b:03}") for a in DIGITS for b in DIGITS]
    random.Random(0).shuffle(sums)
    train = [pair for index, pair in enumerate(sums) if index % HELD_OUT]
    return {"train": train, "held_out": sums[::HELD_OUT]}


def wrong_answer(answer: str, rng: random.Random) -> str:
    """What is the answer to other sums."""
    return rng.choice([f"{number:03}" for number in range(19) if number != int(answer)])


def left_open(sums: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """The sums without answers."""
    return [(prompt, LEFT_OPEN) for prompt, _ in sums]


def texts(sums: Sequence[tuple[str, str]], tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """Ids of the sums with their answers and the end [sums, length]."""
    rows = tokenizer([prompt + answer for prompt, answer in sums], add_special_tokens=False)["input_ids"]
    return torch.tensor([[*row, tokenizer.eos_token_id] for row in rows])


def trained_start(tokenizer, sums, num_steps: int, seed: int) -> BD3LMForMaskedLM:
    """A model that was trained by likelihood on all sums."""
    set_seed(seed)
    fields = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "cond_dim": 16}
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "eos", "mask")}
    fields |= {"vocab_size": len(tokenizer), "max_position_embeddings": 16, "block_size": BLOCK_SIZE}
    model = BD3LMForMaskedLM(BD3LMConfig(**fields, **special, bos_token_id=None, hidden_dropout=0.0))
    everything = [*sums["train"], *sums["held_out"]]
    ids = texts(everything + left_open(everything), tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    schedule = get_cosine_schedule_with_warmup(optimizer, num_steps // 10, num_steps)
    for _ in range(num_steps):
        model(ids, labels=answers_alone(ids)).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return model


def answers_alone(ids: torch.Tensor) -> torch.Tensor:
    """Labels of sums [batch, length]: prompts are not predicted."""
    labels = ids.clone()
    labels[:, :PROMPT_LENGTH] = -100
    return labels


def is_right(completions: list[str], answer: list[str], **kwargs: Any) -> list[float]:
    """The reward: 1 for the answer."""
    return [float(completion == right) for completion, right in zip(completions, answer, strict=True)]


def grpo_trainer(model, tokenizer, sums, num_steps: int, seed: int, folder: str) -> BD3LMGRPOTrainer:
    """Rewards right answers to the sums that are not held out."""
    args = GRPOConfig(
        folder,
        **PLAIN,
        max_steps=num_steps,
        per_device_train_batch_size=128,
        num_generations=16,
        max_completion_length=4,
        learning_rate=1e-4,
        seed=seed,
        logging_steps=10,
    )
    prompts = Dataset.from_list([{"prompt": prompt, "answer": answer} for prompt, answer in sums["train"]])
    return BD3LMGRPOTrainer(model, reward_funcs=is_right, args=args, train_dataset=prompts, processing_class=tokenizer)


def dpo_trainer(model, tokenizer, sums, num_steps: int, seed: int, folder: str) -> BD3LMDPOTrainer:
    """Prefers right answers to wrong ones."""
    args = DPOConfig(
        folder,
        **PLAIN,
        max_steps=num_steps,
        per_device_train_batch_size=32,
        learning_rate=2e-4,
        seed=seed,
        logging_steps=10,
    )
    data = {name: Dataset.from_list(pairs_of(part)) for name, part in sums.items()}
    return BD3LMDPOTrainer(
        model,
        args=args,
        train_dataset=data["train"],
        eval_dataset=data["held_out"],
        processing_class=tokenizer,
    )


TRAINERS: dict[str, Callable[..., Any]] = {"grpo": grpo_trainer, "dpo": dpo_trainer}


def pairs_of(sums: Sequence[tuple[str, str]]) -> list[dict[str, str]]:
    """Each sum with its answer and another one."""
    rng = random.Random(1)
    return [{"prompt": prompt, "chosen": answer, "rejected": wrong_answer(answer, rng)} for prompt, answer in sums]


def measured(trainer, tokenizer, sums) -> dict[str, float]:
    """Shares of right answers, nats per token of held-out sums, and with DPO the margin of held-out pairs."""
    model = trainer.accelerator.unwrap_model(trainer.model).eval()
    figures = {f"right_{name}": share_right(model, tokenizer, part) for name, part in sums.items()}
    answered = sums["held_out"]
    for name, part in (("nats_of_answered", answered), ("nats_of_all", answered + left_open(answered))):
        ids = texts(part, tokenizer)
        options = {"labels": answers_alone(ids).tolist(), "batch_size": 64, "progress": False}
        figures[name] = evaluate_likelihood(model, ids.tolist(), **options).nelbo
    if isinstance(trainer, BD3LMDPOTrainer):
        metrics = trainer.evaluate()
        figures |= {name: metrics[f"eval_rewards/{name}"] for name in ("margins", "accuracies")}
    return figures


@torch.no_grad()
def share_right(model, tokenizer, sums: Sequence[tuple[str, str]]) -> float:
    """Of answers that are drawn from the model, NUM_SAMPLES for each sum."""
    ids = torch.tensor([tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt, _ in sums])
    answers = [answer for _, answer in sums for _ in range(NUM_SAMPLES)]
    output = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, num_return_sequences=NUM_SAMPLES, seed=0
    )
    written = tokenizer.batch_decode(output[:, ids.shape[1] :], skip_special_tokens=True)
    rewards = is_right(written, answers)
    return sum(rewards) / len(rewards)


def table(document: dict[str, Any]) -> str:
    """Means over seeds with standard errors, before and after, and of the differences."""
    results = list(document["runs"].values())
    lines = ["| | before | after | difference |", "|---|---|---|---|"]
    for name in results[0]["before"]:
        before, after = ([result[when][name] for result in results] for when in ("before", "after"))
        difference = [late - early for early, late in zip(before, after, strict=True)]
        lines.append(f"| {name} | {mean(before)} | {mean(after)} | {mean(difference)} |")
    return "\n".join(lines)
