"""
What an adapted model costs beside its source: time (`speed`) and the memory of QLoRA (`qlora`).

`python -m benchmarks.adaptation speed` runs in turn, so that a busy machine is busy for all: `generate` and the
network's own cached forwards of the same shapes; a training step and the source's at equal text. Process time is what
the cores worked, wall time what one waits.

`python -m benchmarks.adaptation qlora` trains LoRA adapters on the nf4 model, in a process of its own whose peak
resident memory counts, that of the libraries included; the libraries alone are measured in another.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

import torch
from transformers import AutoModelForMaskedLM, PreTrainedModel

from bd3lm_hf import BlockDiffusionForMaskedLM, CommitCache
from bd3lm_hf.modeling.generation_block_diffusion import CACHE_NAME
from bd3lm_hf.modeling.prefix_reuse_block_diffusion import sliding_cache

from ..common import print_own_peak_memory, print_table
from .workbench import BLOCK_SIZE, LEARNING_RATE, LENGTH, Recipe, Workbench, workbench_parser


# Per forward, per training step at equal text, and MiB.
MOST_PER_FORWARD, MOST_PER_STEP, MOST_MEMORY = 1.15, 2.2, 2048
NUM_BLOCKS = 8
# Of the process that `qlora` starts; glibc gives back what is freed, or its peak differs from run to run.
ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": str(2**20)}


def run_speed(argv: Sequence[str] | None = None) -> int:
    """Prints both ratios beside their bounds."""
    parser = workbench_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="Timed rounds; medians count.")
    args = parser.parse_args(argv)
    bench = Workbench(args)
    source = bench.load_source()
    texts = torch.tensor(bench.text["train"][: args.batch_size]["input_ids"], device=args.device)
    # The source's modules are the adapted model's, so that one set of weights serves both.
    model = BlockDiffusionForMaskedLM.from_causal_lm(source, block_size=BLOCK_SIZE).eval()
    prompt = texts[:1, : LENGTH // 2]
    pairs = [
        ("`generate`, of the network's own forwards", MOST_PER_FORWARD, lambda: generate(model, prompt)),
        ("training step, of the source's", MOST_PER_STEP, lambda: train_step(model, texts)),
    ]
    references = [lambda: own_forwards(model, prompt), lambda: train_step(source, texts)]
    rows = []
    for (name, bound, step), reference in zip(pairs, references):
        times = interleaved_times({"step": step, "reference": reference}, args.rounds)
        wall, process = (times["step"][kind] / times["reference"][kind] for kind in (0, 1))
        seconds = f"{times['step'][0]:.3f} / {times['reference'][0]:.3f}"
        rows.append([name, seconds, f"{wall:.2f}", f"{process:.2f}", f"{bound}"])
    print_table(["", "wall seconds", "ratio of wall time", "of process time", "at most"], rows)
    return 0


def interleaved_times(steps: dict[str, Callable[[], object]], rounds: int) -> dict[str, tuple[float, float]]:
    """Median (wall, process) seconds of each step, run in turn after one warm-up each."""
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    for index in range(rounds + 1):
        for name, step in steps.items():
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            wall, process = time.perf_counter(), time.process_time()
            step()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if index:
                seconds[name].append((time.perf_counter() - wall, time.process_time() - process))
    return {name: tuple(median(part) for part in zip(*values)) for name, values in seconds.items()}


def generate(model: BlockDiffusionForMaskedLM, prompt: torch.Tensor) -> None:
    """NUM_BLOCKS blocks after a prompt [1, length], a token per forward."""
    num_new = NUM_BLOCKS * BLOCK_SIZE
    output = model.generate(
        prompt,
        max_new_tokens=num_new,
        min_new_tokens=num_new,
        do_sample=False,
        sampler="confidence",
        denoising_steps=BLOCK_SIZE,
        return_dict_in_generate=True,
    )
    if int(output.num_forward_passes) != num_new:
        raise RuntimeError(f"`generate` must take {num_new} forwards, but took {output.num_forward_passes.tolist()}.")


@torch.no_grad()
def own_forwards(model: BlockDiffusionForMaskedLM, prompt: torch.Tensor) -> None:
    """What `generate` asks of the network and its head, and nothing around it."""
    head, device = model.get_output_embeddings(), prompt.device
    cache = sliding_cache(model.config.num_hidden_layers, model.config.window_in_blocks * BLOCK_SIZE)
    block = torch.full((1, BLOCK_SIZE), model.config.mask_token_id, device=device)
    pending, length = prompt, 0
    for _ in range(NUM_BLOCKS):
        for _ in range(BLOCK_SIZE):
            ids = torch.cat([pending, block], dim=1)
            end = length + ids.shape[1]
            positions = torch.arange(length, end, device=device)[None]
            # The rule of block diffusion, so that the kernels are those of `generate`.
            mask = positions[..., None] // BLOCK_SIZE >= torch.arange(end, device=device) // BLOCK_SIZE
            view = CommitCache(cache, pending.shape[1])
            options = {"attention_mask": mask[None], "position_ids": positions, CACHE_NAME: view}
            states = model.base_model(input_ids=ids, use_cache=True, **options).last_hidden_state
            head(states[:, -BLOCK_SIZE:])
            length, pending = length + pending.shape[1], block[:, :0]
        pending = block


def train_step(model: PreTrainedModel, texts: torch.Tensor) -> None:
    """Loss and gradients of texts [batch, length], for either kind of model."""
    model.train()
    model(texts, labels=texts).loss.backward()
    model.zero_grad()
    model.eval()


def run_qlora(argv: Sequence[str] | None = None) -> int:
    """Prints the peak memory beside its bound; 1 where it is above."""
    parser = workbench_parser(__doc__)
    parser.add_argument("--num_steps", type=int, default=3, help="Steps of training.")
    parser.add_argument("--part", choices=["imports", "steps"], help="What the process of its own does.")
    args = parser.parse_args(argv)
    folder = Path(args.output_dir) / "qlora"
    if args.part is not None:
        losses = [] if args.part == "imports" else qlora_steps(folder, args.num_steps, args.batch_size)
        print(json.dumps(losses))
        print_own_peak_memory()
        return 0
    bench = Workbench(args)
    model, tokenizer = bench.adapted(Recipe())
    for part in (model, tokenizer):
        part.save_pretrained(folder)
    texts = bench.text["train"][: args.batch_size * args.num_steps]["input_ids"]
    torch.save(torch.tensor(texts), folder / "texts.pt")
    command = [sys.executable, "-m", "benchmarks.adaptation", "qlora", "--output_dir", args.output_dir]
    command += ["--num_steps", str(args.num_steps), "--batch_size", str(args.batch_size), "--part"]
    results = {}
    for part in ("imports", "steps"):
        environment = os.environ | ENVIRONMENT
        output = subprocess.run(
            [*command, part], check=True, stdout=subprocess.PIPE, text=True, env=environment
        ).stdout
        results[part] = [json.loads(line) for line in output.splitlines()[-2:]]
    print("losses:", ", ".join(f"{loss:.2f}" for loss in results["steps"][0]))
    peak, libraries = results["steps"][1], results["imports"][1]
    print_table(
        ["peak memory, MiB", "of which libraries", "at most"], [[f"{peak:.0f}", f"{libraries:.0f}", str(MOST_MEMORY)]]
    )
    return int(peak > MOST_MEMORY)


def qlora_steps(folder: Path, num_steps: int, batch_size: int) -> list[float]:
    """Losses of training LoRA adapters on the model in a folder, quantized to nf4, on the texts beside it."""
    from peft import LoraConfig, get_peft_model
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    base = AutoModelForMaskedLM.from_pretrained(folder, quantization_config=config, dtype=torch.float32)
    base.gradient_checkpointing_enable()
    base.enable_input_require_grads()
    adapter = LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base, adapter).train()
    optimizer = torch.optim.AdamW([part for part in model.parameters() if part.requires_grad], LEARNING_RATE)
    losses = []
    for batch in torch.load(folder / "texts.pt").split(batch_size)[:num_steps]:
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses
