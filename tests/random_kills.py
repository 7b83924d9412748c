"""
Kills `bd3lm train` at random, goes on by `--resume_from_checkpoint last`, and compares what comes out in the end.

    python tests/random_kills.py --kills 60 --seed 0

Half of the kills hit a run while it writes a checkpoint, or after its last one: at a random moment after a random one
of the operations on files of an uninterrupted run. The others come at any time. A run may be killed several times
before it is left to come to its end, which is that of an uninterrupted run: the same bytes of weights, averages and
configuration, and the same losses and evaluations. Ends with an error if it is not.
"""

import argparse
import contextlib
import gc
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

from conftest import random_model
from datasets import Dataset
from tqdm.auto import tqdm

from bd3lm_hf import train_tokenizer
from bd3lm_hf.cli import main as bd3lm
from bd3lm_hf.training import trainer as _imported_for_the_children  # noqa: F401


# Eight steps per epoch.
MAX_STEPS = 9
COMMON = {
    "eval_data": "{base}/corpus.txt",
    "max_eval_sequences": 8,
    "length": 16,
    "max_steps": MAX_STEPS,
    "per_device_train_batch_size": 2,
    "per_device_eval_batch_size": 4,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "save_steps": 3,
    "ema_decay": 0.8,
    "seed": 5,
    "hidden_dropout": 0.2,
    "report_to": "none",
    "use_cpu": "true",
    "disable_tqdm": "true",
}
NEW_MODEL = {
    "tokenizer": "{base}",
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "cond_dim": 8,
    "block_size": 4,
}
SEARCH = {"eval_strategy": "steps", "eval_steps": 2}
# Name -> flags of the run, and whether its folder holds an older run, from whose model it starts.
CONFIGURATIONS = {
    "EMA": (NEW_MODEL, False),
    "interval search": (NEW_MODEL | SEARCH | {"noise_interval_search_every": 2, "eval_on_start": "true"}, False),
    "search at epoch ends": (NEW_MODEL | {"eval_strategy": "epoch", "save_steps": 8, "save_total_limit": 1}, False),
    "accumulation": (NEW_MODEL | SEARCH | {"gradient_accumulation_steps": 3}, False),
    "block sizes": (NEW_MODEL | SEARCH | {"block_size_schedule": ["2:8", "5:2", f"{MAX_STEPS}:1"]}, False),
    "LoRA": ({"model": "{base}", "lora_rank": 2} | SEARCH, False),
    "stream": (NEW_MODEL | {"streaming": "true", "per_device_train_batch_size": 4} | SEARCH, False),
    "over an older run": ({"model": "{output_dir}", "save_steps": 4, "save_total_limit": 1} | SEARCH, True),
}
FILE_EVENTS = ("open", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "shutil.rmtree")
LAST_CHECKPOINT = f"checkpoint-{MAX_STEPS}"


@dataclass
class Results:
    """Of one configuration: number of chains, of kills by what they hit, and the chains that ended otherwise."""

    chains: int = 0
    kills: dict[str, int] = field(default_factory=lambda: {"writing": 0, "after the last": 0, "between": 0})
    faults: list[str] = field(default_factory=list)


class Events:
    """The operations on files of an output folder, in their order."""

    def __init__(self, output_dir: Path):
        self.prefix = f"{output_dir}{os.sep}"
        self.seen: list[tuple[float, str]] = []
        self.kill_at: int | None = None
        self.delay = 0.0
        sys.addaudithook(self._note)

    def _note(self, event: str, args: tuple) -> None:
        if event not in FILE_EVENTS or not isinstance(args[0], (str, os.PathLike)):
            return
        path = os.path.abspath(os.fspath(args[0]))
        if not path.startswith(self.prefix):
            return
        self.seen.append((time.monotonic(), path.removeprefix(self.prefix)))
        if self.kill_at == len(self.seen) - 1:
            threading.Timer(self.delay, os.kill, (os.getpid(), signal.SIGKILL)).start()


def flags_of(name: str, base: Path, output_dir: Path, **changes) -> list[str]:
    settings = COMMON | CONFIGURATIONS[name][0] | changes
    flags = ["--data", str(base / "corpus.txt"), "--output_dir", str(output_dir)]
    for flag, value in settings.items():
        flags.append(f"--{flag}")
        for item in value if isinstance(value, list) else [value]:
            flags.append(str(item).format(base=base, output_dir=output_dir))
    return flags


