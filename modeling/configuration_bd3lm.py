"""Configuration of a block discrete denoising diffusion language model (BD3-LM, arXiv 2503.09573)."""

from typing import Any

from transformers import PreTrainedConfig


PUBLISHED_FIELDS = {
    "hidden_dim": "hidden_size",
    "n_blocks": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "model_length": "max_position_embeddings",
    "dropout": "hidden_dropout",
}
# More than any network has; float32 tells so many positions apart.
LARGEST = {"num_hidden_layers": 10_000, "max_position_embeddings": 2**24}
NOISE_SCHEDULE_NAMES = ("loglinear", "square", "square_root", "log", "cosine")


class BlockDiffusionConfigMixin:
    """The fields of noise and blocks that the configurations of all networks share, their rules, and masks."""

    # Over layers of one type, which see every earlier position; and the prediction of a token is read at its place.
    sliding_windows = {"full_attention": None}
    clean_attention = "block"
    shift_logits = False
    # Whether the fields came under the names of the published checkpoints.
    is_published_format = False

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any):
        """
        As `PreTrainedConfig.from_dict`, the arguments being checked like those of the constructor. Raises a ValueError
        for another `block_size` than the checkpoint was trained for, and for a field that breaks its rule.
        """
        wanted = kwargs.pop("block_size", None)
        result = super().from_dict(config_dict, **kwargs)
        config = result[0] if isinstance(result, tuple) else result
        if wanted is not None and wanted != config.block_size:
            if "block_size" in config_dict or config.is_published_format:
                rule = f"{config.block_size}, which this checkpoint was trained for"
                advice = "To train it further with other blocks, set `model.config.block_size` after loading"
                raise ValueError(f"`block_size` must be {rule}, but got {wanted}. {advice}.")
            config.block_size = wanted
        config.validate()
        return result

    def _require(self, holds: bool, field: str, rule: str) -> None:
        if not holds:
            raise ValueError(f"`{field}` must be {rule}, but got {getattr(self, field)!r}.")

    def _require_sizes(self, *fields: str) -> None:
        for field in fields:
            value = getattr(self, field)
            self._require(isinstance(value, int) and value is not True and value >= 1, field, "an integer >= 1")

    def _validate_noise(self) -> None:
        rule = f"an id inside the vocabulary, 0 <= id < {self.vocab_size}"
        self._require(0 <= self.mask_token_id < self.vocab_size, "mask_token_id", rule)
        rule = f"one of {', '.join(NOISE_SCHEDULE_NAMES)}"
        self._require(self.noise_schedule in NOISE_SCHEDULE_NAMES, "noise_schedule", rule)
        validate_noise_interval(self.noise_interval)


