"""What is public says what it takes, what it gives, in which shapes, and what it raises."""

import ast
import importlib
import inspect
import re
import textwrap
from dataclasses import is_dataclass
from functools import cache
from pathlib import Path

import pytest
from pages import DOCS

import bd3lm_hf
from bd3lm_hf.evaluation.harness import BD3LMHarness


PACKAGE = Path(bd3lm_hf.__file__).parent
MODULES = sorted(
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
    for folder in (PACKAGE, PACKAGE / "modeling")
    for path in folder.rglob("*.py")
    if path.stem != "__main__"
)
# Imported where Ray is.
OF_RAY = ("bd3lm_hf.serving.ray_data", "bd3lm_hf.serving.ray_serve")
# Where what the pages of the API describe is defined.
PATHS = [path for page in (DOCS / "api").glob("*.md") for path in re.findall(r"^::: (\S+)", page.read_text(), re.M)]
DEFINED_IN = {name: module for module, _, name in (path.rpartition(".") for path in PATHS)}
PUBLIC = {name: getattr(importlib.import_module(module), name) for name, module in DEFINED_IN.items()}
PUBLIC |= {name: getattr(bd3lm_hf, name) for name in bd3lm_hf.__all__} | {"BD3LMHarness": BD3LMHarness}
# Brackets around names, numbers and their products: [batch, length], [2 * length], [B].
SHAPE = re.compile(r"\[(?:[A-Za-z0-9_.]+(?: [-+*x/] [A-Za-z0-9_.]+)*(?: or |, | )?)+\]")


def is_ours(thing):
    return getattr(thing, "__module__", None) is not None and thing.__module__.startswith("bd3lm_hf")


def sections(docstring):
    """The text of a docstring by its section; what stands before the first has the name ''."""
    parts = re.split(r"^(Args|Attributes|Returns|Raises|Yields):$", docstring, flags=re.MULTILINE)
    return {"": parts[0], **dict(zip(parts[1::2], parts[2::2]))}


def is_documented(parameter, docstring):
    """Whether Args (or, of a class, Attributes) have an entry for it, or the text calls it by its name."""
    parts = sections(docstring)
    entries = parts.get("Args", "") + parts.get("Attributes", "")
    named = {
        name
        for line in re.findall(r"^ {4}((?:\*{0,2}\w+(?:, )?)+)(?: \(.*?\))?:", entries, re.M)
        for name in line.split(", ")
    }
    return parameter in named or re.search(rf"`[^`\n]*\b{parameter}\b[^`\n]*`", parts[""]) is not None


@cache
def raised_errors(function):
    """The errors that a function raises itself, those of functions inside it aside."""
    found, nodes = [], [*ast.parse(textwrap.dedent(inspect.getsource(function))).body[0].body]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.Raise) and node.exc is not None:
            found.append(ast.unparse(node.exc.func if isinstance(node.exc, ast.Call) else node.exc))
        if not isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            nodes += ast.iter_child_nodes(node)
    return found


def lacks_of_function(function, docstring, overridden=None):
    """
    What the docstring of a function, or the class's for `__init__`, leaves unsaid.

    What a method takes and gives as the one of Transformers or torch that it overrides stands in the docstring there.
    """
    signature = inspect.signature(function)
    known = set(inspect.signature(overridden).parameters) if overridden else set()
    new = [parameter for parameter in signature.parameters.values() if parameter.name not in {"self", "cls", *known}]
    if overridden:
        new = [
            parameter for parameter in new if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        ]
    lacks = [f"the parameter {item.name}" for item in new if not is_documented(item.name, docstring)]
    lacks += [f"that it raises {error}" for error in raised_errors(function) if error not in docstring]
    annotations = [parameter.annotation for parameter in new]
    annotations += [] if overridden else [signature.return_annotation]
    if any("Tensor" in str(annotation) for annotation in annotations) and not SHAPE.search(docstring):
        lacks.append("shapes")
    return lacks


