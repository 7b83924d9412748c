"""
Publishes folders full of what nobody shall see, on the Hub that HF_ENDPOINT names: a script of `test_decoys.py`.

Arguments: a folder to work in, below the home folder. Leaves what it found in `report.json` there.
"""

import contextlib
import io
import json
import os
import platform
import shutil
import socket
import sys
import tempfile
from pathlib import Path
from unittest import mock

from conftest import random_model
from datasets import Dataset
from huggingface_hub import snapshot_download
from peft import LoraConfig, get_peft_model
from publisher import arguments, attempt

from bd3lm_hf import BD3LMForMaskedLM, BD3LMTrainer, push_to_hub, train_tokenizer
from bd3lm_hf.cli import main


# Names that occur nowhere else: of whoever is logged in, and of the machine.
USER, HOST = "quillfeather", "zebramachine42"
SECRET = f"of {USER} at {HOST}, in /home/{USER}".encode()
# What lies in a folder in which somebody worked.
DECOYS = (
    ".env",
    ".git/config",
    ".ipynb_checkpoints/explore-checkpoint.ipynb",
    "LOG",
    "adapter_model.bin",
    "additional_chat_templates/notes.txt",
    "checkpoint-old/notes.json",
    "data.jsonl",
    "explore.ipynb",
    "id_rsa",
    "model-00009-of-00009.safetensors.tmp",
    "model.safetensors.bak",
    "modeling_secret_bd3lm.py",
    "nohup.out",
    "notes.json",
    "notes.md",
    "out.log",
    "predictions.csv",
    "private_block_diffusion.py",
    "runs/Jan01_00-00-00_{host}/events.out.tfevents.1.{host}.1.0",
    "samples.txt",
    "server.pem",
    "slurm-1.out",
    "tokenizer.json.swp",
    "training_args.bin",
    "wandb/run-1/files/wandb-metadata.json",
    "weights.safetensors",
)


def scatter(folder):
    """Puts decoys into a folder, and links that lead out of it."""
    folder = Path(folder)
    for name in DECOYS:
        path = folder / name.format(host=HOST)
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(SECRET)
    (Path.home() / "secret").mkdir(exist_ok=True)
    (Path.home() / "secret" / "key.json").write_bytes(SECRET)
    for link, target in (
        ("key.json", "secret/key.json"),
        ("more", "secret"),
        ("additional_chat_templates/x", "secret"),
    ):
        if not (folder / link).is_symlink():
            (folder / link).symlink_to(Path.home() / target)


class Trainer(BD3LMTrainer):
    """Its checkpoints are full of decoys by the time that they are pushed."""

    def _push_from_checkpoint(self, checkpoint_folder):
        scatter(checkpoint_folder)
        scatter(self.args.output_dir)
        super()._push_from_checkpoint(checkpoint_folder)


def train(model, tokenizer, texts, output_dir, **kwargs):
    options = {"save_strategy": "steps", "save_steps": 2, "push_to_hub": True, "learning_rate": 1e-3, "ema_decay": 0.5}
    options |= {"hub_always_push": True, "save_total_limit": 1}
    trainer = Trainer(
        model, arguments(str(output_dir), **options | kwargs), train_dataset=texts, processing_class=tokenizer
    )
    scatter(output_dir)
    trainer.train()
    return trainer


def publish(folder):
    os.chdir(folder)
    report = {}
    tokenizer = train_tokenizer(Dataset.from_dict({"text": ["a text of words and words " * 40]}), 280)
    tokenizer.chat_template = "{{ messages }}"
    config = {"vocab_size": len(tokenizer), "num_hidden_layers": 1, "mask_token_id": tokenizer.mask_token_id}
    config |= {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    ids = tokenizer("a text of words and words " * 64)["input_ids"]
    texts = Dataset.from_dict({"input_ids": [ids[row : row + 16] for row in range(16)]})

    # A base in a temporary folder, which is gone before the record is written; others are relative.
    with tempfile.TemporaryDirectory(dir=Path.home()) as temporary:
        random_model(**config).save_pretrained(Path(temporary) / "base")
        model = BD3LMForMaskedLM.from_pretrained(Path(temporary) / "base")
    run = Path.home() / "run"
    trainer = train(model, tokenizer, texts, run, hub_model_id="user/every_save", hub_strategy="every_save")
    trainer.push_to_hub(license="mit")
    report["pushed"] = main(["push", str(run), "user/pushed"])
    report["checkpoint_pushed"] = main(["push", str(run / "checkpoint-4"), "user/pushed_checkpoint"])
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        main(["push", str(run), "user/pushed", "--dry_run"])
    report["dry_run"] = printed.getvalue()

    for strategy in ("checkpoint", "all_checkpoints"):
        model = random_model(**config)
        train(model, tokenizer, texts, Path.home() / strategy, hub_model_id=f"user/{strategy}", hub_strategy=strategy)
    # What was pushed to go on from is gone on from.
    copy = snapshot_download("user/checkpoint")
    shutil.copytree(Path(copy) / "last-checkpoint", "resumed/last-checkpoint")
    resumed = Trainer(
        random_model(**config), arguments("resumed", ema_decay=0.5, learning_rate=1e-3), train_dataset=texts
    )
    report["resumed"] = [
        resumed.train(resume_from_checkpoint="resumed/last-checkpoint").global_step,
        resumed.state.global_step,
    ]

    trainer.model.push_to_hub("user/model")
    tokenizer.push_to_hub("user/tokenizer")

    relative = Path("models/base")
    trainer.model.save_pretrained(relative)
    adapted = get_peft_model(BD3LMForMaskedLM.from_pretrained(relative), LoraConfig(r=2, target_modules="all-linear"))
    adapter = train(adapted, tokenizer, texts, Path("adapter"), hub_model_id="user/adapter", hub_strategy="every_save")
    shutil.rmtree(relative)
    adapter.save_model(_internal_call=True)
    report["adapter"] = attempt(adapter.push_to_hub)
    report["bare_adapter"] = attempt(push_to_hub, "adapter/checkpoint-4", "user/bare")
    report["adapter_pushed"] = main(["push", "adapter", "user/adapter", "--base_model", "user/every_save"])
    Path("report.json").write_text(json.dumps(report))


if __name__ == "__main__":
    with mock.patch.object(socket, "gethostname", lambda: HOST), mock.patch.object(platform, "node", lambda: HOST):
        publish(sys.argv[1])
