"""The rooms of the package import downhill only, no two files import each other, and none is longer than 500 lines."""

import ast
from pathlib import Path
from pkgutil import resolve_name

import pytest
import torch
from conftest import tiny_config

from bd3lm_hf import BD3LMForMaskedLM


ROOT = Path(__file__).parents[1]
# Each may import itself and what comes before it. The package itself, whose files are `__init__.py` and
# `registration.py`, comes last.
ROOMS = (
    "modeling",
    "kernels",
    "decoding",
    "data",
    "noise",
    "evaluation",
    "hub",
    "training",
    "plots",
    "serving",
    "app",
    "cli",
    "package",
)
MOST_LINES = 500
SHORT_ROOTS = ("bd3lm_hf", "modeling")


def read_files(root):
    """Module -> path of all files of a checkout; `modeling/` is installed as `bd3lm_hf.modeling`."""
    files = {}
    for folder, package in (("bd3lm_hf", ("bd3lm_hf",)), ("modeling", ("bd3lm_hf", "modeling"))):
        for path in sorted((root / folder).rglob("*.py")):
            names = path.relative_to(root / folder).with_suffix("").parts
            # Where it is not installed, a link to `modeling/` lies in `bd3lm_hf/`.
            if folder == "modeling" or names[0] != "modeling":
                files[".".join((*package, *names)).removesuffix(".__init__")] = path
    return files


def room_of(module):
    """The room that a module of the package belongs to."""
    names = module.split(".")[1:]
    return names[0] if names and names[0] in ROOMS else "package"


def is_type_checking(node):
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def statements(tree):
    """All nodes but those that only a type checker reads; of such an `if` the `else` counts."""
    nodes = [tree]
    while nodes:
        node = nodes.pop()
        yield node
        nodes += node.orelse if is_type_checking(node) else ast.iter_child_nodes(node)


