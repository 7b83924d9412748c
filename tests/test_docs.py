"""The code of the documentation runs, page by page, and its links lead somewhere."""

import fnmatch
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from adapted import save_causal_lm
from conftest import randomize
from loopback_hub import LoopbackHub, Repository
from pages import DOCS, NOT_RUN, PAGES, README, ROOT, commands, read_blocks, run_page
from quantizing import quantized_share
from test_conversion import PublishedModel, write_ckpt
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, Qwen3Config

from bd3lm_hf import (
    SAMPLERS,
    BD3LMConfig,
    BD3LMForMaskedLM,
    BD3LMGenerationConfig,
    BlockDiffusionConfig,
    BlockDiffusionForMaskedLM,
    TextInfillingPipeline,
    load_documents,
    train_tokenizer,
)
from bd3lm_hf.cli.train import train_arguments


# Run against a Hub, in processes of their own.
HUB_PAGES = ("checkpoints", "publishing", "peft")
# Start processes that import everything once more.
SLOW_PAGES = ("gpus",)
# What a page presupposes in the folder of its reader; `bd3lm-demo` unless it is named here.
GIVEN = {
    "README": ("bd3lm-demo", "README.md"),
    "quickstart": ("bd3lm-demo", "README.md", "docs"),
    "training": ("corpus.txt", "examples.jsonl"),
    "adapted": ("my-llama", "corpus.txt"),
    "evaluation": ("my-model", "my-gpt2", "corpus.txt", "documents.jsonl", "wiki.test.tokens"),
    "gpus": ("corpus.txt", "docs"),
    "families": ("SDAR-1.7B-Chat", "my-adapted"),
    "harness": ("bd3lm-demo", "tasks"),
    "trl": ("my-model",),
    "post_training": ("my-llama", "corpus.txt"),
}
# The optional packages of a page, as modules, and the extra that brings them.
NEEDS = {
    "adapted": ("peft", "peft"),
    "app": ("gradio", "app"),
    "harness": ("lm_eval", "lm-eval"),
    "plots": ("matplotlib", "plots"),
    "serving": ("fastapi", "openai", "greenlet", "peft", "serve"),
    "trl": ("trl", "trl"),
    "post_training": ("trl", "trl"),
    "quantization": ("bitsandbytes", "optimum.quanto", "hqq", "quantizers"),
}
HISTORY = [{"step": 2, "loss": 3.0}, {"step": 4, "loss": 2.0, "eval_nelbo": 2.5}]
TASK = """
task: my_task
dataset_path: json
dataset_kwargs: {data_files: {test: tasks/texts.jsonl}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: bits_per_byte}]
"""


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    """A folder of everything that pages presuppose, at a tiny size."""
    shelf = tmp_path_factory.mktemp("shelf")
    text = README.read_text(encoding="utf-8")
    tokenizer = train_tokenizer(load_documents(str(README)), vocab_size=300)
    for name, length in (("bd3lm-demo", 64), ("my-model", 128)):
        config = BD3LMConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=length,
            block_size=4,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        randomize(BD3LMForMaskedLM(config)).save_pretrained(shelf / name)
        (shelf / name / "trainer_state.json").write_text(json.dumps({"log_history": HISTORY}))
    gpt2 = GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=1)
    GPT2LMHeadModel(gpt2).save_pretrained(shelf / "my-gpt2")
    save_causal_lm(shelf / "my-llama", max_position_embeddings=128)
    for name in ("bd3lm-demo", "my-model", "my-gpt2"):
        tokenizer.save_pretrained(shelf / name)

    put_adapted_models(shelf, len(tokenizer))
    for name in ("SDAR-1.7B-Chat", "my-adapted"):
        tokenizer.save_pretrained(shelf / name)
    (shelf / "README.md").write_text(text, encoding="utf-8")
    (shelf / "corpus.txt").write_text(text * 4, encoding="utf-8")
    (shelf / "wiki.test.tokens").write_text(text[:800], encoding="utf-8")
    lines = [{"text": text[:300]}, {"text": "Once"}]
    write_lines(shelf / "documents.jsonl", lines)
    write_lines(
        shelf / "examples.jsonl",
        [{"prompt": f"{number} and 1 are ", "completion": str(number + 1)} for number in range(100)],
    )
    for folder in ("docs", "tasks"):
        (shelf / folder).mkdir()
    shutil.copy(DOCS / "fsdp2.yaml", shelf / "docs")
    (shelf / "docs" / "page.md").write_text(text, encoding="utf-8")
    (shelf / "tasks" / "my_task.yaml").write_text(TASK)
    write_lines(shelf / "tasks" / "texts.jsonl", lines)
    return shelf


