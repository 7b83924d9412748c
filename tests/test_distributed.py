"""However a batch is cut, over time or over processes, training is that of one process with the whole batch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import FullyShardedDataParallelPlugin
from conftest import random_model, tiny_config
from safetensors.torch import load_file
from torch.distributed.fsdp import FullyShardedDataParallel
from training_script import random_lengths, read_log, train
from transformers import AutoModelForMaskedLM

from bd3lm_hf import BD3LMForMaskedLM
from bd3lm_hf.training.checks import check_fsdp_plugin
from bd3lm_hf.training.ema import AveragedWeights


DOCS = Path(__file__).resolve().parents[1] / "docs"
NOISES = {
    "bernoulli": {"masking": "bernoulli"},
    "exact_count": {"masking": "exact_count"},
    "independent": {"antithetic_sampling": False},
    "complementary": {"num_noise_samples": 2, "complementary_masks": True},
}
# Batches of 8 rows; evaluations of 13 rows in batches of 6, without a checkpoint and with one.
WHOLE_BATCH = {
    "per_device_train_batch_size": 8,
    "per_device_eval_batch_size": 6,
    "learning_rate": 5e-4,
    "max_steps": 6,
    "eval_steps": 3,
    "save_steps": 2,
}
CUT_BATCH = {
    **WHOLE_BATCH,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "per_device_eval_batch_size": 3,
}
# A network of Transformers, with what reaches into its pass and its optimizer.
ADAPTED = {
    "model": {"adapted": {"block_size": 4, "clean_attention": "causal"}},
    "autoregressive_loss_weight": 0.5,
    "mask_token_learning_rate": 1e-3,
    "noise_level_per": "row",
    "eval_steps": 6,
    "loss_weight": "uniform",
}
# Rank 0 of two has more tokens to predict than are projected at once, rank 1 has not.
UNEQUAL = {
    **WHOLE_BATCH,
    "max_steps": 1,
    "lengths": [64] * 64 + [8] * 64,
    "train_sampling_strategy": "sequential",
    "masking": "exact_count",
}

ZERO_2 = {"deepspeed": str(DOCS / "zero2.json")}


def assert_same_run(folder, expected_folder, tolerance):
    """The figures of each step, the chosen intervals, and the exported weights."""
    log, expected_log = read_log(folder), read_log(expected_folder)
    assert [entry.keys() for entry in log] == [entry.keys() for entry in expected_log]
    assert any("eval_nelbo" in entry for entry in log) and any("loss" in entry for entry in log)
    for entry, expected in zip(log, expected_log, strict=True):
        assert entry.pop("interval") == expected.pop("interval")
        assert entry.pop("ema") is not None and expected.pop("ema") is not None
        assert entry == pytest.approx(expected, rel=tolerance, abs=tolerance)
    model, expected = (AutoModelForMaskedLM.from_pretrained(run / "final") for run in (folder, expected_folder))
    torch.testing.assert_close(model.state_dict(), expected.state_dict(), rtol=0, atol=tolerance)


@pytest.mark.parametrize("noise", NOISES)
def test_accumulated_small_batches_equal_a_large_batch(tmp_path, noise):
    # The last batch of an epoch has 5 rows, in three small batches the last of which has one row.
    run = {**NOISES[noise], **WHOLE_BATCH, "lengths": random_lengths(21)}
    train(tmp_path / "large", **run)
    train(tmp_path / "small", **{**run, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4})
    assert_same_run(tmp_path / "small", tmp_path / "large", 1e-5)


def launch(folder, jobs, *options):
    """Runs jobs one after the other in two processes by `accelerate launch`."""
    jobs = [{**job, "output_dir": str(folder / name)} for name, job in jobs.items()]
    Path(folder, "jobs.json").write_text(json.dumps(jobs))
    command = [sys.executable, "-m", "accelerate.commands.launch", *options, "--main_process_port", "0"]
    # No GPU, and no configuration of whoever runs the tests.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HOME": str(folder)}
    script = Path(__file__).with_name("training_script.py")
    subprocess.run([*command, script, folder / "jobs.json"], check=True, env=environment)
    return folder


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one_process")
    train(folder / "plain", **WHOLE_BATCH)
    train(folder / "complementary", **WHOLE_BATCH, **NOISES["complementary"])
    train(folder / "adapted", **WHOLE_BATCH | ADAPTED)
    train(folder / "tied", **WHOLE_BATCH, model={"tie_word_embeddings": True})
    train(folder / "unequal", **UNEQUAL | {"per_device_train_batch_size": 128})
    return folder


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    jobs = {
        "plain": CUT_BATCH,
        "complementary": {**CUT_BATCH, **NOISES["complementary"], "gradient_checkpointing": True},
        "adapted": CUT_BATCH | ADAPTED,
    }
    return launch(tmp_path_factory.mktemp("two_processes"), jobs, "--multi_gpu", "--num_processes", "2")


@pytest.fixture(scope="module")
def fsdp2(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fsdp2")
    fsdp_checkpointing = {"environment": {"fsdp_activation_checkpointing": "true"}}
    jobs = {
        "plain": CUT_BATCH,
        "resumed": {**CUT_BATCH, "resume": str(folder / "plain" / "checkpoint-4")},
        "tied": {**CUT_BATCH, "model": {"tie_word_embeddings": True}},
        "adapted": CUT_BATCH | ADAPTED,
        "unequal": UNEQUAL | {"per_device_train_batch_size": 64},
        "checkpointing": {**CUT_BATCH, "gradient_checkpointing": True},
        "fsdp_checkpointing": {**CUT_BATCH, **fsdp_checkpointing},
        "bf16": {**CUT_BATCH, "bf16": True},
        "dropout": {**CUT_BATCH, **fsdp_checkpointing, "model": {"hidden_dropout": 0.1}, "refused": True},
    }
    return launch(folder, jobs, "--config_file", str(DOCS / "fsdp2.yaml"), "--num_processes", "2")


@pytest.mark.parametrize("name", ["plain", "complementary", "adapted"])
def test_two_processes_equal_one_process(one_process, two_processes, name):
    assert_same_run(two_processes / name, one_process / name, 1e-5)
    assert [entry["eval_nelbo"] for entry in read_log(two_processes / name) if "eval_nelbo" in entry]


@pytest.mark.slow
def test_two_processes_under_zero_2_equal_one_process(one_process, tmp_path):
    pytest.importorskip("deepspeed")
    launch(tmp_path, {"plain": CUT_BATCH | ZERO_2}, "--multi_gpu", "--num_processes", "2")
    assert_same_run(tmp_path / "plain", one_process / "plain", 1e-5)


@pytest.mark.parametrize("name", ["plain", "complementary"])
def test_all_processes_hold_the_same_interval_and_average(two_processes, fsdp2, name):
    for run in (two_processes / name, fsdp2 / "plain"):
        assert read_log(run, process=0) == read_log(run, process=1)
        assert read_log(run)[0]["interval"] != read_log(run)[-1]["interval"]


def test_a_checkpoint_is_called_whole_when_every_process_has_written_its_part(two_processes, fsdp2):
    for run, optimizer in ((two_processes, "optimizer.pt"), (fsdp2, "optimizer.bin")):
        checkpoint = run / "plain" / "checkpoint-4"
        files = set(json.loads((checkpoint / "files_before_state.json").read_text()))
        assert {"ema.safetensors", "rng_state_0.pth", "rng_state_1.pth", "scheduler.pt", optimizer} <= files
        assert "trainer_state.json" not in files


@pytest.mark.parametrize("name", ["plain", "tied", "adapted", "checkpointing", "fsdp_checkpointing"])
def test_two_sharded_processes_equal_one_process(one_process, fsdp2, name):
    expected = one_process / (name if name in ("tied", "adapted") else "plain")
    assert_same_run(fsdp2 / name, expected, 1e-5)
    averages = (load_file(run / "checkpoint-4" / "ema.safetensors") for run in (fsdp2 / name, expected))
    assert {tensor: weight.shape for tensor, weight in next(averages).items()} == {
        tensor: weight.shape for tensor, weight in next(averages).items()
    }


def test_sharded_processes_may_predict_different_numbers_of_tokens(one_process, fsdp2):
    assert_same_run(fsdp2 / "unequal", one_process / "unequal", 1e-5)


def test_a_sharded_run_resumes_from_its_checkpoint(fsdp2):
    expected = [entry for entry in read_log(fsdp2 / "plain") if entry["step"] > 4]
    assert read_log(fsdp2 / "resumed") == expected


def test_a_sharded_run_saves_a_model_that_one_process_loads(one_process, fsdp2):
    ids = torch.arange(22)[None]
    for folder in ("final", "checkpoint-4"):
        saved, expected = fsdp2 / "plain" / folder, one_process / "plain" / folder
        logits, expected_logits = (
            BD3LMForMaskedLM.from_pretrained(run).eval()(input_ids=ids).logits for run in (saved, expected)
        )
        torch.testing.assert_close(logits, expected_logits, rtol=0, atol=1e-4)
        # With the sources that a loading without this package needs.
        assert (saved / "config.json").read_text() == (expected / "config.json").read_text()
        sources = {file.name for file in expected.glob("*.py")}
        assert "modeling_bd3lm.py" in sources and sources == {file.name for file in saved.glob("*.py")}


def test_a_sharded_run_in_bf16_computes_its_loss_in_float32(one_process, fsdp2):
    losses, expected = (
        [entry["loss"] for entry in read_log(run) if "loss" in entry]
        for run in (fsdp2 / "bf16", one_process / "plain")
    )
    assert losses == pytest.approx(expected, rel=0.05)
    # The mean of four bf16 numbers of this size is a multiple of 2^-12.
    assert any(loss * 2**12 % 1 for loss in losses)


def test_checkpointing_that_draws_other_dropout_masks_is_refused(fsdp2):
    assert "so `hidden_dropout` must be 0, but is 0.1" in (fsdp2 / "dropout" / "error.txt").read_text()
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, activation_checkpointing=False)
    check_fsdp_plugin(plugin, tiny_config(hidden_dropout=0.1))


@pytest.mark.filterwarnings("ignore:FSDP is switching to use `NO_SHARD`")
def test_shards_that_hide_their_weights_are_not_averaged(tmp_path):
    model = random_model()
    for parameter in model.parameters():
        # As DeepSpeed marks what ZeRO-3 takes apart.
        parameter.ds_id = 0
    with pytest.raises(ValueError, match="ZeRO-3 shards them; take FSDP2 .*, or set `ema_decay` to 0"):
        AveragedWeights(model, 0.9)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        sharded = FullyShardedDataParallel(random_model(), device_id=torch.device("cpu"), use_orig_params=True)
        with pytest.raises(ValueError, match="FSDP1 shards them; take FSDP2 .*, or set `ema_decay` to 0"):
            AveragedWeights(sharded, 0.9)
    finally:
        torch.distributed.destroy_process_group()
