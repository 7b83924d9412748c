"""
Captured denoising steps, with a CPU in the GPU's place: what would be a graph runs the step again on the same buffers.

Whether a step may be captured is looked at as well: it waits for nothing and asks for nothing whose shape depends on
values. What only a GPU shows is in tests/test_gpu.py.
"""

import gc
import weakref

import pytest
import simulated_gpu
import torch
from adapted import adapted_lm
from adapted_cases import adapt
from conftest import random_model
from simulated_gpu import GpuTensor, SimulatedGpu
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import CompileConfig, LogitsProcessor, LogitsProcessorList, StaticCache

from bd3lm_hf.kernels import cuda_graphs, detached
from bd3lm_hf.kernels.cuda_layers import fast_network
from bd3lm_hf.modeling.denoising_block_diffusion import Denoiser, RowProgress
from bd3lm_hf.modeling.prediction_block_diffusion import TokenPredictor


SAMPLERS = {
    "first_hitting": {},
    "nucleus": {"top_p": 0.8, "top_k": 12, "min_p": 0.01, "temperature": 0.9},
    "repetition": {"repetition_penalty": 1.3},
    "greedy": {"do_sample": False},
    "ancestral": {"sampler": "ancestral", "denoising_steps": 3},
    "steps": {"sampler": "confidence", "denoising_steps": 2},
    "threshold": {"sampler": "confidence", "confidence_threshold": 0.4},
    "margin": {"sampler": "confidence", "confidence": "margin", "tokens_per_step": 2},
    "sequential": {"sampler": "sequential", "tokens_per_step": 2},
    "entropy_bound": {"sampler": "entropy_bound", "entropy_bound": 1.0},
    "ends": {"eos_token_id": [3, 4]},
}
NETWORKS = {
    "published": lambda: random_model(attn_implementation="sdpa", eos_token_id=None),
    "time-conditioned": lambda: random_model(attn_implementation="sdpa", eos_token_id=None, time_conditioning=True),
    "adapted, shifted": lambda: adapted_lm(block_size=4),
    "adapted, causal": lambda: adapted_lm(block_size=4, clean_attention="causal"),
    "adapted": lambda: adapted_lm(block_size=4, shift_logits=False),
    "sliding windows": lambda: adapt("gemma3").eval(),
}


class Reruns:
    """In the place of graphs: counts what is captured and what is replayed."""

    captured = replayed = 0

    def capture(self, function, pool, device):
        self.captured += 1

        def replay():
            self.replayed += 1
            function()

        return replay


@pytest.fixture
def graphs(monkeypatch):
    reruns = Reruns()
    monkeypatch.setattr(cuda_graphs, "DEVICES", ("cpu",))
    monkeypatch.setattr(cuda_graphs, "capture", reruns.capture)
    monkeypatch.setattr(cuda_graphs, "new_pool", lambda: None)
    monkeypatch.setattr(cuda_graphs, "warm_up", lambda function, device: function())
    # The CPU's own nucleus is no processor of Transformers.
    monkeypatch.setattr("bd3lm_hf.kernels.cpu.with_selecting_nucleus", lambda processors: processors)
    # As on a GPU, where the host does not look at tensors.
    monkeypatch.setattr(Denoiser, "waits_for", ())
    return reruns


def prompts(width=7, rows=2, seed=0):
    return torch.randint(5, 20, (rows, width), generator=torch.Generator().manual_seed(seed))


def generated(model, input_ids, **arguments):
    return model.generate(input_ids, **{"max_new_tokens": 21, "seed": 3, "pad_token_id": 0, **arguments})


def static(model, ids, **arguments):
    return generated(model, ids, cache_implementation="static", **arguments)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("network", NETWORKS)
def test_captured_steps_give_the_tokens_of_the_dynamic_cache(network, sampler, graphs):
    model, ids = NETWORKS[network](), prompts()
    padded = {"attention_mask": torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7])}
    for text in ({}, padded) if sampler in ("first_hitting", "steps", "ends") else ({},):
        expected = generated(model, ids, **SAMPLERS[sampler], **text)
        assert torch.equal(static(model, ids, **SAMPLERS[sampler], **text), expected)
        # The graphs of the first call, and buffers with what it left there.
        assert torch.equal(static(model, ids, **SAMPLERS[sampler], **text), expected)
    assert graphs.captured >= 2 and graphs.replayed > 5