def put_adapted_models(shelf, vocab_size):
    """A checkpoint of SDAR, which does not say its block size, and an adapted model with shifted logits."""
    sizes = {"vocab_size": vocab_size, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    stock = AutoModelForCausalLM.from_config(
        Qwen3Config(**sizes, num_attention_heads=2, num_key_value_heads=1, head_dim=8)
    )
    stock.save_pretrained(shelf / "SDAR-1.7B-Chat")
    path = shelf / "SDAR-1.7B-Chat" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_type": "sdar"}))
    adapted = BlockDiffusionForMaskedLM.from_causal_lm(stock, mask_token_id=vocab_size - 1)
    adapted.save_pretrained(shelf / "my-adapted")


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def give(shelf, name, folder):
    if (shelf / name).is_dir():
        shutil.copytree(shelf / name, folder / name)
    else:
        shutil.copy(shelf / name, folder / name)


def lose_the_last_checkpoint(command):
    """What a run leaves that was killed while it wrote its last checkpoint."""
    if "--resume_from_checkpoint" in command:
        Path("my-model", "checkpoint-4", "trainer_state.json").unlink()


# What a page claims, beyond running: functions of the names of its Python and of what it printed.


def check_families(names, printed):
    assert names["model"].config.block_size == 4
    assert BD3LMGenerationConfig.from_pretrained("my-sdar").confidence_threshold == 0.85
    assert json.loads(Path("served", "config.json").read_text())["architectures"] == ["SDARForCausalLM"]
    assert json.loads(Path("again", "config.json").read_text())["architectures"] == ["Qwen3ForCausalLM"]


def check_readme(names, printed):
    assert names["loss"].item() > 0
    assert names["fast"].tokens_per_forward.item() > 1
    assert Path("my-model", "modeling_bd3lm.py").exists()
    assert "nats per token" in printed


def check_adapted(names, printed):
    assert "the same greedy text: True" in printed
    assert names["difference"] < 1e-4
    assert BlockDiffusionConfig.from_pretrained("my-trained-llama").block_size == 4
    before, after = (float(line) for line in printed.splitlines() if re.fullmatch(r"\d+\.\d+", line))
    assert after < before
    assert Path("my-adapter", "adapter_model.safetensors").is_file()


def check_generation(names, printed):
    assert tuple(names["output"].reveal_steps.shape) == tuple(names["output"].sequences.shape)


def check_training(names, printed):
    assert json.loads(Path("my-model", "trainer_state.json").read_text())["global_step"] == 4
    folders = ("pretrained", "blocks-of-4", "one-run")
    assert [BD3LMConfig.from_pretrained(folder).block_size for folder in folders] == [32, 4, 4]
    assert "block size 32 -> 4" in printed
    assert Path("my-adapter", "adapter_model.safetensors").is_file()
    assert names["trainer"].state.global_step == 20


def check_evaluation(names, printed):
    assert printed.count("nats per token") >= len(commands(DOCS / "evaluation.md"))
    assert json.loads(Path("likelihood.json").read_text())["estimator"] == "exact"
    assert names["likelihood"].window == 128


def check_infilling(names, printed):
    assert len(names["output"]["spans"]) == 2 and type(names["fill"]) is TextInfillingPipeline


def check_harness(names, printed):
    assert names["harness"].estimator == "stratified"
    assert "bits_per_byte" in printed


def check_app(names, printed):
    assert {"app.py", "requirements.txt"} <= {path.name for path in Path("my-space").iterdir()}


def check_plots(names, printed):
    written = {command[-1] for command in commands(DOCS / "plots.md")} | {"attention.png", "schedules.svg"}
    assert all(Path(name).stat().st_size > 0 for name in written)


def check_trl(names, printed):
    assert names["trainer"].state.global_step == 20
    assert Path("my-sft-model", "model.safetensors").is_file()
    assert Path("my-sft-adapter", "adapter_model.safetensors").is_file()


def check_gpus(names, printed):
    for folder in ("my-model", "my-sharded-model"):
        assert json.loads(Path(folder, "trainer_state.json").read_text())["global_step"] == 4


def check_quantization(names, printed):
    assert quantized_share(names["again"]) == quantized_share(names["quantized"]) == 1
    assert names["model"].lm_head.weight.device.type == "meta" and names["text"].shape[1] > names["ids"].shape[1]


CHECKS = {
    "README": check_readme,
    "adapted": check_adapted,
    "app": check_app,
    "evaluation": check_evaluation,
    "families": check_families,
    "generation": check_generation,
    "gpus": check_gpus,
    "harness": check_harness,
    "infilling": check_infilling,
    "plots": check_plots,
    "quantization": check_quantization,
    "training": check_training,
    "trl": check_trl,
}


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, id=page.stem, marks=[pytest.mark.slow] * (page.stem in SLOW_PAGES))
        for page in PAGES
        if read_blocks(page) and page.stem not in HUB_PAGES
    ],
)
def test_a_page_runs_from_top_to_bottom(page, shelf, tmp_path, monkeypatch):
    if page.stem in NEEDS:
        *modules, extra = NEEDS[page.stem]
        for module in modules:
            pytest.importorskip(module, reason=f"needs {module}: pip install 'bd3lm-hf[{extra}]'")
    for name in GIVEN.get(page.stem, ("bd3lm-demo",)):
        give(shelf, name, tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    # What a page writes is checked, so it is the same each time.
    torch.manual_seed(0)
    # The engines' mask token has an id beyond tiny vocabularies.
    mask_token_id = BD3LMConfig.from_pretrained(shelf / "bd3lm-demo").mask_token_id
    monkeypatch.setattr("bd3lm_hf.hub.export.SDAR_MASK_TOKEN_ID", mask_token_id)
    # A page names a sampler of its own, which other tests must not meet.
    with mock.patch.dict(SAMPLERS):
        names, printed = run_page(page, before=lose_the_last_checkpoint)
    CHECKS.get(page.stem, lambda names, printed: None)(names, printed)


# The pages that need a Hub: an author with this package, and a user without it.


@pytest.fixture(scope="module")
def hub(shelf, tmp_path_factory):
    """A Hub that has a published checkpoint and the tokenizer that goes with it."""
    source = tmp_path_factory.mktemp("hub")
    with LoopbackHub() as hub:
        for owner in ("kuleshov-group", "openai-community"):
            (source / owner).mkdir()
        vocab_size = BD3LMConfig.from_pretrained(shelf / "bd3lm-demo").vocab_size
        PublishedModel(vocab_size=vocab_size).write(source / "kuleshov-group" / "bd3lm-owt-block_size4")
        shutil.copytree(shelf / "my-gpt2", source / "openai-community" / "gpt2")
        for folder in source.glob("*/*"):
            repo_id = folder.relative_to(source).as_posix()
            files = {path.name: path.read_bytes() for path in folder.iterdir()}
            hub.repositories[repo_id] = Repository(repo_id.split("/")[0], private=False)
            hub.repositories[repo_id].commit("main", "published", files)
        yield hub


@pytest.fixture(scope="module")
def reports(hub, shelf, tmp_path_factory):
    """What the author and the user found, by role."""
    folder = tmp_path_factory.mktemp("hub_pages")
    for name in ("my-model", "corpus.txt"):
        give(shelf, name, folder)
    # Enough for an evaluation.
    (folder / "corpus.txt").write_text((folder / "corpus.txt").read_text(encoding="utf-8")[:800], encoding="utf-8")
    write_ckpt(folder)
    dropped = ("HF_TOKEN", "HF_HUB_OFFLINE", "HF_MODULES_CACHE", "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY")
    environment = {key: value for key, value in os.environ.items() if key not in dropped}
    environment |= {"HF_ENDPOINT": hub.endpoint, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    reports = {}
    for role, token in (("author", {"HF_TOKEN": "hf_owner"}), ("user", {})):
        result = subprocess.run(
            [sys.executable, str(Path(__file__).with_name("pages.py")), f"{role}.json", role, *HUB_PAGES],
            cwd=folder,
            env=environment | token | {"HF_HOME": str(folder / f"home_of_{role}")},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        assert result.returncode == 0, result.stderr[-6000:]
        reports[role] = json.loads((folder / f"{role}.json").read_text())
    return reports


def test_the_pages_that_need_a_hub_run_from_top_to_bottom(hub, reports):
    assert set(reports["author"]) == set(reports["user"]) == set(HUB_PAGES)
    assert "published at http" in reports["author"]["publishing"]["printed"]
    assert {"model.safetensors", "modeling_bd3lm.py", "tokenizer.json"} <= set(hub.files("user/my-model"))
    commits = hub.repositories["user/my-model"].commits.values()
    cards = [commit.files.get("README.md", b"").decode() for commit in commits]
    assert any("my corpus" in card for card in cards) and "- example" in cards[-1]


def test_an_adapter_of_a_published_checkpoint_comes_back_over_remote_code_merges_and_writes(hub, reports):
    assert "adapter_model.safetensors" in hub.files("user/my-adapter")
    assert "model.safetensors" not in hub.files("user/my-adapter")
    found = reports["user"]["peft"]
    assert found["merged"] < 1e-4 and found["again"] < 1e-4 and found["same_text"]
    # The adapter is more than nothing.
    assert found["bare"] > 0.01


# What is not run.


def test_every_block_is_run_or_has_a_reason():
    """`run_page` runs the blocks of a page or fails, and every page is given to it; what it leaves out is listed."""
    shown = [command for page in PAGES for block in read_blocks(page) for command in block.commands]
    for pattern in NOT_RUN:
        assert fnmatch.filter(shown, pattern), f"no page shows {pattern!r} any more"
    for name in (*HUB_PAGES, *SLOW_PAGES, *GIVEN, *CHECKS):
        assert any(page.stem == name and read_blocks(page) for page in PAGES), name
    for page in PAGES:
        for line in page.read_text(encoding="utf-8").splitlines():
            # Markdown shows these as code too, and nothing would run them.
            assert not re.match(r"( {4}|\t)(\$|bd3lm|python|pip|make|git|accelerate) ", line), (page.name, line)


def test_a_block_that_is_neither_run_nor_listed_fails(tmp_path):
    for block in ("```bash\nrm -r bd3lm-demo\n```\n", "```\nbd3lm demo\n```\n", "```python\nassert False\n```\n"):
        (tmp_path / "page.md").write_text(f"# Page\n\n{block}")
        with pytest.raises(AssertionError):
            run_page(tmp_path / "page.md")


def test_the_train_command_of_the_readme_is_understood():
    (words,) = (words[1:] for words in commands(README) if words[0] == "train")
    data, model, training = train_arguments(words)
    assert (data.data, data.tokenizer, data.length) == ("my_texts/", "gpt2", 512)
    assert (model.block_size, training.output_dir) == (4, "my-model")


def test_every_link_of_the_documentation_leads_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_every_file_and_module_that_a_page_names_exists():
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for path in re.findall(r"`((?:tests|benchmarks|bd3lm_hf|modeling)/[\w./-]+)`", text):
            if path == "tests/conformance/.cache":
                # Made by the conformance tests.
                continue
            assert (ROOT / path).exists(), f"{page.name}: {path}"
        for module in re.findall(r"-m (benchmarks[\w.]+)", text):
            path = ROOT.joinpath(*module.split("."))
            assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), f"{page.name}: {module}"


def test_the_page_on_the_design_names_every_module():
    text = (DOCS / "design.md").read_text(encoding="utf-8")
    # The design says what is in them as a whole.
    apart = ("app", "cli", "modeling")
    library = [path for path in ROOT.glob("bd3lm_hf/**/[!_]*.py") if path.relative_to(ROOT).parts[1] not in apart]
    for path in [*ROOT.glob("modeling/[!_]*.py"), *library]:
        assert f"`{path.name}`" in text, path.name
