"""The log-probability of a completion, by enumeration, and TRL's trainers for preferences and rewards on it."""

import copy
import math
from pathlib import Path

import pytest
import torch
from adapted import adapted_lm, byte_tokenizer
from adapted_cases import stock_model
from datasets import Dataset
from peft import LoraConfig, PromptTuningConfig
from test_adapted_distribution import brute_force, small_pair

from bd3lm_hf.hub.training_summary import TrainingSummary
from bd3lm_hf.training.bound import completion_log_probs, token_log_probs


trl = pytest.importorskip("trl")

from trl import DPOConfig, GRPOConfig  # noqa: E402

from bd3lm_hf.training.preference import BD3LMDPOTrainer, BD3LMGRPOTrainer  # noqa: E402


# the log-probability


def completions(prompt_length=2):
    ids = torch.tensor([[0, 2, 1, 1, 2, 0], [1, 1, 0, 2, 2, 2], [2, 0, 0, 1, 2, 1]])
    labels = ids.clone()
    labels[:, :prompt_length] = -100
    return ids, labels


@torch.no_grad()
def enumerated(stock, config, prompt_length=2):
    """-NELBO of each completion, whose prompt is a whole block."""
    return torch.tensor(
        [
            brute_force(stock, config, ids[:prompt_length]) - brute_force(stock, config, ids)
            for ids in completions()[0].tolist()
        ]
    )


@pytest.mark.parametrize("num_samples", [1, 3])
def test_the_log_probability_is_the_enumerated_bound_within_its_error(num_samples):
    stock, model = small_pair(True, "block")
    expected = enumerated(stock, model.config)
    estimate = completion_log_probs(model, *completions(), num_draws=150, num_samples=num_samples)
    deviations = (estimate.value - expected) / estimate.standard_error
    assert deviations.abs().max() < 4 and estimate.standard_error.max() < 0.1 * expected.abs().max()
    # A bound of other texts is told from it.
    assert ((estimate.value - expected.roll(1)) / estimate.standard_error).abs().max() > 8


def test_at_block_size_1_it_is_the_log_probability_itself():
    stock, model = small_pair(True, "block", block_size=1)
    ids, labels = completions()
    with torch.no_grad():
        scores = stock(ids).logits[..., :3].log_softmax(-1)[:, 1:-1].gather(-1, ids[:, 2:, None]).sum((1, 2))
    estimate = completion_log_probs(model, ids, labels, num_draws=2)
    torch.testing.assert_close(estimate.value.float(), scores, atol=1e-5, rtol=1e-5)
    assert estimate.standard_error.max() < 1e-5
    with pytest.raises(ValueError, match="`num_draws` must be at least 2"):
        completion_log_probs(model, ids, labels, num_draws=1)


def test_a_text_meets_the_same_noise_wherever_it_stands():
    model = small_pair(True, "block")[1]
    ids, labels = completions()
    rows = token_log_probs(model, ids, labels, num_samples=2, seed=(3,))
    pad = torch.zeros(3, 2, dtype=torch.long)
    for side in (0, 1):
        parts = [(pad, pad - 100, pad), (ids, labels, torch.ones_like(ids))]
        padded = [torch.cat(pair if side == 0 else pair[::-1], dim=1)[[2, 0]] for pair in zip(*parts, strict=True)]
        other = token_log_probs(model, padded[0], padded[1], padded[2], num_samples=2, seed=(3,))
        other = other[:, 2:] if side == 0 else other[:, :-2]
        torch.testing.assert_close(other, rows[[2, 0]], atol=1e-5, rtol=1e-5)
    assert not torch.equal(rows, token_log_probs(model, ids, labels, num_samples=2, seed=(4,)))


@torch.no_grad()
def test_shared_noise_makes_differences_vary_less():
    model = small_pair(True, "block")[1]
    reference = copy.deepcopy(model)
    reference.lm_head.weight.mul_(0.9)
    ids, labels = completions()

    def totals(part, seed):
        return token_log_probs(part, ids, labels, seed=(seed,)).sum(-1)

    shared = torch.stack([totals(model, seed) - totals(reference, seed) for seed in range(60)])
    independent = torch.stack([totals(model, seed) - totals(reference, seed + 1000) for seed in range(60)])
    assert (shared.var(0) < 0.2 * independent.var(0)).all()
    assert (totals(model, 0) == totals(copy.deepcopy(model), 0)).all()


