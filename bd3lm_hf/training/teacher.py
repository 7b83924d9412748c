"""The frozen models that a block diffusion model is distilled from: an autoregressive one, or its own sampler."""

import contextlib
import copy

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ..evaluation.networks import is_block_diffusion, stock_config
from ..modeling.attention_block_diffusion import block_starts
from ..modeling.modeling_causal_lm import BlockDiffusionForMaskedLM
from ..modeling.network_block_diffusion import prepare_denoising
from ..modeling.samplers_block_diffusion import ConfidenceSampler
from ..modeling.two_stream_block_diffusion import TextBlocks
from .divergence import NO_PROBABILITY, chunk_size_of


class Teacher:
    """
    A frozen block diffusion model.

    Args:
        network: the model.
        adapted: a PeftModel around it whose adapters are turned off while it teaches, None without.
    """

    def __init__(self, network: PreTrainedModel, adapted: nn.Module | None = None):
        self.network, self.adapted = network, adapted

    @classmethod
    def of_student(cls, student: nn.Module) -> "Teacher":
        """What the student is so far: a frozen copy, or the model under its adapters."""
        if hasattr(student, "get_base_model"):
            return cls(student.get_base_model(), student)
        return cls(copy.deepcopy(student).requires_grad_(False).eval())

    def to(self, device: torch.device) -> "Teacher":
        """Moves a model of its own; one under adapters is where the student is."""
        if self.adapted is None:
            self.network.to(device)
        return self

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


