"""
Time per token and memory far past the context, by quarters of a text: `python -m benchmarks.long_generation`.

One text of 16 contexts, written by `first_hitting` with random weights. Each quarter is four contexts long, so the
window is full before the second begins.
"""

import argparse
import time

import torch

from .common import BLOCK_SIZE, Size, machine, make_bd3lm, print_table, resident_memory_mib


NUM_CONTEXTS = 16


class QuarterWatch:
    """A streamer that notes, for each quarter of the text, its duration and the largest resident memory."""

    def __init__(self, num_new_tokens: int):
        self.num_new_tokens = num_new_tokens
        self.num_seen = -1
        self.starts = [time.perf_counter()]
        self.memory = [0.0] * 4

    def put(self, value: torch.Tensor) -> None:
        # The prompt comes first.
        self.num_seen = 0 if self.num_seen < 0 else self.num_seen + value.numel()
        quarter = min(4 * self.num_seen // self.num_new_tokens, 3)
        self.memory[quarter] = max(self.memory[quarter], resident_memory_mib())
        while len(self.starts) <= 4 * self.num_seen // self.num_new_tokens:
            self.starts.append(time.perf_counter())

    def end(self) -> None:
        pass

    def seconds(self) -> list[float]:
        return [end - start for start, end in zip(self.starts, self.starts[1:])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    num_new_tokens = NUM_CONTEXTS * arguments.context - BLOCK_SIZE
    model = make_bd3lm(Size(384, 6, 6, 8192, arguments.context, 1)).eval()
    prompt = torch.randint(8191, (1, BLOCK_SIZE))
    options = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": num_new_tokens, "eos_token_id": None}
    model.generate(prompt, **{**options, "max_new_tokens": 2 * arguments.context})
    watches = []
    for _ in range(arguments.repeats):
        watches.append(QuarterWatch(num_new_tokens))
        model.generate(prompt, **options, streamer=watches[-1])

    print(f"{num_new_tokens} tokens at a context of {arguments.context}, {machine()}\n")
    rows = []
    for quarter in range(4):
        milliseconds = sorted(watch.seconds()[quarter] / num_new_tokens * 4e3 for watch in watches)
        ratio = sorted(watch.seconds()[quarter] / watch.seconds()[1] for watch in watches)
        memory = max(watch.memory[quarter] for watch in watches)
        middle = len(watches) // 2
        rows.append([str(quarter + 1), f"{milliseconds[middle]:.2f}", f"{ratio[middle]:.2f}", f"{memory:.0f}"])
    print_table(["quarter", "ms per token", "x the second", "peak memory, MiB"], rows)


if __name__ == "__main__":
    main()
