"""Importing the package is light, whatever is imported first is registered, and no name is lost by it."""

import ast
import inspect
import pickle
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from conftest import tiny_config

import bd3lm_hf


PACKAGE = Path(bd3lm_hf.__file__).parent

# What a program may import first.
ORDERS = {
    "package, auto classes one by one": """
        import bd3lm_hf
        from transformers import AutoConfig
        assert AutoConfig.for_model("bd3lm").model_type == "bd3lm"
        assert "transformers.modeling_utils" not in sys.modules
        from transformers import AutoModel
    """,
    "package, pipelines": "import bd3lm_hf; from transformers import pipeline",
    "package, what imports the auto classes in passing": "import bd3lm_hf; from transformers import Trainer",
    "the model, whose class alone is used": """
        from bd3lm_hf import BD3LMForMaskedLM
        from transformers.conversion_mapping import get_checkpoint_conversion_mapping
        assert get_checkpoint_conversion_mapping("BD3LMForMaskedLM")
    """,
    "auto classes, package": "from transformers import AutoModelForMaskedLM; import bd3lm_hf",
    "pipelines, package": "from transformers import pipeline; import bd3lm_hf",
    "an import that fails": """
        import bd3lm_hf
        sys.modules["lm_eval"] = None
        try:
            import bd3lm_hf.harness
        except ImportError:
            pass
        else:
            raise AssertionError("the harness needs lm_eval")
    """,
}
CHECKS = """
    import tempfile
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
    assert pipelines.PIPELINE_REGISTRY.get_supported_tasks().count("text-infilling") == 1
    assert not [finder for finder in sys.meta_path if type(finder).__module__.startswith("bd3lm_hf")]
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] in ("transformers", "bd3lm_hf"):
            for loader in (getattr(module.__spec__, "loader", None), getattr(module, "__loader__", None)):
                assert not type(loader).__module__.startswith("bd3lm_hf"), name
"""
# Threads that begin at once with what imports one another's modules.
THREADS = """
import sys, threading, traceback
import transformers, bd3lm_hf

statements = [
    "from transformers import AutoModel",
    "from transformers import pipeline",
    "from transformers import Trainer",
    "from bd3lm_hf import BD3LMForMaskedLM",
]
start, errors = threading.Barrier(len(statements)), []

def run(statement):
    start.wait(60)
    try:
        exec(statement, {})
    except BaseException:
        errors.append(f"{statement}: {traceback.format_exc()}")

threads = [threading.Thread(target=run, args=[statement], daemon=True) for statement in statements]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join(120)
assert not errors, "".join(errors)
assert not any(thread.is_alive() for thread in threads)
"""
# Each order runs in a fork of a process that has imported what is slow and neither Transformers nor this package.
FORKS = """
import os, sys, traceback
import torch, torch._dynamo, torch.distributed.checkpoint, torch.distributed.tensor, torch.export
assert "transformers" not in sys.modules
for name, code in {orders!r}.items():
    if os.fork() == 0:
        status = 1
        try:
            exec(code, {{"sys": sys}})
            status = 0
        except BaseException:
            print(f"--- {{name}}", file=sys.stderr)
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)
    if os.wait()[1] == 0:
        print(name)
"""


def run_python(code):
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return result.stdout


def imported_by(statement):
    """The modules that a fresh interpreter holds after a statement."""
    return set(run_python(f"import sys; {statement}; print(*sys.modules)").split())


def test_the_import_brings_no_package_but_this_one():
    modules = imported_by("import bd3lm_hf") - imported_by("pass")
    packages = {name.partition(".")[0] for name in modules}
    assert packages - sys.stdlib_module_names == {"bd3lm_hf"}
    assert {name for name in modules if name.startswith("bd3lm_hf")} == {"bd3lm_hf", "bd3lm_hf.registration"}


def test_the_import_adds_nothing_to_torch_and_transformers():
    added = imported_by("import torch, transformers, bd3lm_hf") - imported_by("import torch, transformers")
    assert added == {"bd3lm_hf", "bd3lm_hf.registration"}


def test_the_import_takes_no_longer_than_that_of_torch_and_transformers():
    def seconds(statement):
        start = time.perf_counter()
        run_python(statement)
        return time.perf_counter() - start

    times = [(seconds("import torch, transformers"), seconds("import bd3lm_hf")) for _ in range(2)]
    reference, own = map(min, zip(*times))
    assert own <= 1.3 * reference


def test_the_classes_are_registered_in_whatever_order_things_are_imported():
    checks = "import bd3lm_hf\n" + textwrap.dedent(CHECKS)
    orders = {name: f"{textwrap.dedent(code)}\n{checks}" for name, code in ORDERS.items()}
    result = subprocess.run(
        [sys.executable, "-c", FORKS.format(orders=orders)], capture_output=True, text=True, check=True
    )
    assert result.stdout.splitlines() == list(ORDERS), result.stderr
    assert "already registered" not in result.stderr


def test_threads_may_import_at_once():
    code = THREADS + textwrap.dedent(CHECKS)
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr


def test_a_pickled_model_is_read_by_a_process_that_has_imported_nothing(tmp_path):
    path = tmp_path / "model.pickle"
    model = bd3lm_hf.BD3LMForMaskedLM(tiny_config(block_size=4))
    path.write_bytes(pickle.dumps(model))
    total = run_python(
        f"import pickle; model = pickle.load(open({str(path)!r}, 'rb')); "
        "print(model.config.block_size, sum(value.double().sum() for value in model.state_dict().values()).item())"
    )
    block_size, total = total.split()
    assert int(block_size) == 4
    assert float(total) == sum(value.double().sum() for value in model.state_dict().values()).item()


def test_every_public_name_is_there_however_it_is_asked_for():
    names = {}
    exec("from bd3lm_hf import *", names)
    assert bd3lm_hf.__all__ == sorted(set(bd3lm_hf.__all__))
    for name in bd3lm_hf.__all__:
        assert names[name] is getattr(bd3lm_hf, name)
        assert name in dir(bd3lm_hf)


def test_what_a_type_checker_reads_is_what_is_imported():
    tree = ast.parse(inspect.getsource(bd3lm_hf))
    block = next(node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    read = {alias.name: node.module for node in block.body for alias in node.names}
    assert read == bd3lm_hf._MODULES
    assert sorted(read) == sorted(bd3lm_hf.__all__)


def test_modules_are_attributes_and_other_names_are_not():
    for path in PACKAGE.glob("*.py"):
        if path.stem not in ("__init__", "harness"):
            assert inspect.ismodule(getattr(bd3lm_hf, path.stem))
    assert bd3lm_hf.modeling.modeling_bd3lm.BD3LMModel is bd3lm_hf.BD3LMModel
    with pytest.raises(AttributeError, match="'bd3lm_hf' has no attribute 'BD3LMForSpeech'"):
        _ = bd3lm_hf.BD3LMForSpeech
