"""The ways to train that change the cost of a step, and not its loss."""

import pytest
import torch
from conftest import DEVICE, random_model

from bd3lm_hf import BD3LMTrainer, BD3LMTrainingArguments


datasets = pytest.importorskip("datasets")


def losses_and_weights(folder, model_overrides=None, streaming=False, steps=3, **kwargs):
    """The logged loss of each step and the final weights of a short run on random texts."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(22, (16, 32), generator=generator).tolist()
    dataset = datasets.Dataset.from_dict({"input_ids": rows})
    args = BD3LMTrainingArguments(
        str(folder),
        max_steps=steps,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        train_sampling_strategy="sequential",
        ema_decay=0,
        report_to=[],
        use_cpu=DEVICE.type == "cpu",
        disable_tqdm=True,
        **kwargs,
    )
    model = random_model(attn_implementation="sdpa", **(model_overrides or {}))
    trainer = BD3LMTrainer(model, args, train_dataset=dataset.to_iterable_dataset() if streaming else dataset)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == steps
    return losses, {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return losses_and_weights(tmp_path_factory.mktemp("plain"))


@pytest.mark.parametrize(
    "changes",
    [{"streaming": True}, {"gradient_checkpointing": True}, {"dataloader_num_workers": 1}],
    ids=lambda changes: next(iter(changes)),
)
def test_the_losses_stay(plain, tmp_path, changes):
    losses, weights = losses_and_weights(tmp_path, **changes)
    assert losses == pytest.approx(plain[0], abs=1e-5)
    for name, weight in weights.items():
        torch.testing.assert_close(weight, plain[1][name], atol=1e-4, rtol=0)


def test_mixed_precision_stays_close(plain, tmp_path):
    losses, weights = losses_and_weights(tmp_path, bf16=True)
    assert losses == pytest.approx(plain[0], rel=0.02)
    assert losses != plain[0]
    assert all(weight.dtype == torch.float32 for weight in weights.values())


def test_several_copies_train_as_well(tmp_path):
    losses, _ = losses_and_weights(
        tmp_path, num_noise_samples=2, complementary_masks=True, gradient_checkpointing=True, bf16=True
    )
    assert all(0 < loss < 10 for loss in losses)


@pytest.mark.slow
def test_a_compiled_model_has_the_same_losses(plain, tmp_path):
    losses, _ = losses_and_weights(tmp_path, torch_compile=True)
    assert losses == pytest.approx(plain[0], abs=1e-4)