@pytest.mark.parametrize("network", NETWORKS)
def test_passes_that_share_masks_give_the_tokens_of_plain_ones(network, graphs):
    """With a dynamic cache: of one text, of padded rows, after the context, and of a cache that is given again."""
    model, ids = NETWORKS[network](), prompts()
    padded = {"attention_mask": torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7])}
    for text in ({}, padded, {"max_new_tokens": 60}, {"use_cache": False}, {"do_sample": False, "new_block": True}):
        found = generated(model, ids, **text, return_dict_in_generate=True)
        whole = {"input_ids": found.sequences, "attention_mask": torch.ones_like(found.sequences)}
        again = generated(model, **whole, cache=found.cache) if text == {} else None
        with detached():
            assert torch.equal(found.sequences, generated(model, ids, **text))
            assert again is None or torch.equal(again, generated(model, **whole))
    assert graphs.captured == 0


def test_calls_of_one_shape_share_graphs_and_others_get_their_own(graphs):
    model = NETWORKS["published"]()
    static(model, prompts())
    assert graphs.captured == 2
    for ids in (prompts(seed=1), prompts(9, seed=2)):
        assert torch.equal(static(model, ids), generated(model, ids))
    assert graphs.captured == 2
    for count, (ids, arguments) in enumerate([(prompts(rows=3), {}), (prompts(), {"top_k": 5})], 2):
        assert torch.equal(static(model, ids, **arguments), generated(model, ids, **arguments))
        assert graphs.captured == 2 * count


def test_what_one_call_left_does_not_reach_the_next(graphs):
    model, ids = NETWORKS["adapted, shifted"](), prompts()
    expected = generated(model, ids)
    static(model, ids)
    (steps,) = cuda_graphs._STEPS[model].values()
    for layer in steps.cache.layers:
        assert not layer.keys.any() and not layer.values.any() and layer.cumulative_length == 0
    for own in steps._owners():
        for _, buffer in cuda_graphs.tensors_in(vars(own)):
            buffer.fill_(1)
    steps.first_logits.fill_(torch.nan)
    assert torch.equal(static(model, ids), expected)


def test_new_weights_in_their_old_places_are_read(graphs):
    model, other, ids = NETWORKS["published"](), random_model(1, "sdpa", eos_token_id=None), prompts()
    first = static(model, ids)
    model.load_state_dict(other.state_dict())
    found = static(model, ids)
    assert graphs.captured == 2 and torch.equal(found, generated(other, ids)) and not torch.equal(found, first)


def test_weights_in_new_places_are_captured_anew(graphs):
    model, ids = NETWORKS["published"](), prompts()
    static(model, ids)
    model.lm_head.weight = torch.nn.Parameter(-model.lm_head.weight.detach())
    assert torch.equal(static(model, ids), generated(model, ids)) and graphs.captured == 4


def test_a_returned_cache_is_the_callers_own(graphs):
    model, ids = NETWORKS["published"](), prompts()
    first = static(model, ids, return_dict_in_generate=True)
    assert graphs.captured == 2 and isinstance(first.cache, StaticCache)
    kept = [layer.keys.clone() for layer in first.cache.layers]
    forwards = first.num_forward_passes.clone()
    static(model, prompts(seed=1))
    assert all(torch.equal(layer.keys, keys) for layer, keys in zip(first.cache.layers, kept))
    assert torch.equal(first.num_forward_passes, forwards) and forwards.tolist() == [21, 21]
    longer = first.cache.layers[0].max_cache_len
    assert longer >= 28 + 8
    continued = generated(model, first.sequences, past_key_values=first.cache)
    assert torch.equal(continued, generated(model, first.sequences))


def test_a_call_within_a_call_has_buffers_of_its_own(graphs):
    model, ids = NETWORKS["published"](), prompts(rows=1)

    class Nested:
        found = []

        def put(self, value):
            if len(self.found) < 3:
                self.found.append(static(model, prompts(rows=1, seed=1)))

        def end(self):
            pass

    expected, inner = generated(model, ids), generated(model, prompts(rows=1, seed=1))
    assert torch.equal(static(model, ids, streamer=Nested()), expected)
    assert len(Nested.found) == 3 and all(torch.equal(found, inner) for found in Nested.found)


