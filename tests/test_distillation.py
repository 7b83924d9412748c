"""Distillation from an autoregressive teacher: its loss and gradients by dense passes, its noise by enumeration."""

import copy
import itertools
import math

import pytest
import torch
from adapted import adapted_lm, byte_tokenizer, causal_lm
from adapted_cases import MASK, adapt, close, dense_scores, random_ids, stock_model
from conftest import random_model
from peft import LoraConfig, get_peft_model
from test_adapted_distribution import SMALL, flattened, small_pair
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bd3lm_hf.training import distillation, divergence
from bd3lm_hf.training.distillation import BD3LMDistillationArguments, BD3LMDistillationTrainer
from bd3lm_hf.training.divergence import token_divergences


def rows_of(ids, **columns):
    return [
        {"input_ids": row, **{name: values[index] for name, values in columns.items()}}
        for index, row in enumerate(ids.tolist())
    ]


def trainer_of(model, folder, dataset, teacher=None, **arguments):
    fields = {"use_cpu": True, "report_to": [], "fix_noise_interval": True, "ema_decay": 0.0, "disable_tqdm": True}
    fields |= {"per_device_train_batch_size": 2, "max_steps": 2, "save_strategy": "no", "learning_rate": 1e-3}
    args = BD3LMDistillationArguments(str(folder), **{**fields, **arguments})
    return BD3LMDistillationTrainer(model, args, train_dataset=dataset, teacher=teacher)


def loss_of(trainer, batch):
    """The loss of one batch, with the noise that the model met."""
    met = {}
    # As the first batch of its step.
    trainer._noised_step = None
    handle = trainer.model.register_forward_pre_hook(lambda module, args, kwargs: met.update(kwargs), with_kwargs=True)
    loss, outputs = trainer.compute_loss(trainer.model.train(), trainer._with_labels(batch), return_outputs=True)
    handle.remove()
    return loss, outputs, met


def without_mask_token(scores, mask=MASK):
    return torch.cat([scores[..., :mask], scores[..., mask + 1 :]], dim=-1).log_softmax(-1)


def dense_divergence(student, teacher, kind, top_k):
    """KL of two log-probabilities [vocab], the teacher's likeliest `top_k` one by one."""
    if top_k is not None:
        chosen = teacher.argsort(descending=True)[:top_k].tolist()
        others = [i for i in range(len(teacher)) if i not in chosen]
        student, teacher = (torch.cat([p[chosen], p[others].logsumexp(0)[None]]) for p in (student, teacher))
    first, second = (teacher, student) if kind == "forward" else (student, teacher)
    return (first.exp() * (first - second)).sum()


def dense_loss(stock, teacher, config, met, kind, top_k):
    """The same loss by passes of the stock class, a block at a time."""
    x_t, x_0, weights, total = met["input_ids"], met["clean_input_ids"], met["loss_weights"], 0.0
    for row in range(len(x_0)):
        target = without_mask_token(teacher(x_0[row : row + 1]).logits[0].detach())
        for start in range(0, x_0.shape[1], config.block_size):
            columns = range(max(start, 1), min(start + config.block_size, x_0.shape[1]))
            masked = [i for i in columns if x_t[row, i] == config.mask_token_id]
            if masked:
                scores = dense_scores(stock, config, x_t[row, None], x_0[row, None], start // config.block_size)
                scores = without_mask_token(scores)
                for i in masked:
                    parts = (scores[i - start], target[i - 1], kind, top_k)
                    total = total + weights[row, i] * dense_divergence(*parts)
    return total / (len(x_0) * (x_0.shape[1] - 1))


@pytest.mark.parametrize(
    ("variant", "kind", "top_k"),
    [
        ({"shift_logits": True}, "forward", None),
        ({"shift_logits": False}, "reverse", None),
        ({"shift_logits": True, "clean_attention": "causal"}, "forward", 3),
        ({"shift_logits": True}, "reverse", 3),
    ],
)
def test_loss_and_gradients_are_those_of_dense_passes(variant, kind, top_k, tmp_path):
    stock, model, ids = stock_model("llama"), adapt("llama", **variant), random_ids(3, 14)
    arguments = {"divergence": kind, "teacher_top_k": top_k, "masking": "exact_count"}
    trainer = trainer_of(model, tmp_path, rows_of(ids), stock_model("gpt2", seed=3), **arguments)
    loss, _, met = loss_of(trainer, {"input_ids": ids})
    expected = dense_loss(stock, stock_model("gpt2", seed=3), model.config, met, kind, top_k)
    close(loss, expected)
    loss.backward()
    expected.backward()
    gradients = {name: parameter.grad for name, parameter in stock.named_parameters()}
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], atol=2e-5, rtol=2e-4)
    assert all(parameter.grad is None for parameter in trainer.teacher.network.parameters())