# the trainers


PLAIN = {"use_cpu": True, "bf16": False, "report_to": [], "save_strategy": "no", "logging_steps": 1}
PLAIN |= {"disable_tqdm": True, "gradient_checkpointing": False, "learning_rate": 5e-3, "seed": 1}


def tiny():
    tokenizer = byte_tokenizer("<mask>")
    overrides = {"vocab_size": len(tokenizer), "max_position_embeddings": 128}
    return adapted_lm(overrides=overrides, block_size=4), tokenizer


def pairs(num_rows):
    rows = [{"prompt": f"{n} is", "chosen": " aa", "rejected": " bb"} for n in range(num_rows)]
    return Dataset.from_list(rows)


def dpo(folder, peft_config=None, data=None, **arguments):
    model, tokenizer = tiny()
    args = DPOConfig(str(folder), **{**PLAIN, "per_device_train_batch_size": 4, "max_steps": 10, **arguments})
    return BD3LMDPOTrainer(
        model,
        args=args,
        train_dataset=data or pairs(16),
        eval_dataset=pairs(24).select(range(16, 24)),
        processing_class=tokenizer,
        num_samples=2,
        peft_config=peft_config,
    )


def test_dpo_starts_at_equal_models_and_raises_the_margin_of_held_out_pairs(tmp_path):
    trainer = dpo(tmp_path)
    before = trainer.evaluate()
    # The reference meets the same noise: equal models have the same estimates.
    assert before["eval_rewards/margins"] == 0 and before["eval_loss"] == pytest.approx(math.log(2), abs=1e-6)
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_rewards/margins"] > 0.5 and after["eval_rewards/accuracies"] == 1
    assert not {name.removeprefix("eval_") for name in after} & {"entropy", "mean_token_accuracy", "logits/chosen"}
    card = card_of(trainer)
    assert "direct preference optimisation" in card and "from 2 noised copies of each text" in card
    assert "Reference: the model that training went on from." in card and "Rewards:" not in card
    assert "| `beta` | 0.1 |" in card and "Noise interval: the full one" in card and str(tmp_path) not in card


def test_the_gradient_of_dpo_is_that_of_its_definition(tmp_path):
    trainer = dpo(tmp_path, beta=0.3)
    with torch.no_grad():
        trainer.model.lm_head.weight.mul_(0.9)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(3)])
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, batch)
    gradient = torch.autograd.grad(loss, trainer.model.lm_head.weight)[0]
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    texts = (batch["input_ids"], labels, batch["attention_mask"], 2, (1, 0, 0))
    policy, reference = (token_log_probs(part, *texts).sum(-1) for part in (trainer.model, trainer.ref_model))
    ratio = policy - reference.detach()
    expected = -torch.nn.functional.logsigmoid(0.3 * (ratio[:3] - ratio[3:])).mean()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, trainer.model.lm_head.weight)[0])


def card_of(trainer):
    trainer.create_model_card()
    return Path(trainer.args.output_dir, "README.md").read_text(encoding="utf-8")


def share_of_ascii(completions, **kwargs):
    return [sum(c.isascii() and c.isprintable() for c in text) / max(len(text), 1) for text in completions]


def grpo(folder, peft_config=None, **arguments):
    model, tokenizer = tiny()
    with torch.no_grad():
        # So that all is written now and then from the start.
        model.lm_head.weight.mul_(0.3)
    fields = {"per_device_train_batch_size": 16, "num_generations": 8, "max_completion_length": 8, "max_steps": 40}
    args = GRPOConfig(
        str(folder), **{**PLAIN, **fields, "learning_rate": 1e-2, "lr_scheduler_type": "constant", **arguments}
    )
    return BD3LMGRPOTrainer(
        model,
        reward_funcs=share_of_ascii,
        args=args,
        train_dataset=Dataset.from_list([{"prompt": f"{n}:"} for n in range(8)]),
        processing_class=tokenizer,
        num_samples=2,
        peft_config=peft_config,
    )


def test_grpo_raises_the_reward(tmp_path):
    trainer = grpo(tmp_path)
    trainer.train()
    rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.2
    assert not any("entropy" in entry for entry in trainer.state.log_history)
    card = card_of(trainer)
    assert "group relative policy optimisation" in card and "Rewards: `share_of_ascii`." in card
    # Without a `beta` nothing was compared to a reference.
    assert "Reference:" not in card and "| `num_generations` | 8 |" in card
    # What publishes the folder later tells the same.
    trainer.save_model()
    assert TrainingSummary.from_folder(tmp_path).recipe["rewards"] == ["`share_of_ascii`"]


