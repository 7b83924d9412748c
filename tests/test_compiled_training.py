"""The static training step has the loss of the plain one, whatever a batch holds, and never waits for the device."""

import copy
import functools

import pytest
import torch
from adapted import adapted_lm
from adapted_cases import adapt
from conftest import random_model
from simulated_gpu import GpuTensor, SimulatedGpu
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import TrainerCallback

from bd3lm_hf.kernels import compiled
from bd3lm_hf.kernels.compiled import compile_training, step_of, uncompile_training, usual_room
from bd3lm_hf.modeling.two_stream_block_diffusion import TextBlocks
from bd3lm_hf.noise.sampler import NoiseSampler


LENGTH, MASK = 26, 22
# Not a whole number of blocks of 4.
X_0 = torch.randint(MASK, (3, LENGTH), generator=torch.Generator().manual_seed(1))
COLUMNS = torch.arange(LENGTH)
TEXTS = {
    "whole": {},
    "left_padding": {"attention_mask": (COLUMNS >= torch.tensor([[0], [5], [11]])).long()},
    "right_padding": {"attention_mask": (COLUMNS < torch.tensor([[18], [13], [2]])).long()},
    "packed": {"document_ids": (COLUMNS >= torch.tensor([[7], [18], [1]])).long()},
    "prompts": {"labels": X_0.masked_fill(COLUMNS < torch.tensor([[3], [9], [25]]), -100)},
}
GEMMA = {"head_dim": 8, "attn_implementation": "eager"}
MODELS = {
    "bd3lm": lambda: random_model(attn_implementation="sdpa"),
    "bd3lm_eager": lambda: random_model(attn_implementation="eager"),
    "bd3lm_told_the_time": lambda: random_model(attn_implementation="sdpa", time_conditioning=True),
    "bd3lm_without_adaln": lambda: random_model(attn_implementation="sdpa", adaln=False),
    "adapted": lambda: adapted_lm(shift_logits=False, block_size=4),
    "adapted_shifted": lambda: adapted_lm(shift_logits=True, block_size=4),
    "adapted_noisy": lambda: adapted_lm(shift_logits="noisy", block_size=4),
    "adapted_causal": lambda: adapted_lm(clean_attention="causal", block_size=4),
    "adapted_granite": lambda: adapted_lm(model_type="granite", overrides={"logits_scaling": 4.0}, block_size=4),
    "adapted_gemma": lambda: adapted_lm(model_type="gemma2", overrides=GEMMA, block_size=4),
}
# Norms of heads and a tied head, two types of layers, fused projections, and a table of positions.
SHAPES = ["llama", "qwen3", "gemma3", "gpt_neox", "gpt2"]
MODELS |= {name: functools.partial(adapt, name) for name in SHAPES}
SAMPLERS = {
    "nelbo": NoiseSampler(),
    "uniform": NoiseSampler(loss_weight="uniform"),
    "exact_count": NoiseSampler(masking="exact_count", antithetic=False),
    "complementary": NoiseSampler(num_copies=2, complementary=True),
    "three_copies": NoiseSampler(num_copies=3),
}


def noised(model, text="whole", sampler="nelbo", seed=0):
    """A batch with noise drawn elsewhere, as the trainer gives it to a model, and how many tokens are masked."""
    inputs = {"labels": X_0, **TEXTS[text]}
    blocks = TextBlocks.of_batch(model.config, X_0, **inputs)
    noise = SAMPLERS[sampler].draw(model.config, (0.1, 0.9), X_0, blocks, range(3), 3, (seed,))
    return {**inputs, **noise.inputs(X_0), "num_items_in_batch": 7}, noise.num_masked


def loss_and_gradients(model, inputs, seed=0):
    torch.manual_seed(seed)
    model.zero_grad()
    output = model.train()(**inputs)
    output.loss.backward()
    return output, {name: value.grad for name, value in model.named_parameters() if value.grad is not None}