def test_the_clean_stream_learns_from_the_teacher_too(tmp_path):
    model, ids = adapt("llama", clean_attention="causal"), random_ids(2, 10)
    teacher = stock_model("gpt2", seed=3)
    losses = [
        loss_of(
            trainer_of(copy.deepcopy(model), tmp_path, rows_of(ids), copy.deepcopy(teacher), **arguments),
            {"input_ids": ids},
        )[0]
        for arguments in ({"autoregressive_loss_weight": 0.5}, {})
    ]
    with torch.no_grad():
        one, other = (without_mask_token(part(ids).logits[:, :-1]) for part in (stock_model("llama"), teacher))
    expected = (other.exp() * (other - one)).sum() / 18
    close(losses[0] - losses[1], 0.5 * expected)


def test_documents_and_padding_are_read_by_the_teacher_as_alone(tmp_path):
    model, texts = adapt("llama"), [random_ids(1, length, seed=length) for length in (6, 5, 8)]
    trainer = trainer_of(model, tmp_path, rows_of(random_ids(2, 8)), stock_model("gemma3", seed=3))
    alone = [trainer.teacher.states(text)[0] for text in texts]
    packed = torch.cat([*texts[:2], torch.zeros(1, 2, dtype=torch.long)], dim=1)
    mask, documents = torch.tensor([[1] * 11 + [0] * 2]), torch.tensor([[1] * 6 + [2] * 5 + [0] * 2])
    states = trainer.teacher.states(packed, attention_mask=mask, document_ids=documents)[0]
    close(states[:6], alone[0])
    close(states[6:11], alone[1])


# the noise


