"""Configuration of a block diffusion language model whose network is a causal language model of Transformers."""

from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from .configuration_bd3lm import BlockDiffusionConfigMixin


# The whole text is seen, as far as the layers of the network go.
ALL_BLOCKS = 2**31
LAYER_TYPES = ("full_attention", "sliding_attention")


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
    # The network is told the noise by its mask tokens alone.
    time_conditioning = False

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
        longest = self.max_position_embeddings
        rule = f"at most `max_position_embeddings` of the network ({longest})"
        self._require(longest is None or self.block_size <= longest, "block_size", rule)
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

    @property
    def window_in_blocks(self) -> int:
        """How many earlier blocks a block sees: all."""
        return ALL_BLOCKS

    @property
    def vocab_size(self) -> int:
        """Ids that the embeddings have a row for, the mask token's among them."""
        return self.text_config.vocab_size

    @property
    def hidden_size(self) -> int:
        """Width of the network's residual stream."""
        return self.text_config.hidden_size

    @property
    def num_hidden_layers(self) -> int:
        """Layers of the network."""
        return self.text_config.num_hidden_layers

    @property
    def max_position_embeddings(self) -> int | None:
        """Context length of the network in tokens, None where it declares none."""
        return getattr(self.text_config, "max_position_embeddings", None)


def check_network(text_config: PreTrainedConfig) -> None:
    """Raises a ValueError that says why a network can't be read by blocks, where it can't."""
    faults = {
        "is an encoder-decoder": text_config.is_encoder_decoder or hasattr(text_config, "encoder_layers"),
        "has latent attention, whose cache can't be cut": getattr(text_config, "kv_lora_rank", None),
        "has positions in its scores (ALiBi), not in its states": getattr(text_config, "alibi", False)
        or text_config.model_type in ("bloom", "mpt"),
        "scales its logits": any(
            getattr(text_config, name, 1.0) not in (None, 1.0) for name in ("logit_scale", "logits_scaling")
        ),
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
