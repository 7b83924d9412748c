"""The recipes of adapted families: each loss equals one written out by hand, and the likelihood stays the bound."""

import copy

import pytest
import torch
from adapted import adapted_lm, causal_lm
from conftest import DEVICE, random_model
from peft import LoraConfig, get_peft_model

from bd3lm_hf import BD3LMTrainer, BD3LMTrainingArguments, BlockDiffusionForMaskedLM, evaluate_likelihood


MASK = 22
# Two documents in the second row; the mask token is no part of a text.
LENGTH = 10
DOCUMENTS = [[0] * 10, [0] * 4 + [1] * 6]


def rows(number=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(MASK, (LENGTH,), generator=generator).tolist()} for _ in range(number)]


@pytest.fixture
def make_trainer(tmp_path):
    def make(model, train_dataset=None, **overrides):
        arguments = {
            "max_steps": 3,
            "per_device_train_batch_size": 4,
            "per_device_eval_batch_size": 4,
            "learning_rate": 1e-2,
            "lr_scheduler_type": "constant",
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": [],
            "use_cpu": DEVICE.type == "cpu",
            "disable_tqdm": True,
            "ema_decay": 0.0,
            **overrides,
        }
        arguments = BD3LMTrainingArguments(str(tmp_path), **arguments)
        return BD3LMTrainer(model, arguments, train_dataset=train_dataset or rows(), eval_dataset=rows(seed=1))

    return make


def positions_of(documents):
    return [index - documents.index(document) for index, document in enumerate(documents)]


def sees(query, key, documents, block_size, clean_attention):
    """Whether a token sees another; each is (is it noisy, its column)."""
    (query_is_noisy, i), (key_is_noisy, j) = query, key
    if documents[i] != documents[j]:
        return False
    positions = positions_of(documents)
    block, key_block = positions[i] // block_size, positions[j] // block_size
    if query_is_noisy:
        return block == key_block if key_is_noisy else key_block < block
    if key_is_noisy:
        return False
    return j <= i if clean_attention == "causal" else key_block <= block


def two_stream_logits(stock, x_t, x_0, documents, block_size, clean_attention):
    """Logits of the stock model over [x_t ; x_0], of one row [2 * length, vocab]."""
    tokens = [(True, i) for i in range(len(x_t))] + [(False, i) for i in range(len(x_0))]
    mask = [[sees(query, key, documents, block_size, clean_attention) for key in tokens] for query in tokens]
    mask = torch.zeros(len(tokens), len(tokens)).masked_fill(~torch.tensor(mask), -torch.inf)
    positions = torch.tensor([positions_of(documents) * 2])
    output = stock(torch.cat([x_t, x_0])[None], attention_mask=mask[None, None], position_ids=positions)
    return output.logits[0]


def nats(logits, token):
    return -logits.index_fill(-1, torch.tensor(MASK), -torch.inf).log_softmax(-1)[token]


def dense_loss(stock, config, noise, x_0, labels, documents, weight_of, autoregressive_weight=0.0):
    """The sum over masked tokens, one by one, divided by the number of those to be predicted."""
    total, num_predicted = 0.0, 0
    num_copies = noise.x_t.shape[1] // LENGTH
    for row, copies in enumerate(noise.x_t.unflatten(1, (num_copies, LENGTH))):
        positions = positions_of(documents[row])
        predicted = [i for i in range(LENGTH) if positions[i] > 0 and labels[row, i] != -100]
        num_predicted += len(predicted)
        for number, x_t in enumerate(copies):
            options = (documents[row], config.block_size, config.clean_attention)
            logits = two_stream_logits(stock, x_t, x_0[row], *options)
            for i in predicted:
                if x_t[i] != MASK:
                    continue
                is_first = positions[i] % config.block_size == 0
                place = i if not config.shift_logits else LENGTH + i - 1 if is_first else i - 1
                total = total + weight_of(row, number, i) * nats(logits[place], x_0[row, i])
            if number == 0:
                for i in predicted:
                    total = total + autoregressive_weight * nats(logits[LENGTH + i - 1], x_0[row, i])
    return total / num_predicted


RECIPES = {
    "nelbo": {},
    "nelbo, t of a row": {"noise_level_per": "row"},
    "nelbo, t of a document": {"noise_level_per": "document"},
    "uniform": {"loss_weight": "uniform"},
    "uniform, two copies": {"loss_weight": "uniform", "num_noise_samples": 2},
    "uniform, complementary": {"loss_weight": "uniform", "num_noise_samples": 2, "complementary_masks": True},
    "autoregressive": {"autoregressive_loss_weight": 0.7, "clean_attention": "causal"},
    "autoregressive, complementary": {
        "autoregressive_loss_weight": 0.7,
        "clean_attention": "causal",
        "loss_weight": "uniform",
        "num_noise_samples": 2,
        "complementary_masks": True,
    },
}


