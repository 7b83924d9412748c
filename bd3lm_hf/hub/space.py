"""A folder that can be uploaded as a Space: the page of `bd3lm app`, with a model and all that it needs."""

import importlib.metadata
import re
import shutil
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..data.replacing import check_folder, replaced_folder


# The page's modules, and the name of their folder in a Space.
PAGE = Path(__file__).parents[1] / "app"
PAGE_IN_SPACE = "denoising_page"
# What of this package's requirements the page has; gradio comes with the Space.
REQUIRED = ("torch", "transformers", "numpy", "safetensors")

APP = f'''"""A block diffusion language model at work: this Space holds the model, its code and the page."""

from pathlib import Path

from transformers import pipeline

from {PAGE_IN_SPACE} import launch_options, make_page


NAME = {{name!r}}
# The code that comes with the model, in the same folder.
filler = pipeline("text-infilling", model=str(Path(__file__).with_name("model")), trust_remote_code=True)
demo = make_page(filler, NAME)

if __name__ == "__main__":
    demo.launch(**launch_options())
'''

README = """\
---
title: {title}
emoji: 🧩
colorFrom: indigo
colorTo: green
sdk: gradio
sdk_version: {sdk_version}
app_file: app.py
pinned: false
---

# {name}

Watch a block diffusion language model (arXiv 2503.09573) write: each token is coloured by the forward that revealed it
and by how probable it was then. Continue a prompt or fill the gaps of a text, switch the sampler and its steps, and
read off tokens per forward and perplexity.

The model stands in `model/`, with the code that loads it; the page in `{page}/`. To run it elsewhere:

```bash
pip install gradio=={sdk_version} -r requirements.txt
python app.py
```
"""

ATTRIBUTES = "*.safetensors filter=lfs diff=lfs merge=lfs -text\n"


def write_space(
    folder: str | Path, model: Any, tokenizer: PreTrainedTokenizerBase, *, name: str, overwrite: bool = False
) -> None:
    """
    Writes a Space that needs nothing of this package: model, tokenizer and their code, the page, and what to install.

    Args:
        folder: a new or an empty folder. An interruption leaves what was there, or the whole Space.
        model: a `BD3LMForMaskedLM`.
        tokenizer: its tokenizer.
        name: of the model, for the title.
        overwrite: take the place of a Space in `folder`, or of a file. What else lies there, such as `.git`, stays.

    Raises:
        ValueError: the folder holds something, or is a file.
        ImportError: gradio, whose version the Space is to run, is missing.
    """
    check_folder("folder", folder, overwrite)
    try:
        sdk_version = importlib.metadata.version("gradio")
    except importlib.metadata.PackageNotFoundError as error:
        raise ImportError("A Space needs gradio: pip install 'bd3lm-hf[app]'") from error
    # YAML would read some names as something else.
    title = "'" + name.replace("'", "''") + "'"
    files = {
        "app.py": APP.format(name=name),
        "requirements.txt": "".join(f"{requirement}\n" for requirement in requirements()),
        "README.md": README.format(name=name, title=title, sdk_version=sdk_version, page=PAGE_IN_SPACE),
        ".gitattributes": ATTRIBUTES,
    }
    with replaced_folder("folder", folder, overwrite=overwrite) as new:
        for part in (model, tokenizer):
            part.save_pretrained(new / "model")
        shutil.copytree(PAGE, new / PAGE_IN_SPACE, ignore=shutil.ignore_patterns("__pycache__"))
        for path, text in files.items():
            (new / path).write_text(text, encoding="utf-8")


def requirements() -> list[str]:
    """Those of this package that the page and the model's code have too."""
    stated = importlib.metadata.requires("bd3lm-hf") or []
    return [requirement for requirement in stated if re.split(r"[^\w.-]", requirement, maxsplit=1)[0] in REQUIRED]