def imports_of(module, path, modules):
    """The modules of the package that a file imports at any place, by what they are called from its top on."""
    package = module if path.stem == "__init__" else module.rpartition(".")[0]
    for node in statements(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            source = ".".join([*above, *([node.module] if node.module else [])])
            named = [f"{source}.{alias.name}" for alias in node.names]
            targets = [name if name in modules else source for name in named]
        else:
            continue
        yield from (target for target in targets if target.split(".")[0] == "bd3lm_hf" and target != module)


def uphill_imports(root):
    """Pairs of a module and what it must not import."""
    files = read_files(root)
    return [
        (module, target)
        for module, path in files.items()
        for target in imports_of(module, path, files)
        if ROOMS.index(room_of(target)) > ROOMS.index(room_of(module))
    ]


def circles(root):
    """The modules that are imported, over however many others, by what they import."""
    files = read_files(root)
    imported = {module: {*imports_of(module, path, files)} for module, path in files.items()}

    def reached_from(module):
        reached, waiting = set(), [module]
        while waiting:
            new = imported.get(waiting.pop(), set()) - reached
            reached |= new
            waiting += new
        return reached

    return [module for module in files if module in reached_from(module)]


def long_files(root, folders):
    """The files of some folders that have too many lines."""
    paths = [path for folder in folders for path in read_files(root).values() if path.is_relative_to(root / folder)]
    return [path.name for path in paths if len(path.read_text(encoding="utf-8").splitlines()) > MOST_LINES]


def write_files(root, sources):
    for name, source in sources.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(source)


def test_rooms_import_downhill_only():
    files = read_files(ROOT)
    assert {room_of(module) for module in files} >= {*ROOMS}
    assert sum(len([*imports_of(module, path, files)]) for module, path in files.items()) > 100
    assert uphill_imports(ROOT) == []


def test_no_files_import_each_other():
    assert circles(ROOT) == []


def test_no_file_is_longer_than_500_lines():
    assert long_files(ROOT, SHORT_ROOTS) == []


@pytest.mark.parametrize(
    ("name", "source", "target"),
    [
        ("bd3lm_hf/noise/x.py", "from ..training.trainer import Trainer", "training.trainer"),
        ("bd3lm_hf/noise/x.py", "from ..training import trainer", "training.trainer"),
        ("bd3lm_hf/noise/x.py", "def f():\n    import bd3lm_hf.training.trainer", "training.trainer"),
        ("bd3lm_hf/noise/__init__.py", "from ..training.trainer import Trainer", "training.trainer"),
        ("bd3lm_hf/noise/x.py", "if not TYPE_CHECKING:\n    from ..plots import plot", "plots"),
        ("bd3lm_hf/plots.py", "from .cli.common import make_parser", "cli.common"),
        ("modeling/x_bd3lm.py", "from ..data import tables", "data.tables"),
        ("modeling/x_bd3lm.py", "from bd3lm_hf import BD3LMTrainer", ""),
    ],
)
def test_an_import_that_runs_uphill_is_found(tmp_path, name, source, target):
    rooms = {f"bd3lm_hf/{path}": "" for path in ("training/trainer.py", "data/tables.py", "cli/common.py")}
    write_files(tmp_path, {**rooms, name: source})
    ((_, found),) = uphill_imports(tmp_path)
    assert found == f"bd3lm_hf.{target}".removesuffix(".")


def test_what_runs_downhill_or_is_read_by_a_type_checker_alone_is_not_found(tmp_path):
    source = """
import os
from typing import TYPE_CHECKING
from ..modeling.x_bd3lm import X
from .sibling import Y
if TYPE_CHECKING:
    from ..training.trainer import Trainer
"""
    write_files(tmp_path, {"bd3lm_hf/noise/x.py": source, "bd3lm_hf/training/trainer.py": ""})
    assert uphill_imports(tmp_path) == []


def test_circles_and_long_files_are_found(tmp_path):
    sources = {
        "bd3lm_hf/data/a.py": "from .b import B",
        "bd3lm_hf/data/b.py": "def f():\n    from . import c",
        "bd3lm_hf/data/c.py": "from bd3lm_hf.data.a import A",
        "bd3lm_hf/data/long.py": "from .a import A\n" + "\n" * MOST_LINES,
        "modeling/long_bd3lm.py": "\n" * (MOST_LINES + 1),
    }
    write_files(tmp_path, sources)
    assert circles(tmp_path) == [f"bd3lm_hf.data.{name}" for name in "abc"]
    assert long_files(tmp_path, ["bd3lm_hf"]) == ["long.py"]
    assert long_files(tmp_path, ["bd3lm_hf", "modeling"]) == ["long.py", "long_bd3lm.py"]


def equations():
    """The names in the table of docs/concepts.md that leads from equations to functions."""
    page = (ROOT / "docs" / "concepts.md").read_text(encoding="utf-8")
    rows = [line for line in page.partition("## From equations")[2].splitlines() if line.startswith("| arXiv")]
    return [row.split("`")[1] for row in rows]


def test_the_table_of_equations_names_functions_that_exist():
    names = equations()
    assert len(names) > 10 and "bd3lm_hf.modeling.diffusion_block_diffusion.forward_process" in names
    for name in names:
        assert callable(resolve_name(name)), name
    with pytest.raises((ImportError, AttributeError)):
        resolve_name("bd3lm_hf.modeling.diffusion_block_diffusion.no_such_function")


# What makes a processor fast has a room of its own, and messages alone speak of the package.
FOREIGN_TO_MODELING = ("mkldnn", "autograd.Function", "torch.compiler.disable", "untyped_storage", "from bd3lm_hf")
# The published network with all that every network shares, and what makes a network of a stock model.
MOST_LINES_OF_MODELING, MOST_LINES_OF_ADAPTED = 3500, 440


def test_modeling_is_short_and_plain():
    sources = {path.name: path.read_text(encoding="utf-8") for path in ROOT.glob("modeling/*.py")}
    lengths = {name: len(source.splitlines()) for name, source in sources.items()}
    adapted = sum(length for name, length in lengths.items() if name.endswith("_causal_lm.py"))
    assert sum(lengths.values()) - adapted <= MOST_LINES_OF_MODELING and adapted <= MOST_LINES_OF_ADAPTED
    for name, source in sources.items():
        assert not [word for word in FOREIGN_TO_MODELING if word in source], name


@pytest.mark.parametrize("adaln", [True, False])
def test_every_projection_is_exactly_a_linear_layer(adaln):
    # As quantizers look for them.
    model = BD3LMForMaskedLM(tiny_config(adaln=adaln))
    matrices = {name for name, parameter in model.named_parameters() if parameter.dim() == 2}
    linear = {f"{name}.weight" for name, module in model.named_modules() if type(module) is torch.nn.Linear}
    assert matrices - linear == {"model.embed_tokens.weight"}
    assert len(linear) == 2 * 6 + 1 + (2 + 2 + 1 if adaln else 0)
