"""
Reads, fine-tunes and publishes what `publisher.py` published, for `test_publishing.py`: a script, as a user runs it
who has Transformers and PEFT but not this package.

Arguments: the folder of the publisher, and one to work in. Leaves what it found in `report.json` there.
"""

import contextlib
import hashlib
import io
import json
import os
import re
import sys
import urllib.request
from pathlib import Path


sys.modules["bd3lm_hf"] = None  # import bd3lm_hf raises ImportError from here on

import torch  # noqa: E402
from datasets import Dataset  # noqa: E402
from huggingface_hub import HfApi, hf_hub_download  # noqa: E402
from peft import PeftModel  # noqa: E402
from transformers import (  # noqa: E402
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)


TOKEN = "hf_owner"


def control(**request):
    request = urllib.request.Request(f"{os.environ['HF_ENDPOINT']}/control", json.dumps(request).encode())
    urllib.request.urlopen(request).close()


def load(repo_id, **kwargs):
    return AutoModelForCausalLM.from_pretrained(repo_id, trust_remote_code=True, **kwargs).eval()


def attempt(function, *args, **kwargs):
    try:
        function(*args, **kwargs)
    except Exception as error:
        return [type(error).__name__, str(error)]


def agrees(model, expected):
    """Whether a model computes and writes what the published one did."""
    with torch.no_grad():
        difference = (model(input_ids=expected["ids"]).logits - expected["logits"]).abs().max().item()
    text = model.generate(
        input_ids=expected["ids"], max_new_tokens=8, do_sample=False, sampler="confidence", denoising_steps=2
    )
    return [difference, torch.equal(text, expected["text"])]


def run_card(repo_id, folder):
    """Runs the Python of a card from top to bottom, in a folder of its own, and returns what it printed."""
    card = Path(hf_hub_download(repo_id, "README.md")).read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", card, re.DOTALL | re.MULTILINE)
    folder.mkdir()
    printed = io.StringIO()
    with contextlib.chdir(folder), contextlib.redirect_stdout(printed):
        exec(compile("\n".join(blocks), repo_id, "exec"), {"__name__": "card"})
        saved = sorted(path.name for path in Path("my-model").iterdir())
    return {"num_blocks": len(blocks), "printed": printed.getvalue(), "saved": saved}


def fine_tune(model, tokenizer):
    rows = [tokenizer("import torch and transformers, nothing else" * 2)["input_ids"][:24]] * 8
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            "tuned",
            max_steps=2,
            per_device_train_batch_size=4,
            learning_rate=1e-2,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            hub_model_id="user/tuned",
            hub_token=TOKEN,
        ),
        train_dataset=Dataset.from_dict({"input_ids": rows}),
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        processing_class=tokenizer,
    )
    trainer.train()
    return trainer.push_to_hub().oid


def same_weights(model, other):
    return all(torch.equal(weight, other.get_parameter(name)) for name, weight in model.named_parameters())


def read(published, folder):
    os.chdir(folder)
    report = {"refusal": attempt(AutoModelForCausalLM.from_pretrained, "user/tiny")}
    tiny = torch.load(published / "tiny.pt")

    control(cut="download", down_after=True)
    report["cut_download"] = attempt(load, "user/tiny")
    control()
    control(cut="download")
    model = load("user/tiny")
    report["tiny"] = agrees(model, tiny)
    control(cut="download")
    large = Path(hf_hub_download("user/large", "large.bin")).read_bytes()
    report["large"] = [len(large), hashlib.sha256(large).hexdigest()]
    tokenizer = AutoTokenizer.from_pretrained("user/tiny")
    report["card"] = run_card("user/tiny", Path("card"))
    report["parts"] = agrees(load("user/parts"), tiny)
    report["parts_tokens"] = AutoTokenizer.from_pretrained("user/parts")("def main")["input_ids"]
    report["tiny_tokens"] = tokenizer("def main")["input_ids"]

    report["private"] = attempt(load, "user/checkpoint")
    report["private_stranger"] = attempt(load, "user/checkpoint", token="hf_stranger")
    report["private_owner"] = load("user/checkpoint", token=TOKEN).config.block_size

    adapter = torch.load(published / "adapter.pt")
    adapted = PeftModel.from_pretrained(load("user/tiny"), "user/adapter").eval()
    report["adapter"] = agrees(adapted, adapter)
    report["merged"] = agrees(adapted.merge_and_unload(), adapter)
    report["base"] = agrees(load("user/tiny"), adapter)
    report["adapter_card"] = run_card("user/adapter", Path("adapter_card"))

    before = load("user/tiny")
    first = fine_tune(model, tokenizer)
    report["tuned"] = [same_weights(load("user/tuned"), model), same_weights(model, before)]
    # Somebody else changes the repository, which this machine has in its cache.
    with torch.no_grad():
        model.lm_head.weight.add_(1.0)
    model.push_to_hub("user/tuned", token=TOKEN)
    model.push_to_hub("user/tuned", token=TOKEN, revision="draft")
    report["changed"] = same_weights(load("user/tuned"), model)
    report["branch"] = same_weights(load("user/tuned", revision="draft"), model)
    report["first"] = same_weights(load("user/tuned", revision=first), model)
    report["no_revision"] = attempt(load, "user/tuned", revision="nowhere")
    report["tuned_files"] = HfApi().list_repo_files("user/tuned")
    report["refused_push"] = attempt(model.push_to_hub, "user/tuned", token="hf_stranger")
    Path("report.json").write_text(json.dumps(report))


if __name__ == "__main__":
    read(Path(sys.argv[1]), Path(sys.argv[2]))