def test_a_call_that_failed_leaves_nothing_and_keeps_nothing_from_the_next(graphs):
    model, ids = NETWORKS["adapted, shifted"](), prompts(rows=1)

    class Failing:
        num_put = 0

        def put(self, value):
            self.num_put += 1
            if self.num_put == 4:
                raise RuntimeError("no more")

    expected = generated(model, ids)
    with pytest.raises(RuntimeError, match="no more"):
        static(model, ids, streamer=Failing())
    assert graphs.captured == 2
    replayed = graphs.replayed
    assert torch.equal(static(model, ids), expected)
    assert graphs.captured == 2 and graphs.replayed > replayed


def test_a_step_that_cannot_be_recorded_is_taken_without_and_said(graphs, monkeypatch):
    said = []
    monkeypatch.setattr(cuda_graphs.logger, "warning_once", said.append)

    def capture(function, pool, device):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(cuda_graphs, "capture", capture)
    model, ids = NETWORKS["published"](), prompts()
    expected = generated(model, ids)
    assert torch.equal(static(model, ids), expected) and torch.equal(static(model, ids), expected)
    assert {*said} == {said[0]} and "not permitted when stream is capturing" in said[0]


def test_weights_that_autocast_has_cast_are_no_part_of_a_graph(graphs):
    """It keeps them until it ends; a graph that had read them would find others, or none."""
    model, ids = NETWORKS["adapted"](), prompts()
    with torch.autocast("cpu", torch.bfloat16):
        expected = generated(model, ids)
        first = static(model, ids)
        with torch.no_grad():
            model.lm_head.weight.neg_()
            changed = static(model, ids)
    assert torch.is_autocast_cache_enabled() and graphs.captured == 2
    assert torch.equal(first, expected) and not torch.equal(changed, expected)


def test_graphs_are_freed_with_the_model(graphs):
    model = NETWORKS["published"]()
    static(model, prompts())
    (steps,) = cuda_graphs._STEPS[model].values()
    freed = [weakref.ref(model), weakref.ref(steps)]
    assert not [name for name in vars(model) if "graph" in name or "steps" in name]
    del model, steps
    gc.collect()
    assert [reference() for reference in freed] == [None, None]


class Halving(LogitsProcessor):
    def __call__(self, input_ids, scores):
        return scores / 2


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"logits_processor": LogitsProcessorList([Halving()])}, "a Halving is among the processors"),
        ({"sampler": "ancestral", "denoising_steps": 3, "remask_cap": 0.5}, "AncestralSampler"),
        ({"output_scores": True, "return_dict_in_generate": True}, "scores, logits"),
        ({"guidance_scale": 1.5}, "guidance"),
        ({"sampler": "confidence", "repetition_penalty": 1.2}, "several tokens at once"),
    ],
)
def test_what_cannot_be_captured_is_generated_without_and_said(arguments, reason, graphs, monkeypatch):
    said = []
    monkeypatch.setattr(cuda_graphs.logger, "warning_once", said.append)
    model, ids = NETWORKS["published"](), prompts()
    found, expected = static(model, ids, **arguments), generated(model, ids, **arguments)
    if not torch.is_tensor(found):
        found, expected = found.sequences, expected.sequences
    assert torch.equal(found, expected)
    assert graphs.captured == 0 and len(said) == 1 and reason in said[0]


def test_a_hooked_model_is_not_captured(graphs):
    model, calls = NETWORKS["published"](), []
    model.model.layers[0].register_forward_hook(lambda *_: calls.append(1))
    assert torch.equal(static(model, prompts()), generated(model, prompts()))
    assert graphs.captured == 0 and len(calls) == 2 * 21


class Watch(TorchDispatchMode):
    """Lists the operations that wait for the device, or give a tensor whose shape depends on values."""

    WAITS = (
        "_local_scalar_dense",
        "nonzero",
        "masked_select",
        "unique",
        "_unique2",
        "unique_consecutive",
        "is_nonzero",
    )
    VIEWS = ("view", "slice", "transpose", "unsqueeze", "expand", "select", "t", "split", "split_with_sizes", "unbind")

    def __init__(self):
        super().__init__()
        self.waits, self.num_launches = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.split("::")[1]
        indices = args[1] if name.startswith("index") and isinstance(args[1], (list, tuple)) else ()
        has_flags = any(index is not None and index.dtype == torch.bool for index in indices)
        if name in self.WAITS or has_flags:
            self.waits.append(name)
        self.num_launches += name not in self.VIEWS
        return func(*args, **(kwargs or {}))