def assert_same(model, inputs, expected_inputs=None, seed=0):
    """The step of a model has the loss, and the gradients, that it has without one."""
    output, gradients = loss_and_gradients(model, inputs, seed)
    step = compiled._STEPS.pop(model)
    expected, wanted = loss_and_gradients(model, inputs if expected_inputs is None else expected_inputs, seed)
    compiled._STEPS[model] = step
    torch.testing.assert_close(output.loss, expected.loss)
    torch.testing.assert_close(output.token_nelbo, expected.token_nelbo, rtol=1e-4, atol=1e-5)
    assert expected.loss > 0 and gradients.keys() == wanted.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("text", TEXTS)
def test_the_static_step_has_the_loss_and_the_gradients_of_the_plain_one(name, text):
    model = MODELS[name]()
    compile_training(model, backend=None)
    inputs, num_masked = noised(model, text)
    assert_same(model, {**inputs, "num_masked": num_masked}, inputs)
    # Noise that is drawn inside.
    assert_same(model, {"input_ids": X_0, "labels": X_0, **TEXTS[text]})


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("name", ["bd3lm", "adapted_shifted"])
def test_so_it_has_for_every_way_to_mask_and_to_weigh(name, sampler):
    model = MODELS[name]()
    step = compile_training(model, backend=None)
    inputs, num_masked = noised(model, "prompts", sampler)
    masked = (inputs["input_ids"] == MASK).sum()
    assert num_masked == masked
    assert_same(model, {**inputs, "num_masked": num_masked}, inputs)
    assert all(room <= inputs["input_ids"].numel() for room in step.rooms.values())


@pytest.mark.parametrize("name", ["bd3lm", "adapted"])
def test_it_composes_with_gradient_checkpointing(name):
    model = MODELS[name]()
    compile_training(model, backend=None)
    inputs, _ = noised(model)
    expected, wanted = loss_and_gradients(model, inputs)
    wanted = {name: gradient.clone() for name, gradient in wanted.items()}
    model.gradient_checkpointing_enable()
    output, gradients = loss_and_gradients(model, inputs)
    torch.testing.assert_close(output.loss, expected.loss)
    for key, gradient in gradients.items():
        torch.testing.assert_close(gradient, wanted[key], rtol=1e-3, atol=1e-4, msg=key)


def test_dropout_is_on():
    model = random_model(attn_implementation="sdpa", hidden_dropout=0.5)
    compile_training(model, backend=None)
    inputs, num_masked = noised(model)
    losses = {
        loss_and_gradients(model, {**inputs, "num_masked": num_masked}, seed)[0].loss.item() for seed in range(3)
    }
    assert len(losses) == 3


# Room for masked tokens.


@pytest.mark.parametrize("name", ["bd3lm", "adapted_shifted", "gemma3"])
def test_a_batch_with_more_masked_tokens_than_usual_is_counted_and_loses_none(monkeypatch, caplog, name):
    monkeypatch.setattr(compiled, "ROOM_MULTIPLE", 1)
    monkeypatch.setattr(compiled, "NUM_STANDARD_DEVIATIONS", -3)
    model = MODELS[name]()
    step = compile_training(model, backend=None)
    inputs, num_masked = noised(model)
    room = usual_room(model.config, X_0.numel())
    assert 0 < room < num_masked
    assert_same(model, {**inputs, "num_masked": num_masked}, inputs)
    assert step.num_overflows == 1 and min(step.rooms.values()) >= num_masked
    assert f"{num_masked} masked tokens of {X_0.numel()}" in caplog.text
    assert_same(model, {**inputs, "num_masked": num_masked}, inputs)
    assert step.num_overflows == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bd3lm", "adapted_shifted"])
def test_such_a_batch_is_one_more_compilation_and_those_after_it_none(monkeypatch, name):
    monkeypatch.setattr(compiled, "ROOM_MULTIPLE", 1)
    torch._dynamo.reset()
    counters.clear()
    model = MODELS[name]()
    step, graphs = compile_training(model, backend="aot_eager"), []
    for seed, deviations in ((0, 6), (1, -3), (1, 6)):
        monkeypatch.setattr(compiled, "NUM_STANDARD_DEVIATIONS", deviations)
        # As if the law of another schedule had not foreseen this batch.
        if deviations < 0:
            step.rooms.clear()
        inputs, num_masked = noised(model, seed=seed)
        assert_same(model, {**inputs, "num_masked": num_masked}, inputs)
        graphs.append((step.num_overflows, counters["stats"]["unique_graphs"]))
    assert graphs == [(0, 1), (1, 2), (1, 2)] and not counters["graph_break"]


