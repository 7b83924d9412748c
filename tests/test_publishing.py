"""Publishing on a Hub on the loopback interface, and what others get from there: E1 and E2 of the acceptance."""

import hashlib
import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import random_model
from datasets import Dataset
from hub_script import run_script
from huggingface_hub import ModelCard
from loopback_hub import LoopbackHub, card_errors
from publisher import DATASET, DATASET_REVISION

from bd3lm_hf import SAMPLERS, BD3LMTrainer, BD3LMTrainingArguments, push_to_hub
from bd3lm_hf.cli import main
from bd3lm_hf.hub.model_card import SAMPLER_TABLE, TEMPLATE_FILE, create_model_card
from bd3lm_hf.hub.published_files import published_files
from bd3lm_hf.hub.publishing import prepare_files
from bd3lm_hf.hub.training_summary import SUMMARY_FILE, TrainingSummary


HERE = Path(__file__).parent
# The client writes what it downloads in pieces of 10 MiB.
LARGE_FILE = bytes(range(256)) * (24 * 4096)
SOURCES = {path.name for path in (HERE.parent / "modeling").glob("*_bd3lm.py")}


@pytest.fixture(scope="module")
def hub():
    with LoopbackHub() as hub:
        yield hub


@pytest.fixture(scope="module")
def published(hub, tmp_path_factory):
    """What the publisher found, and its folder."""
    folder = tmp_path_factory.mktemp("published")
    return run_script(hub, "publisher.py", folder, home=folder / "home", token="hf_owner") | {"folder": folder}


@pytest.fixture(scope="module")
def read(hub, published, tmp_path_factory):
    """What a reader without this package and without a token found."""
    folder = tmp_path_factory.mktemp("read")
    hub.add_large_file("user/large", "large.bin", LARGE_FILE)
    start = len(hub.requests)
    report = run_script(hub, "hub_reader.py", published["folder"], folder, home=folder / "home")
    return report | {"requests": hub.requests[start:]}


@pytest.fixture(scope="module")
def card(hub, published):
    return ModelCard(hub.files("user/tiny", published["commit"])["README.md"].decode())


@pytest.fixture
def saved(tmp_path):
    model = random_model(num_hidden_layers=1)
    model.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


# E1: published by one, loaded, fine-tuned and published again by another, who has only Transformers.


