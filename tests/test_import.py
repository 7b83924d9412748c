"""After the import Transformers knows the model, nothing optional is imported, and every public name is there."""

import ast
import inspect
import pickle
import subprocess
import sys
import textwrap

import pytest
from conftest import tiny_config

import bd3lm_hf


# What the package needs only where it is used, and what it may lack.
NOT_IMPORTED = ("datasets", "gradio", "matplotlib", "peft", "evaluate", "lm_eval", "trl")
# What a program may import before.
BEFORE = ("pass", "from transformers import AutoModelForMaskedLM, pipeline")
CHECKS = """
    import tempfile
    import bd3lm_hf
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, pipelines
    sizes = dict(vocab_size=16, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, cond_dim=8, block_size=4)
    config = AutoConfig.for_model("bd3lm", **sizes)
    assert type(config) is bd3lm_hf.BD3LMConfig
    assert type(AutoModel.from_config(config)) is bd3lm_hf.BD3LMModel
    for auto in (AutoModelForMaskedLM, AutoModelForCausalLM):
        model = auto.from_config(config)
        assert type(model) is bd3lm_hf.BD3LMForMaskedLM
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        assert type(AutoModelForMaskedLM.from_pretrained(folder)) is bd3lm_hf.BD3LMForMaskedLM
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping
    assert get_checkpoint_conversion_mapping("BD3LMForMaskedLM") and get_checkpoint_conversion_mapping("BD3LMModel")
    task = pipelines.PIPELINE_REGISTRY.check_task("text-infilling")[1]
    assert task["impl"] is bd3lm_hf.TextInfillingPipeline
"""


def run_python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)


def test_importing_the_package_imports_neither_datasets_nor_anything_optional():
    code = f"import sys, bd3lm_hf; print([name for name in {NOT_IMPORTED} if name in sys.modules])"
    assert run_python(code).stdout.strip() == "[]"


@pytest.mark.parametrize("before", BEFORE)
def test_after_the_import_transformers_knows_the_model_the_pipeline_and_the_published_format(before):
    result = run_python(f"{before}\n{textwrap.dedent(CHECKS)}")
    assert "already registered" not in result.stderr


def test_a_pickled_model_is_read_by_a_process_that_has_imported_nothing(tmp_path):
    path = tmp_path / "model.pickle"
    model = bd3lm_hf.BD3LMForMaskedLM(tiny_config(block_size=4))
    path.write_bytes(pickle.dumps(model))
    written = run_python(
        f"import pickle; model = pickle.load(open({str(path)!r}, 'rb')); "
        "print(model.config.block_size, sum(value.double().sum() for value in model.state_dict().values()).item())"
    )
    block_size, total = written.stdout.split()
    assert int(block_size) == 4
    assert float(total) == sum(value.double().sum() for value in model.state_dict().values()).item()


def test_every_public_name_is_there_however_it_is_asked_for():
    names = {}
    exec("from bd3lm_hf import *", names)
    assert bd3lm_hf.__all__ == sorted(set(bd3lm_hf.__all__))
    for name in bd3lm_hf.__all__:
        assert names[name] is getattr(bd3lm_hf, name)
        assert name in dir(bd3lm_hf)
    with pytest.raises(AttributeError, match="'bd3lm_hf' has no attribute 'BD3LMForSpeech'"):
        _ = bd3lm_hf.BD3LMForSpeech


def test_what_a_type_checker_reads_is_what_is_imported():
    tree = ast.parse(inspect.getsource(bd3lm_hf))
    block = next(node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    read = {alias.name: node.module for node in block.body for alias in node.names}
    assert read == bd3lm_hf._MODULES
    eager = {alias.name for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert set(bd3lm_hf.__all__) - eager == set(read)
