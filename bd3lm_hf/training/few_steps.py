"""`BD3LMFewStepTrainer`: a model learns to reveal in one step what its own sampler reveals in several."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from .distillation import BD3LMDistillationArguments, BD3LMDistillationTrainer
from .teacher import PathTeacher


@dataclass
class BD3LMFewStepArguments(BD3LMDistillationArguments):
    """
    [`BD3LMDistillationArguments`], and how far the teacher goes.

    Args:
        path_steps: steps of the sampler that are learned as one; None for all of a block.

    Raises:
        ValueError: an argument outside its range, or of the autoregressive teacher.
    """

    path_steps: int | None = field(
        default=None, metadata={"help": "Steps of the sampler that are learned as one. (default: a whole block's)"}
    )

    def __post_init__(self):
        super().__post_init__()
        if self.path_steps is not None and self.path_steps < 1:
            raise ValueError(f"`path_steps` must be at least 1, or None, but got {self.path_steps}.")
        if self.autoregressive_loss_weight:
            raise ValueError(
                "`autoregressive_loss_weight` must be 0, as a sampler predicts no next tokens, but got "
                f"{self.autoregressive_loss_weight}."
            )


class BD3LMFewStepTrainer(BD3LMDistillationTrainer):
    """
    Distils the steps of a model's own sampler into one (self-distillation through time: Deschenaux and Gulcehre, arXiv
    2410.21035). From each noised block the frozen teacher goes on by its sampler, one token per forward, the surest
    one, as the likeliest; the student, which reads the noised block alone, learns for each token what the teacher
    predicted when it revealed it. As the path is the same each time, the student can learn it: the likeliest tokens of
    one step are those of several.

    The teacher takes `path_steps` forwards without gradients for each batch. Once the student has learned, it may be
    the teacher of another run.

    Args:
        model, data_collator, train_dataset, eval_dataset, kwargs: As [`BD3LMDistillationTrainer`] takes them.
        args: [`BD3LMFewStepArguments`].
        teacher: A block diffusion model with the same tokenizer. By default what `model` is as it is handed over: a
            copy, or the model under its adapters.

    Raises:
        ValueError: what [`BD3LMDistillationTrainer`] refuses; a teacher of another kind, or that is told noise levels.
    """

    loss_in_card = (
        "the divergence from what a teacher predicts as its sampler reveals one token after the other "
        "([self-distillation through time](https://arxiv.org/abs/2410.21035))"
    )

    def __init__(
        self,
        model=None,
        args: BD3LMFewStepArguments | None = None,
        data_collator=None,
        train_dataset=None,
        eval_dataset=None,
        *,
        teacher=None,
        **kwargs: Any,
    ):
        args = BD3LMFewStepArguments("tmp_trainer") if args is None else args
        if not isinstance(args, BD3LMFewStepArguments):
            raise ValueError(f"`args` must be BD3LMFewStepArguments, but got {type(args).__name__}.")
        super().__init__(model, args, data_collator, train_dataset, eval_dataset, teacher=teacher, **kwargs)

    def _teacher_of(self, teacher: Any, student: nn.Module) -> PathTeacher:
        return PathTeacher.of(teacher, student)

    def _lessons(self, inputs: dict[str, Tensor]) -> Iterator[Tensor]:
        """The teacher's final hidden states [num_masked, hidden] of the masked tokens, each as it was revealed."""
        num_steps = self.config.block_size if self.args.path_steps is None else self.args.path_steps
        yield self.teacher.states(self._x_t, inputs["input_ids"], self._text_blocks(inputs), num_steps)
