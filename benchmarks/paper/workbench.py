"""
What the experiments share: a text, models trained on it in one of several ways, and what was measured of them.

Models and measurements are kept in a folder, under names that say all they depend on. So experiments share them, and
a command that was killed goes on from what is done. The package `datasets` is not needed.
"""

import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from bd3lm_hf import (
    BD3LMConfig,
    BD3LMForMaskedLM,
    BD3LMTrainer,
    BD3LMTrainingArguments,
    evaluate_likelihood,
    train_tokenizer,
)
from bd3lm_hf.modeling.diffusion_block_diffusion import FULL_NOISE_INTERVAL
from bd3lm_hf.noise.intervals import chosen_noise_intervals
from bd3lm_hf.training.callbacks import EMACallback

from .corpus import Sequences, drawn, first_bytes, packed, paragraphs, read_text, tokenized
from .scales import COVERING, MEASURING, Scale


# So much of the text trains the tokenizer, at most.
TOKENIZER_BYTES = 20_000_000


@dataclass(frozen=True)
class Arm:
    """
    One way to train.

    Attributes:
        block_size: tokens per block; None is the autoregressive model, Transformers' GPT-2.
        noise_schedule, noise_interval: of training; the interval is where the search starts from, if there is one.
        search: let evaluations during training choose the interval.
        antithetic, masking: see `BD3LMTrainingArguments`.
        stage: "continued" from the base of its seed, "whole" for as many steps without one, or "base". The paper
            continues a base too, a masked diffusion model. Ours has block size 1: small models under masked diffusion
            stay on a plateau first, some seeds much longer than others.
    """

    block_size: int | None
    noise_schedule: str = "loglinear"
    noise_interval: tuple[float, float] = FULL_NOISE_INTERVAL
    search: bool = False
    antithetic: bool = True
    masking: str = "bernoulli"
    stage: str = "continued"

    @property
    def name(self) -> str:
        if self.block_size is None:
            return "gpt2"
        interval = "search" if self.search else "{:g}-{:g}".format(*self.noise_interval)
        draws = "antithetic" if self.antithetic else "independent"
        return f"block{self.block_size}-{self.noise_schedule}-{interval}-{draws}-{self.masking}-{self.stage}"


AUTOREGRESSIVE = Arm(None, stage="whole")
# t = 1 masks every token of every block: block size 1 is trained by the exact likelihood.
TUNED_BLOCK_SIZE_ONE = Arm(1, noise_interval=(1.0, 1.0))
BASE = replace(TUNED_BLOCK_SIZE_ONE, stage="base")


class KeptAverage(EMACallback):
    """The moving average of the weights, still there when training is over."""

    def on_train_end(self, args, state, control, **kwargs):
        pass


class OutOfTime(Exception):
    """There is no time left for what this names."""


class Deadline(TrainerCallback):
    """Ends a training by `OutOfTime` when it is too late, by `time.monotonic`."""

    def __init__(self, deadline: float, name: str):
        self.deadline, self.name = deadline, name

    def on_step_end(self, args, state, control, **kwargs):
        if time.monotonic() > self.deadline:
            raise OutOfTime(f"{self.name}, after {state.global_step} of {state.max_steps} steps")