def test_without_room_tokens_would_be_missing(monkeypatch):
    """What the test above would see."""
    model = MODELS["bd3lm"]()
    compile_training(model, backend=None)
    inputs, num_masked = noised(model)
    monkeypatch.setattr(compiled.TrainingStep, "room", lambda *args: num_masked - 1)
    with pytest.raises(AssertionError, match="not close"):
        assert_same(model, {**inputs, "num_masked": num_masked}, inputs)


@pytest.mark.parametrize(
    ("schedule", "interval", "block_size"),
    [("loglinear", (0.001, 1.0), 4), ("cosine", (0.3, 0.8), 16), ("square", (0.001, 1.0), 512)],
)
def test_usual_batches_have_room(schedule, interval, block_size):
    """In 200 batches of 8 rows none is beyond, though half the margin, drawn so often, would have been."""
    torch.manual_seed(0)
    changes = {"noise_schedule": schedule, "noise_interval": interval, "block_size": block_size}
    model = random_model(attn_implementation="sdpa", max_position_embeddings=512, **changes).train()
    step, x_0 = compile_training(model, backend=None), torch.zeros(8, 512, dtype=torch.long)
    blocks = TextBlocks.of_batch(model.config, x_0, x_0)
    numbers = [model._draw_noise(x_0, blocks, None, 0).num_masked for _ in range(200)]
    room = usual_room(model.config, x_0.numel())
    assert max(numbers) < room < x_0.numel()
    mean, deviation = torch.tensor(numbers).double().mean(), torch.tensor(numbers).double().std()
    assert room - mean < 12 * deviation + 128
    assert step.num_overflows == 0


def test_intervals_that_are_chosen_in_training_share_few_rooms():
    """As a search goes from one interval to the next, of equal and of other mean."""
    shape = torch.Size((8, 512))
    model = random_model(attn_implementation="sdpa", max_position_embeddings=512, block_size=4)
    step, rooms, usual = compile_training(model, backend=None), [], []
    for beta in (0.001, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5):
        model.config.noise_interval = (beta, 1.0)
        usual.append(usual_room(model.config, shape.numel()))
        rooms.append(step.room(model.config, shape, 1))
    assert all(room >= least for room, least in zip(rooms, usual, strict=True))
    assert all(room <= least + shape.numel() / 8 for room, least in zip(rooms, usual, strict=True))
    assert rooms[0] == usual[0] and len({*usual}) > 7 and len({*rooms}) == 4
    assert step.num_overflows == 0


def test_noise_drawn_on_the_host_is_that_of_the_model():
    model = random_model(attn_implementation="sdpa", time_conditioning=True).train()
    blocks = TextBlocks.of_batch(model.config, X_0, X_0)
    torch.manual_seed(3)
    expected = model._draw_noise(X_0, blocks, None, 0)
    compile_training(model, backend=None)
    torch.manual_seed(3)
    noise = model._draw_noise(X_0, blocks, None, 0)
    assert noise.num_masked == (noise[0] == MASK).sum()
    for found, wanted in zip(noise, expected, strict=True):
        torch.testing.assert_close(found, wanted)


# One graph.


def graphs_of(model, batches):
    torch._dynamo.reset()
    counters.clear()
    step = compile_training(model, backend="aot_eager")
    for inputs, expected_inputs, seed in batches:
        assert_same(model, inputs, expected_inputs, seed)
    assert not counters["graph_break"] and step.num_overflows == 0
    return counters["stats"]["unique_graphs"]


def in_turn(names, texts=TEXTS):
    """Each of the names with one of the texts, and each text with some."""
    texts = [*texts]
    return [(name, texts[index % len(texts)]) for index, name in enumerate(names)]


ADAPTED = ["adapted_shifted", *SHAPES]
MANY = [*in_turn(ADAPTED), *in_turn(SHAPES, ["packed", "left_padding"])]
FEW = [("bd3lm", "packed"), ("gemma3", "left_padding")]


