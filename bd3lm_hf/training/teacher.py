"""The frozen autoregressive model that a block diffusion model is distilled from."""

import contextlib
import copy

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..evaluation.networks import stock_config
from ..modeling.modeling_causal_lm import BlockDiffusionForMaskedLM
from ..modeling.network_block_diffusion import prepare_denoising


class CausalTeacher:
    """
    An autoregressive model that one causal forward reads a batch with.

    Args:
        network: the block diffusion model that holds it, which at block size 1 is the autoregressive model.
        adapted: a PeftModel around it whose adapters are turned off while it teaches, None without.
    """

    def __init__(self, network: BlockDiffusionForMaskedLM, adapted: nn.Module | None = None):
        self.network, self.adapted = network, adapted
        self.config = copy.deepcopy(network.config)
        self.config.update({"block_size": 1, "clean_attention": "causal"})

    @classmethod
    def of(cls, teacher: PreTrainedModel | str | None, student: nn.Module) -> "CausalTeacher":
        """
        The teacher of a student: a causal language model of Transformers with the same tokenizer, whose modules are
        taken over, or the name or folder of one. None is the autoregressive model that the student itself is so far:
        a frozen copy, or the model under its adapters.

        Raises:
            ValueError: there is no autoregressive model in the student, or the teacher is none that can be read.
        """
        is_adapted = hasattr(student, "get_base_model")
        network = student.get_base_model() if is_adapted else student
        if teacher is not None:
            mask_token_id = network.config.mask_token_id
            model = BlockDiffusionForMaskedLM.from_causal_lm(teacher, block_size=1, mask_token_id=mask_token_id)
            return cls(model.requires_grad_(False).eval())
        if stock_config(network.config) is None or not network.config.shift_logits:
            raise ValueError(
                "`teacher` must be given for a model that does not predict the next token at block size 1, but got "
                f"None for a {type(network).__name__} without `shift_logits`."
            )
        if is_adapted:
            return cls(network, student)
        return cls(copy.deepcopy(network).requires_grad_(False).eval())

    def to(self, device: torch.device) -> "CausalTeacher":
        """Moves a model of its own; one under adapters is where the student is."""
        if self.adapted is None:
            self.network.to(device)
        return self

    @torch.no_grad()
    def states(self, input_ids: Tensor, attention_mask=None, position_ids=None, document_ids=None) -> Tensor:
        """The final hidden states of texts as the trainer's batches have them, [batch, length] -> [.., hidden]."""
        text = (attention_mask, position_ids, document_ids)
        with self._at_work():
            dtype = self.network.dtype
            positions, mask = prepare_denoising(self.config, input_ids, dtype, text, None)
            inputs = {"input_ids": input_ids, "position_ids": positions, "attention_mask": mask, "use_cache": False}
            return self.network.base_model(**inputs, return_dict=True).last_hidden_state

    @torch.no_grad()
    def logits(self, states: Tensor) -> Tensor:
        """Logits [..., vocab] of hidden states [..., hidden]."""
        with self._at_work():
            return self.network._logits(states)

    @contextlib.contextmanager
    def _at_work(self):
        """Without adapters and dropout."""
        if self.adapted is None:
            yield
            return
        is_training = self.adapted.training
        self.adapted.eval()
        try:
            with self.adapted.disable_adapter():
                yield
        finally:
            self.adapted.train(is_training)