def enumerated_divergence(stock, teacher, config, ids):
    """sum over blocks and k of 1 / k E_{|M| = k} sum over M of KL, in nats of the whole text."""
    total, size, x_0 = 0.0, config.block_size, torch.tensor([ids])
    target = without_mask_token(teacher(x_0).logits[0], config.mask_token_id)
    for start in range(0, len(ids), size):
        positions = [i for i in range(start, min(start + size, len(ids))) if i > 0]
        for k in range(1, len(positions) + 1):
            for masked in itertools.combinations(positions, k):
                x_t = x_0.clone()
                x_t[0, list(masked)] = config.mask_token_id
                scores = without_mask_token(dense_scores(stock, config, x_t, x_0, start // size), config.mask_token_id)
                parts = [dense_divergence(scores[i - start], target[i - 1], "forward", None) for i in masked]
                total += sum(parts).item() / (k * math.comb(len(positions), k))
    return total


@pytest.mark.parametrize("masking", ["bernoulli", "exact_count"])
@torch.no_grad()
def test_the_mean_over_the_noise_is_the_enumerated_divergence(masking, tmp_path):
    stock, model = small_pair(True, "block")
    teacher = flattened(stock_model("llama", seed=9, **SMALL))
    ids = [0, 2, 1, 1, 2]
    expected = enumerated_divergence(stock, copy.deepcopy(teacher), model.config, ids)
    batch = torch.tensor([ids]).expand(4000, -1)
    arguments = {"masking": masking, "noise_interval": [0.001, 1.0], "antithetic_sampling": False}
    trainer = trainer_of(model, tmp_path, rows_of(batch[:2]), teacher, **arguments)
    totals = loss_of(trainer, {"input_ids": batch})[1].token_nelbo.double().sum(-1)
    error = totals.std() / len(totals) ** 0.5
    assert abs(totals.mean() - expected) < 4 * error and error < 0.05 * expected
    # Another weight is told from it.
    teacher = flattened(stock_model("llama", seed=9, **SMALL))
    uniform = trainer_of(model, tmp_path, rows_of(batch[:2]), teacher, loss_weight="uniform", **arguments)
    totals = loss_of(uniform, {"input_ids": batch})[1].token_nelbo.double().sum(-1)
    assert abs(totals.mean() - expected) > 8 * totals.std() / len(totals) ** 0.5


def test_fewer_tokens_never_make_more_divergence():
    states, teacher = torch.randn(2, 40, 6, generator=torch.Generator().manual_seed(0)).unbind(0)
    head = torch.nn.Linear(6, 9)
    pair = ((states, head), (teacher * 3, head))
    for kind in ("forward", "reverse"):
        whole = token_divergences(*pair, 8, kind)
        for top_k in (1, 3, 6):
            assert (token_divergences(*pair, 8, kind, top_k) <= whole + 1e-6).all()
        # The mask token is the rest then.
        close(token_divergences(*pair, 8, kind, 8), whole)


# memory


class LargestLogits(TorchDispatchMode):
    """The most rows of a tensor whose last size is that of the vocabulary, and which is no weight of a head."""

    def __init__(self, vocab_size, hidden_sizes):
        super().__init__()
        self.vocab_size, self.hidden_sizes, self.most = vocab_size, hidden_sizes, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            shape = tuple(getattr(tensor, "shape", ()))
            if len(shape) > 1 and shape[-1] == self.vocab_size and shape[0] not in self.hidden_sizes:
                self.most = max(self.most, math.prod(shape[:-1]))
        return output


def test_logits_of_all_tokens_are_never_there(tmp_path, monkeypatch):
    model, ids = adapt("llama"), random_ids(8, 40)
    trainer = trainer_of(model, tmp_path, rows_of(ids), stock_model("gpt2", seed=3), masking="exact_count")
    results = []
    for chunk in (10 * 2 * 67, 2**24):
        monkeypatch.setattr(divergence, "CHUNK_NUMEL_ON_CPU", chunk)
        model.zero_grad()
        with LargestLogits(67, {32}) as largest:
            loss = loss_of(trainer, {"input_ids": ids})[0]
            loss.backward()
        results.append((largest.most, loss.detach(), model.lm_head.weight.grad.clone()))
    assert results[0][0] == 10 and results[1][0] > 100
    close(results[0][1], results[1][1])
    close(results[0][2], results[1][2])


# the teacher


def test_by_default_the_model_learns_from_what_it_was(tmp_path):
    model, ids = adapt("llama", block_size=1), random_ids(4, 12)
    trainer = trainer_of(model, tmp_path, rows_of(ids))
    # At block size 1 it is the teacher.
    assert loss_of(trainer, {"input_ids": ids})[0].abs() < 1e-6
    with torch.no_grad():
        model.lm_head.weight.mul_(0.5)
    assert loss_of(trainer, {"input_ids": ids})[0] > 0.1
    adapted = get_peft_model(
        adapt("llama", block_size=1), LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    )
    trainer = trainer_of(adapted, tmp_path, rows_of(ids))
    assert trainer.teacher.network is adapted.get_base_model()
    loss = loss_of(trainer, {"input_ids": ids})[0]
    with torch.no_grad():
        close(trainer.teacher.states(ids), stock_model("llama").model(ids).last_hidden_state)
    loss.backward()
    assert loss > 1e-3 and adapted.training
    assert all(parameter.grad is not None for name, parameter in adapted.named_parameters() if "lora" in name)


# rollouts


def test_rollouts_are_the_student_s_own_and_end_where_texts_end(tmp_path):
    model, ids = adapt("llama"), random_ids(4, 16)
    options = {"do_sample": False, "sampler": "confidence"}
    text = model.generate(ids[:, :5], max_new_tokens=11, seed=0, **options)
    end = int(text[0, 9])
    arguments = {"on_policy_fraction": 1.0, "rollout_prompt_length": 5, "per_device_train_batch_size": 4}
    arguments["rollout_arguments"] = {**options, "eos_token_id": end}
    trainer = trainer_of(model, tmp_path, rows_of(ids), **arguments)
    batch = trainer._rolled_out({"input_ids": ids}, 0)
    for row, whole in enumerate(text.tolist()):
        length = whole.index(end, 5) + 1 if end in whole[5:] else len(whole)
        assert batch["input_ids"][row, :length].tolist() == whole[:length]
        assert batch["labels"][row].tolist()[5:length] == whole[5:length]
        assert (batch["labels"][row, :5] == -100).all() and (batch["labels"][row, length:] == -100).all()
        assert batch["attention_mask"][row].sum() == length
    assert trainer.train().training_loss > 0


def test_a_share_of_the_batches_is_written_by_the_student(tmp_path):
    model, ids = adapt("llama"), random_ids(64, 12)
    trainer = trainer_of(model, tmp_path, rows_of(ids), on_policy_fraction=0.25, rollout_prompt_length=4)
    batches = [trainer._rolled_out({"input_ids": ids[:1]}, index) for index in range(48)]
    share = sum("labels" in batch for batch in batches) / len(batches)
    assert 0.1 < share < 0.4
    again = [trainer._rolled_out({"input_ids": ids[:1]}, index) for index in range(48)]
    assert all(torch.equal(one["input_ids"], other["input_ids"]) for one, other in zip(batches, again, strict=True))


# runs


RUN = {
    "per_device_train_batch_size": 4,
    "max_steps": 6,
    "save_strategy": "steps",
    "save_steps": 3,
    "learning_rate": 3e-3,
}
RUN |= {
    "on_policy_fraction": 0.5,
    "rollout_prompt_length": 4,
    "block_size_schedule": ["0:1", "2:4"],
    "save_total_limit": None,
}


@pytest.mark.parametrize("with_lora", [False, True])
def test_a_resumed_run_is_the_run_that_went_on(with_lora, tmp_path):
    def begin(folder):
        model = adapt("llama", seed=1)
        if with_lora:
            torch.manual_seed(0)
            model = get_peft_model(model, LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
        return trainer_of(model, folder, rows_of(random_ids(24, 16)), stock_model("gpt2", seed=3), **RUN)

    whole = begin(tmp_path / "whole")
    before = copy.deepcopy(whole.model.state_dict())
    whole.train()
    resumed = begin(tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    changed = 0
    for name, weights in whole.model.state_dict().items():
        assert torch.equal(weights, resumed.model.state_dict()[name])
        changed += not torch.equal(weights, before[name])
    assert changed > 4 and whole.config.block_size == 4


def test_training_brings_the_student_nearer_to_the_teacher(tmp_path):
    teacher = flattened(stock_model("llama", seed=9, **SMALL))
    model = small_pair(True, "block")[1]
    data = torch.randint(3, (64, 12), generator=torch.Generator().manual_seed(0))
    arguments = {"max_steps": 40, "per_device_train_batch_size": 16, "learning_rate": 1e-2}
    trainer = trainer_of(model, tmp_path, rows_of(data), teacher, **arguments)
    with torch.no_grad():
        before = loss_of(trainer, {"input_ids": data})[0]
    trainer.train()
    trainer.state.global_step = 0
    with torch.no_grad():
        assert loss_of(trainer, {"input_ids": data})[0] < 0.5 * before


def test_what_can_t_be_distilled_is_refused(tmp_path):
    for name, value in (
        ("divergence", "both"),
        ("teacher_top_k", 0),
        ("on_policy_fraction", 2),
        ("rollout_prompt_length", 0),
    ):
        with pytest.raises(ValueError, match=f"`{name}` must be"):
            BD3LMDistillationArguments(str(tmp_path), **{name: value})
    with pytest.raises(ValueError, match="`torch_compile` must be False"):
        BD3LMDistillationArguments(str(tmp_path), torch_compile=True)
    rows = rows_of(random_ids(2, 12))
    with pytest.raises(ValueError, match="`teacher` must be given"):
        trainer_of(adapt("llama", shift_logits=False), tmp_path, rows)
    with pytest.raises(ValueError, match="`teacher` must be given"):
        trainer_of(random_model(), tmp_path, rows_of(random_ids(2, 12).clamp(max=20)))
    trainer = trainer_of(adapt("llama"), tmp_path, rows, on_policy_fraction=1.0, rollout_prompt_length=12)
    with pytest.raises(ValueError, match="`rollout_prompt_length` must be less than.*12"):
        trainer.train()
    trainer = trainer_of(adapt("llama"), tmp_path, rows, on_policy_fraction=1.0, rollout_prompt_length=4)
    padded = {"input_ids": random_ids(2, 12), "attention_mask": torch.arange(12).ge(2).long().expand(2, 12)}
    with pytest.raises(ValueError, match="padded on the right.* begins with 0 tokens"):
        trainer._rolled_out(padded, 0)
    assert distillation.STEPS_OF_A_RUN > 0


def test_a_teacher_of_another_vocabulary_is_refused(tmp_path):
    rows = rows_of(random_ids(2, 12))
    # 66 ids are those of text, and the last of the mask token.
    trainer_of(adapt("llama"), tmp_path, rows, stock_model("llama", vocab_size=66))
    with pytest.raises(ValueError, match="`teacher` must have the 66 ids .* got one of 65"):
        trainer_of(adapt("llama"), tmp_path, rows, stock_model("llama", vocab_size=65))
    tokenizer = byte_tokenizer("<more>", "<mask>")
    args = BD3LMDistillationArguments(str(tmp_path), use_cpu=True, report_to=[])
    for name, tokens in (("same", ["<more>"]), ("other", ["<less>", "<more>"])):
        others, folder = byte_tokenizer(*tokens), str(tmp_path / name)
        others.save_pretrained(folder)
        causal_lm(vocab_size=len(others)).save_pretrained(folder)
        model = adapted_lm(overrides={"vocab_size": len(tokenizer)}, block_size=4)
        options = {"train_dataset": rows, "processing_class": tokenizer, "teacher": folder}
        if name == "same":
            BD3LMDistillationTrainer(model, args, **options)
        else:
            with pytest.raises(ValueError, match="`teacher` must have the tokenizer.* 1 tokens have other ids"):
                BD3LMDistillationTrainer(model, args, **options)