@pytest.mark.parametrize(
    ("name", "text"), FEW + [pytest.param(*case, marks=pytest.mark.slow) for case in {*MANY} - {*FEW}]
)
def test_three_steps_of_different_noise_are_one_graph(name, text):
    model = MODELS[name]()
    batches = []
    for seed in range(1, 4):
        inputs, num_masked = noised(model, text, seed=seed)
        inputs["num_items_in_batch"] = 7 + seed
        batches.append(({**inputs, "num_masked": num_masked}, inputs, seed))
    assert len({inputs["num_masked"] for inputs, _, _ in batches}) == 3
    assert graphs_of(model, batches) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "text"),
    [("bd3lm_told_the_time", "left_padding"), ("adapted", "whole"), ("adapted_causal", "packed"), ("bd3lm", "whole")],
)
def test_so_they_are_with_other_models_and_texts(name, text):
    inputs = {"input_ids": X_0, "labels": X_0, **TEXTS[text]}
    assert graphs_of(MODELS[name](), [(inputs, None, seed) for seed in range(3)]) == 1


@pytest.mark.slow
@pytest.mark.parametrize(("name", "checkpointing"), [("bd3lm", False), ("adapted_shifted", True)])
def test_inductor_has_the_same_losses_and_gradients(name, checkpointing):
    torch._dynamo.reset()
    model = MODELS[name]()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    compile_training(model)
    for seed in range(3):
        inputs, num_masked = noised(model, seed=seed)
        assert_same(model, {**inputs, "num_masked": num_masked}, inputs)


def test_too_many_shapes_run_uncompiled(monkeypatch):
    monkeypatch.setattr(compiled, "MOST_SHAPES", 1)
    runs = []

    def backend(graph, example_inputs):
        runs.append(len(runs))
        return graph

    torch._dynamo.reset()
    model = MODELS["bd3lm"]()
    step = compile_training(model, backend=backend)
    assert_same(model, {"input_ids": X_0, "labels": X_0})
    assert len(runs) == len(step.shapes) == 1
    shorter = X_0[:, :16].contiguous()
    assert_same(model, {"input_ids": shorter, "labels": shorter})
    assert len(runs) == len(step.shapes) == 1


# The host does not wait.


class Waits(TorchDispatchMode):
    """Notes what makes the host wait for the simulated GPU: values that it reads, and shapes that depend on values."""

    NAMES = ("_local_scalar_dense", "nonzero", "masked_select", "masked_scatter", "_unique2", "unique_dim", "item")

    def __init__(self):
        super().__init__()
        self.found, self.num_operations = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.split("::")[1].rstrip("_")
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        is_on_gpu = any(isinstance(tensor, GpuTensor) for tensor in tensors)
        by_flags = name in ("index", "index_put", "_index_put_impl") and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        self.num_operations += is_on_gpu
        if is_on_gpu and (name in self.NAMES or by_flags):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("name", "text"),
    [(name, text) for name in ("bd3lm", "adapted_shifted") for text in TEXTS]
    + in_turn(SHAPES)
    + in_turn(SHAPES[::-1]),
)
def test_the_host_never_waits_for_the_device(name, text):
    model = MODELS[name]()
    given, num_masked = noised(model, text)
    drawn = {"input_ids": X_0, "labels": X_0, **TEXTS[text]}
    for inputs in ({**given, "num_masked": num_masked}, drawn):
        with SimulatedGpu():
            on_gpu = copy.deepcopy(model).to("cuda").train()
            # Of the first batches the ids are looked at.
            on_gpu._num_checks_left = 0
            compile_training(on_gpu, backend=None)
            inputs = {key: value.to("cuda") if torch.is_tensor(value) else value for key, value in inputs.items()}
            with Waits() as waits:
                on_gpu(**inputs).loss.backward()
            assert waits.num_operations > 100 and waits.found == []


def test_such_waits_are_found():
    """The plain step, which looks for the masked tokens."""
    with SimulatedGpu():
        model = MODELS["bd3lm"]().to("cuda").train()
        with Waits() as waits:
            model(X_0.to("cuda"), labels=X_0.to("cuda")).loss.backward()
    assert {"index", "masked_scatter", "_local_scalar_dense"} <= {*waits.found}


# Who trains by it.


