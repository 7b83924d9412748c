"""How large the experiments are: one record for each scale that `--scale` names."""

from dataclasses import dataclass


# What does not change how a model is trained, or its likelihood.
MEASURING = ("num_gradients", "num_long_sequences", "num_samples")
# Nor what is measured of one model.
COVERING = ("num_seeds", "block_sizes")


@dataclass(frozen=True)
class Scale:
    """
    Attributes:
        max_bytes: of the text that is read, at most.
        vocab_size: of the byte-level tokenizer; 260 are the bytes and its special tokens.
        length: tokens of a training sequence.
        hidden_size, num_layers, num_heads: of all networks.
        batch_size, learning_rate: of training, which warms up for a twentieth of the steps.
        num_base_steps: at block size 1, with which the diffusion models begin; one base for each seed.
        num_steps: behind these, each arm in its own way. Without a base, of both numbers.
        ema_decay: of the moving average of the weights, which is what is evaluated.
        num_sequences: held-out sequences of a likelihood.
        num_search_sequences: held-out sequences, others than those, by which the noise interval is chosen ...
        num_searches: ... so often during training.
        num_draws: draws of the noise in a likelihood, four noised copies each.
        num_gradients: batches of a gradient variance.
        num_long_sequences: held-out sequences of eight times the length.
        num_samples: samples of a length, and of a text that ends.
        bf16: mixed precision.
        num_seeds: seeds 0, 1, ...
        block_sizes: between 1 and the length, of the likelihoods.
    """

    max_bytes: int
    vocab_size: int
    length: int
    hidden_size: int
    num_layers: int
    num_heads: int
    batch_size: int
    num_base_steps: int
    num_steps: int
    learning_rate: float
    ema_decay: float
    num_sequences: int
    num_search_sequences: int
    num_searches: int
    num_draws: int
    num_gradients: int
    num_long_sequences: int
    num_samples: int
    bf16: bool = False
    num_seeds: int = 3
    block_sizes: tuple[int, ...] = (4, 8, 16)


SCALES = {
    # For the tests.
    "tiny": Scale(
        max_bytes=20_000,
        vocab_size=260,
        length=32,
        hidden_size=16,
        num_layers=1,
        num_heads=2,
        batch_size=4,
        num_base_steps=2,
        num_steps=3,
        learning_rate=1e-3,
        ema_decay=0.5,
        num_sequences=4,
        num_search_sequences=4,
        num_searches=1,
        num_draws=1,
        num_gradients=2,
        num_long_sequences=2,
        num_samples=2,
        num_seeds=2,
    ),
    "cpu": Scale(
        max_bytes=2_000_000,
        vocab_size=260,
        length=64,
        hidden_size=64,
        num_layers=3,
        num_heads=2,
        batch_size=16,
        num_base_steps=400,
        num_steps=800,
        learning_rate=3e-3,
        ema_decay=0.98,
        num_sequences=256,
        num_search_sequences=64,
        num_searches=6,
        num_draws=2,
        num_gradients=48,
        num_long_sequences=64,
        num_samples=32,
    ),
    # 40 million parameters, 36 beside the embeddings; 26 million tokens for each arm, of which the base has half.
    "gpu": Scale(
        max_bytes=120_000_000,
        vocab_size=8192,
        length=512,
        hidden_size=512,
        num_layers=10,
        num_heads=8,
        batch_size=64,
        num_base_steps=400,
        num_steps=400,
        learning_rate=6e-4,
        ema_decay=0.99,
        num_sequences=512,
        num_search_sequences=128,
        num_searches=4,
        num_draws=2,
        num_gradients=16,
        num_long_sequences=64,
        num_samples=32,
        bf16=True,
        block_sizes=(4, 16),
    ),
}