@pytest.fixture
def watched_steps(monkeypatch):
    """List of a [`Watch`] for each step."""
    watches, step = [], Denoiser.step

    def watched(self, task):
        watches.append(Watch())
        with watches[-1]:
            step(self, task)

    monkeypatch.setattr(Denoiser, "step", watched)
    return watches


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("network", ["published", "adapted, shifted"])
def test_steps_wait_for_nothing(network, sampler, cache, graphs, watched_steps):
    arguments = {} if cache == "dynamic" else {"cache_implementation": "static"}
    generated(NETWORKS[network](), prompts(), **SAMPLERS[sampler], **arguments)
    assert len(watched_steps) > 5
    assert [watch.waits for watch in watched_steps] == [[]] * len(watched_steps)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_how_often_the_host_looks_at_a_block(sampler, cache, graphs, monkeypatch):
    """Before it, for the number of its steps, and after it; where predictions decide on that, after each step."""
    watches, num_steps = [], []

    def watched(cls, name, begins):
        method = getattr(cls, name)

        def within(self, *arguments):
            if begins:
                watches.append(Watch())
                num_steps.append(0)
            with watches[-1]:
                return method(self, *arguments)

        monkeypatch.setattr(cls, name, within)

    watched(Denoiser, "denoise_block", True)
    watched(RowProgress, "finish_block", False)
    show = Denoiser._show

    def shown(self, *arguments):
        num_steps[-1] += 1
        show(self, *arguments)

    monkeypatch.setattr(Denoiser, "_show", shown)
    arguments = {} if cache == "dynamic" else {"cache_implementation": "static"}
    generated(NETWORKS["published"](), prompts(), **SAMPLERS[sampler], **arguments)
    assert len(watches) > 5
    looks = [1 + number if sampler in ("threshold", "entropy_bound") else 1 for number in num_steps]
    assert [watch.waits for watch in watches] == [["_local_scalar_dense"] * (number + 1) for number in looks]


class OnDeviceAlone(TorchDispatchMode):
    """Refuses what the recording of a graph refuses: to wait, and to bring something from the CPU or to it."""

    BRINGS = ("copy_", "_to_copy", "index", "index_put_", "_index_put_impl_")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.split("::")[1]
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        is_on_cpu = [not isinstance(tensor, GpuTensor) for tensor in tensors]
        # A number is a part of the graph, a list of them is not.
        is_list = name == "lift_fresh" and args[0].dim() > 0
        if is_list or (name in Watch.WAITS and not all(is_on_cpu)) or (name in self.BRINGS and any(is_on_cpu)):
            raise RuntimeError(f"operation not permitted when stream is capturing: {func}")
        return func(*args, **(kwargs or {}))


@pytest.fixture
def simulated_graphs(graphs, monkeypatch):
    """As `graphs`, with the simulated GPU, on which a step is taken under the rules of a recording."""
    monkeypatch.setattr(cuda_graphs, "DEVICES", ("cpu", "cuda"))
    monkeypatch.setattr(GpuTensor, "data_ptr", lambda self: self.on_cpu.data_ptr(), raising=False)
    rerun = graphs.capture

    def capture(function, pool, device):
        def alone():
            with OnDeviceAlone(), monkeypatch.context() as patch:
                patch.setattr(simulated_gpu, "to", stays)
                function()

        return rerun(alone if device.type == "cuda" else function, pool, device)

    def stays(tensor, *arguments, **keywords):
        moved = to(tensor, *arguments, **keywords)
        if isinstance(moved, GpuTensor) != isinstance(tensor, GpuTensor):
            raise RuntimeError("operation not permitted when stream is capturing: to")
        return moved

    to = simulated_gpu.to

    monkeypatch.setattr(cuda_graphs, "capture", capture)
    return graphs


ON_SIMULATED = [("published", sampler) for sampler in ("nucleus", "repetition", "ancestral", "entropy_bound", "ends")]
ON_SIMULATED += [("time-conditioned", "ancestral"), ("adapted, shifted", "threshold"), ("sliding windows", "nucleus")]


