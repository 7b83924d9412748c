"""Fewer steps: the losses of a sampler's path and of confidence (CAP) by dense passes, and what they bring."""

import copy
import itertools

import pytest
import torch
from adapted_cases import MASK, adapt, close, dense_scores, random_ids, stock_model
from conftest import random_model
from peft import LoraConfig, get_peft_model
from test_adapted_distribution import SMALL
from test_distillation import dense_divergence, loss_of, rows_of, trainer_of, without_mask_token

from bd3lm_hf import BD3LMTrainer, BD3LMTrainingArguments, BlockDiffusionForMaskedLM
from bd3lm_hf.hub import training_summary
from bd3lm_hf.hub.model_card import create_model_card
from bd3lm_hf.hub.published_files import is_repo_id
from bd3lm_hf.hub.training_summary import TrainingSummary
from bd3lm_hf.training.distillation import BD3LMDistillationArguments, BD3LMDistillationTrainer
from bd3lm_hf.training.few_steps import BD3LMFewStepArguments, BD3LMFewStepTrainer
from bd3lm_hf.training.rollouts import own_texts


FIELDS = {"use_cpu": True, "report_to": [], "fix_noise_interval": True, "ema_decay": 0.0, "disable_tqdm": True}
FIELDS |= {"per_device_train_batch_size": 2, "max_steps": 2, "save_strategy": "no", "learning_rate": 1e-3}


def few_steps(model, folder, dataset, teacher=None, **arguments):
    args = BD3LMFewStepArguments(str(folder), **{**FIELDS, **arguments})
    return BD3LMFewStepTrainer(model, args, train_dataset=dataset, teacher=teacher)


def masked_blocks(met, config):
    """Row, first column and masked columns of each block with a masked token."""
    x_t, size = met["input_ids"], config.block_size
    for row in range(len(x_t)):
        for start in range(0, x_t.shape[1], size):
            columns = range(max(start, 1), min(start + size, x_t.shape[1]))
            masked = [i for i in columns if x_t[row, i] == config.mask_token_id]
            if masked:
                yield row, start, masked