class BD3LMConfig(BlockDiffusionConfigMixin, PreTrainedConfig):
    """
    Configuration of [`BD3LMModel`] and [`BD3LMForMaskedLM`].

    With the package bd3lm_hf the field names of the published checkpoints (`hidden_dim`, `n_blocks`, `n_heads`,
    `model_length`, `dropout`, `sampling_eps_min`, `sampling_eps_max`, `cross_attn`) are read as well.

    Args:
        vocab_size: number of token ids, the mask token included.
        hidden_size: width of the residual stream.
        num_hidden_layers: number of transformer layers.
        num_attention_heads: attention heads per layer; divides `hidden_size` into heads of an even size.
        intermediate_size: width of the MLP; `None` means 4 x `hidden_size`.
        max_position_embeddings: context length in tokens; longer text is read through a window of whole blocks.
        block_size: tokens denoised together. 1 is an autoregressive model, `max_position_embeddings` masked diffusion.
        hidden_dropout: dropout probability of both residual branches.
        cond_dim: width of the noise level's embedding.
        adaln: modulate the layers by the noise level (adaptive layer norm).
        time_conditioning: feed the noise level to the modulation; otherwise it is 0 for every input.
        noise_schedule: "loglinear", "square", "square_root", "log" or "cosine".
        noise_interval: (beta, omega), the interval of t that training draws from ("clipped schedule" if narrower).
        mask_token_id: id of the mask token; `None` means the last one.
        bos_token_id, eos_token_id, pad_token_id: ids of the other special tokens; `None` where there is none.
        ignore_bos: the first token of a text is neither masked nor predicted.
        rope_theta: base of the rotary embedding.
        layer_norm_eps: epsilon of the layer norms.
        initializer_range: standard deviation of the initial weights.
        tie_word_embeddings: share the embedding matrix with the output projection.

    Raises:
        ValueError: a field breaks its rule; the message names the field, its value and the rule.
    """

    model_type = "bd3lm"
    # Sets fields that came under their published names, and takes these out of the arguments; of the package bd3lm-hf.
    read_published_fields = None
    keys_to_ignore_at_inference = ["cache", "past_key_values", "token_nelbo"]
    attribute_map = PUBLISHED_FIELDS
    base_model_tp_plan = {f"layers.*.self_attn.{name}_proj": "colwise" for name in "qkv"} | {
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
    }

    vocab_size: int = 50258
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int | None = None
    max_position_embeddings: int = 1024
    block_size: int = 16
    hidden_dropout: float | int = 0.1
    cond_dim: int = 128
    adaln: bool = True
    time_conditioning: bool = False
    noise_schedule: str = "loglinear"
    noise_interval: tuple | list = (1e-3, 1.0)
    mask_token_id: int | None = None
    ignore_bos: bool = True
    rope_theta: float | int = 10000.0
    layer_norm_eps: float | int = 1e-5
    initializer_range: float | int = 0.02
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | list | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs: Any):
        if self.read_published_fields is not None:
            self.read_published_fields(kwargs)
        elif "hidden_dim" in kwargs:
            raise ValueError("`hidden_dim` must be `hidden_size`: the package bd3lm_hf reads published checkpoints.")
        self.noise_interval = tuple(value) if isinstance(value := self.noise_interval, list) else value
        self._require_sizes("vocab_size", "hidden_size")
        if self.intermediate_size is None:
            self.intermediate_size = 4 * self.hidden_size
        if self.mask_token_id is None:
            self.mask_token_id = self.vocab_size - 1
        super().__post_init__(**kwargs)
        self.validate()

    @property
    def head_dim(self) -> int:
        """Size of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def window_in_blocks(self) -> int:
        """How many earlier blocks a block sees: with its own they make up the context length."""
        return -(-self.max_position_embeddings // self.block_size) - 1

    def to_dict(self) -> dict[str, Any]:
        """The fields as saved: always under this package's names."""
        return {name: value for name, value in super().to_dict().items() if name != "is_published_format"}

    def validate(self) -> None:
        """Checks all fields of a configuration that was changed since; raises the ValueError of the constructor."""
        self._require_sizes("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
        self._require_sizes("max_position_embeddings", "block_size", "cond_dim", "intermediate_size")
        for field, largest in LARGEST.items():
            self._require(getattr(self, field) <= largest, field, f"at most {largest}")
        divides = self.hidden_size % self.num_attention_heads == 0
        self._require(divides, "num_attention_heads", f"a divisor of `hidden_size` ({self.hidden_size})")
        if self.head_dim % 2:
            got = f"{self.hidden_size} / {self.num_attention_heads} = {self.head_dim}"
            rule = "even for the rotary embedding"
            raise ValueError(f"`hidden_size` / `num_attention_heads` must be {rule}, but got {got}.")
        longest = self.max_position_embeddings
        self._require(self.block_size <= longest, "block_size", f"at most `max_position_embeddings` ({longest})")
        for field, kind in BD3LMConfig.__annotations__.items():
            rule = f"of the type {kind.__name__ if isinstance(kind, type) else kind}"
            self._require(isinstance(getattr(self, field), kind), field, rule)
        self._require(0 <= self.hidden_dropout < 1, "hidden_dropout", "a probability in [0, 1)")
        self._validate_noise()


def validate_noise_interval(noise_interval: tuple[float, float]) -> None:
    """Raises a ValueError unless the `noise_interval` (beta, omega) has 0 <= beta <= omega <= 1 and omega > 0."""
    # beta = omega fixes t, which makes block size 1 autoregressive.
    if len(noise_interval) != 2 or not 0 <= noise_interval[0] <= noise_interval[1] <= 1 or noise_interval[1] == 0:
        rule = "a pair (beta, omega) with 0 <= beta <= omega <= 1 and omega > 0"
        raise ValueError(f"`noise_interval` must be {rule}, but got {tuple(noise_interval)}.")