def weights_of(recipe, noise, documents, block_size):
    """Function (row, copy, column) -> the weight of a masked token, by the formula of the recipe."""
    block_of = []
    for row in documents:
        keys = list(zip(row, [position // block_size for position in positions_of(row)], strict=True))
        block_of.append([sorted(set(keys)).index(key) for key in keys])

    def weight_of(row, number, column):
        if recipe.get("loss_weight") == "uniform":
            # Each token is in one of two complementary copies; other copies are averaged.
            return 1 / (1 if recipe.get("complementary_masks") else recipe.get("num_noise_samples", 1))
        return 1 / noise.t[row, number, block_of[row][column]]

    return weight_of


@pytest.mark.parametrize("shift_logits", [True, False])
@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_the_loss_and_its_gradient_are_those_written_out_by_hand(make_trainer, recipe, shift_logits):
    source = causal_lm()
    stock = copy.deepcopy(source)
    model = BlockDiffusionForMaskedLM.from_causal_lm(
        source, block_size=3, mask_token_id=MASK, shift_logits=shift_logits
    )
    trainer = make_trainer(model, **recipe)
    drawn = []
    draw = trainer.noise_sampler.draw
    trainer.noise_sampler.draw = lambda *args, **kwargs: drawn.append(draw(*args, **kwargs)) or drawn[-1]
    x_0 = torch.tensor([row["input_ids"] for row in rows(2)])
    # The first row begins with a prompt.
    labels = x_0.clone()
    labels[0, :3] = -100
    inputs = trainer._with_labels({"input_ids": x_0, "labels": labels, "document_ids": torch.tensor(DOCUMENTS)})
    loss = trainer.compute_loss(model, inputs)
    loss.backward()
    (noise,) = drawn
    assert (noise.x_t == MASK).sum() > 4
    weight_of = weights_of(recipe, noise, DOCUMENTS, 3)
    autoregressive_weight = recipe.get("autoregressive_loss_weight", 0.0)
    expected = dense_loss(stock, model.config, noise, x_0, labels, DOCUMENTS, weight_of, autoregressive_weight)
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    for (name, parameter), stock_parameter in zip(model.named_parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(
            parameter.grad, stock_parameter.grad, rtol=1e-3, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_the_reported_likelihood_is_the_bound_whatever_is_trained(make_trainer):
    model = adapted_lm(block_size=3, clean_attention="causal")
    recipe = RECIPES["autoregressive, complementary"]
    nelbo = make_trainer(model).evaluate()["eval_nelbo"]
    trainer = make_trainer(model, **recipe)
    assert trainer.evaluate()["eval_nelbo"] == pytest.approx(nelbo, rel=1e-6)
    exact = evaluate_likelihood(model, [row["input_ids"] for row in rows(seed=1)], progress=False).nelbo
    assert nelbo == pytest.approx(exact, rel=0.2)
    interval = model.config.noise_interval
    trainer.args.eval_strategy, trainer.args.eval_steps = "steps", 1
    trainer.train()
    # The one that suits the bound is not searched for another loss.
    assert model.config.noise_interval == interval
    assert not any("noise_interval_beta" in entry for entry in trainer.state.log_history)


def test_the_causal_clean_stream_keeps_the_autoregressive_model(make_trainer):
    """Trained as both, the network scores as the stock class does what the clean stream scores."""
    model = adapted_lm(block_size=3)
    trainer = make_trainer(model, max_steps=12, **RECIPES["autoregressive"])
    text = torch.tensor([row["input_ids"] for row in rows()])

    def autoregressive_nats():
        with torch.no_grad():
            hidden = model.base_model(text, attention_mask=torch.ones_like(text)).last_hidden_state
            logits = model.lm_head(hidden)[:, :-1].index_fill(-1, torch.tensor(MASK), -torch.inf)
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), text[:, 1:].flatten()).item()

    before = autoregressive_nats()
    trainer.train()
    assert autoregressive_nats() < before - 0.2


def test_what_needs_a_causal_clean_stream_is_refused_without_it(make_trainer):
    with pytest.raises(ValueError, match="takes `clean_attention` 'causal'.* but got 0.5 with 'block'"):
        make_trainer(adapted_lm(), autoregressive_loss_weight=0.5)
    with pytest.raises(ValueError, match="`clean_attention` must be 'block' for a 'bd3lm'.* but got 'causal'"):
        make_trainer(random_model(), clean_attention="causal")
    with pytest.raises(ValueError, match="takes `clean_attention` 'causal'"):
        make_trainer(random_model(), autoregressive_loss_weight=0.5)
    x_0 = torch.tensor([rows()[0]["input_ids"]])
    with pytest.raises(ValueError, match="takes a `clean_attention` of 'causal', but got 1.0 with 'block'"):
        adapted_lm()(x_0, labels=x_0, autoregressive_loss_weight=1.0)
    with pytest.raises(ValueError, match="`autoregressive_loss_weight` must be at least 0, but got -1"):
        BD3LMTrainingArguments(autoregressive_loss_weight=-1)
    with pytest.raises(ValueError, match="`mask_token_learning_rate` must be at least 0.* but got -1"):
        BD3LMTrainingArguments(mask_token_learning_rate=-1)


@pytest.mark.parametrize("tie_word_embeddings", [True, False])
@pytest.mark.parametrize("optim", ["adamw_torch", "sgd"])
def test_the_mask_token_s_row_has_a_learning_rate_of_its_own(make_trainer, optim, tie_word_embeddings):
    def train(**options):
        torch.manual_seed(0)
        overrides = {"tie_word_embeddings": tie_word_embeddings}
        model = adapted_lm(block_size=3, overrides=overrides)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        options = {"max_steps": 1, "weight_decay": 0.1, "optim": optim, **options}
        make_trainer(model, **options).train()
        return {name: value - before[name] for name, value in model.state_dict().items()}

    change, faster = train(), train(mask_token_learning_rate=5e-2)
    embedding = "model.embed_tokens.weight"
    assert change[embedding][MASK].abs().max() > 0
    torch.testing.assert_close(faster[embedding][MASK], 5 * change[embedding][MASK], rtol=1e-3, atol=1e-6)
    for name in change:
        others = (
            torch.arange(len(change[name])) != MASK if name == embedding or name == "lm_head.weight" else slice(None)
        )
        torch.testing.assert_close(faster[name][others], change[name][others], rtol=0, atol=0)


def test_with_an_adapter_the_mask_token_s_row_is_trained_if_it_is_named(make_trainer):
    def adapter(**options):
        return LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM", **options)

    frozen = get_peft_model(adapted_lm(block_size=3), adapter())
    with pytest.raises(ValueError, match=r"`trainable_token_indices=\[22\]` trains it"):
        make_trainer(frozen, mask_token_learning_rate=0.1).train()

    def change(**options):
        torch.manual_seed(0)
        model = get_peft_model(adapted_lm(block_size=3), adapter(trainable_token_indices=[5, MASK]))
        before = model.get_input_embeddings().token_adapter.trainable_tokens_delta["default"].clone()
        make_trainer(model, max_steps=1, **options).train()
        return model.get_input_embeddings().token_adapter.trainable_tokens_delta["default"].detach() - before

    plain, faster = change(), change(mask_token_learning_rate=3e-2)
    torch.testing.assert_close(faster[1], 3 * plain[1], rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(faster[0], plain[0], rtol=0, atol=0)


def test_checkpointed_activations_give_the_same_training(make_trainer):
    weights = []
    for checkpointing in (False, True):
        model = adapted_lm(block_size=3)
        make_trainer(model, gradient_checkpointing=checkpointing, **RECIPES["autoregressive, complementary"]).train()
        weights.append(model.state_dict())
    torch.testing.assert_close(*weights, rtol=0, atol=1e-6)
    assert model.is_gradient_checkpointing


def test_blocks_grow_from_1_and_the_optimizer_goes_on(make_trainer):
    model = adapted_lm(block_size=1)
    trainer = make_trainer(model, block_size_schedule={0: 1, 2: 2, 4: 5}, max_steps=6)
    sizes, optimizers = [], []
    compute_loss = trainer.compute_loss

    def noted(model, *args, **kwargs):
        sizes.append(trainer.config.block_size)
        optimizers.append(trainer.optimizer)
        return compute_loss(model, *args, **kwargs)

    trainer.compute_loss = noted
    trainer.train()
    assert sizes == [1, 1, 2, 2, 5, 5] and model.config.block_size == 5
    assert len({id(optimizer) for optimizer in optimizers}) == 1
    assert {int(state["step"]) for state in trainer.optimizer.state.values()} == {6}