def test_a_model_that_is_wrapped_or_copied():
    from peft import LoraConfig, get_peft_model

    model = MODELS["bd3lm"]()
    wrapped = torch.nn.DataParallel(get_peft_model(model, LoraConfig(target_modules=["q_proj"])))
    step = compile_training(wrapped, backend=None)
    assert step_of(model) is step_of(wrapped) is step
    assert step_of(copy.deepcopy(model)) is None
    uncompile_training(wrapped)
    assert step_of(model) is None


def test_a_model_of_another_kind_is_refused():
    with pytest.raises(ValueError, match="`model` must be a block diffusion language model, but got Linear"):
        compile_training(torch.nn.Linear(2, 2))


@pytest.fixture
def process_group():
    """One process that is a group of its own, as `accelerate launch` makes them."""
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def drawn_losses(model, forward):
    """The loss and a gradient of three steps."""
    found = []
    for seed in range(3):
        torch.manual_seed(seed)
        model.zero_grad()
        loss = forward(input_ids=X_0, labels=X_0).loss
        loss.backward()
        gradient = model.model.layers[0].mlp.up_proj.weight.grad
        gradient = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
        found.append(torch.cat([loss.detach()[None], gradient.flatten()]))
    return torch.stack(found)


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_several_processes_train_by_it(kind, process_group):
    """DDP by the graph, FSDP2 by the step that is not compiled."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = MODELS["bd3lm"]().train()
    expected = drawn_losses(model, model)
    if kind == "ddp":
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
    else:
        mesh = init_device_mesh("cpu", (1,))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        wrapped = fully_shard(model, mesh=mesh)
    cuts = []

    def backend(graph, example_inputs):
        cuts.append(torch._dynamo.config.optimize_ddp)
        return graph

    step = compile_training(wrapped, backend=backend if kind == "ddp" else None)
    assert step_of(model) is step
    torch.testing.assert_close(drawn_losses(model, wrapped), expected, rtol=1e-4, atol=1e-5)
    assert step.rooms and cuts == [False] * (kind == "ddp")


# The trainer.


def trained(tmp_path, **changes):
    """The losses of a short run, the step that the model had in it, and the model."""
    from bd3lm_hf import BD3LMTrainer, BD3LMTrainingArguments

    rows = [
        {"input_ids": row} for row in torch.randint(22, (12, 32), generator=torch.Generator().manual_seed(0)).tolist()
    ]
    arguments = {"max_steps": 3, "logging_steps": 1, "report_to": [], "use_cpu": True, "save_strategy": "no"}
    arguments |= {"per_device_train_batch_size": 4, "learning_rate": 1e-2, "disable_tqdm": True, "ema_decay": 0}
    args = BD3LMTrainingArguments(str(tmp_path), **arguments, **changes)
    trainer = BD3LMTrainer(random_model(attn_implementation="sdpa"), args, train_dataset=rows)
    steps = []

    class Looking(TrainerCallback):
        def on_step_end(self, *arguments, model=None, **kwargs):
            steps.append(step_of(model))

    trainer.add_callback(Looking())
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert step_of(trainer.model) is None
    return losses, steps


@pytest.mark.parametrize("changes", [{}, {"masking": "exact_count"}, {"num_noise_samples": 2}], ids=str)
def test_the_trainer_takes_the_step_on_an_accelerator_and_has_the_same_losses(tmp_path, monkeypatch, changes):
    from bd3lm_hf import BD3LMTrainingArguments
    from bd3lm_hf.training import callbacks

    expected, steps = trained(tmp_path / "plain", **changes)
    assert steps == [None] * 3
    # On this machine there is none.
    monkeypatch.setattr(BD3LMTrainingArguments, "compiles_step", property(lambda self: self.torch_compile is None))
    monkeypatch.setattr(callbacks, "compile_training", lambda model, backend, mode: compile_training(model, None))
    losses, steps = trained(tmp_path / "static", **changes)
    assert losses == pytest.approx(expected, abs=1e-5)
    # What the host counted came to it: there is less room than tokens.
    (room,) = steps[0].rooms.values()
    assert len({id(step) for step in steps}) == 1 and room <= 4 * 32 * changes.get("num_noise_samples", 1)
    losses, steps = trained(tmp_path / "refused", torch_compile=False, **changes)
    assert losses == expected and steps == [None] * 3
