"""An autoregressive model of Transformers becomes a block diffusion language model: its mask token, and the folder."""

import os
import re
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from ..data.replacing import check_folder
from ..evaluation.loading import load_gguf, load_whole
from ..evaluation.networks import is_block_diffusion
from ..modeling.configuration_causal_lm import BlockDiffusionConfig, check_network
from ..modeling.modeling_causal_lm import BlockDiffusionForMaskedLM
from .export import SDAR_CLASSES, SDAR_MASK_TOKEN, SDAR_MASK_TOKEN_ID
from .published_files import replaced_model


# What a vocabulary calls a mask token that it does not declare, and the tokens that it keeps for later: those of Llama
# 3, Gemma, Qwen 1, BERT and others.
MASK_TOKEN = re.compile(r"[<|\[]+mask[>|\]]+", re.IGNORECASE)
UNUSED_TOKEN = re.compile(r"<\|?(reserved|unused|extra|placeholder)[\w ]*\|?>|\[(unused|reserved)\w*\]", re.IGNORECASE)
NEW_MASK_TOKEN = "<|mask|>"
TARGETS = ("sdar",)


def adapt(
    source: PreTrainedModel | str | os.PathLike,
    tokenizer: PreTrainedTokenizerBase | str | os.PathLike | None = None,
    *,
    block_size: int = BlockDiffusionConfig.block_size,
    mask_token: str | None = None,
    shift_logits: bool | None = None,
    clean_attention: str = BlockDiffusionConfig.clean_attention,
    target: str | None = None,
    gguf_file: str | None = None,
    **kwargs: Any,
) -> tuple[BlockDiffusionForMaskedLM, PreTrainedTokenizerBase]:
    """
    A block diffusion language model made of an autoregressive one, and its tokenizer, which has a mask token.

    With block size 1 and shifted logits it scores and writes as the source does. Before it was trained, larger blocks
    are denoised badly.

    Args:
        source: A causal language model, whose modules are taken over; or a folder or Hub id, or a .gguf file.
        tokenizer: That of the model, which is changed; or a folder or Hub id. By default that of `source`.
        block_size: Tokens denoised together.
        mask_token: A token that no text uses, or a new one. By default the tokenizer's own mask token, or else one
            that its vocabulary calls so (`<mask>`, `[MASK]`) or keeps for later use (`<unused0>`,
            `<|reserved_special_token_0|>`), or a new one.
            The embeddings grow only if they have no row for it; a new row starts at the mean of the others.
        shift_logits: Whether the output at a token goes on scoring the next one; by default True.
        clean_attention: "block" or "causal"; see [`BlockDiffusionConfig`].
        target: "sdar" for what SGLang and LMDeploy serve as SDAR: a Qwen3, no shift, the mask token's id 151669.
        gguf_file: The .gguf file in a folder or repository, which takes the package gguf.
        kwargs: For `from_pretrained` of a source that is loaded: `dtype`, `revision`, ...

    Raises:
        ValueError: the source is not whole, is no autoregressive model, or one that block diffusion can't take; the
            mask token has another use; arguments that exclude each other, or the target.
    """
    target_fields = _target_fields(target, mask_token, shift_logits)
    mask_token, shift_logits = target_fields.get("mask_token", mask_token), target_fields["shift_logits"]
    name = source.config._name_or_path if isinstance(source, PreTrainedModel) else os.fspath(source)
    if not isinstance(source, PreTrainedModel):
        name, gguf_file = _gguf_in_folder(name, gguf_file)
        if gguf_file is None:
            source = load_whole(AutoModelForCausalLM, name, **kwargs)
        else:
            source = load_gguf(name, gguf_file, **kwargs)
    elif kwargs or gguf_file is not None:
        raise ValueError(f"`source` must be loaded here for {sorted(kwargs) or ['gguf_file']}, but got a model.")
    _check_source(source, target)
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        own = {} if gguf_file is None or tokenizer is not None else {"gguf_file": gguf_file}
        hub = {key: kwargs[key] for key in ("revision", "token", "trust_remote_code") if key in kwargs}
        tokenizer = AutoTokenizer.from_pretrained(tokenizer or name, **own, **({} if tokenizer else hub))
    set_mask_token(tokenizer, mask_token)
    if target is not None and tokenizer.mask_token_id != SDAR_MASK_TOKEN_ID:
        raise ValueError(
            f"`target` 'sdar' takes a tokenizer in which {tokenizer.mask_token!r} has the id {SDAR_MASK_TOKEN_ID}, "
            f"as that of Qwen3 gives it, but here it has {tokenizer.mask_token_id}."
        )
    model = BlockDiffusionForMaskedLM.from_causal_lm(
        source,
        block_size=block_size,
        mask_token_id=tokenizer.mask_token_id,
        shift_logits=shift_logits,
        clean_attention=clean_attention,
    )
    if name and not os.path.exists(name):
        # A folder means nothing to others.
        model.config.adapted_from = name
    return model, tokenizer