def launch(flags: list[str], output_dir: Path, kill: tuple[int, float] | None = None, seconds: float | None = None):
    """
    Runs `bd3lm train` in a process of its own.

    Args:
        kill: After which of its operations on files, and how many seconds later, it dies.
        seconds: After how many seconds it dies.

    Returns:
        Its exit status, which is negative if it was killed, and what it printed.
    """
    log = output_dir.parent / "log.txt"
    process = os.fork()
    if process == 0:
        with log.open("w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        # Its lock is common to all that was forked here, and who is killed while it holds it keeps it for ever.
        tqdm.set_lock(threading.RLock())
        events = Events(output_dir)
        if kill is not None:
            events.kill_at, events.delay = kill
        status = 1
        with contextlib.suppress(SystemExit):
            status = bd3lm(["train", *flags])
        Path(output_dir.parent, "events.json").write_text(json.dumps(events.seen))
        os._exit(status)
    if seconds is not None:
        timer = threading.Timer(seconds, os.kill, (process, signal.SIGKILL))
        timer.start()
    _, status = os.waitpid(process, 0)
    if seconds is not None:
        timer.cancel()
    return os.waitstatus_to_exitcode(status), log.read_text()


def outcome(output_dir: Path) -> dict:
    """What must not depend on kills: files by their bytes, and the figures of each step."""
    found = {}
    for folder in (output_dir, output_dir / LAST_CHECKPOINT):
        for pattern in ("*.safetensors", "config.json", "adapter_config.json"):
            found |= {str(path.relative_to(output_dir)): path.read_bytes() for path in folder.glob(pattern)}
    entries = json.loads((output_dir / "trainer_state.json").read_text())["log_history"]
    timed = ("runtime", "per_second", "flos", "train_loss", "preparation_time")
    found["log"] = [{k: v for k, v in entry.items() if not k.endswith(timed)} for entry in entries]
    assert "model.safetensors" in found or "adapter_model.safetensors" in found
    return found


def prepare(base: Path) -> None:
    """A text, a tokenizer and a model."""
    base.mkdir()
    words = random.Random(0).choices("to be or not that is the question of all".split(), k=88)
    (base / "corpus.txt").write_text("\n\n".join(" ".join(words[i : i + 11]) for i in range(0, 88, 11)))
    tokenizer = train_tokenizer(Dataset.from_dict({"text": [" ".join(words)] * 8}), vocab_size=270)
    tokenizer.save_pretrained(base)
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad", "mask")}
    random_model(vocab_size=len(tokenizer), max_position_embeddings=16, **special).save_pretrained(base)


class Chain:
    """Runs of one configuration, each of which goes on from where the one before it was killed."""

    def __init__(self, name: str, folder: Path, base: Path):
        self.name, self.base = name, base
        self.output_dir = folder / name.replace(" ", "-") / "out"
        self.flags = flags_of(name, base, self.output_dir)
        # An uninterrupted run: what comes out, how long it takes, what it does to files.
        self.reset()
        start = time.monotonic()
        status, printed = launch(self.flags, self.output_dir)
        self.duration = time.monotonic() - start
        assert status == 0, printed
        self.expected = outcome(self.output_dir)
        self.events = json.loads((self.output_dir.parent / "events.json").read_text())

    def reset(self) -> None:
        """The folder as it was before the run, with an older one of other weights where there is one."""
        older = self.output_dir.parent / "older"
        shutil.rmtree(self.output_dir, ignore_errors=True)
        self.output_dir.parent.mkdir(parents=True, exist_ok=True)
        if CONFIGURATIONS[self.name][1]:
            if not older.is_dir():
                shutil.copytree(self.base, self.output_dir)
                flags = flags_of(self.name, self.base, self.output_dir, seed=6, max_steps=MAX_STEPS + 3)
                status, printed = launch(flags, self.output_dir)
                assert status == 0, printed
                self.output_dir.rename(older)
            shutil.copytree(older, self.output_dir)

    def random_event(self, rng: random.Random) -> tuple[int, float]:
        """A moment while a checkpoint is being written, or after the last one."""
        last = max(index for index, (_, path) in enumerate(self.events) if path.startswith(LAST_CHECKPOINT))
        writing = [index for index, (_, path) in enumerate(self.events[:last]) if path.startswith("checkpoint-")]
        index = rng.choice(writing if rng.random() < 0.5 else range(last, len(self.events)))
        following = self.events[index + 1 : index + 2] or [self.events[index]]
        return index, rng.random() * min(0.5, following[0][0] - self.events[index][0])

    def what_was_hit(self) -> str:
        checkpoints = {int(path.name[11:]): path for path in self.output_dir.glob("checkpoint-*")}
        whole = {step for step, path in checkpoints.items() if (path / "checkpoint_manifest.json").is_file()}
        if len(whole) < len(checkpoints):
            return "writing"
        run = json.loads((self.output_dir / "training_run.json").read_text() or '{"id": ""}')["id"]
        newest = checkpoints.get(MAX_STEPS)
        is_own = newest is not None and run in (newest / "checkpoint_manifest.json").read_text()
        return "after the last" if is_own else "between"

    def run(self, rng: random.Random, num_kills: int, results: Results) -> None:
        """Kills the run, each time at its place in the list of events or at any time, and lets it end at last."""
        self.reset()
        results.chains += 1
        resume = []
        for attempt in range(num_kills + 1):
            kill = {}
            if attempt < num_kills:
                # While going on, the same operation may come at another place.
                is_late = sum(results.kills.values()) % 2 == 0
                kill = {"kill": self.random_event(rng)} if is_late else {"seconds": rng.random() * self.duration}
            status, printed = launch([*self.flags, *resume], self.output_dir, **kill)
            if status == 2 and resume and "there is no whole checkpoint" in printed:
                # It was killed before its first checkpoint was whole, and may have left a part of it.
                status, printed = launch([*self.flags, "--overwrite"], self.output_dir, **kill)
            if status == -signal.SIGKILL and kill:
                results.kills[self.what_was_hit() if self.output_dir.is_dir() else "between"] += 1
                resume = ["--resume_from_checkpoint", "last"]
                continue
            if status != 0:
                results.faults.append(f"exit {status}: {printed[-2000:]}")
                return
            break
        found = outcome(self.output_dir)
        differing = sorted(name for name in {*found, *self.expected} if found.get(name) != self.expected.get(name))
        if differing:
            log = [pair for pair in zip(self.expected["log"], found["log"]) if pair[0] != pair[1]]
            results.faults.append(f"{', '.join(differing)} differ; the first entries of the log that do: {log[:1]}")


def kill_at_random(num_kills: int, seed: int, names: list[str]) -> dict[str, Results]:
    """Kills runs of some configurations in turn until there were so many kills."""
    rng = random.Random(seed)
    results = {name: Results() for name in names}
    # Spares the children from collecting, and so from copying, what was imported.
    gc.freeze()
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder, "base")
        prepare(base)
        chains = {name: Chain(name, Path(folder), base) for name in names}
        while (left := num_kills - sum(sum(result.kills.values()) for result in results.values())) > 0:
            name = min(results, key=lambda name: sum(results[name].kills.values()))
            chains[name].run(rng, min(left, rng.choice([1, 1, 2, 3])), results[name])
    return results


def table(results: dict[str, Results]) -> str:
    lines = [f"{'':24}chains  kills: writing  after the last  between  other outcomes"]
    for name, result in results.items():
        hits = result.kills
        lines.append(
            f"{name:24}{result.chains:6}{hits['writing']:16}{hits['after the last']:16}{hits['between']:9}"
            f"{len(result.faults):16}"
        )
    total = {kind: sum(result.kills[kind] for result in results.values()) for kind in Results().kills}
    lines.append(f"{sum(total.values())} kills: {', '.join(f'{number} {kind}' for kind, number in total.items())}")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=CONFIGURATIONS, default=[*CONFIGURATIONS])
    args = parser.parse_args()
    results = kill_at_random(args.kills, args.seed, args.only)
    print(table(results))
    faults = [f"{name}: {fault}" for name, result in results.items() for fault in result.faults]
    sys.exit("\n".join(faults) or 0)