def test_a_repository_holds_weights_code_tokenizer_generation_config_card_and_nothing_pickled(hub, published):
    files = set(hub.files("user/tiny", published["commit"]))
    assert files >= SOURCES | {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"}
    assert files >= {"README.md", "tokenizer_config.json", SUMMARY_FILE}
    # A checkpoint of training holds much more, none of which a reader needs.
    checkpoint = set(hub.files("user/checkpoint"))
    assert (published["folder"] / "run" / "checkpoint-4" / "ema.safetensors").is_file()
    assert checkpoint >= SOURCES | {"model.safetensors", "tokenizer.json", "README.md"}
    assert not {"ema.safetensors", "trainer_state.json", "training_args.bin"} & checkpoint
    for held in (files - {"training_args.bin"}, checkpoint):
        assert {Path(file).suffix for file in held - {".gitattributes"}} == {".py", ".json", ".safetensors", ".md"}
    # The last push is one commit, whatever those in training were.
    commits = hub.repositories["user/tiny"].commits
    assert commits[published["commit"]].summary == "End of training"


def test_what_is_pushed_while_training_loads_without_the_package_too(hub, published):
    commits = hub.repositories["user/tiny"].commits.values()
    pushed = [commit for commit in commits if commit.summary == "Training in progress, step 2"]
    assert len(pushed) == 1
    assert set(pushed[0].files) >= SOURCES | {"config.json", "model.safetensors", "README.md"}
    # Weights of training, and the figures of the moving average: they are not each other's.
    assert "model-index" not in pushed[0].files["README.md"].decode()


def test_no_published_file_tells_a_path_of_the_machine_that_published_it(hub, published, read):
    for repo_id, repository in hub.repositories.items():
        for commit in repository.commits.values():
            for name, content in commit.files.items():
                assert str(published["folder"]).encode() not in content, (repo_id, name)


def test_without_trust_transformers_refuses(read):
    kind, message = read["refusal"]
    assert kind == "ValueError" and "trust_remote_code=True" in message


def test_a_reader_without_the_package_gets_the_logits_and_the_text_of_the_publisher(read):
    difference, same_text = read["tiny"]
    assert difference < 1e-5 and same_text
    assert read["parts"][0] < 1e-5 and read["parts_tokens"] == read["tiny_tokens"]


def test_the_reader_fine_tunes_with_the_plain_trainer_publishes_and_loads_again(read):
    again_is_the_tuned_model, tuned_is_the_base = read["tuned"]
    assert again_is_the_tuned_model and not tuned_is_the_base
    assert set(read["tuned_files"]) >= SOURCES | {"config.json", "model.safetensors", "README.md"}


def test_a_changed_repository_is_loaded_anew_and_a_revision_stays_what_it_was(read):
    assert read["changed"] and read["branch"] and not read["first"]
    assert "nowhere" in read["no_revision"][1]


def test_a_private_repository_is_its_owners(read):
    for who in ("private", "private_stranger"):
        kind, message = read[who]
        assert kind == "OSError" and "user/checkpoint" in message, message
    assert read["private_owner"] == 4
    assert "403" in read["refused_push"][1]


def test_a_download_that_is_cut_fails_or_resumes_but_never_loads_half_a_file(hub, read):
    kind, message = read["cut_download"]
    assert kind == "OSError" and ("user/tiny" in message or "503" in message), message
    assert read["tiny"][0] < 1e-5
    # A file of more than one piece is read on from where the last whole one ended.
    assert read["large"] == [len(LARGE_FILE), hashlib.sha256(LARGE_FILE).hexdigest()]
    assert [request[2] for request in read["requests"] if request[2]] == [f"bytes={10 * 2**20}-"]


def test_an_upload_that_is_cut_leaves_no_half_model_and_the_next_one_completes_it(hub, published):
    for fault in ("cut_upload", "cut_commit"):
        kind, message = published[fault]
        assert kind == "ConnectionError" and "user/cut" in message and "another push completes it" in message
        assert published["files"][f"after_{fault}"] == [".gitattributes"]
    assert set(published["files"]["whole"]) >= SOURCES | {"config.json", "model.safetensors", "README.md"}
    # One commit holds it all, and the weights that had arrived before the commit was cut were not sent again.
    commits = list(hub.repositories["user/cut"].commits)
    assert commits.index(published["whole_commit"]) == 1
    assert published["cut_update"][0] == "ConnectionError"
    assert published["head_after_cut_update"] == published["whole_commit"]


def test_weights_of_an_earlier_commit_are_not_left_beside_those_that_replace_them(published):
    shards, one_file = published["files"]["shards"], published["files"]["one_file_again"]
    assert "model.safetensors.index.json" in shards and "model.safetensors" not in shards
    assert "model.safetensors" in one_file and not [name for name in one_file if "-of-" in name or "index" in name]


def test_an_adapter_loads_onto_remote_code_merges_and_generates(hub, read):
    files = hub.files("user/adapter")
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "user/tiny"
    assert "adapter_model.safetensors" in files and "model.safetensors" not in files
    for name in ("adapter", "merged"):
        difference, same_text = read[name]
        assert difference < 1e-4 and same_text, (name, difference, same_text)
    assert read["base"][0] > 0.01


def test_the_client_asked_nothing_that_the_loopback_hub_does_not_know(hub, read):
    # The Hub's discussions, and safetensors' conversion, are asked for by nobody here.
    assert hub.unknown == []


# E2: the card.


def test_the_figures_of_the_card_are_those_of_the_run(published, card):
    metrics = published["metrics"]
    results = {result.metric_type: result for result in card.data.eval_results}
    for name in ("nelbo", "perplexity", "bits_per_byte"):
        assert results[name].metric_value == metrics[f"eval_{name}"], name
    error = metrics["eval_nelbo_standard_error"]
    assert results["nelbo"].metric_args["standard_error"] == error > 0
    assert results["perplexity"].metric_args["standard_error"] == pytest.approx(error * metrics["eval_perplexity"])
    assert results["nelbo"].metric_args["estimator"] == "stratified"
    assert results["nelbo"].metric_args["num_sequences"] == 16
    assert f"| {metrics['eval_nelbo']:.4f} ± {error:.4g} |" in card.text
    for entry in published["log_history"]:
        if "eval_nelbo" in entry and entry["step"] == 2:
            assert f"| 2 | held-out text | {entry['eval_nelbo']:.4f} ± " in card.text
    assert f"| parameters | {published['num_parameters']:,} |" in card.text


def test_the_card_tells_the_data_the_interval_the_arguments_and_the_versions(published, card):
    data = card.data
    assert (data.license, data.language, data.pipeline_tag) == ("apache-2.0", "en", "text-generation")
    assert {"bd3lm", "block-diffusion", "text-generation", "custom_code"} <= set(data.tags)
    assert data.widget == [{"text": "# bd3lm-hf"}]
    assert data.datasets == [DATASET]
    assert data.eval_results[0].dataset_type == DATASET and data.eval_results[0].dataset_revision == DATASET_REVISION
    beta, omega = published["noise_interval"]
    assert f"| noise interval | ({beta}, {omega}) |" in card.text and "| block size | 4 |" in card.text
    (chosen,) = [
        entry for entry in published["log_history"] if entry.get("step") == 4 and "noise_interval_beta" in entry
    ]
    variance = chosen["nelbo_variance"]
    varies_least = f"varies least: {variance:.4f}" if 1 <= variance < 1e5 else f"varies least: {variance:.4g}"
    assert "chosen from data" in card.text and f"{varies_least} (nats per" in card.text
    assert "| `learning_rate` | 0.001 |" in card.text and "| `max_steps` | 4 |" in card.text
    assert "the moving average at step 4" in card.text
    assert f"torch {importlib.metadata.version('torch')}" in card.text and "2503.09573" in card.text
    assert "| `first_hitting` (default) |" in card.text
    assert "\n\n\n" not in card.text


def test_the_card_validates_and_a_broken_one_does_not(hub, published, card):
    assert card_errors(str(card)) == [] and ModelCard(str(card)).content == str(card)
    assert published["invalid"][0] == "ValueError" and "license must hold strings" in published["invalid"][1]
    metadata = yaml.safe_load(str(card).split("---")[1])
    assert card_errors(f"---\n{yaml.dump(metadata | {'base_model': '/tmp/x'})}\n---\n")


def test_the_python_of_the_cards_runs(read):
    for name, weights in (("card", "model.safetensors"), ("adapter_card", "adapter_model.safetensors")):
        assert read[name]["num_blocks"] == 3
        assert read[name]["printed"].strip()
        assert weights in read[name]["saved"]


def test_bd3lm_push_writes_the_card_that_the_trainer_wrote(published):
    assert published["push"] == 0 and "published at http" in published["printed"]
    # Nothing differs, so there is nothing to commit.
    assert published["head_after_push"] == published["commit"]


def test_the_card_of_a_checkpoint_does_not_claim_the_figures_of_the_average(hub, published):
    card = ModelCard(hub.files("user/checkpoint")["README.md"].decode())
    assert hub.repositories["user/checkpoint"].private
    assert card.data.eval_results is None and "those of step 4" in card.text and "Data: README.md" in card.text


def test_the_card_of_an_adapter_names_its_base(hub, read):
    card = ModelCard(hub.files("user/adapter")["README.md"].decode())
    assert card.data.base_model == "user/tiny" and card.data.base_model_relation == "adapter"
    assert card.data.library_name == "peft" and "lora" in card.data.tags
    assert "[user/tiny](https://huggingface.co/user/tiny)" in card.text
    assert "parameters of the adapter" in card.text


def test_every_sampler_stands_in_the_table():
    assert set(SAMPLER_TABLE) == set(SAMPLERS)


# What needs no Hub.


def test_the_card_of_a_folder_without_a_record_tells_what_its_configuration_tells(saved, capsys):
    assert main(["push", str(saved), "user/plain", "--dry_run", "--base_model", "user/older"]) == 0
    printed = capsys.readouterr().out
    assert "model.safetensors" in printed and "modeling_bd3lm.py" in printed
    card = ModelCard(printed[printed.index("---\n") :])
    assert card.data.base_model == "user/older" and card.data.eval_results is None
    assert "| block size | 4 |" in card.text and "## Training" not in card.text and "no licence is stated" in card.text
    assert card_errors(str(card)) == []


def test_likelihoods_and_measured_samplers_are_added_as_they_were_measured(saved, tmp_path, capsys):
    likelihood = {"nelbo": 2.5, "perplexity": 12.182493960703473, "standard_error": 0.25, "bits_per_byte": None}
    likelihood |= {"num_sequences": 7, "estimator": "exact", "block_size": 4}
    (tmp_path / "likelihood.json").write_text(json.dumps(likelihood))
    rows = [{"sampler": "confidence", "tokens per forward": 2.25}, {"sampler": "ancestral", "tokens per forward": 1.5}]
    (tmp_path / "samplers.json").write_text(json.dumps(rows))
    command = ["push", str(saved), "user/plain", "--dry_run", "--sampler_results", str(tmp_path / "samplers.json")]
    assert main([*command, "--likelihood", f"wikitext={tmp_path / 'likelihood.json'}"]) == 0
    printed = capsys.readouterr().out
    card = ModelCard(printed[printed.index("---\n") :])
    results = {result.metric_type: result for result in card.data.eval_results}
    assert set(results) == {"nelbo", "perplexity"}
    assert results["nelbo"].metric_value == 2.5 and results["nelbo"].dataset_name == "wikitext"
    assert results["perplexity"].metric_args["standard_error"] == 0.25 * likelihood["perplexity"]
    assert "| wikitext | 7 | 2.5000 ± 0.25 | 12.1825 |" in card.text
    assert "| confidence | 2.2500 |\n| ancestral | 1.5000 |" in card.text
    (tmp_path / "likelihood.json").write_text(json.dumps(likelihood | {"block_size": 16}))
    assert main([*command, "--likelihood", f"wikitext={tmp_path / 'likelihood.json'}"]) == 2
    assert "block size 16" in capsys.readouterr().err


def test_a_diverged_run_has_a_valid_card():
    summary = TrainingSummary(model={"block_size": 4, "num_parameters": 1})
    summary.add_likelihood("text", {"nelbo": 800.0, "perplexity": float("inf"), "standard_error": 1.0})
    card = create_model_card(summary, "user/diverged")
    assert [result.metric_type for result in card.data.eval_results] == ["nelbo"]
    assert card_errors(str(card)) == []


def test_what_is_no_whole_model_is_refused_before_anything_is_sent(saved, tmp_path):
    with pytest.raises(ValueError, match="`checkpoint` must be a folder"):
        push_to_hub(tmp_path / "nowhere", "user/x")
    with pytest.raises(ValueError, match="`colour` is nothing that a card tells"):
        push_to_hub(saved, "user/x", colour="red")
    for name, message in (
        ("modeling_bd3lm.py", "lacks the code.*modeling_bd3lm.py"),
        ("model.safetensors", "model.safetensors is missing"),
        ("config.json", "holds neither config.json nor adapter_config.json"),
    ):
        content = (saved / name).read_bytes()
        (saved / name).unlink()
        with pytest.raises(ValueError, match=message):
            published_files(saved)
        (saved / name).write_bytes(content)
    weights = (saved / "model.safetensors").read_bytes()
    (saved / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(ValueError, match="model.safetensors is cut short"):
        prepare_files(saved, "user/x")
    (saved / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(ValueError, match="'gpt2'"):
        published_files(saved)


def test_an_adapter_whose_base_is_a_folder_needs_the_base_on_the_hub(saved, tmp_path):
    from peft import LoraConfig, get_peft_model

    from bd3lm_hf import BD3LMForMaskedLM

    adapted = get_peft_model(BD3LMForMaskedLM.from_pretrained(saved), LoraConfig(target_modules="all-linear"))
    adapted.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="`base_model` must name the adapter's base on the Hub.*'saved'"):
        prepare_files(tmp_path / "adapter", "user/x")
    files = prepare_files(tmp_path / "adapter", "user/x", base_model="user/base")
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "user/base"
    assert str(saved) in (tmp_path / "adapter" / "adapter_config.json").read_text()
    assert not any(str(saved).encode() in content for content in files.values() if isinstance(content, bytes))


@pytest.mark.parametrize(
    "block_size,arguments,interval,weights,estimator,claimed",
    [
        (4, {}, "the default; no search took place", "the moving average at", "stratified", True),
        (4, {"noise_interval": (0.3, 0.8)}, "fixed beforehand", "the moving average at", "stratified", True),
        # While training it is the average that is evaluated, and what is saved here are the trained weights.
        (4, {"export_ema": False, "eval_strategy": "steps"}, "chosen from data", "those of", "stratified", False),
        (1, {"ema_decay": 0.0, "eval_strategy": "steps"}, "chosen from data", "those of", "exact", True),
    ],
)
def test_what_the_card_claims_follows_from_the_arguments(
    tmp_path, block_size, arguments, interval, weights, estimator, claimed
):
    texts = Dataset.from_dict({"input_ids": [[(row + column) % 20 for column in range(12)] for row in range(8)]})
    trainer = BD3LMTrainer(
        random_model(block_size=block_size, num_hidden_layers=1),
        BD3LMTrainingArguments(
            str(tmp_path / "run"),
            max_steps=2,
            eval_steps=2,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            **arguments,
        ),
        train_dataset=texts,
        eval_dataset=texts,
    )
    trainer.train()
    if "eval_strategy" not in arguments:
        trainer.evaluate()
    trainer.save_model()

    def written_card():
        trainer.create_model_card()
        return ModelCard.load(tmp_path / "run" / "README.md")

    card = written_card()
    assert f"Noise interval: {interval}" in card.text.replace("\n", " ")
    assert f"The weights are {weights} step 2." in card.text.replace("\n", " ")
    assert (card.data.eval_results is not None) == claimed
    # Evaluated after training, it is the saved weights that were, and `bd3lm push` knows it.
    metrics = trainer.evaluate()
    card = written_card()
    summary = TrainingSummary.from_folder(tmp_path / "run")
    assert card.data.eval_results[0].metric_value == metrics["eval_nelbo"]
    assert card.data.eval_results[0].metric_args["estimator"] == estimator
    assert str(create_model_card(summary, "run")) == str(card)


def test_the_wheel_ships_the_template_of_the_card(tmp_path):
    command = [sys.executable, "setup.py", "--quiet", "build_py", "--build-lib", str(tmp_path)]
    subprocess.run(command, cwd=HERE.parent, check=True, capture_output=True)
    assert (tmp_path / "bd3lm_hf" / "hub" / TEMPLATE_FILE.name).read_text() == TEMPLATE_FILE.read_text()