def adapt_checkpoint(
    source: str | os.PathLike, destination: str | os.PathLike, *, overwrite: bool = False, **kwargs: Any
) -> tuple[BlockDiffusionForMaskedLM, PreTrainedTokenizerBase]:
    """
    [`adapt`], saved as a folder: weights under the source's names, the code that reads them where this package is not
    installed, and the tokenizer with its chat template.

    Args:
        source: Folder, Hub id or .gguf file of a causal language model.
        destination: The folder to write.
        overwrite: Take the place of a model in `destination`, nothing of which stays, or of a file.
        kwargs: For [`adapt`].

    Raises:
        ValueError: the destination holds something, or is the source; see also [`adapt`].
    """
    here = Path(source).resolve()
    if Path(destination).resolve() in (here, here.parent if here.suffix == ".gguf" else here):
        raise ValueError(f"`destination` must be another folder than `source`, but both are {destination}.")
    check_folder("destination", destination, overwrite)
    model, tokenizer = adapt(source, **kwargs)
    with replaced_model(destination, overwrite) as folder:
        for part in (model, tokenizer):
            part.save_pretrained(folder)
    return model, tokenizer


def set_mask_token(tokenizer: PreTrainedTokenizerBase, mask_token: str | None = None) -> None:
    """
    Gives a tokenizer a mask token, which is a special one from then on.

    Args:
        tokenizer: Is changed.
        mask_token: See [`adapt`].

    Raises:
        ValueError: the token has another use: BOS, EOS, padding, what is unknown, or a part of the chat template.
    """
    if mask_token is None:
        vocabulary = [token for token, _ in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])]
        found = [token for kind in (MASK_TOKEN, UNUSED_TOKEN) for token in vocabulary if kind.fullmatch(token)]
        found = [token for token in found if _use(tokenizer, token) is None]
        mask_token = tokenizer.mask_token or (found or [NEW_MASK_TOKEN])[0]
    use = _use(tokenizer, mask_token)
    if use is not None:
        raise ValueError(f"`mask_token` must be a token that no text uses, but {mask_token!r} is {use}.")
    tokenizer.add_special_tokens({"mask_token": mask_token})


def _use(tokenizer: PreTrainedTokenizerBase, token: str) -> str | None:
    """What a token is for, as far as the tokenizer says."""
    for role in ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token"):
        if getattr(tokenizer, role, None) == token:
            return f"its `{role}`"
    templates = tokenizer.chat_template or ""
    templates = templates.values() if isinstance(templates, dict) else [templates]
    return "in its chat template" if any(token in template for template in templates) else None


def _target_fields(target: str | None, mask_token: str | None, shift_logits: bool | None) -> dict[str, Any]:
    if target is None:
        return {"shift_logits": True if shift_logits is None else shift_logits}
    if target not in TARGETS:
        raise ValueError(f"`target` must be one of {', '.join(TARGETS)}, but got {target!r}.")
    if shift_logits:
        raise ValueError(f"`shift_logits` must be False for `target` 'sdar', but got {shift_logits!r}.")
    return {"shift_logits": False, "mask_token": mask_token or SDAR_MASK_TOKEN}


def _check_source(source: PreTrainedModel, target: str | None) -> None:
    if is_block_diffusion(source.config):
        raise ValueError(
            f"`source` must be an autoregressive model, but is a {type(source).__name__}, which denoises "
            "blocks already."
        )
    text_config = source.config.get_text_config(decoder=True)
    # Says why where the network is none to be read by blocks.
    check_network(text_config)
    # Transformers loads BERT as a causal model, too.
    is_masked = text_config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    if is_masked and not getattr(text_config, "is_decoder", False):
        raise ValueError(
            f"`source` must be an autoregressive model, but is a {type(source).__name__}, whose scores depend on "
            "other tokens than those before."
        )
    if target is not None and text_config.model_type not in SDAR_CLASSES:
        raise ValueError(
            f"`target` 'sdar' takes a network of the type {' or '.join(SDAR_CLASSES)}, which the engines have "
            f"built in, but got {text_config.model_type!r}."
        )


def _gguf_in_folder(name: str, gguf_file: str | None) -> tuple[str, str | None]:
    """(folder or Hub id, name of the .gguf file in it or None), of a path to a .gguf file as well."""
    if gguf_file is None and name.endswith(".gguf"):
        return os.path.dirname(name) or ".", os.path.basename(name)
    return name, gguf_file
