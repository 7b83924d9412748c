"""
`python -m benchmarks.post_training speculation`: how much faster does a model write what its source would?

SmolLM2 with a causal clean stream, as it is and trained with its next-token loss kept, writes greedily by
self-speculation beside the stock autoregressive model of the same weights: tokens per forward, tokens per second, and
whether the texts are the same token for token, all in float32. The trained model and the report are files, so that a
second call measures only.
"""

import json
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from bd3lm_hf import BlockDiffusionForMaskedLM
from bd3lm_hf.decoding.speculation import self_speculative
from bd3lm_hf.hub.export import to_causal_lm
from benchmarks.adaptation.workbench import BLOCK_SIZE, LENGTH, Recipe, Workbench, workbench_parser

from ..common import machine


RECIPE = Recipe(training={"clean_attention": "causal", "autoregressive_loss_weight": 1.0})
NUM_NEW_TOKENS = 64


def run(argv: Sequence[str] | None = None) -> int:
    """Trains if that is to be done still, then measures; 1 if a text differs."""
    parser = workbench_parser(__doc__)
    # Next tokens are those of all tokens, which takes memory.
    parser.set_defaults(gradient_accumulation_steps=2)
    parser.add_argument("--num_tokens", type=int, default=50_000, help="Tokens of training.")
    parser.add_argument("--num_texts", type=int, default=8, help="Texts that are written, one after the other.")
    args = parser.parse_args(argv)
    bench = Workbench(args)
    prompts = torch.tensor(bench.text["held_out"]["input_ids"][: args.num_texts], device=args.device)
    prompts = prompts[:, : LENGTH // 2]
    models = {"the source as it is": adapted_source, f"after {args.num_tokens:,} tokens": trained}
    results = {
        "machine": machine(args.device, "float32"),
        "block_size": BLOCK_SIZE,
        "networks": {name: ways_of(make(bench), prompts) for name, make in models.items()},
    }
    (bench.folder / "speculation.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(results, indent=2))
    return 0 if all(result["same_texts"] for result in results["networks"].values()) else 1


def adapted_source(bench: Workbench) -> BlockDiffusionForMaskedLM:
    """The source, which has learned no drafting: its weights, and so its texts, are those of the source itself."""
    model, _ = bench.adapted(RECIPE)
    model.config.clean_attention = "causal"
    return model.eval()


def trained(bench: Workbench) -> BlockDiffusionForMaskedLM:
    """The source after training, which is done once."""
    folder = bench.folder / "speculation"
    if not (folder / "model.safetensors").is_file():
        model, tokenizer = bench.adapted(RECIPE)
        bench.train(model, tokenizer, RECIPE, bench.args.num_tokens, seed=0)
        model.save_pretrained(folder)
    return BlockDiffusionForMaskedLM.from_pretrained(folder, dtype=torch.float32).to(bench.args.device).eval()


def ways_of(model: BlockDiffusionForMaskedLM, prompts: torch.Tensor) -> dict[str, Any]:
    """What each way of writing takes, and whether all write the same."""
    stock = to_causal_lm(model)
    ways: dict[str, Callable[[torch.Tensor], Any]] = {
        "the autoregressive model's generate": lambda ids: write(stock, ids),
        "self-speculation": lambda ids: write(model, ids, custom_generate=self_speculative),
        "self-speculation, predraft=False": lambda ids: write(
            model, ids, custom_generate=self_speculative, predraft=False
        ),
    }
    report = {name: measure(way, prompts) for name, way in ways.items()}
    first, *others = (result.pop("texts") for result in report.values())
    num_same = [int((first == other).all(-1).sum()) for other in others]
    same = {"same_texts": min(num_same) == len(prompts), "num_same": num_same, "num_texts": len(prompts)}
    return {**same, "ways": report}


def write(model: PreTrainedModel, ids: torch.Tensor, **options: Any):
    """A greedy continuation of NUM_NEW_TOKENS tokens."""
    options |= {"do_sample": False, "max_new_tokens": NUM_NEW_TOKENS, "eos_token_id": None}
    return model.generate(ids, attention_mask=torch.ones_like(ids), return_dict_in_generate=True, **options)


def measure(way: Callable[[torch.Tensor], Any], prompts: torch.Tensor) -> dict[str, Any]:
    """Tokens per forward and per second over texts that are written one after the other, and the texts."""
    way(prompts[:1])
    start = time.perf_counter()
    outputs = [way(prompt[None]) for prompt in prompts]
    seconds = time.perf_counter() - start
    # A stock model runs a forward for each token.
    per_forward = [getattr(output, "tokens_per_forward", torch.ones(1)) for output in outputs]
    return {
        "tokens_per_forward": torch.cat(per_forward).mean().item(),
        "tokens_per_second": len(prompts) * NUM_NEW_TOKENS / seconds,
        "texts": torch.cat([output.sequences for output in outputs]),
    }
