"""
Registration with the Auto classes, the pipelines and the formats of checkpoints, when Transformers imports these.

`AutoModel.register` and its kind take classes, and a class of a model takes seconds to import; so does the module that
`AutoModel` stands in. What `import bd3lm_hf` leaves behind is therefore a finder on `sys.meta_path`, which registers
right after Transformers has imported what there is to register with, and goes once everything is registered.
"""

import importlib
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def _register_config() -> None:
    from transformers import AutoConfig

    from .modeling.configuration_bd3lm import BD3LMConfig

    AutoConfig.register(BD3LMConfig.model_type, BD3LMConfig)


def _register_models() -> None:
    from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM

    from .modeling.modeling_bd3lm import BD3LMConfig, BD3LMForMaskedLM, BD3LMModel

    AutoModel.register(BD3LMConfig, BD3LMModel)
    AutoModelForMaskedLM.register(BD3LMConfig, BD3LMForMaskedLM)
    AutoModelForCausalLM.register(BD3LMConfig, BD3LMForMaskedLM)


def _register_published_format() -> None:
    # Without it `from_pretrained` knows our own names of the weights alone.
    from .conversion import register_published_format

    register_published_format()


def _register_pipeline() -> None:
    from transformers import AutoModelForMaskedLM
    from transformers.pipelines import PIPELINE_REGISTRY

    from .modeling.infilling_block_diffusion import TEXT_INFILLING, TextInfillingPipeline

    # Two threads may come here at once, and Transformers warns of a name that is registered again.
    if TEXT_INFILLING not in PIPELINE_REGISTRY.get_supported_tasks():
        PIPELINE_REGISTRY.register_pipeline(
            TEXT_INFILLING, TextInfillingPipeline, pt_model=AutoModelForMaskedLM, type="text"
        )


# The module that holds a register, and what enters our classes there.
_PENDING: dict[str, Callable[[], None]] = {
    "transformers.models.auto.configuration_auto": _register_config,
    "transformers.models.auto.modeling_auto": _register_models,
    "transformers.conversion_mapping": _register_published_format,
    "transformers.pipelines": _register_pipeline,
}

# The threads that are inside an import of Transformers or of this package. (A `threading.local` could not be pickled,
# and `datasets` pickles a package that lies in a checkout when it hashes a function which uses it.)
_IMPORTING: set[int] = set()


@contextmanager
def _outermost_import() -> Iterator[None]:
    _IMPORTING.add(threading.get_ident())
    try:
        yield
    finally:
        _IMPORTING.discard(threading.get_ident())


def _register_imported() -> None:
    """Registers with every register that has been imported so far."""
    # To register may import another register.
    while imported := {name: register for name, register in [*_PENDING.items()] if name in sys.modules}:
        for name, register in imported.items():
            # Waits for another thread that is still importing it.
            importlib.import_module(name)
            register()
            _PENDING.pop(name, None)
    if not _PENDING and _FINDER in sys.meta_path:
        # A new list: other threads may be going through the old one, and would miss the finder behind a removed one.
        sys.meta_path = [finder for finder in sys.meta_path if finder is not _FINDER]


class _RegisteringLoader(Loader):
    """A loader that registers after it has executed a module; in everything else it is the loader it stands for."""

    def __init__(self, spec: ModuleSpec):
        self._spec = spec
        self._loader = spec.loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._spec.loader = self._loader
        if getattr(module, "__loader__", None) is self:
            module.__loader__ = self._loader
        with _outermost_import():
            self._loader.exec_module(module)
        # What our classes need may be in the hands of a thread that waits for this module: the last one registers.
        if _IMPORTING:
            return
        with _outermost_import():
            try:
                _register_imported()
            except (ImportError, RuntimeError):
                # Another thread has come meanwhile, and Python found out (by a RuntimeError) that each waits for the
                # other, or gave one of them a half imported module. That thread registers when it is done.
                if _IMPORTING == {threading.get_ident()}:
                    raise

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)


class _RegisteringFinder(MetaPathFinder):
    """
    Finds the modules of Transformers and of this package as the other finders do, and lets them load so that the
    outermost of nested imports registers: before it ends, the modules that our classes need may be half imported.
    """

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if threading.get_ident() in _IMPORTING or fullname.partition(".")[0] not in ("transformers", __package__):
            return None
        others = [finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec")]
        spec = next(filter(None, (finder.find_spec(fullname, path, target) for finder in others)), None)
        if spec is not None and hasattr(spec.loader, "exec_module"):
            spec.loader = _RegisteringLoader(spec)
        return spec


_FINDER = _RegisteringFinder()


def register_with_transformers() -> None:
    """
    Makes the classes of this package known to `AutoConfig`, `AutoModel`, `AutoModelForMaskedLM`,
    `AutoModelForCausalLM` and `pipeline`, and the published format to `from_pretrained`: now where Transformers has
    imported these, else as soon as it does.
    """
    if _PENDING and _FINDER not in sys.meta_path:
        sys.meta_path.insert(0, _FINDER)
    with _outermost_import():
        _register_imported()
