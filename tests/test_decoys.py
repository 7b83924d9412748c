"""What is published of a folder full of what nobody shall see: the list, and nothing of whose it was (F4)."""

import json
from pathlib import Path

import pytest
from decoys import DECOYS, HOST, SECRET, USER
from hub_script import run_script
from loopback_hub import LoopbackHub


SOURCES = {path.name for path in (Path(__file__).parents[1] / "modeling").glob("*.py")} - {"__init__.py"}
CODE = {name for name in SOURCES if name.endswith(("_bd3lm.py", "_block_diffusion.py"))}
# What every repository has anyway.
ATTRIBUTES = ".gitattributes"
TOKENIZER = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
TOLD = {"README.md", "training_summary.json"}
MODEL = CODE | {"config.json", "generation_config.json", "model.safetensors"}
ADAPTER = {"adapter_config.json", "adapter_model.safetensors"}
STATE = {"optimizer.pt", "scheduler.pt", "rng_state.pth", "ema.safetensors", "trainer_state.json"}


@pytest.fixture(scope="module")
def hub():
    with LoopbackHub() as hub:
        yield hub


@pytest.fixture(scope="module")
def published(hub, tmp_path_factory):
    folder = tmp_path_factory.mktemp(USER)
    variables = {"HOME": str(folder), "USER": USER, "LOGNAME": USER, "TMPDIR": str(folder)}
    return run_script(hub, "decoys.py", folder, home=folder / "hub", token="hf_owner", **variables) | {"home": folder}


def commits(hub, *names):
    for name in names or hub.repositories:
        for commit in hub.repositories[name].commits.values():
            yield name, commit


@pytest.mark.parametrize(
    ("repository", "files"),
    [
        ("user/every_save", MODEL | TOKENIZER | TOLD),
        ("user/pushed", MODEL | TOKENIZER | TOLD),
        ("user/pushed_checkpoint", MODEL | TOKENIZER | TOLD),
        ("user/model", MODEL | {"README.md"}),
        ("user/tokenizer", TOKENIZER | {"README.md"}),
        ("user/adapter", ADAPTER | TOKENIZER | TOLD),
    ],
)
def test_what_is_sent_is_the_list(hub, published, repository, files):
    assert (published["pushed"], published["checkpoint_pushed"], published["adapter_pushed"]) == (0, 0, 0)
    assert set(hub.files(repository)) == files | {ATTRIBUTES}
    sent = {name for _, commit in commits(hub, repository) for name in commit.files}
    assert sent == files | {ATTRIBUTES}


def test_a_checkpoint_is_sent_to_go_on_from_where_that_is_asked_for(hub, published):
    of_checkpoint = MODEL | TOKENIZER | TOLD | STATE
    assert set(hub.files("user/checkpoint")) == MODEL | TOKENIZER | TOLD | {ATTRIBUTES} | {
        f"last-checkpoint/{name}" for name in of_checkpoint
    }
    assert set(hub.files("user/all_checkpoints")) == MODEL | TOKENIZER | TOLD | {ATTRIBUTES} | {
        f"checkpoint-{step}/{name}" for step in (2, 4) for name in of_checkpoint
    }
    assert published["resumed"] == [4, 4]


def test_no_byte_of_what_is_sent_tells_whose_it_was(hub, published):
    names = [str(published["home"]).encode(), USER.encode(), HOST.encode(), SECRET]
    contents = [
        (repository, name, content) for repository, commit in commits(hub) for name, content in commit.files.items()
    ]
    assert len({repository for repository, _, _ in contents}) == 8 and len(contents) > 200
    for repository, name, content in contents:
        assert not [secret for secret in names if secret in content], (repository, name)
        # The model was trained on from a folder that is gone, the adapter on a relative one.
        assert b"models/base" not in content, (repository, name)
    assert b"went on from another checkpoint" in hub.files("user/pushed")["README.md"]
    assert json.loads(hub.files("user/pushed")["training_summary.json"])["base_model"] is None


def test_the_folder_is_as_full_as_the_list_is_short(published):
    for folder in ("run", "run/checkpoint-4"):
        held = {
            path.relative_to(published["home"] / folder).as_posix() for path in (published["home"] / folder).rglob("*")
        }
        assert {name.format(host=HOST) for name in DECOYS} | {"key.json", "more"} <= held


def test_pushes_of_training_are_one_commit_each_and_leave_nothing_behind(hub, published):
    summaries = [commit.summary for _, commit in commits(hub, "user/every_save")]
    assert summaries[1:] == ["Training in progress, step 2", "Training in progress, step 4", "End of training"]
    # A checkpoint is sent even where it is gone by then: `save_total_limit` is 1.
    assert not list(published["home"].rglob(".push-*")) and not (published["home"] / "run" / "checkpoint-2").exists()


def test_a_dry_run_lists_all_files_and_what_stays(published):
    listed, _, card = published["dry_run"].partition("\n---\n")
    names = {line.split("  ")[-1] for line in listed.splitlines() if line[:1] == " "}
    assert names == MODEL | TOKENIZER | TOLD and "license: mit" in card
    (stays,) = [line for line in listed.splitlines() if line.startswith("not published: ")]
    stays = stays.removeprefix("not published: ").split(", ")
    tops = {name.split("/")[0] + "/" * ("/" in name) for name in DECOYS} - {"additional_chat_templates/"}
    assert set(stays) >= tops | {"key.json", "more/", "checkpoint-4/"} and not set(stays) & names


def test_an_adapter_whose_base_is_a_relative_folder_that_is_gone_needs_an_id(published):
    for name in ("adapter", "bare_adapter"):
        kind, message = published[name]
        assert kind == "ValueError" and "`base_model` must name the adapter's base on the Hub" in message
        assert "'base'" in message