def lacks_of_class(cls):
    docstring = inspect.cleandoc(vars(cls).get("__doc__") or "")
    # Dataclasses write one for themselves.
    if not docstring or docstring.startswith(f"{cls.__name__}("):
        yield cls.__name__, "a docstring"
    if is_dataclass(cls):
        for name in vars(cls).get("__annotations__", {}):
            if not name.startswith("_") and not is_documented(name, docstring):
                yield cls.__name__, f"the field {name}"
    for name, member in vars(cls).items():
        function = inspect.unwrap(getattr(member, "fget", None) or getattr(member, "__func__", member))
        if not inspect.isfunction(function) or not is_ours(function) or function.__qualname__.count("<"):
            continue
        if name == "__init__" and not is_dataclass(cls):
            yield from ((f"{cls.__name__}.{name}", lack) for lack in lacks_of_function(function, docstring))
        elif not name.startswith("_") or name == "__call__":
            inherited = [vars(base)[name] for base in cls.__mro__[1:] if name in vars(base)]
            overridden = next((getattr(base, "__func__", base) for base in inherited if not is_ours(base)), None)
            text = inspect.cleandoc(function.__doc__ or "")
            if not text and inherited:
                text = inspect.getdoc(inherited[0]) or ""
            if not text:
                yield f"{cls.__name__}.{name}", "a docstring"
            elif inspect.isfunction(overridden) or overridden is None:
                yield from ((f"{cls.__name__}.{name}", lack) for lack in lacks_of_function(function, text, overridden))


def lacks_of(name, thing):
    """Pairs of a name and what its docstring lacks."""
    if inspect.isclass(thing):
        return list(lacks_of_class(thing))
    docstring = inspect.getdoc(thing) or ""
    return [(name, lack) for lack in (lacks_of_function(thing, docstring) if docstring else ["a docstring"])]


def report(lacks):
    return "\n".join(f"{name} lacks {lack}" for name, lack in lacks)


def test_public_functions_and_classes_say_what_they_take_give_and_raise():
    lacks = [
        lack
        for name, thing in PUBLIC.items()
        if inspect.isclass(thing) or inspect.isfunction(thing)
        for lack in lacks_of(name, thing)
    ]
    assert not lacks, report(lacks)


def test_public_constants_say_what_they_are():
    unsaid = []
    for name, thing in PUBLIC.items():
        if inspect.isclass(thing) or inspect.isfunction(thing):
            continue
        lines = inspect.getsource(importlib.import_module(DEFINED_IN[name])).splitlines()
        index = next(index for index, line in enumerate(lines) if re.match(rf"{name}\b.* = ", line))
        if not lines[index - 1].startswith("# "):
            unsaid.append(name)
    assert not unsaid


@pytest.mark.parametrize("name", MODULES)
def test_modules_and_what_stands_open_in_them_say_what_they_are_for(name):
    if name in OF_RAY:
        pytest.importorskip("ray", reason="needs Ray: pip install 'bd3lm-hf[ray]'")
    module = importlib.import_module(name)
    unsaid = [] if module.__doc__ else [name]
    things = [
        thing
        for key, thing in vars(module).items()
        if not key.startswith("_")
        and getattr(thing, "__module__", None) == name
        and (inspect.isclass(thing) or inspect.isfunction(thing))
    ]
    for thing in things:
        if not thing.__doc__ or thing.__doc__.startswith(f"{thing.__name__}("):
            unsaid.append(thing.__qualname__)
    assert not unsaid


def example(x_t, steps, seed=None):
    """
    Docstring of an example.

    Args:
        x_t: Ids.
        steps, others: How many.
    """
    if steps < 1:
        raise ValueError("steps")


def test_what_is_unsaid_is_found():
    example.__annotations__["x_t"] = "torch.Tensor"
    assert lacks_of("example", example) == [
        ("example", "the parameter seed"),
        ("example", "that it raises ValueError"),
        ("example", "shapes"),
    ]
