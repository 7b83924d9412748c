"""`ModelTesterMixin` on BD3LMModel and BD3LMForMaskedLM; run.py provides the package `transformers_tests`."""

import copy
import functools
import random
import unittest
from unittest import mock

import torch
from transformers import DynamicCache, PreTrainedModel, set_seed
from transformers import initialization as init
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES, MODEL_MAPPING_NAMES
from transformers.testing_utils import torch_device
from transformers_tests.generation.test_utils import GenerationTesterMixin
from transformers_tests.test_modeling_common import ModelTesterMixin, ids_tensor

from bd3lm_hf import BD3LMConfig, BD3LMForMaskedLM, BD3LMModel, BD3LMPreTrainedModel
from bd3lm_hf.modeling import network_block_diffusion


# By these tables of Transformers' own models the mixin tells base models from heads, and heads that take `labels`.
# Without the two names many of its tests would pass over our classes and succeed.
MODEL_MAPPING_NAMES[BD3LMConfig.model_type] = BD3LMModel.__name__
MODEL_FOR_MASKED_LM_MAPPING_NAMES[BD3LMConfig.model_type] = BD3LMForMaskedLM.__name__


class BD3LMModelTester:
    """A small model and a batch for it."""

    batch_size = 3
    # No multiple of the block size and longer than the context: the last block is short, and the window slides.
    seq_length = 14
    block_size = 4
    max_position_embeddings = 8
    vocab_size = 99
    # Inside the smallest vocabulary that the tests shrink the model to, and not the id 0 of their labels.
    mask_token_id = 1
    hidden_size = 32
    num_hidden_layers = 2
    num_attention_heads = 4
    is_training = True

    def get_config(self):
        return BD3LMConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            max_position_embeddings=self.max_position_embeddings,
            block_size=self.block_size,
            cond_dim=16,
            mask_token_id=self.mask_token_id,
            # With the default, so small a model changes its input so little that a wrong mask goes unnoticed.
            initializer_range=0.1,
        )

    def prepare_config_and_inputs_for_common(self):
        attention_mask = torch.ones(self.batch_size, self.seq_length, dtype=torch.long, device=torch_device)
        attention_mask[0, :3] = 0
        attention_mask[1, -2:] = 0
        # The loss takes text, in which nothing is masked.
        first_id = self.mask_token_id + 1
        shape = [self.batch_size, self.seq_length]
        input_ids = first_id + ids_tensor(shape, self.vocab_size - first_id, rng=random.Random(0))
        return self.get_config(), {"input_ids": input_ids, "attention_mask": attention_mask}


initialize_as_published = BD3LMPreTrainedModel._init_weights


@torch.no_grad()
def initialize_without_zeros(self, module):
    """
    The model's own initialisation, after which whatever starts at zero is drawn.

    As published, no layer of a new model changes its input and all its logits are 0: any two of them would be equal.
    """
    initialize_as_published(self, module)
    for parameter in module.parameters(recurse=False):
        if not parameter.is_meta and not parameter.any():
            init.normal_(parameter, std=0.5)


def with_fixed_seed(draw):
    """`draw` with the same result at every call; the global generator stays as it was."""

    @functools.wraps(draw)
    def draw_again(*args, **kwargs):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return draw(*args, **kwargs)

    return draw_again


# `test_generation_tester_mixin_inheritance` asks for the second base. It is a stand-in without tests.
class BD3LMModelTest(ModelTesterMixin, GenerationTesterMixin, unittest.TestCase):
    all_model_classes = (BD3LMModel, BD3LMForMaskedLM)
    # `test_can_init_all_missing_weights` skips models whose file names no year from 2023 on, unless it is told not to.
    test_can_init_all_missing_weights_before_2023 = True
    # They are about the initialisation as it is; the others meet parameters that all count.
    tests_of_initialization = ("test_can_init_all_missing_weights", "test_init_weights_can_init_buffers")

    def setUp(self):
        set_seed(0)
        self.model_tester = BD3LMModelTester()
        if self._testMethodName not in self.tests_of_initialization:
            self.patch(BD3LMPreTrainedModel, "_init_weights", initialize_without_zeros)
        # The loss is an estimate over drawn noise; tests that compare the losses of two passes mean the same noise.
        for name in ("sample_timesteps", "forward_process"):
            self.patch(network_block_diffusion, name, with_fixed_seed(getattr(network_block_diffusion, name)))

    def patch(self, target, name, value):
        patcher = mock.patch.object(target, name, value)
        patcher.start()
        self.addCleanup(patcher.stop)

    def test_reverse_loading_mapping(self):
        # `save_pretrained` of these models never writes the published names, and the test is about the way there and
        # back: it gets Transformers' own. The names hold for the model with its head, as the published ones are.
        with mock.patch.object(BD3LMPreTrainedModel, "save_pretrained", PreTrainedModel.save_pretrained):
            super().test_reverse_loading_mapping(skip_base_model=True)

    def test_bc_cache_name_forward(self):
        # The mixin also asks for a warning of the older name, which these models take on every version alike.
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        for model_class in self.all_model_classes:
            with self.subTest(model_class.__name__):
                model = model_class(config).to(torch_device).eval()
                states = []
                for name in ("past_key_values", "cache"):
                    output = model(**inputs, **{name: DynamicCache(config=config)})
                    states.append(output.cache.layers[0].keys)
                    assert output[0] is not None and output.past_key_values is output.cache
                torch.testing.assert_close(*states)

    def test_sdpa_can_dispatch_on_flash(self):
        # Torch's flash kernel takes no mask, and only a pass over a single block needs none.
        self.model_tester.seq_length = self.model_tester.block_size
        super().test_sdpa_can_dispatch_on_flash()

    @staticmethod
    def _prepare_config_headdim(config, requested_dim):
        # The mixin's own sets `head_dim`, which follows from the hidden size here and can't be set.
        config = copy.deepcopy(config)
        config.hidden_size = max(config.hidden_size, requested_dim * config.num_attention_heads)
        return config