class Workbench:
    """
    Args:
        scale: How large everything is.
        data: What `load_documents` takes; its text is cut into documents at blank lines.
        folder: Where models and measurements are kept.
        device: Of training and measuring.
        torch_compile: Whether training is compiled; by default as `BD3LMTrainer` has it on the device, and on an
            accelerator for the autoregressive model too.
        deadline: No training goes on, and nothing is begun, after this `time.monotonic`.
        on_entry: Called after each record and measurement.

    Attributes:
        entries: The records and measurements that were asked for, by their names.
    """

    def __init__(
        self,
        scale: Scale,
        data: str,
        folder: Path,
        device: str = "cpu",
        torch_compile: bool | None = None,
        deadline: float = math.inf,
        on_entry: Callable[[], object] = lambda: None,
    ):
        self.scale, self.device, self.torch_compile = scale, device, torch_compile
        self.deadline, self.on_entry = deadline, on_entry
        text = read_text(data, scale.max_bytes)
        self.num_bytes = len(text.encode())
        cut = text.rfind("\n\n", 0, round(len(text) * 0.9))
        self.documents = {"train": paragraphs(text[:cut]), "held_out": paragraphs(text[cut:])}
        self.tokenizer = train_tokenizer(first_bytes(self.documents["train"], TOKENIZER_BYTES), scale.vocab_size)
        training = {name: value for name, value in asdict(scale).items() if name not in MEASURING + COVERING}
        depends_on = hashlib.sha256(json.dumps(training).encode() + text.encode())
        self.entries: dict[str, dict] = {}
        self.folder = folder / depends_on.hexdigest()[:12]

    @cached_property
    def train_sequences(self) -> Sequences:
        return self._packed("train", self.scale.length)

    @cached_property
    def _held_out(self) -> Sequences:
        sequences = self._packed("held_out", self.scale.length)
        return drawn(sequences, self.scale.num_sequences + self.scale.num_search_sequences)

    @property
    def search_sequences(self) -> Sequences:
        return self._held_out.select(range(min(self.scale.num_search_sequences, len(self._held_out) // 2)))

    @cached_property
    def held_out_sequences(self) -> list[list[int]]:
        """Of the training length, for likelihoods."""
        return self._held_out.select(range(len(self.search_sequences), len(self._held_out))).lists()

    @cached_property
    def long_sequences(self) -> list[list[int]]:
        """Of eight times the training length."""
        return drawn(self._packed("held_out", 8 * self.scale.length), self.scale.num_long_sequences).lists()

    def _packed(self, split: str, length: int) -> Sequences:
        return packed(tokenized(self.documents[split], self.tokenizer), length, self.tokenizer.bos_token_id)

    def trained(self, arm: Arm, seed: int):
        """The model with the averaged weights; trained if that was not done before."""
        folder = self._run_folder(arm, seed) / "model"
        if not folder.exists():
            self._train(arm, seed)
        model_class = AutoModelForCausalLM if arm.block_size is None else BD3LMForMaskedLM
        return model_class.from_pretrained(folder).to(self.device).eval()

    def record(self, arm: Arm, seed: int) -> dict:
        """What was found of an arm when it was trained: see `_train`."""
        path = self._run_folder(arm, seed) / "record.json"
        if not path.exists():
            self._train(arm, seed)
        return self._read(path)

    def measured(self, arm: Arm, seed: int, name: str, measure: Callable[..., dict]) -> dict:
        """What `measure` returns of the trained model, from the folder if it was measured before."""
        path = self._run_folder(arm, seed) / f"{measurement_name(self.scale, name)}.json"
        if not path.exists():
            model = self.trained(arm, seed)
            self._check_time(f"{name} of {arm.name}")
            print(f"measuring {name} of {arm.name}, seed {seed}", flush=True)
            start = time.perf_counter()
            result = measure(model)
            write_json(path, {"seconds": time.perf_counter() - start, **result})
        return self._read(path)

    @property
    def used_seconds(self) -> float:
        """What everything that was asked for took, whenever that was."""
        return sum(entry["seconds"] for entry in self.entries.values())

    def _read(self, path: Path) -> dict:
        name = path.relative_to(self.folder).with_suffix("").as_posix()
        self.entries[name] = json.loads(path.read_text())
        self.on_entry()
        return self.entries[name]

    def _check_time(self, name: str) -> None:
        if time.monotonic() > self.deadline:
            raise OutOfTime(name)

    def likelihood(self, model) -> dict:
        """NELBO of the held-out sequences in nats per token, with its error over sequences."""
        found = evaluate_likelihood(
            model,
            self.held_out_sequences,
            estimator="stratified" if getattr(model.config, "block_size", 1) > 1 else "exact",
            num_draws=self.scale.num_draws,
            batch_size=32,
            progress=False,
        )
        return {name: getattr(found, name) for name in ("nelbo", "standard_error", "draw_standard_error")}

    def _run_folder(self, arm: Arm, seed: int) -> Path:
        return self.folder / run_name(arm, seed)

    def _train(self, arm: Arm, seed: int) -> None:
        """
        Trains, and keeps the model and a record: `seconds`, the noise intervals that were chosen and, of all but a
        base, the likelihoods of the averaged weights and of those that the last step left.
        """
        self._check_time(f"training {arm.name}")
        print(f"training {arm.name}, seed {seed}", flush=True)
        start = time.perf_counter()
        # Compiled code is of one model, and only so much of it is kept for a function.
        torch.compiler.reset()
        trainer = self._trainer(arm, seed)
        trainer.remove_callback(PrinterCallback)
        average = KeptAverage(self.scale.ema_decay, export=False)
        trainer.add_callback(average)
        trainer.add_callback(Deadline(self.deadline, f"training {arm.name}"))
        trainer.train()
        record = {
            "training_seconds": time.perf_counter() - start,
            "num_tokens": trainer.state.max_steps * self.scale.batch_size * self.scale.length,
            "num_parameters": trainer.model.num_parameters(),
            "chosen": chosen_noise_intervals(trainer.state.log_history),
        }
        model, is_scored = trainer.model, arm.stage != "base"
        if is_scored:
            record["last"] = self.likelihood(model)
        average.weights.copy_to_model()
        if is_scored:
            record["average"] = self.likelihood(model)
        record["seconds"] = time.perf_counter() - start
        folder = self._run_folder(arm, seed)
        unfinished = folder / f"unfinished-{os.getpid()}"
        model.save_pretrained(unfinished)
        write_json(folder / "record.json", record)
        # Another command may have trained the same meanwhile.
        if (folder / "model").exists():
            shutil.rmtree(unfinished)
        else:
            os.replace(unfinished, folder / "model")

    def _trainer(self, arm: Arm, seed: int) -> Trainer:
        scale, rows = self.scale, self._steps_of_text(arm, seed)
        num_steps = len(rows) // scale.batch_size
        arguments = {
            "output_dir": str(self._run_folder(arm, seed) / "trainer"),
            "seed": seed,
            "train_sampling_strategy": "sequential",
            "per_device_train_batch_size": scale.batch_size,
            "per_device_eval_batch_size": min(32, scale.num_search_sequences),
            "max_steps": num_steps,
            "learning_rate": scale.learning_rate,
            "lr_scheduler_type": "constant_with_warmup",
            "warmup_steps": 0.05,
            "bf16": scale.bf16,
            "save_strategy": "no",
            "logging_strategy": "no",
            "report_to": [],
            "disable_tqdm": True,
            "dataloader_pin_memory": False,
            "use_cpu": self.device == "cpu",
        }
        set_seed(seed)
        model = self._initial_model(arm, seed)
        if arm.block_size is None:
            arguments["torch_compile"] = self.device != "cpu" if self.torch_compile is None else self.torch_compile
            return Trainer(model, TrainingArguments(**arguments), train_dataset=rows.with_labels())
        if self.torch_compile is not None:
            arguments["torch_compile"] = self.torch_compile
        arguments |= {
            "noise_schedule": arm.noise_schedule,
            "noise_interval": list(arm.noise_interval),
            "fix_noise_interval": not arm.search,
            "antithetic_sampling": arm.antithetic,
            "masking": arm.masking,
            "ema_decay": 0.0,
        }
        if arm.search:
            arguments |= {"eval_strategy": "steps", "eval_steps": max(num_steps // (scale.num_searches + 1), 1)}
        return BD3LMTrainer(
            model,
            BD3LMTrainingArguments(**arguments),
            train_dataset=rows,
            eval_dataset=self.search_sequences,
        )

    def _steps_of_text(self, arm: Arm, seed: int) -> Sequences:
        """The sequences of all steps in their order: those of a seed are the same whatever is trained."""
        base, whole = (
            steps * self.scale.batch_size
            for steps in (self.scale.num_base_steps, self.scale.num_base_steps + self.scale.num_steps)
        )
        generator = torch.Generator().manual_seed(seed)
        rows = self.train_sequences
        order = torch.cat([torch.randperm(len(rows), generator=generator) for _ in range(-(-whole // len(rows)))])
        start, end = {"base": (0, base), "continued": (base, whole), "whole": (0, whole)}[arm.stage]
        return rows.select(order[start:end].numpy())

    def _initial_model(self, arm: Arm, seed: int):
        if arm.stage != "continued":
            return self._new_model(arm)
        # Its time counts.
        self.record(BASE, seed)
        model = self.trained(BASE, seed).train()
        model.config.block_size = arm.block_size
        return model

    def _new_model(self, arm: Arm):
        scale, tokenizer = self.scale, self.tokenizer
        # A narrow network learns to attend much sooner from weights of the order of 1 / sqrt(hidden size).
        initializer_range = 0.6 / scale.hidden_size**0.5
        ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "pad_token_id")}
        if arm.block_size is None:
            return GPT2LMHeadModel(
                GPT2Config(
                    vocab_size=len(tokenizer),
                    n_positions=scale.length,
                    n_embd=scale.hidden_size,
                    n_layer=scale.num_layers,
                    n_head=scale.num_heads,
                    resid_pdrop=0.0,
                    embd_pdrop=0.0,
                    attn_pdrop=0.0,
                    initializer_range=initializer_range,
                    eos_token_id=None,
                    **ids,
                )
            )
        return BD3LMForMaskedLM(
            BD3LMConfig(
                vocab_size=len(tokenizer),
                hidden_size=scale.hidden_size,
                num_hidden_layers=scale.num_layers,
                num_attention_heads=scale.num_heads,
                max_position_embeddings=scale.length,
                block_size=arm.block_size,
                hidden_dropout=0.0,
                tie_word_embeddings=True,
                initializer_range=initializer_range,
                mask_token_id=tokenizer.mask_token_id,
                **ids,
            )
        )


def run_name(arm: Arm, seed: int) -> str:
    """What a training is called."""
    return f"{arm.name}-seed{seed}"


def measurement_name(scale: Scale, name: str) -> str:
    """What a measurement of a trained model is called, with the sizes that it depends on."""
    return "-".join([name, *(str(getattr(scale, size)) for size in MEASURING)])


def write_json(path: Path, value: dict) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(f".{os.getpid()}.tmp")
    unfinished.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    os.replace(unfinished, path)
