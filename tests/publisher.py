"""
Publishes on the Hub that HF_ENDPOINT names, for `test_publishing.py`: a script, as a user with this package runs it.

Arguments: a folder to work in. Leaves what it found in `report.json` there.
"""

import contextlib
import io
import json
import os
import shutil
import sys
import urllib.request
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
from conftest import randomize
from datasets import Dataset, DatasetInfo
from huggingface_hub import HfApi, ModelCard, repocard
from huggingface_hub.utils import get_session
from peft import LoraConfig, get_peft_model
from transformers import set_seed

from bd3lm_hf import BD3LMConfig, BD3LMForMaskedLM, BD3LMTrainer, BD3LMTrainingArguments, push_to_hub, train_tokenizer
from bd3lm_hf.cli import main


README = Path(__file__).parents[1] / "README.md"
LENGTH = 16
DATASET, DATASET_REVISION = "user/readmes", "0123456789abcdef0123456789abcdef01234567"


def control(**request):
    request = urllib.request.Request(f"{os.environ['HF_ENDPOINT']}/control", json.dumps(request).encode())
    urllib.request.urlopen(request).close()


def attempt(function, *args, **kwargs):
    """The name and the text of the error that a call ends with, or None."""
    try:
        function(*args, **kwargs)
    except Exception as error:
        return [type(error).__name__, str(error)]


def sequences(tokenizer):
    ids = tokenizer(README.read_text(encoding="utf-8"))["input_ids"]
    rows = [ids[start : start + LENGTH] for start in range(0, 64 * LENGTH, LENGTH)]
    info = DatasetInfo(
        download_checksums={f"hf://datasets/{DATASET}@{DATASET_REVISION}/train.parquet": {"num_bytes": 1}},
        config_name="default",
    )
    return Dataset.from_dict({"input_ids": rows}, info=info)


def arguments(output_dir, **kwargs):
    return BD3LMTrainingArguments(
        output_dir,
        per_device_train_batch_size=4,
        per_device_eval_batch_size=8,
        max_steps=4,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **kwargs,
    )


def train(tokenizer, texts):
    """A model that is published while it is trained, at the end, and once more after the last evaluation."""
    config = BD3LMConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
        block_size=4,
        cond_dim=16,
        hidden_dropout=0.0,
        mask_token_id=tokenizer.mask_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    trainer = BD3LMTrainer(
        randomize(BD3LMForMaskedLM(config)),
        arguments(
            "run",
            eval_strategy="steps",
            eval_steps=2,
            save_strategy="steps",
            save_steps=2,
            push_to_hub=True,
            hub_model_id="user/tiny",
            hub_strategy="every_save",
            learning_rate=1e-3,
        ),
        train_dataset=texts,
        eval_dataset=texts.select(range(16)),
        processing_class=tokenizer,
    )
    trainer.train()
    metrics = trainer.evaluate()
    commit = trainer.push_to_hub(license="apache-2.0", language="en", widget_prompts=["# bd3lm-hf"])
    return trainer, metrics, commit


def cut_uploads(model, report):
    """An upload cut while it sends the weights, and then while it commits; each time it is tried again."""
    files = {}
    # Weights that the Hub does not have yet, in one file, and later others in shards.
    for folder, seed, kwargs in (("one_file", 1, {}), ("shards", 2, {"max_shard_size": "40KB"})):
        shutil.copytree("run", folder, ignore=shutil.ignore_patterns("checkpoint-*", "*.safetensors"))
        randomize(model, seed).save_pretrained(folder, **kwargs)
    control(cut="upload", down_after=True)
    report["cut_upload"] = attempt(push_to_hub, "one_file", "user/cut")
    files["after_cut_upload"] = HfApi().list_repo_files("user/cut")
    control()
    control(cut="commit")
    report["cut_commit"] = attempt(push_to_hub, "one_file", "user/cut")
    files["after_cut_commit"] = HfApi().list_repo_files("user/cut")
    control()
    report["whole_commit"] = push_to_hub("one_file", "user/cut").oid
    files["whole"] = HfApi().list_repo_files("user/cut")

    # Another state of the model replaces it; a cut leaves the earlier state.
    control(cut="upload", down_after=True)
    report["cut_update"] = attempt(push_to_hub, "shards", "user/cut")
    report["head_after_cut_update"] = HfApi().model_info("user/cut").sha
    control()
    push_to_hub("shards", "user/cut")
    files["shards"] = HfApi().list_repo_files("user/cut")
    push_to_hub("one_file", "user/cut")
    files["one_file_again"] = HfApi().list_repo_files("user/cut")
    report["files"] = files


def adapt(tokenizer, texts):
    set_seed(0)
    base = BD3LMForMaskedLM.from_pretrained("user/tiny")
    adapted = get_peft_model(base, LoraConfig(r=2, lora_alpha=16, target_modules="all-linear"))
    trainer = BD3LMTrainer(
        adapted, arguments("adapter", learning_rate=1e-3), train_dataset=texts, processing_class=tokenizer
    )
    trainer.train()
    # The adapter is more than nothing.
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.02)
    trainer.hub_model_id = None
    trainer.args.hub_model_id = "user/adapter"
    trainer.push_to_hub()
    return adapted.eval()


def outputs(model, ids):
    """Logits, and a text in which nothing is left to chance."""
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    text = model.generate(input_ids=ids, max_new_tokens=8, do_sample=False, sampler="confidence", denoising_steps=2)
    return {"ids": ids, "logits": logits, "text": text}


def validate(card):
    """`card.validate()` by the Hub of HF_ENDPOINT; before its version 2, huggingface_hub asks the public one."""
    session = get_session()

    def post(url, **kwargs):
        return session.post(url.replace("https://huggingface.co", os.environ["HF_ENDPOINT"]), **kwargs)

    with mock.patch.object(repocard, "get_session", lambda: SimpleNamespace(post=post)):
        card.validate()


def publish(folder):
    os.chdir(folder)
    report = {}
    tokenizer = train_tokenizer(Dataset.from_dict({"text": [README.read_text(encoding="utf-8")]}), 300)
    texts = sequences(tokenizer)
    trainer, report["metrics"], commit = train(tokenizer, texts)
    report["log_history"], report["commit"] = trainer.state.log_history, commit.oid
    report["noise_interval"] = trainer.config.noise_interval
    report["num_parameters"] = trainer.model.num_parameters()
    ids = torch.tensor(texts[:2]["input_ids"])
    torch.save(outputs(trainer.model.eval(), ids), "tiny.pt")

    card = ModelCard.load("user/tiny")
    validate(card)
    report["invalid"] = attempt(lambda: validate(ModelCard(str(card).replace("license: apache-2.0", "license: 1"))))
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        report["push"] = main(["push", "run", "user/tiny"])
        main(["push", "run/checkpoint-4", "user/checkpoint", "--private", "--dataset", "README.md"])
    report["head_after_push"], report["printed"] = HfApi().model_info("user/tiny").sha, printed.getvalue()

    torch.save(outputs(adapt(tokenizer, texts), ids), "adapter.pt")
    trainer.model.push_to_hub("user/parts", tags=["bd3lm"])
    tokenizer.push_to_hub("user/parts")
    cut_uploads(trainer.model, report)
    Path("report.json").write_text(json.dumps(report))


if __name__ == "__main__":
    publish(sys.argv[1])
