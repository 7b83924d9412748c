"""The code blocks of the documentation run, its links lead somewhere, and the import stays light."""

import contextlib
import io
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
from conftest import randomize
from transformers import GPT2Config, GPT2LMHeadModel

from bd3lm_hf import SAMPLERS, BD3LMConfig, BD3LMForMaskedLM, load_documents, load_tokenizer, train_tokenizer
from bd3lm_hf.cli import main
from bd3lm_hf.cli.train import train_arguments


README = Path(__file__).parents[1] / "README.md"
TRAINING = README.parent / "docs" / "training.md"
GENERATION = README.parent / "docs" / "generation.md"
EVALUATION = README.parent / "docs" / "evaluation.md"
# What the commands of docs/training.md are given in the place of their sizes.
TINY = {
    "--vocab_size": ["300"],
    "--length": ["32"],
    "--hidden_size": ["32"],
    "--num_hidden_layers": ["1"],
    "--max_steps": ["4"],
    "--eval_steps": ["2"],
    "--save_steps": ["2"],
    "--max_eval_sequences": ["8"],
    "--max_new_tokens": ["8"],
    "--block_size_schedule": ["0:32", "2:4"],
}


def blocks(language, page=README):
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def commands(page):
    """The words of each `bd3lm` command of a page."""
    lines = [shlex.split(line) for block in blocks("bash", page) for line in block.splitlines()]
    return [words[1:] for words in lines if words[:1] == ["bd3lm"]]


def run_python(page):
    """Runs the Python of a page from top to bottom, and returns its names."""
    namespace = {"__name__": page.stem}
    with contextlib.redirect_stdout(io.StringIO()):
        exec(compile("\n".join(blocks("python", page)), page.name, "exec"), namespace)
    return namespace


def tiny(words):
    """A command at a tiny size: only flags that it has are changed."""
    changed, values = [], iter(words)
    flag = None
    for word in values:
        if word.startswith("--"):
            flag = word
            changed += [word, *TINY.get(word, [])]
        elif flag == "--block_size" and word == "128":
            changed.append("32")
        elif flag not in TINY:
            changed.append(word)
    return changed


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder in which `bd3lm-demo` holds a tiny model and its tokenizer, and `README.md` some text."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "README.md").write_text(README.read_text(encoding="utf-8"), encoding="utf-8")
    tokenizer = train_tokenizer(load_documents(str(folder / "README.md")), vocab_size=300)
    config = BD3LMConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        block_size=4,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    randomize(BD3LMForMaskedLM(config)).save_pretrained(folder / "bd3lm-demo")
    tokenizer.save_pretrained(folder / "bd3lm-demo")
    return folder


def test_the_python_of_the_readme_runs_from_top_to_bottom(folder, monkeypatch):
    monkeypatch.chdir(folder)
    namespace = run_python(README)
    assert namespace["loss"].item() > 0
    assert namespace["fast"].tokens_per_forward.item() > 1
    assert (folder / "my-model" / "modeling_bd3lm.py").exists()


@pytest.mark.parametrize("command", ["evaluate", "generate"])
def test_the_commands_of_the_readme_run(folder, monkeypatch, capsys, command):
    monkeypatch.chdir(folder)
    chosen = [words for words in commands(README) if words[0] == command]
    assert chosen
    for words in chosen:
        assert main(words) in (0, None)
        assert capsys.readouterr().out.strip()


def test_the_train_command_of_the_readme_is_understood():
    (words,) = (words[1:] for words in commands(README) if words[0] == "train")
    data, model, training = train_arguments(words)
    assert (data.data, data.tokenizer, data.length) == ("my_texts/", "gpt2", 512)
    assert (model.block_size, training.output_dir) == (4, "my-model")


def test_the_python_of_the_page_on_generation_runs_from_top_to_bottom(folder, monkeypatch):
    monkeypatch.chdir(folder)
    # The page names a sampler of its own, which other tests must not meet.
    with mock.patch.dict(SAMPLERS):
        namespace = run_python(GENERATION)
    assert tuple(namespace["output"].reveal_steps.shape) == tuple(namespace["output"].sequences.shape)


def test_the_page_on_training_runs_from_top_to_bottom(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("corpus.txt").write_text(README.read_text(encoding="utf-8") * 4, encoding="utf-8")
    with open("examples.jsonl", "w", encoding="utf-8") as file:
        for number in range(100):
            print(json.dumps({"prompt": f"{number} and 1 are ", "completion": str(number + 1)}), file=file)
    for words in commands(TRAINING):
        if "--resume_from_checkpoint" in words:
            # What a run leaves that was killed while it wrote its last checkpoint.
            Path("my-model", "checkpoint-4", "trainer_state.json").unlink()
        assert main(tiny(words)) in (0, None)
        printed = capsys.readouterr().out
        if "block_size" in words and "--model" in words:
            assert "block size 32 -> 4" in printed
    assert json.loads(Path("my-model", "trainer_state.json").read_text())["global_step"] == 4
    block_sizes = {
        name: BD3LMConfig.from_pretrained(name).block_size for name in ("pretrained", "blocks-of-4", "one-run")
    }
    assert block_sizes == {"pretrained": 32, "blocks-of-4": 4, "one-run": 4}
    assert Path("my-adapter", "adapter_model.safetensors").is_file()
    namespace = run_python(TRAINING)
    assert namespace["trainer"].state.global_step == 20


def test_the_page_on_evaluation_runs_from_top_to_bottom(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    tokenizer = load_tokenizer(folder / "bd3lm-demo")
    config = BD3LMConfig.from_pretrained(folder / "bd3lm-demo", max_position_embeddings=128)
    randomize(BD3LMForMaskedLM(config)).save_pretrained("my-model")
    GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=1)).save_pretrained("my-gpt2")
    for name in ("my-model", "my-gpt2"):
        tokenizer.save_pretrained(name)
    text = README.read_text(encoding="utf-8")
    Path("corpus.txt").write_text(text[:800], encoding="utf-8")
    Path("wiki.test.tokens").write_text(text[:800], encoding="utf-8")
    Path("documents.jsonl").write_text("".join(json.dumps({"text": part}) + "\n" for part in (text[:300], "Once")))
    for words in commands(EVALUATION):
        assert main(words) in (0, None)
        assert "nats per token" in capsys.readouterr().out
    assert json.loads(Path("likelihood.json").read_text())["estimator"] == "exact"
    assert run_python(EVALUATION)["likelihood"].window == 128


def test_every_link_of_the_documentation_leads_somewhere():
    for page in (README, *README.parent.glob("docs/*.md")):
        for target in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_every_make_target_of_the_readme_exists():
    makefile = (README.parent / "Makefile").read_text(encoding="utf-8")
    lines = [line.split() for block in blocks("bash") for line in block.splitlines()]
    targets = {words[1] for words in lines if words[0] == "make"}
    assert {"demo", "test", "lint", "conformance"} <= targets
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_importing_the_package_imports_neither_datasets_nor_anything_optional():
    code = "import sys, bd3lm_hf; print([name for name in ('datasets', 'peft', 'evaluate') if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
