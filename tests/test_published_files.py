"""What of a saved folder is published, without a Hub: links, indices, places, bases and what is left out."""

import json
import os
from pathlib import Path

import pytest
import torch
from conftest import random_model
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from bd3lm_hf.cli import main
from bd3lm_hf.hub.model_card import create_model_card
from bd3lm_hf.hub.published_files import is_on_hub, is_path, left_out, published_files
from bd3lm_hf.hub.publishing import prepare_files
from bd3lm_hf.hub.training_summary import SUMMARY_FILE, TrainingSummary
from bd3lm_hf.training.publishing import training_state


@pytest.fixture
def saved(tmp_path):
    random_model(num_hidden_layers=1).save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """A model of the Hub, `user/base`, that lies in the cache of this machine."""
    snapshot = tmp_path / "cache" / "models--user--base" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return "user/base"


def change_json(path, **fields):
    content = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(content | fields))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "modeling_bd3lm.py", "metrics.json"])
def test_a_link_that_leads_out_of_the_folder_is_refused(saved, tmp_path, name):
    (tmp_path / "elsewhere").write_bytes((saved / name).read_bytes() if (saved / name).is_file() else b"{}")
    (saved / name).unlink(missing_ok=True)
    (saved / name).symlink_to(os.path.relpath(tmp_path / "elsewhere", saved))
    with pytest.raises(ValueError, match=f"{name} is a symbolic link that leads out"):
        published_files(saved)


def test_a_link_within_the_folder_and_one_to_the_folder_are_followed(saved, tmp_path):
    (saved / "model.safetensors").rename(saved / "weights")
    (saved / "model.safetensors").symlink_to("weights")
    (tmp_path / "link").symlink_to(saved)
    files = prepare_files(tmp_path / "link", "user/x")
    assert files["model.safetensors"].read_bytes() == (saved / "weights").read_bytes() and "weights" not in files
    assert "weights" in left_out(saved, files)


@pytest.mark.parametrize("name", ["../outside.safetensors", "runs/model.safetensors", "/etc/passwd", "model.bin"])
def test_an_index_names_weights_of_its_own_folder(saved, name):
    save_file(load_file(saved / "model.safetensors"), saved.parent / "outside.safetensors")
    (saved / "model.safetensors").unlink()
    (saved / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lm_head.bias": name}}))
    with pytest.raises(ValueError, match="must hold safetensors, but its index names"):
        published_files(saved)


def test_shards_that_the_index_does_not_name_stay(saved):
    random_model(num_hidden_layers=1).save_pretrained(saved, max_shard_size="40KB")
    (saved / "model-00008-of-00009.safetensors").write_bytes(b"old")
    (saved / "model.safetensors").unlink(missing_ok=True)
    files = prepare_files(saved, "user/x")
    assert "model-00001-of-00003.safetensors" in files and "model-00008-of-00009.safetensors" not in files


def test_where_parts_were_loaded_from_is_left_out_of_configurations(saved):
    change_json(saved / "config.json", _name_or_path="/home/somebody/base")
    places = {"name_or_path": "../tokenizer", "special_tokens_map_file": "/root/.cache/x.json", "model_max_length": 64}
    change_json(saved / "tokenizer_config.json", **places)
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    files = prepare_files(saved, "user/x")
    assert json.loads(files["tokenizer_config.json"]) == {"model_max_length": 64}
    config = json.loads(files["config.json"])
    assert "_name_or_path" not in config and config["block_size"] == 4
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("generation_config.json", {"cache_config": {"offload_folder": "/scratch/me"}}),
        ("metrics.json", {"data": ["~/corpus.txt"]}),
        ("config.json", {"quantization_config": {"modules_file": "C:\\Users\\me\\modules.json"}}),
        (SUMMARY_FILE, {"stated": {"dataset": "/data/of/ours"}}),
    ],
)
def test_another_path_of_a_machine_is_refused(saved, name, fields):
    change_json(saved / name, **fields)
    with pytest.raises(ValueError, match=f"`{name}` must not be published with a path of this machine, but it holds"):
        prepare_files(saved, "user/x")


def test_the_home_folder_is_refused_in_code_weights_card_and_what_is_stated(saved):
    home = str(Path.home())
    with pytest.raises(ValueError, match="`README.md` must not be published"):
        prepare_files(saved, "user/x", card=f"It lies in {home}.")
    with pytest.raises(ValueError, match=f"`{SUMMARY_FILE}` must not be published"):
        prepare_files(saved, "user/x", dataset=[f"{home}/corpus.txt"])
    weights = load_file(saved / "model.safetensors")
    save_file(weights, saved / "model.safetensors", metadata={"format": "pt", "from": f"{home}/run"})
    with pytest.raises(ValueError, match=r"`model.safetensors` must not be published"):
        prepare_files(saved, "user/x")
    save_file(weights, saved / "model.safetensors", metadata={"format": "pt"})
    with (saved / "samplers_block_diffusion.py").open("a") as code:
        code.write(f"# {home}/x")
    with pytest.raises(ValueError, match=r"`samplers_block_diffusion.py` must not be published"):
        prepare_files(saved, "user/x")