@pytest.mark.parametrize(("network", "sampler"), ON_SIMULATED)
def test_what_is_recorded_is_of_the_device_alone(network, sampler, simulated_graphs):
    """And of dtypes that go together, in bfloat16."""
    model, ids = NETWORKS[network]().to(torch.bfloat16), prompts()
    arguments = {**SAMPLERS[sampler], "max_new_tokens": 9}
    expected = static(model, ids, **arguments)
    with SimulatedGpu():
        found = static(model.to("cuda"), ids.to("cuda"), **arguments).cpu()
    assert simulated_graphs.captured == 4 and simulated_graphs.replayed >= 4
    assert torch.equal(found, expected)


@pytest.mark.parametrize("brings", [lambda ids: torch.ones(2, 1).to(ids.device), lambda ids: ids.sum().item()])
def test_what_cannot_be_recorded_is_found(brings, simulated_graphs, monkeypatch):
    settle = TokenPredictor.settle

    def settled(self, prediction, revealed, columns, *place):
        brings(columns)
        settle(self, prediction, revealed, columns, *place)

    monkeypatch.setattr(TokenPredictor, "settle", settled)
    model, ids = NETWORKS["published"](), prompts()
    with SimulatedGpu(), pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
        static(model.to("cuda"), ids.to("cuda"))


def test_waiting_is_found(graphs, watched_steps):
    processors = LogitsProcessorList([Halving()])
    generated(NETWORKS["published"](), prompts(), logits_processor=processors)
    assert any("_local_scalar_dense" in watch.waits or "_unique2" in watch.waits for watch in watched_steps)


@pytest.mark.parametrize(("network", "of_layer", "of_rest"), [("published", 17, 55), ("adapted, shifted", 50, 80)])
def test_how_many_operations_a_step_takes(network, of_layer, of_rest, graphs, watched_steps):
    """The host launches each of them: with 12 layers and the nucleus about 255, where GPT-2 has 292."""
    launches = {}
    for num_layers in (2, 4):
        overrides = {"num_hidden_layers": num_layers}
        if network == "published":
            model = random_model(attn_implementation="sdpa", eos_token_id=None, **overrides)
        else:
            model = adapted_lm(block_size=4, overrides=overrides)
        del watched_steps[:]
        generated(model, prompts(), top_p=0.9)
        launches[num_layers] = watched_steps[-1].num_launches
    each = (launches[4] - launches[2]) / 2
    assert each <= of_layer and launches[2] - 2 * each <= of_rest


def test_a_compiled_step_breaks_no_graph_and_is_compiled_once(graphs, monkeypatch):
    """Over ten blocks, with the backend that traces alone."""
    torch._dynamo.reset()
    counted = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    logits = torch.compile(cuda_graphs.logits_of, backend=counted, fullgraph=True, dynamic=False)
    monkeypatch.setattr(cuda_graphs, "logits_compiler", lambda: logits)
    model, ids = NETWORKS["adapted, shifted"](), prompts()
    arguments = {"max_new_tokens": 40}
    found = static(model, ids, **arguments, compile_config=CompileConfig())
    assert counted.frame_count == 2 and graphs.captured == 2
    assert torch.equal(found, generated(model, ids, **arguments))
    torch._dynamo.reset()


@pytest.mark.parametrize("inference", [False, True])
def test_the_fast_layers_compute_the_logits_of_the_model(inference, graphs):
    for fields in ({}, {"adaln": False}, {"tie_word_embeddings": True}):
        model = random_model(attn_implementation="sdpa", **fields)
        ids, mask = prompts(8), torch.ones(1, 1, 8, 8, dtype=torch.bool)
        inputs = {"position_ids": torch.arange(8)[None], "attention_mask": mask, "cache": None}
        kept = torch.tensor([[1, 5], [0, 7]])
        with torch.inference_mode() if inference else torch.no_grad():
            expected = model(ids, **inputs, logits_to_keep=kept).logits
            fast = fast_network(model, cuda_graphs.is_plain_module)
            torch.testing.assert_close(fast(ids, **inputs, logits_to_keep=kept).logits, expected)
    with torch.no_grad():
        conditioned = random_model(attn_implementation="sdpa", time_conditioning=True)
        assert fast_network(conditioned, cuda_graphs.is_plain_module) is None
    # With gradients it would be no part of their graph.
    assert fast_network(model, cuda_graphs.is_plain_module) is None
