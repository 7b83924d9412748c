"""`ModelTesterMixin` on BD3LMModel and BD3LMForMaskedLM. Run by `make conformance`, which makes `transformers_tests`."""

import copy
import functools
import unittest
from unittest import mock

import torch
from transformers import initialization as init
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES, MODEL_MAPPING_NAMES
from transformers.testing_utils import torch_device
from transformers_tests.generation.test_utils import GenerationTesterMixin
from transformers_tests.test_modeling_common import ModelTesterMixin, ids_tensor

from bd3lm_hf import BD3LMConfig, BD3LMForMaskedLM, BD3LMModel, BD3LMPreTrainedModel
from bd3lm_hf.modeling import modeling_bd3lm


# The mixin tells base models from heads, and heads that take `labels`, by these tables of Transformers' own models.
# Without the two names half of its tests would pass over our classes and succeed.
MODEL_MAPPING_NAMES[BD3LMConfig.model_type] = BD3LMModel.__name__
MODEL_FOR_MASKED_LM_MAPPING_NAMES[BD3LMConfig.model_type] = BD3LMForMaskedLM.__name__

published_init_weights = BD3LMPreTrainedModel._init_weights


@torch.no_grad()
def open_init_weights(self, module):
    """
    The model's own initialisation, after which what starts at zero is drawn.

    With zero modulation no layer changes its input, and with a zero projection all logits are 0: outputs would agree
    whatever the tests compare.
    """
    published_init_weights(self, module)
    for name in ("adaln_modulation", "lm_head"):
        if hasattr(module, name):
            linear = getattr(module, name)
            init.normal_(linear.weight, std=0.5)
            init.normal_(linear.bias, std=0.5)


def with_fixed_seed(draw):
    """`draw` with the same result at every call and the global generator left as it was."""

    @functools.wraps(draw)
    def seeded(*args, **kwargs):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return draw(*args, **kwargs)

    return seeded


class BD3LMModelTester:
    """A small model and a batch for it."""

    batch_size = 3
    # No multiple of the block size, and longer than the context, so that the last block is short and the window slides.
    seq_length = 14
    block_size = 4
    max_position_embeddings = 8
    vocab_size = 99
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
            # The tests shrink the vocabulary, down to 4 ids; the mask token has to stay inside.
            mask_token_id=1,
            initializer_range=0.1,
        )

    def prepare_config_and_inputs_for_common(self):
        attention_mask = torch.ones(self.batch_size, self.seq_length, dtype=torch.long, device=torch_device)
        attention_mask[0, :3] = 0
        attention_mask[1, -2:] = 0
        inputs = {
            "input_ids": ids_tensor([self.batch_size, self.seq_length], self.vocab_size),
            "attention_mask": attention_mask,
        }
        return self.get_config(), inputs


class BD3LMModelTest(ModelTesterMixin, GenerationTesterMixin, unittest.TestCase):
    all_model_classes = (BD3LMModel, BD3LMForMaskedLM)
    # The tests of initialisation run for models whose file names a year from 2023 on, or with this.
    test_can_init_all_missing_weights_before_2023 = True

    def setUp(self):
        self.model_tester = BD3LMModelTester()
        # These two are about the initialisation as it is.
        if self._testMethodName not in ("test_can_init_all_missing_weights", "test_init_weights_can_init_buffers"):
            self.patch(BD3LMPreTrainedModel, "_init_weights", open_init_weights)
        # The loss is an estimate over drawn noise; tests that compare two passes mean passes that met the same noise.
        for name in ("sample_timesteps", "forward_process"):
            self.patch(modeling_bd3lm, name, with_fixed_seed(getattr(modeling_bd3lm, name)))

    def patch(self, target, name, value):
        patcher = mock.patch.object(target, name, value)
        patcher.start()
        self.addCleanup(patcher.stop)
