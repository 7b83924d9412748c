"""Folders that are not what they say: what adapts, resumes from and publishes them refuses them and says why."""

import json

import pytest
import torch
from adapted import byte_tokenizer, causal_lm
from conftest import random_model
from safetensors.torch import load_file, save_file

from bd3lm_hf import BlockDiffusionForMaskedLM
from bd3lm_hf.cli import main
from bd3lm_hf.hub.publishing import prepare_files
from bd3lm_hf.training.checkpoints import what_is_missing


WEIGHTS, PROJECTION = "model.safetensors", "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture
def source(tmp_path):
    folder, tokenizer = tmp_path / "source", byte_tokenizer()
    causal_lm(vocab_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def edit(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def without_a_projection(folder):
    save_file({k: v for k, v in load_file(folder / WEIGHTS).items() if k != PROJECTION}, folder / WEIGHTS)


def with_nan(folder):
    tensors = load_file(folder / WEIGHTS)
    tensors[PROJECTION][0, 0] = torch.nan
    save_file(tensors, folder / WEIGHTS)


SOURCES = {
    "a tensor less": (without_a_projection, PROJECTION),
    "NaN": (with_nan, PROJECTION),
    "a layer more": (lambda folder: edit(folder, num_hidden_layers=3), "model.layers.2"),
    "a layer less": (lambda folder: edit(folder, num_hidden_layers=1), "model.layers.1"),
    "10^8 layers": (lambda folder: edit(folder, num_hidden_layers=10**8), "num_hidden_layers"),
    "another rotary embedding": (lambda folder: edit(folder, rope_parameters={"rope_type": "zzz"}), "zzz"),
}


@pytest.mark.parametrize("kind", SOURCES)
def test_a_source_that_is_not_whole_is_not_adapted(kind, source, tmp_path, capsys):
    breaks, named = SOURCES[kind]
    breaks(source)
    assert main(["adapt", str(source), str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("bd3lm adapt: error: ") and named in error
    assert not (tmp_path / "out").exists()


def test_a_source_that_lacks_weights_is_not_adapted_from_python(source):
    without_a_projection(source)
    with pytest.raises(ValueError, match=f"`model` must be a whole checkpoint, but it lacks .*{PROJECTION}"):
        BlockDiffusionForMaskedLM.from_causal_lm(str(source))


def test_a_block_is_no_longer_than_the_context(source, tmp_path, capsys):
    assert main(["adapt", str(source), str(tmp_path / "out"), "--block_size", "65"]) == 2
    assert "`block_size` must be at most `max_position_embeddings` of the network (64)" in capsys.readouterr().err


@pytest.fixture
def checkpoint(tmp_path):
    """A checkpoint as an earlier version wrote it, without a manifest."""
    folder, model = tmp_path / "checkpoint-3", random_model(num_hidden_layers=1)
    model.save_pretrained(folder)
    optimizer = torch.optim.AdamW(model.parameters())
    sum(parameter.sum() for parameter in model.parameters()).backward()
    optimizer.step()
    torch.save(optimizer.state_dict(), folder / "optimizer.pt")
    torch.save({"last_epoch": 3}, folder / "scheduler.pt")
    torch.save({"cpu": torch.get_rng_state()}, folder / "rng_state.pth")
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": 3, "log_history": []}))
    assert what_is_missing(folder) is None
    return folder


def state(**fields):
    return lambda folder: (folder / "trainer_state.json").write_text(json.dumps({"global_step": 3, **fields}))


CHECKPOINTS = {
    "NaN": (with_nan, "NaN or infinity in"),
    "a history of another type": (state(log_history=3), "`log_history` of another type"),
    "no last step": (state(max_steps=None), "`max_steps` of another type"),
    "callbacks of another type": (state(stateful_callbacks=3), "`stateful_callbacks` of another type"),
    "another optimizer": (
        lambda folder: torch.save({"a": 1}, folder / "optimizer.pt"),
        "something else than its name",
    ),
    "another schedule": (lambda folder: torch.save([1], folder / "scheduler.pt"), "no state of a schedule"),
    "another manifest": (
        lambda folder: (folder / "checkpoint_manifest.json").write_text(
            json.dumps({"run": {}, "files": {"model.safetensors": {"size": "a", "sha256": "b"}}})
        ),
        "checkpoint_manifest.json can't be read",
    ),
}


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_a_checkpoint_that_holds_something_else_is_not_whole(kind, checkpoint):
    breaks, told = CHECKPOINTS[kind]
    breaks(checkpoint)
    assert told in what_is_missing(checkpoint)


@pytest.mark.parametrize("base", ["../secret/model", "./w/m", "http://x/y", "tests"])
def test_a_recorded_base_that_is_no_id_is_not_told(base, tmp_path):
    random_model(num_hidden_layers=1).save_pretrained(tmp_path)
    (tmp_path / "training_summary.json").write_text(json.dumps({"base_model": base}))
    if base == "tests":
        base = str(tmp_path)
        (tmp_path / "training_summary.json").write_text(json.dumps({"base_model": base}))
    card = prepare_files(tmp_path, "user/name")["README.md"].decode()
    assert base not in card and "base_model:" not in card


@pytest.mark.parametrize("repo_id", ["", "/x", "../x", "me/x y", "me/..", "a/b/c"])
def test_a_target_that_no_repository_can_have_is_refused(repo_id, tmp_path):
    random_model(num_hidden_layers=1).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="`repo_id` must be an id on the Hub"):
        prepare_files(tmp_path, repo_id)


@pytest.mark.parametrize("auto_map", [None, 3, [], {"AutoModel": 3}])
def test_a_folder_that_names_no_code_is_not_published(auto_map, tmp_path):
    random_model(num_hidden_layers=1).save_pretrained(tmp_path)
    edit(tmp_path, auto_map=auto_map)
    with pytest.raises(ValueError, match="lacks the code that loads it .*auto_map"):
        prepare_files(tmp_path, "user/name")


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_weights_of_another_kind_of_numbers_are_not_published(dtype, tmp_path):
    random_model(num_hidden_layers=1).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    save_file({**tensors, PROJECTION: tensors[PROJECTION].to(dtype)}, tmp_path / WEIGHTS)
    with pytest.raises(ValueError, match=f"no floating-point numbers in {PROJECTION}"):
        prepare_files(tmp_path, "user/name")


@pytest.mark.parametrize("fields", [{"dtype": "zzz"}, {"id2label": 3}])
def test_a_configuration_that_nobody_can_read_is_one_line(fields, tmp_path, capsys):
    random_model(num_hidden_layers=1).save_pretrained(tmp_path)
    edit(tmp_path, **fields)
    assert main(["push", str(tmp_path), "user/name", "--dry_run"]) == 2
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith("bd3lm push: error: ")