@torch.no_grad()
def path(teacher, config, x_t, x_0, start, masked, num_steps):
    """{column: what the teacher predicts for it as it reveals it}: the surest of the block, a token per pass."""
    x_t, left, found = x_t.clone(), list(masked), {}
    for _ in range(num_steps):
        scores = without_mask_token(dense_scores(teacher, config, x_t, x_0, start // config.block_size))
        found |= {i: scores[i - start] for i in left}
        if left:
            surest = max(left, key=lambda i: scores[i - start].max().item())
            # The mask token, which is no prediction, is the last one.
            x_t[0, surest] = scores[surest - start].argmax()
            left.remove(surest)
    return found


def dense_path_loss(stock, teacher, config, met, kind, num_steps):
    x_t, x_0, weights, total = met["input_ids"], met["clean_input_ids"], met["loss_weights"], 0.0
    for row, start, masked in masked_blocks(met, config):
        texts = (x_t[row, None], x_0[row, None])
        targets = path(teacher, config, *texts, start, masked, num_steps)
        scores = without_mask_token(dense_scores(stock, config, *texts, start // config.block_size))
        for i in masked:
            total = total + weights[row, i] * dense_divergence(scores[i - start], targets[i], kind, None)
    return total / (len(x_0) * (x_0.shape[1] - 1))


@pytest.mark.parametrize(
    ("variant", "kind", "num_steps"),
    [
        ({"shift_logits": True}, "forward", None),
        ({"shift_logits": False}, "reverse", 2),
        ({"shift_logits": True, "clean_attention": "causal"}, "forward", 3),
    ],
)
def test_loss_and_gradients_of_a_path_are_those_of_dense_passes(variant, kind, num_steps, tmp_path):
    stock, model, ids = stock_model("llama"), adapt("llama", **variant), random_ids(3, 14)
    arguments = {"divergence": kind, "path_steps": num_steps, "masking": "exact_count"}
    trainer = few_steps(model, tmp_path, rows_of(ids), adapt("llama", seed=3, **variant), **arguments)
    loss, _, met = loss_of(trainer, {"input_ids": ids})
    teacher = stock_model("llama", seed=3)
    expected = dense_path_loss(stock, teacher, model.config, met, kind, num_steps or 4)
    close(loss, expected)
    # Another number of steps is told from it.
    other = dense_path_loss(stock, teacher, model.config, met, kind, 1)
    assert (expected - other).abs() > 100 * (expected - loss).abs()
    loss.backward()
    expected.backward()
    gradients = {name: parameter.grad for name, parameter in stock.named_parameters()}
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], atol=2e-5, rtol=2e-4)
    assert all(parameter.grad is None for parameter in trainer.teacher.network.parameters())


GREEDY = {"sampler": "confidence", "do_sample": False, "tokens_per_step": 1}


def write(model, prompts, num_new, **options):
    options = {**GREEDY, "attention_mask": torch.ones_like(prompts), "max_new_tokens": num_new, **options}
    return model.eval().generate(prompts, **options)


def test_the_path_is_what_generate_writes(tmp_path):
    model = adapt("llama")
    prompts, documents = random_ids(4, 4), torch.tensor([[1] * 8 + [2] * 12]).expand(4, -1)
    text = write(model, prompts, 16)
    trainer = few_steps(model, tmp_path, rows_of(text))
    inputs = {"input_ids": text, "labels": text}
    trainer._x_t = text.masked_fill(torch.arange(20) >= 4, MASK)
    tokens = trainer.teacher.logits(next(trainer._lessons(inputs)))[:, :MASK].argmax(-1).view(4, 16)
    assert torch.equal(tokens, text[:, 4:])
    # Two noised copies, of which one has less to go.
    trainer._x_t = torch.cat([trainer._x_t, text.masked_fill(torch.arange(20) >= 17, MASK)], dim=1)
    states = next(trainer._lessons(inputs))
    tokens = trainer.teacher.logits(states)[:, :MASK].argmax(-1).view(4, 19)
    assert torch.equal(tokens[:, :16], text[:, 4:])
    assert torch.equal(tokens[:, 16:], write(model, text[:, :17], 3)[:, 17:])
    # Other blocks, other paths: the first token of a document is not predicted, and the blocks start there.
    trainer._x_t = text.masked_fill(torch.arange(20) >= 9, MASK)
    tokens = trainer.teacher.logits(next(trainer._lessons({**inputs, "document_ids": documents})))[:, :MASK].argmax(-1)
    alone = write(model, text[:, 8:9], 3)
    assert torch.equal(tokens.view(4, 11)[:, :3], alone[:, 1:])


def test_a_step_learns_what_several_reveal(tmp_path):
    fields = {**SMALL, "hidden_size": 32, "head_dim": 16}
    model = BlockDiffusionForMaskedLM.from_causal_lm(stock_model("llama", seed=8, **fields), 4, mask_token_id=3)
    before = copy.deepcopy(model)
    ids = torch.tensor(list(itertools.product(range(3), repeat=4))).repeat(2, 2)
    arguments = {"max_steps": 100, "per_device_train_batch_size": 27, "learning_rate": 3e-3}
    trainer = few_steps(model, tmp_path, rows_of(ids), noise_interval=[0.95, 1.0], **arguments)
    trainer.train()
    prompts = ids[:81, :4]
    slow, *fast = (
        write(part, prompts, 4, tokens_per_step=number, pad_token_id=0)[:, 4:]
        for part, number in ((before, 1), (before, 4), (model, 4))
    )
    shares = [(part == slow).float().mean() for part in fast]
    assert shares[1] > shares[0] + 0.1, shares


def test_own_texts_are_those_of_one_token_per_forward_to_their_end():
    model, ids = adapt("llama"), random_ids(5, 20)
    lengths = (20, 14, 20, 20, 14)
    rows = [{"input_ids": row[:length]} for row, length in zip(ids.tolist(), lengths, strict=True)]
    end = int(write(model, ids[:1, :4], 16)[0, 9])
    texts = own_texts(model, rows, 4, batch_size=2, eos_token_id=end)
    for row, length, text in zip(ids, lengths, texts, strict=True):
        whole = write(model, row[None, :4], length - 4)[0].tolist()
        whole = whole[: whole.index(end, 4) + 1] if end in whole[4:] else whole
        assert text == {"input_ids": whole, "labels": [-100] * 4 + whole[4:]}
    with pytest.raises(ValueError, match="`prompt_length` must be .* got 14 for a row of 14 tokens"):
        own_texts(model, rows, 14)


def test_who_learns_its_own_texts_writes_them_in_fewer_forwards(tmp_path):
    model = adapt("llama")
    prompts = random_ids(8, 16)[:, :8]
    slow, before = (write(model, prompts, 8, tokens_per_step=number) for number in (1, 2))
    rows = own_texts(model, rows_of(random_ids(8, 16)), 8, eos_token_id=None)
    fields = {"max_steps": 40, "per_device_train_batch_size": 8, "learning_rate": 3e-3}
    args = BD3LMTrainingArguments(str(tmp_path), **{**FIELDS, **fields})
    BD3LMTrainer(model, args, train_dataset=rows).train()
    after = write(model, prompts, 8, tokens_per_step=2)
    shares = [(part == slow)[:, 8:].float().mean() for part in (before, after)]
    assert shares[1] > shares[0] + 0.3, shares


def test_by_default_the_teacher_is_the_model_as_it_was_under_adapters_too(tmp_path):
    ids = random_ids(2, 12)
    adapter = LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    adapted = get_peft_model(adapt("llama"), adapter)
    losses = []
    for model, teacher in ((adapted, None), (copy.deepcopy(adapted), adapt("llama"))):
        trainer = few_steps(model, tmp_path, rows_of(ids), teacher)
        loss = loss_of(trainer, {"input_ids": ids})[0]
        loss.backward()
        losses.append(loss.detach())
        assert all(part.grad is not None for name, part in model.named_parameters() if "lora" in name)
    close(losses[0], losses[1])
    assert losses[0] > 1e-3 and trainer.model.training


# confidence-aware training


def dense_confidence(stock, config, met):
    """Weighted -log p of the masked tokens, and weighted entropies of those whose likeliest token is right."""
    x_t, x_0, weights = met["input_ids"], met["clean_input_ids"], met["loss_weights"]
    nats, entropies, num_right = 0.0, 0.0, 0
    for row, start, masked in masked_blocks(met, config):
        texts = (x_t[row, None], x_0[row, None])
        scores = without_mask_token(dense_scores(stock, config, *texts, start // config.block_size))
        for i in masked:
            log_probs, target = scores[i - start], x_0[row, i]
            nats = nats - weights[row, i] * log_probs[target]
            if log_probs.argmax() == target:
                entropies, num_right = entropies - weights[row, i] * (log_probs.exp() * log_probs).sum(), num_right + 1
    num_tokens = len(x_0) * (x_0.shape[1] - 1)
    return nats / num_tokens, entropies / num_tokens, num_right


@pytest.fixture(scope="module")
def own_text():
    """What the model writes, which it predicts right now and then."""
    return write(adapt("llama"), random_ids(4, 4), 16)


def test_loss_and_gradients_of_confidence_are_those_of_dense_passes(own_text, tmp_path):
    stock, model = stock_model("llama"), adapt("llama")
    args = BD3LMTrainingArguments(str(tmp_path), **FIELDS, masking="exact_count", confidence_loss_weight=2.0)
    trainer = BD3LMTrainer(model, args, train_dataset=rows_of(own_text))
    loss, _, met = loss_of(trainer, {"input_ids": own_text})
    nats, entropies, num_right = dense_confidence(stock, model.config, met)
    num_masked = int((met["input_ids"] == MASK).sum())
    assert 5 < num_right < num_masked - 5
    expected = nats + 2.0 * entropies
    close(loss, expected)
    loss.backward()
    expected.backward()
    gradients = {name: parameter.grad for name, parameter in stock.named_parameters()}
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], atol=2e-5, rtol=2e-4)
    assert "token_nats" not in vars(model)


def test_confidence_counts_beside_a_teacher_and_not_in_the_clean_stream(own_text, tmp_path):
    parts = []
    for weight in (0.0, 1.0):
        model, teacher = adapt("llama", clean_attention="causal"), stock_model("gpt2", seed=3)
        fields = {**FIELDS, "confidence_loss_weight": weight, "autoregressive_loss_weight": 0.5}
        args = BD3LMDistillationArguments(str(tmp_path), **fields)
        trainer = BD3LMDistillationTrainer(model, args, train_dataset=rows_of(own_text), teacher=teacher)
        loss, _, met = loss_of(trainer, {"input_ids": own_text})
        parts.append(loss.detach())
    with torch.no_grad():
        _, entropies, num_right = dense_confidence(stock_model("llama"), model.config, met)
    close(parts[1] - parts[0], entropies)
    assert num_right > 5


def test_what_has_no_path_is_refused(tmp_path):
    for name, value in (("path_steps", 0), ("autoregressive_loss_weight", 1.0), ("confidence_loss_weight", -1.0)):
        with pytest.raises(ValueError, match=f"`{name}` must be"):
            BD3LMFewStepArguments(str(tmp_path), **{name: value})
    with pytest.raises(ValueError, match="`torch_compile` must be False with `confidence_loss_weight`"):
        BD3LMTrainingArguments(str(tmp_path), confidence_loss_weight=1.0, torch_compile=True)
    rows = rows_of(random_ids(2, 12).clamp(max=20))
    with pytest.raises(ValueError, match="`teacher` must be a block diffusion model.*LlamaForCausalLM"):
        few_steps(adapt("llama"), tmp_path, rows, stock_model("llama"))
    with pytest.raises(ValueError, match="`mask_token_id` of the teacher must be 66, as the student's, but got 65"):
        other = BlockDiffusionForMaskedLM.from_causal_lm(stock_model("llama"), block_size=4, mask_token_id=65)
        few_steps(adapt("llama"), tmp_path, rows, other)
    with pytest.raises(ValueError, match="`time_conditioning` must be False"):
        few_steps(random_model(time_conditioning=True), tmp_path, rows)
    with pytest.raises(ValueError, match="`args` must be BD3LMFewStepArguments"):
        BD3LMFewStepTrainer(adapt("llama"), BD3LMDistillationArguments(str(tmp_path)), train_dataset=rows)


def test_a_published_network_learns_its_path_too(tmp_path):
    model, ids = random_model(), random_ids(4, 12).clamp(max=15)
    trainer = few_steps(model, tmp_path, rows_of(ids), max_steps=2)
    assert trainer.train().training_loss > 0


# the card


def test_the_card_names_the_recipe_and_its_teacher(tmp_path, monkeypatch):
    # On the Hub is what has the form of an id.
    monkeypatch.setattr(training_summary, "is_on_hub", is_repo_id)
    ids = random_ids(4, 12)
    for begin, teacher, words in (
        (trainer_of, "them/llama", "Teacher: [them/llama](https://huggingface.co/them/llama)."),
        (trainer_of, str(tmp_path / "folder"), "Teacher: a model that is not named."),
        (few_steps, None, "Teacher: the model that training went on from."),
    ):
        model = None
        if teacher is not None:
            model = stock_model("gpt2", seed=3)
            model.config._name_or_path = teacher
        trainer = begin(adapt("llama"), tmp_path, rows_of(ids), model, divergence="reverse", max_steps=1)
        assert "Teacher:" not in card_of(trainer)
        trainer.train()
        card = card_of(trainer)
        assert words in card and "| `divergence` | reverse |" in card and str(tmp_path) not in card
        assert ("self-distillation through time" in card) == (begin is few_steps)
    args = BD3LMTrainingArguments(str(tmp_path), **{**FIELDS, "confidence_loss_weight": 0.5, "max_steps": 1})
    plain = BD3LMTrainer(adapt("llama"), args, train_dataset=rows_of(ids))
    plain.train()
    assert "Teacher:" not in card_of(plain) and "| `confidence_loss_weight` | 0.5 |" in card_of(plain)


def card_of(trainer):
    return str(create_model_card(TrainingSummary.from_trainer(trainer), "me/mine"))
