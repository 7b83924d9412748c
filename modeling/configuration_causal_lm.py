"""Configuration of a block diffusion language model whose network is a causal language model of Transformers."""

from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from .configuration_bd3lm import BlockDiffusionConfigMixin


LAYER_TYPES = ("full_attention", "sliding_attention")


def of_network(field: str, meaning: str) -> property:
    """A field of the network's configuration, None where it declares none."""
    return property(lambda config: getattr(config.text_config, field, None), doc=meaning)


class BlockDiffusionConfig(BlockDiffusionConfigMixin, PreTrainedConfig):
    """
    Configuration of [`BlockDiffusionModel`] and [`BlockDiffusionForMaskedLM`].

    Args:
        text_config: configuration of the network, a causal language model of Transformers; whole, or its fields with
            their `model_type`. A Llama of the default size if it is left out.
        block_size: tokens denoised together. With 1 and `shift_logits` the model is the autoregressive one.
        mask_token_id: id of the mask token; `None` means the last one.
        shift_logits: whether the output at a token scores the next one, as in an autoregressive model. The first token
            of a block is read at the last token before the block: at the clean one, or where this is "noisy" in
            training at the noised one, as Fast-dLLM v2 (arXiv 2509.26328) trains.
        clean_attention: "block", where a clean token sees its whole block, or "causal", where it sees what comes
            before it, so that the clean stream stays the autoregressive model's.
        predicts_mask_token: whether the mask token has a probability in the loss of training mode, which is then
            cross-entropy over the whole vocabulary, as published families of adapted models are trained.
        noise_schedule, noise_interval, ignore_bos: as in [`BD3LMConfig`].
        bos_token_id, eos_token_id, pad_token_id, tie_word_embeddings: by default those of `text_config`.

    Raises:
        ValueError: a field breaks its rule, or the network is none that block diffusion can take.
    """

    model_type = "block_diffusion"
    sub_configs = {"text_config": AutoConfig}
    keys_to_ignore_at_inference = ["cache", "past_key_values", "token_nelbo"]
    # Reads the `config.json` of another format: (name of its folder, its fields, arguments, arguments for the Hub) ->
    # fields of this class. The package bd3lm-hf has one for the published families.
    read_other_format = None
    # The network is told the noise by its mask tokens alone, and sees the whole text, as far as its layers go.
    time_conditioning = False
    window_in_blocks = 2**31
    vocab_size = of_network("vocab_size", "Ids that the embeddings have a row for, the mask token's among them.")
    hidden_size = of_network("hidden_size", "Width of the network's residual stream.")
    num_hidden_layers = of_network("num_hidden_layers", "Layers of the network.")
    max_position_embeddings = of_network("max_position_embeddings", "Context length of the network in tokens.")

    text_config: dict | PreTrainedConfig | None = None
    block_size: int = 4
    mask_token_id: int | None = None
    shift_logits: bool | str = True
    clean_attention: str = "block"
    predicts_mask_token: bool = False
    noise_schedule: str = "loglinear"
    noise_interval: tuple | list = (1e-3, 1.0)
    ignore_bos: bool = True
    tie_word_embeddings: bool | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs: Any):
        if not isinstance(self.text_config, PreTrainedConfig):
            fields = dict(self.text_config or {})
            self.text_config = AutoConfig.for_model(fields.pop("model_type", "llama"), **fields)
        check_network(self.text_config)
        for field in ("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings"):
            if getattr(self, field) is None:
                setattr(self, field, getattr(self.text_config, field, None))
        if self.mask_token_id is None:
            self.mask_token_id = self.vocab_size - 1
        self.noise_interval = tuple(value) if isinstance(value := self.noise_interval, list) else value
        super().__post_init__(**kwargs)
        self.validate()

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path: str, **kwargs: Any) -> tuple[dict, dict]:
        """As in Transformers; raises a ValueError for the configuration of another model that nothing here reads."""
        fields, unused = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        model_type = fields.get("model_type", cls.model_type)
        if model_type == cls.model_type:
            return fields, unused
        if cls.read_other_format is None:
            raise ValueError(
                f"`model_type` in config.json must be {cls.model_type!r}, but got {model_type!r}. `from_causal_lm` "
                "adapts an autoregressive model, and the package bd3lm-hf reads and converts published families."
            )
        return cls.read_other_format(pretrained_model_name_or_path, fields, unused, kwargs), unused

    def validate(self) -> None:
        """Checks all fields, as the constructor does; for a configuration that was changed since."""
        self._require_sizes("block_size")
        if (longest := self.max_position_embeddings) is not None:
            rule = f"at most `max_position_embeddings` of the network ({longest})"
            self._require(self.block_size <= longest, "block_size", rule)
        self._validate_noise()
        self._require(self.shift_logits in (False, True, "noisy"), "shift_logits", "False, True or 'noisy'")
        self._require(self.clean_attention in ("block", "causal"), "clean_attention", "'block' or 'causal'")
        rule = "true with `shift_logits`, which predict no first token"
        self._require(bool(self.ignore_bos or not self.shift_logits), "ignore_bos", rule)

    @property
    def sliding_windows(self) -> dict[str, int | None]:
        """For each type of the network's layers, how many positions they see, or None for all."""
        window = getattr(self.text_config, "sliding_window", None)
        default = "full_attention" if window is None else "sliding_attention"
        types = getattr(self.text_config, "layer_types", None) or [default]
        return {kind: None if kind == "full_attention" else window for kind in dict.fromkeys(types)}


def check_network(text_config: PreTrainedConfig) -> None:
    """Raises a ValueError that says why a network can't be read by blocks, where it can't."""
    faults = {
        "is an encoder-decoder": text_config.is_encoder_decoder or hasattr(text_config, "encoder_layers"),
        "has latent attention, whose cache can't be cut": getattr(text_config, "kv_lora_rank", None),
        "has positions in its scores (ALiBi), not in its states": getattr(text_config, "alibi", False)
        or text_config.model_type in ("bloom", "mpt"),
    }
    kinds = sorted(set(getattr(text_config, "layer_types", None) or ()) - set(LAYER_TYPES))
    faults[f"has layers of the type {', '.join(kinds)}"] = kinds
    faults["keeps a state of the text (a state space, or linear attention)"] = any(
        hasattr(text_config, name)
        for name in ("state_size", "ssm_state_size", "mamba_d_state", "linear_num_key_heads", "lru_width")
    )
    for fault, holds in faults.items():
        if holds:
            raise ValueError(
                f"`text_config` must be of a decoder with rotary or learned positions whose layers are of the types "
                f"{' and '.join(LAYER_TYPES)}, but got {text_config.model_type!r}, which {fault}."
            )
