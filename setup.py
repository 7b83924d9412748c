from pathlib import Path

from setuptools import setup


PEFT = ["peft>=0.18"]
# Its trainer is subclassed: older ones build the labels elsewhere, and version 2 takes arguments away.
TRL = ["trl>=1.16,<2"]
EVAL = ["evaluate>=0.4"]
PLOTS = ["matplotlib>=3.9"]
APP = ["gradio>=6.31"]
SERVE = ["fastapi>=0.115", "uvicorn>=0.30", "pydantic>=2.8", "prometheus-client>=0.21", "greenlet>=3.1"]
RAY = ["ray[data,serve]>=2.60"]
LM_EVAL = ["lm-eval>=0.4.13"]
# Downloads of 41, 3, 0.2 and 0.1 MB on Linux.
QUANTIZERS = ["bitsandbytes>=0.50", "torchao>=0.18", "optimum-quanto>=0.2.7", "hqq>=0.2.8"]
# MkDocs 2 takes neither this theme nor these plugins. Ruff formats the signatures.
DOCS = ["mkdocs>=1.6,<2", "mkdocs-material>=9.5,<10", "mkdocstrings[python]>=1,<2", "ruff>=0.14"]

# The folders of `bd3lm_hf/`, in the order in which they may import each other.
ROOMS = ("kernels", "decoding", "data", "noise", "evaluation", "hub", "training", "serving", "app", "cli")

setup(
    name="bd3lm-hf",
    version="0.2.0",
    description="Block diffusion language models (BD3-LMs) for Hugging Face Transformers",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    keywords=["block diffusion", "discrete diffusion", "language model", "transformers"],
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Operating System :: OS Independent",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    packages=["bd3lm_hf", *(f"bd3lm_hf.{room}" for room in ROOMS), "bd3lm_hf.modeling"],
    py_modules=["bd3lm_command"],
    # The folder that travels to the Hub stays visible as one folder of the repository.
    package_dir={"bd3lm_hf": "bd3lm_hf", "bd3lm_hf.modeling": "modeling"},
    # `evaluate.load` reads the metrics as files.
    package_data={"bd3lm_hf.evaluation": ["metrics/*/*.py"], "bd3lm_hf.hub": ["model_card_template.md"]},
    python_requires=">=3.10",
    install_requires=[
        "torch>=2.11",
        "transformers>=5.17",
        "accelerate>=1.10",
        "datasets>=4.0",
        "huggingface_hub>=1.0",
        "jinja2>=3.1",
        "numpy",
        "safetensors>=0.6",
        "tokenizers>=0.22",
        "tqdm>=4.66",
    ],
    extras_require={
        "peft": PEFT,
        "trl": TRL,
        "eval": EVAL,
        "lm-eval": LM_EVAL,
        "plots": PLOTS,
        "app": APP,
        "serve": SERVE,
        "ray": [*SERVE, *RAY],
        "quantizers": QUANTIZERS,
        "docs": DOCS,
        # What `make adapt-demo` takes: its source is a .gguf file, its report has a plot.
        "gguf": ["gguf>=0.19", *PLOTS],
        "flash-attn": ["flash-attn>=2.7"],
        "dev": [
            "build>=1.2",
            "parameterized>=0.9",
            "pytest>=8",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.6",
            "ruff>=0.14",
            "selenium>=4.40",
            # As pyproject.toml asks for: the tests build without isolation.
            "setuptools>=77",
            *PEFT,
            *TRL,
            *EVAL,
            *PLOTS,
            *APP,
            *SERVE,
            # Clients that the tests of the server ask with.
            "httpx>=0.27",
            "openai>=1.60",
            # lm-evaluation-harness asks servers with it.
            "tenacity>=8",
            *LM_EVAL,
            *QUANTIZERS,
            *DOCS,
        ],
    },
    entry_points={"console_scripts": ["bd3lm = bd3lm_command:main"]},
)