class CausalTeacher(Teacher):
    """An autoregressive model, which the network is at block size 1; it reads a batch in one causal forward."""

    def __init__(self, network: BlockDiffusionForMaskedLM, adapted: nn.Module | None = None):
        super().__init__(network, adapted)
        self.config = copy.deepcopy(network.config)
        self.config.update({"block_size": 1, "clean_attention": "causal"})

    @classmethod
    def of(
        cls,
        teacher: PreTrainedModel | str | None,
        student: nn.Module,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> "CausalTeacher":
        """
        The teacher of a student: a causal language model of Transformers with the same tokenizer, whose modules are
        taken over, or the name or folder of one. None is the autoregressive model that the student itself is so far:
        a frozen copy, or the model under its adapters. `tokenizer` is the student's.

        Raises:
            ValueError: there is no autoregressive model in the student, or the teacher is none that can be read, or
                has another vocabulary, as far as that can be told.
        """
        network = student.get_base_model() if hasattr(student, "get_base_model") else student
        if teacher is not None:
            _check_vocabulary(teacher, network.config, tokenizer)
            mask_token_id = network.config.mask_token_id
            model = BlockDiffusionForMaskedLM.from_causal_lm(teacher, block_size=1, mask_token_id=mask_token_id)
            return cls(model.requires_grad_(False).eval())
        if stock_config(network.config) is None or not network.config.shift_logits:
            raise ValueError(
                "`teacher` must be given for a model that does not predict the next token at block size 1, but got "
                f"None for a {type(network).__name__} without `shift_logits`."
            )
        return cls.of_student(student)

    @torch.no_grad()
    def states(self, input_ids: Tensor, attention_mask=None, position_ids=None, document_ids=None) -> Tensor:
        """The final hidden states of texts as the trainer's batches have them, [batch, length] -> [.., hidden]."""
        text = (attention_mask, position_ids, document_ids)
        with self._at_work():
            dtype = self.network.dtype
            positions, mask = prepare_denoising(self.config, input_ids, dtype, text, None)
            inputs = {"input_ids": input_ids, "position_ids": positions, "attention_mask": mask, "use_cache": False}
            return self.network.base_model(**inputs, return_dict=True).last_hidden_state


class PathTeacher(Teacher):
    """
    A block diffusion model that writes by its own sampler: one token of each block per forward, the likeliest one,
    where it is surest (`generate(sampler="confidence", tokens_per_step=1, do_sample=False)`).
    """

    @classmethod
    def of(cls, teacher: PreTrainedModel | None, student: nn.Module) -> "PathTeacher":
        """
        The teacher of a student: another block diffusion model, or None for the one that the student itself is so far.

        Raises:
            ValueError: the teacher is no such model, is told the noise level, or has another mask token.
        """
        path_teacher = cls.of_student(student) if teacher is None else cls(teacher)
        config = getattr(path_teacher.network, "config", None)
        if not is_block_diffusion(config):
            raise ValueError(f"`teacher` must be a block diffusion model, but got {type(teacher).__name__}.")
        if config.time_conditioning:
            raise ValueError("`time_conditioning` must be False, as a path has no noise level, but got True.")
        own = (student.get_base_model() if hasattr(student, "get_base_model") else student).config
        for name in ("vocab_size", "mask_token_id"):
            of_student, of_teacher = getattr(own, name), getattr(config, name)
            if of_student != of_teacher:
                raise ValueError(
                    f"`{name}` of the teacher must be {of_student}, as the student's, but got {of_teacher}."
                )
        if teacher is not None:
            teacher.requires_grad_(False).eval()
        return path_teacher

    @torch.no_grad()
    def states(self, x_t: Tensor, x_0: Tensor, blocks: TextBlocks, num_steps: int) -> Tensor:
        """
        The sampler goes on from x_t for so many steps, in all blocks at once, each after the clean text before it.

        Args:
            x_t: ids of noised copies of the text [batch, copies * length].
            x_0: the text [batch, length].
            blocks: those of `x_0`.
            num_steps: steps, each of one forward.

        Returns:
            The final hidden states [num_masked, hidden] by which each masked token of x_t was predicted when it was
            revealed, or in the last step.
        """
        num_copies = x_t.shape[1] // x_0.shape[1]
        masked = (x_t == self.network.config.mask_token_id) & blocks.predicted.repeat(1, num_copies)
        place = _places_in_blocks(blocks, masked)
        x_t, left, found = x_t.clone(), masked.clone(), None
        with self._at_work():
            for step in range(num_steps):
                streams, outputs = self.network._two_stream_pass(x_t, x_0, blocks, None, left)
                states = streams.of_predictions(outputs.last_hidden_state, left)
                found = states.clone() if found is None else found.masked_scatter(left[masked][:, None], states)
                if step < num_steps - 1:
                    tokens, confidence = self._predict(states)
                    revealed = _surest_of_each(confidence, place[left[masked]])
                    x_t[left] = torch.where(revealed, tokens, x_t[left])
                    left[left.clone()] = ~revealed
        return found

    def _predict(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Of states [num_masked, hidden] the likeliest tokens and their probabilities [num_masked]."""
        mask_token_id, tokens, confidence = self.network.config.mask_token_id, [], []
        for part in states.split(chunk_size_of(self.network._logits, states)):
            logits = self.network._logits(part).float()
            logits[:, mask_token_id] = NO_PROBABILITY
            likeliest = logits.log_softmax(-1).max(-1)
            tokens.append(likeliest.indices)
            confidence.append(likeliest.values.exp())
        return torch.cat(tokens), torch.cat(confidence)


def _check_vocabulary(teacher: PreTrainedModel | str, config, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Raises ValueError where a teacher can't have the tokenizer of the student with this `config`."""
    vocabulary = {} if tokenizer is None else tokenizer.get_vocab()
    vocabulary = {token: number for token, number in vocabulary.items() if number != config.mask_token_id}
    # Without a tokenizer every id but the last, if that was added for the mask, may be one of text.
    num_ids = config.vocab_size - (config.mask_token_id == config.vocab_size - 1)
    num_ids = max(vocabulary.values()) + 1 if vocabulary else num_ids
    if isinstance(teacher, str):
        num_rows = AutoConfig.from_pretrained(teacher).get_text_config(decoder=True).vocab_size
    else:
        num_rows = teacher.get_input_embeddings().weight.shape[0]
    if num_rows < num_ids:
        raise ValueError(f"`teacher` must have the {num_ids} ids of the student's text, but got one of {num_rows}.")
    if isinstance(teacher, str) and vocabulary:
        try:
            others = AutoTokenizer.from_pretrained(teacher).get_vocab()
        except (OSError, ValueError):
            # A folder of a model alone.
            return
        differ = [token for token, number in vocabulary.items() if others.get(token, number) != number]
        if differ or not others.keys() & vocabulary.keys():
            raise ValueError(
                f"`teacher` must have the tokenizer of the student, but got {teacher!r}, in whose own "
                f"{len(differ) or len(vocabulary)} tokens have other ids."
            )


def _places_in_blocks(blocks: TextBlocks, masked: Tensor) -> Tensor:
    """
    Of each token of `masked`, bool [batch, copies * length], the number of its block in the batch and its place in it,
    [num_masked, 2].
    """
    batch_size, length = blocks.block.shape
    num_copies, num_blocks = masked.shape[1] // length, blocks.shape[1]
    columns = torch.arange(length, device=masked.device)
    first = torch.where(block_starts(blocks.block), columns, 0).cummax(-1).values
    row_and_copy = torch.arange(batch_size * num_copies, device=masked.device).view(batch_size, num_copies, 1)
    block = row_and_copy * num_blocks + blocks.block[:, None]
    place = (columns - first)[:, None].expand_as(block)
    return torch.stack([block.flatten(1)[masked], place.flatten(1)[masked]], dim=-1)


def _surest_of_each(confidence: Tensor, place: Tensor) -> Tensor:
    """Which tokens the sampler reveals [num_masked], bool: one of each block; `place` [num_masked, 2]."""
    if not len(place):
        return torch.zeros_like(confidence, dtype=torch.bool)
    block, place = place.unbind(-1)
    scores = confidence.new_full((int(block.max()) + 1, int(place.max()) + 1), -torch.inf)
    scores[block, place] = confidence
    return ConfidenceSampler().reveal(scores > -torch.inf, scores)[block, place]
