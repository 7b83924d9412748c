"""
`python -m benchmarks.post_training speculation`: how much faster does a model write what its source would?

Trains SmolLM2 with a causal clean stream, keeping its next-token loss, and lets it write greedily by self-speculation
beside its own clean stream one token after the other: tokens per forward, tokens per second, and whether the texts are
the same token for token. The trained model and the report are files, so that a second call measures only.
"""

import json
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from bd3lm_hf import BlockDiffusionForMaskedLM
from bd3lm_hf.decoding.speculation import self_speculative
from bd3lm_hf.hub.adaptation import adapt
from benchmarks.adaptation.workbench import BLOCK_SIZE, LENGTH, Recipe, Workbench, workbench_parser


RECIPE = Recipe(training={"clean_attention": "causal", "autoregressive_loss_weight": 1.0})
NUM_NEW_TOKENS = 64


def run(argv: Sequence[str] | None = None) -> int:
    """Trains if that is to be done still, then measures; 1 if a text differs."""
    parser = workbench_parser(__doc__)
    parser.add_argument("--num_tokens", type=int, default=50_000, help="Tokens of training.")
    parser.add_argument("--num_texts", type=int, default=8, help="Texts that are written, one after the other.")
    args = parser.parse_args(argv)
    bench = Workbench(args)
    folder = bench.folder / "speculation"
    if not (folder / "config.json").is_file():
        model, tokenizer = bench.adapted(RECIPE)
        bench.train(model, tokenizer, RECIPE, args.num_tokens, seed=0)
        model.save_pretrained(folder)
    model = BlockDiffusionForMaskedLM.from_pretrained(folder, dtype=torch.float32).to(args.device).eval()
    one_by_one, _ = adapt(bench.load_source(), tokenizer=bench.tokenizer, block_size=1)
    one_by_one.load_state_dict(model.state_dict())
    prompts = torch.tensor(bench.text["held_out"]["input_ids"][: args.num_texts], device=args.device)
    prompts = prompts[:, : LENGTH // 2]
    ways: dict[str, Callable[[torch.Tensor], Any]] = {
        "one token after the other": lambda ids: write(one_by_one, ids),
        "self-speculation": lambda ids: write(model, ids, custom_generate=self_speculative),
        "self-speculation, predraft=False": lambda ids: write(
            model, ids, custom_generate=self_speculative, predraft=False
        ),
    }
    report = {name: measure(way, prompts) for name, way in ways.items()}
    texts = [result.pop("texts") for result in report.values()]
    is_same = all(torch.equal(texts[0], other) for other in texts[1:])
    results = {"block_size": BLOCK_SIZE, "same_texts": is_same, "ways": report}
    (bench.folder / "speculation.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(results, indent=2))
    return 0 if is_same else 1


def write(model, ids: torch.Tensor, **options: Any):
    """A greedy continuation of NUM_NEW_TOKENS tokens."""
    options |= {"do_sample": False, "max_new_tokens": NUM_NEW_TOKENS, "eos_token_id": None}
    return model.generate(ids, return_dict_in_generate=True, **options)


def measure(way: Callable[[torch.Tensor], Any], prompts: torch.Tensor) -> dict[str, Any]:
    """Tokens per forward and per second over texts that are written one after the other, and the texts."""
    way(prompts[:1])
    start = time.perf_counter()
    outputs = [way(prompt[None]) for prompt in prompts]
    seconds = time.perf_counter() - start
    tokens_per_forward = torch.cat([output.tokens_per_forward for output in outputs]).mean().item()
    texts = torch.cat([output.sequences for output in outputs])
    return {
        "tokens_per_forward": tokens_per_forward,
        "tokens_per_second": len(prompts) * NUM_NEW_TOKENS / seconds,
        "texts": texts,
    }