def test_the_gradient_of_grpo_is_that_of_the_bound_times_the_advantage(tmp_path):
    trainer = grpo(tmp_path, loss_type="dr_grpo", max_completion_length=6)
    ids = torch.randint(3, 250, (4, 11), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :2], mask[1, 9:] = 0, 0
    texts = {"prompt_ids": ids[:, :5], "prompt_mask": mask[:, :5], "completion_ids": ids[:, 5:]}
    advantages = torch.tensor([1.0, -0.5, 2.0, 0.3])
    batch = {
        **texts,
        "completion_mask": mask[:, 5:],
        "advantages": advantages,
        "num_items_in_batch": mask[:, 5:].sum(),
    }
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    gradient = torch.autograd.grad(trainer.compute_loss(trainer.model, batch), trainer.model.lm_head.weight)[0]
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :5] = -100
    bound = token_log_probs(trainer.model, ids, labels, mask, 2, (1, 0)).sum(-1)
    expected = torch.autograd.grad(-(advantages * bound).sum() / (4 * 6), trainer.model.lm_head.weight)[0]
    torch.testing.assert_close(gradient, expected, atol=1e-6, rtol=1e-4)


def test_policy_old_policy_and_reference_meet_the_same_masks_new_ones_with_each_writing(tmp_path, monkeypatch):
    trainer = grpo(tmp_path, learning_rate=0.0, beta=0.1, num_iterations=2, max_steps=4)
    seeds, seed_of = [], trainer._noise_seed
    monkeypatch.setattr(trainer, "_noise_seed", lambda: seeds.append(seed_of()) or seeds[-1])
    trainer.train()
    # A model that does not move is its own reference, and its ratio to what it was is 1.
    logs = [entry for entry in trainer.state.log_history if "kl" in entry]
    assert len(logs) == 4 and all(entry["kl"] == 0 and entry["clip_ratio/region_mean"] == 0 for entry in logs)
    # Texts are written in the first and in the third step.
    assert len(set(seeds)) == 2 and seeds[0] != seeds[-1]


# In the third step GRPO learns from completions of the first for the third time.
@pytest.mark.parametrize(("make", "arguments"), [(dpo, {}), (grpo, {}), (grpo, {"num_iterations": 3})])
def test_a_resumed_run_is_the_run_that_went_on_with_adapters_too(make, arguments, tmp_path):
    def begin(folder):
        torch.manual_seed(0)
        adapter = LoraConfig(r=4, target_modules="all-linear")
        return make(folder, adapter, max_steps=4, save_strategy="steps", save_steps=2, **arguments)

    whole = begin(tmp_path / "whole")
    whole.train()
    resumed = begin(tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    weights = {name: part for name, part in whole.model.state_dict().items() if "lora_B" in name}
    assert all(torch.equal(part, resumed.model.state_dict()[name]) for name, part in weights.items())
    assert any(part.abs().max() > 0 for part in weights.values())


def test_what_has_no_meaning_for_the_bound_is_refused(tmp_path):
    for arguments, name in (
        ({"precompute_ref_log_probs": True}, "precompute_ref_log_probs"),
        ({"use_weighting": True}, "use_weighting"),
    ):
        with pytest.raises(ValueError, match=f"`{name}` must be False"):
            dpo(tmp_path, **arguments)
    with pytest.raises(ValueError, match="`temperature` must be 1.0"):
        grpo(tmp_path, temperature=0.7)
    with pytest.raises(ValueError, match="`new_block` of `generation_kwargs` must be False"):
        grpo(tmp_path, generation_kwargs={"new_block": True})
    with pytest.raises(ValueError, match="`peft_config` must adapt weights.*PromptTuningConfig"):
        dpo(tmp_path, PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"))
    synced = dpo(tmp_path, sync_ref_model=True, max_steps=1, save_strategy="steps", save_steps=1)
    synced.train()
    with pytest.raises(ValueError, match="`sync_ref_model` must be False in a run that is resumed"):
        synced.train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="`model` must be a block diffusion model"):
        BD3LMDPOTrainer(stock_model("llama"), args=None, train_dataset=pairs(2))
