"""The wheel and the source distribution install without the checkout, with all that the package reads at run time."""

import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path
from shutil import copytree, ignore_patterns

import pytest


ROOT = Path(__file__).parents[1]
# A user's first minutes, somewhere else on the disk.
FIRST_MINUTES = """
import sys
from pathlib import Path

import bd3lm_hf

installed, checkout = map(Path, sys.argv[1:])
assert installed in Path(bd3lm_hf.__file__).parents, bd3lm_hf.__file__
assert not [entry for entry in sys.path if Path(entry).resolve() == checkout], sys.path

from transformers import AutoModelForMaskedLM
from bd3lm_hf.evaluation.likelihood import NELBO_METRIC
from bd3lm_hf.hub.model_card import TEMPLATE_FILE

config = bd3lm_hf.BD3LMConfig(
    vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, cond_dim=8, block_size=4
)
model = bd3lm_hf.BD3LMForMaskedLM(config)
assert type(AutoModelForMaskedLM.from_config(config)) is type(model)
model.save_pretrained("saved")
remote = AutoModelForMaskedLM.from_pretrained("saved", trust_remote_code=True)
ids = model.dummy_inputs["input_ids"] % 31
assert remote.generate(ids[:1, :3], max_new_tokens=6).shape == (1, 9)
assert Path(NELBO_METRIC).exists() and TEMPLATE_FILE.exists()
print(*sorted(path.name for path in Path("saved").glob("*.py")))
"""
# Neither what others have put into the checkout nor what they are writing there is part of what is built.
NOT_COPIED = ignore_patterns(".*", "__pycache__", "build", "dist", "*.egg-info", "site", "bd3lm-demo", "bd3lm-trained")


def run(*command, **kwargs):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run([*map(str, command)], capture_output=True, text=True, env=environment, **kwargs)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def distributions(tmp_path_factory):
    """The source distribution, and the wheel that is built from it."""
    source = tmp_path_factory.mktemp("source") / "checkout"
    copytree(ROOT, source, ignore=NOT_COPIED, symlinks=True)
    run(sys.executable, "-m", "build", "--no-isolation", source, cwd=source.parent)
    return {path.suffix: path for path in (source / "dist").iterdir()}


# The wheel is built from the source distribution already.
@pytest.mark.parametrize("suffix", [".whl", pytest.param(".gz", marks=pytest.mark.slow)])
def test_it_installs_without_the_checkout(suffix, distributions, tmp_path):
    venv.create(tmp_path / "environment")
    python = tmp_path / "environment" / "bin" / "python"
    site_packages = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    # The dependencies are those of this environment. A path file that lies in there, such as that of an editable
    # installation, is not read from here.
    (site_packages / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    offline = ("--no-index", "--no-deps", "--no-build-isolation", "--ignore-installed")
    run(sys.executable, "-m", "pip", "--python", python, "install", *offline, distributions[suffix])

    folder = site_packages / "bd3lm_hf"
    sources = {path.relative_to(ROOT / "bd3lm_hf"): path for path in (ROOT / "bd3lm_hf").rglob("*")}
    sources |= {Path("modeling") / path.name: path for path in (ROOT / "modeling").iterdir()}
    # Python's own files come and go while other tests import.
    expected = {name for name, path in sources.items() if "__pycache__" not in name.parts and path.is_file()}
    assert {path.relative_to(folder) for path in folder.rglob("*") if path.suffix in (".py", ".md")} == expected

    written = run(python, "-c", FIRST_MINUTES, site_packages, ROOT, cwd=tmp_path).splitlines()[-1].split()
    assert "modeling_bd3lm.py" in written and set(written) <= {path.name for path in (ROOT / "modeling").iterdir()}
    assert "bd3lm train" in run(tmp_path / "environment" / "bin" / "bd3lm", "--help", cwd=tmp_path)