def test_paths_are_told_apart_from_other_text():
    for text in ("/home/x", "/tmp/x/y", "~/x", "C:\\x", "D:/x", "file:///x"):
        assert is_path(text), text
    for text in (
        "</s>",
        "/",
        "//",
        "/n",
        "user/name",
        "a b/c",
        "{% if x %}/a/b",
        "https://x.org/y",
        "",
        "C:",
        "/ a/ b",
    ):
        assert not is_path(text), text


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", SUMMARY_FILE, "metrics.json"])
@pytest.mark.parametrize("content", ["[1]", "{", "", "null"])
def test_json_of_another_type_is_named(saved, name, content, capsys):
    (saved / name).write_text(content)
    assert main(["push", str(saved), "user/x", "--dry_run"]) == 2
    error = capsys.readouterr().err
    assert name in error and "JSON" in error and error.count("\n") == 1


def test_a_model_without_whole_weights_is_not_published(saved, capsys):
    weights = load_file(saved / "model.safetensors")
    save_file(weights | {"lm_head.bias": weights["lm_head.bias"] * torch.nan}, saved / "model.safetensors")
    assert main(["push", str(saved), "user/x", "--dry_run"]) == 2
    assert "there are NaN or infinities in lm_head.bias" in capsys.readouterr().err


# A base is named by its id on the Hub or not at all.


@pytest.mark.parametrize(
    "name", ["outputs/base", "base", "../base", "/tmp/gone/base", "user/base.git", "a/b/c", "C:\\b", ""]
)
def test_what_was_not_loaded_from_the_hub_is_no_id(name, cached, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert is_on_hub(cached) and not is_on_hub(name)
    (tmp_path / "user" / "base").mkdir(parents=True)
    assert not is_on_hub(cached)


@pytest.mark.parametrize("name", ["outputs/base", "/tmp/gone/base", "../base"])
def test_a_record_of_version_0_1_that_took_a_folder_for_an_id_is_read_without_it(saved, cached, name):
    for recorded, told in (
        ({"base_model": name}, None),
        ({"base_folder": "base"}, None),
        ({"base_model": cached}, cached),
    ):
        change_json(saved / SUMMARY_FILE, **{"base_model": None, "base_folder": None, "versions": {}} | recorded)
        summary = TrainingSummary.from_folder(saved)
        assert summary.base_model == told and summary.has_unnamed_base == (told is None)
        card = str(create_model_card(summary, "user/x"))
        assert name not in card and (told is None or f"base_model: {told}" in card)


def test_an_adapter_without_a_record_names_a_base_of_the_hub_and_no_other(saved, cached, tmp_path):
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(random_model(num_hidden_layers=1), LoraConfig(r=2, target_modules="all-linear"))
    adapted.save_pretrained(tmp_path / "adapter")
    module = {"base_model_class": "BD3LMForMaskedLM", "parent_library": "transformers_modules.my_run.modeling_bd3lm"}
    change_json(tmp_path / "adapter" / "adapter_config.json", base_model_name_or_path=cached, auto_mapping=module)
    config = json.loads(prepare_files(tmp_path / "adapter", "user/x")["adapter_config.json"])
    assert config["base_model_name_or_path"] == cached and config["auto_mapping"] is None
    change_json(tmp_path / "adapter" / "adapter_config.json", base_model_name_or_path="outputs/base")
    with pytest.raises(ValueError, match="`base_model` must name the adapter's base on the Hub"):
        prepare_files(tmp_path / "adapter", "user/x")


@pytest.mark.parametrize("name", ["../base", "/tmp/base", "saved", "a/b/c"])
def test_a_base_that_is_given_must_be_an_id(saved, name, monkeypatch):
    monkeypatch.chdir(saved.parent)
    with pytest.raises(ValueError, match="`base_model` must be an id on the Hub"):
        prepare_files(saved, "user/x", base_model=name)


def test_a_data_set_that_is_a_file_here_is_no_id(saved, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert b"datasets:" in prepare_files(saved, "user/x", dataset=["data/corpus"])["README.md"]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "corpus").touch()
    assert b"datasets:" not in prepare_files(saved, "user/x", dataset=["data/corpus"])["README.md"]


def test_what_a_run_goes_on_from_is_in_its_checkpoint_and_keeps_the_place_of_the_best_one(tmp_path):
    state = {"best_model_checkpoint": f"{tmp_path}/checkpoint-2", "global_step": 4}
    (tmp_path / "trainer_state.json").write_text(json.dumps(state))
    for name in ("optimizer.pt", "training_args.bin", "secret.pt"):
        (tmp_path / name).write_bytes(b"x")
    files = training_state(tmp_path)
    assert set(files) == {"optimizer.pt", "trainer_state.json"}
    assert json.loads(files["trainer_state.json"]) == {"best_model_checkpoint": None, "global_step": 4}
    (tmp_path / "rng_state.pth").symlink_to("/etc/passwd")
    with pytest.raises(ValueError, match="rng_state.pth is a symbolic link"):
        training_state(tmp_path)
