"""The likelihood of texts under a block diffusion or an autoregressive model, as a metric of `evaluate`."""

import datasets
import evaluate

from bd3lm_hf.data.tokenization import encode_documents
from bd3lm_hf.evaluation.likelihood import evaluate_likelihood, load_for_evaluation


DESCRIPTION = """\
Perplexity, NELBO and bits per byte of texts under a block diffusion language model (BD3-LM), or on the same terms
under an autoregressive one. Each text is a document of its own, with BOS in front and EOS behind.
"""
INPUTS_DESCRIPTION = """\
Args:
    predictions (list of str): the texts; what holds no text is passed over.
    model (str or model): folder or Hub id of a BD3-LM or an autoregressive model, or the model itself.
    tokenizer (str or tokenizer): folder or Hub id, or the tokenizer itself; by default the one beside the model.
    device (str): by default the accelerator, if there is one. Not for a model that is given itself.
    others: as `bd3lm_hf.evaluate_likelihood` takes them (estimator, num_draws, target_error, max_draws, window,
        stride, batch_size, seed, progress).
Returns:
    dict: what `bd3lm_hf.evaluation.likelihood.Likelihood` holds, with `perplexity`, `nelbo` (nats per token) and
        `bits_per_byte`.
Raises:
    ValueError: no text, a model without its tokenizer, or what `bd3lm_hf.evaluate_likelihood` refuses.
"""
CITATION = """\
@inproceedings{arriola2025block,
  title={Block Diffusion: Interpolating Between Autoregressive and Diffusion Language Models},
  author={Arriola, Marianne and Gokaslan, Aaron and Chiu, Justin T. and Yang, Zhihan and Qi, Zhixuan and Han, Jiaqi
          and Sahoo, Subham Sekhar and Kuleshov, Volodymyr},
  booktitle={International Conference on Learning Representations},
  year={2025}
}
"""


class BD3LMNelbo(evaluate.Metric):
    """`compute(predictions=texts, model=..., ...)`; see INPUTS_DESCRIPTION."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation=CITATION,
            inputs_description=INPUTS_DESCRIPTION,
            features=datasets.Features({"predictions": datasets.Value("string")}),
            reference_urls=["https://arxiv.org/abs/2503.09573"],
        )

    def _compute(self, predictions, model, tokenizer=None, device=None, **options):
        if isinstance(model, str):
            if tokenizer is not None and not isinstance(tokenizer, str):
                raise ValueError(
                    f"`tokenizer` must be a folder or a Hub id where `model` is one, but got a "
                    f"{type(tokenizer).__name__}."
                )
            model, tokenizer = load_for_evaluation(model, tokenizer, device=device)
        elif tokenizer is None or isinstance(tokenizer, str) or device is not None:
            raise ValueError(
                "`tokenizer` must be the tokenizer itself, and `device` None, where `model` is the model itself, but "
                f"got {tokenizer!r} and {device!r}."
            )
        num_bytes = sum(len(text.encode()) for text in predictions)
        sequences = encode_documents(predictions, tokenizer)
        return evaluate_likelihood(model, sequences, num_bytes=num_bytes, **options).to_dict()
