"""The code blocks of the documentation run, its links lead somewhere, and the import stays light."""

import contextlib
import io
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import randomize

from bd3lm_hf import BD3LMConfig, BD3LMForMaskedLM, load_documents, train_tokenizer
from bd3lm_hf.cli import main
from bd3lm_hf.cli.train import train_arguments


README = Path(__file__).parents[1] / "README.md"


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


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
    code = "\n".join(blocks("python"))
    namespace = {"__name__": "readme"}
    with contextlib.redirect_stdout(io.StringIO()):
        exec(compile(code, "README.md", "exec"), namespace)
    assert namespace["loss"].item() > 0
    assert namespace["fast"].tokens_per_forward.item() > 1
    assert (folder / "my-model" / "modeling_bd3lm.py").exists()


@pytest.mark.parametrize("command", ["evaluate", "generate"])
def test_the_commands_of_the_readme_run(folder, monkeypatch, capsys, command):
    monkeypatch.chdir(folder)
    lines = [shlex.split(line) for block in blocks("bash") for line in block.splitlines()]
    chosen = [words[1:] for words in lines if words[:2] == ["bd3lm", command]]
    assert chosen
    for words in chosen:
        assert main(words) in (0, None)
        assert capsys.readouterr().out.strip()


def test_the_train_command_of_the_readme_is_understood():
    lines = [shlex.split(line) for block in blocks("bash") for line in block.splitlines()]
    (words,) = (words[2:] for words in lines if words[:2] == ["bd3lm", "train"])
    data, model, training = train_arguments(words)[:3]
    assert (data.data, data.tokenizer, data.length) == ("my_texts/", "gpt2", 512)
    assert (model.block_size, training.output_dir) == (4, "my-model")


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
