"""
The pass over [x_t ; x_0] in pieces of whole blocks, for texts so long that all pairs of their tokens are too many.

A noisy block sees itself and the clean blocks of the window before it. So the clean text is read into a cache piece by
piece, and the noised copies of each piece read the cache; the numbers are those of the pass over the whole text.
"""

import torch
from torch import Tensor, nn

from ..modeling.attention_block_diffusion import PADDING_BLOCK, MaskKind, Tokens, block_diffusion_mask, block_starts
from ..modeling.cache_block_diffusion import CommitCache
from ..modeling.prefix_reuse_block_diffusion import sliding_cache
from ..modeling.two_stream_block_diffusion import TextBlocks, columns_to_compute
from ..noise.sampler import Noise


# Tokens of both streams that are read at once, per row: a mask of all their pairs is 4 MiB, and the matrix products
# are as fast as those of a longer pass.
MOST_AT_ONCE = 2048


def token_nelbo(model, batch: dict[str, Tensor], blocks: TextBlocks, noise: Noise) -> Tensor:
    """
    The NELBO estimate of each token, in nats [batch, length], 0 where nothing is predicted: `token_nelbo` of the
    model's `forward` for this noise, in memory that grows with the window and not with its square.

    Args:
        model: a block diffusion language model, or what is wrapped around one, which is called as a whole.
        batch: `input_ids`, `labels` and perhaps `attention_mask` and so on, each [batch, length].
        blocks: the blocks of `batch`.
        noise: of this batch.
    """
    x_0 = batch["input_ids"]
    num_copies = noise.x_t.shape[1] // x_0.shape[1]
    bounds = piece_bounds(blocks.block_ids, MOST_AT_ONCE // (num_copies + 1))
    # A compiled `BlockMask` takes little memory by itself.
    is_sparse = model.config._attn_implementation == "flex_attention" and x_0.device.type != "cpu"
    if len(bounds) == 1 or is_sparse or torch.is_grad_enabled() or not is_called_plainly(model):
        return model(**{**batch, **noise.inputs(x_0)}).token_nelbo
    return PieceScorer(model, batch, blocks, noise, bounds).nelbo()


def is_called_plainly(model: nn.Module) -> bool:
    """Whether calling a model runs the `forward` of its class alone, so that its parts may be called by themselves."""
    hooks = (model._forward_hooks, model._forward_pre_hooks)
    return hasattr(type(model), "token_nats") and "forward" not in vars(model) and not any(hooks)


def piece_bounds(block_ids: Tensor, piece_size: int) -> list[tuple[int, int]]:
    """
    Columns (start, end) of pieces of at most `piece_size` tokens, or one block where that is longer, which end where
    every row of `block_ids` [batch or 1, length] ends a block.
    """
    ends_before = (block_starts(block_ids) | (block_ids == PADDING_BLOCK)).all(0)
    bounds, start, end = [], 0, 0
    for cut in [*ends_before.nonzero()[1:, 0].tolist(), len(ends_before)]:
        if cut - start > piece_size and end > start:
            bounds.append((start, end))
            start = end
        end = cut
    return [*bounds, (start, end)]


class PieceScorer:
    """The NELBO of a batch under its noise, piece by piece; arguments as for [`token_nelbo`]."""

    def __init__(self, model, batch, blocks: TextBlocks, noise: Noise, bounds: list[tuple[int, int]]):
        self.model, self.blocks, self.noise, self.bounds = model, blocks, noise, bounds
        self.x_0, self.labels = batch["input_ids"], batch.get("labels", batch["input_ids"])
        config = self.config = model.config
        self.kind = MaskKind.of(config, model.dtype)
        longest = max(end - start for start, end in bounds)
        # Of the last piece the first block sees a window before it.
        window = config.window_in_blocks * config.block_size + longest
        self.cache = sliding_cache(config.num_hidden_layers, window)
        self.x_t, self.weights, self.timesteps = (
            None if values is None else values.unflatten(1, (-1, self.x_0.shape[1]))
            for values in (noise.x_t, noise.loss_weights, noise.timesteps)
        )
        # With shifted logits, of the last clean token before a piece and of those in it [batch, 1 + length, hidden].
        self.states: Tensor | None = None
        self.masked = (self.x_t == config.mask_token_id) & blocks.predicted[:, None]

    def nelbo(self) -> Tensor:
        """[batch, length], float32."""
        nelbo = torch.zeros(self.masked.shape, dtype=torch.float32, device=self.x_0.device)
        is_masked = self.masked.flatten(0, 1).any(0)
        for start, end in self.bounds:
            if not is_masked[start:].any():
                break
            piece = slice(start, end)
            self.commit(piece)
            if is_masked[piece].any():
                nelbo[:, :, piece] = self.nelbo_of_piece(piece)
        return nelbo.sum(1)

    def commit(self, piece: slice) -> None:
        """Reads the clean tokens of a piece into the cache."""
        query, key = self.clean(piece), self.clean(self.cached(piece))
        mask = block_diffusion_mask(query, key, self.kind)
        inputs = {"position_ids": query.position_ids, "attention_mask": mask, "cache": self.cache}
        states = self.model._network(input_ids=self.x_0[:, piece], **inputs).last_hidden_state
        if self.config.shift_logits:
            before = states[:, :1] if self.states is None else self.states[:, -1:]
            self.states = torch.cat([before, states], dim=1)

    def cached(self, piece: slice) -> slice:
        """The columns of the clean text that the cache holds, or will, once it holds a piece."""
        return slice(self.cache.get_mask_sizes(0, 0)[1], piece.stop)

    def clean(self, columns: slice) -> Tokens:
        """Tokens of the clean text."""
        block_ids, positions = (ids[:, columns] for ids in (self.blocks.block_ids, self.blocks.position_ids))
        return Tokens(block_ids, positions, 0, self.kind.clean_is_causal and torch.ones_like(block_ids) > 0)

    def nelbo_of_piece(self, piece: slice) -> Tensor:
        """The NELBO of the noised copies of a piece whose clean tokens are committed [batch, copies, length]."""
        x_t, weights, masked = (values[:, :, piece] for values in (self.x_t, self.weights, self.masked))
        num_copies, shape = x_t.shape[1], x_t.flatten(1).shape
        block_ids, clean = self.blocks.block_ids[:, piece], self.clean(self.cached(piece))
        columns = torch.arange(shape[1], device=x_t.device)[None]
        if self.x_0.device.type == "cpu" and self.config._attn_implementation != "flex_attention":
            # As `forward` has it: without the blocks that hold no prediction.
            columns, _ = columns_to_compute(block_ids, masked.flatten(1))

        def chosen(values: Tensor) -> Tensor:
            """Of each copy [batch or 1, copies * length] what is computed [batch or 1, columns]."""
            rows = max(len(values), len(columns))
            return values.expand(rows, -1).gather(1, columns.expand(rows, -1))

        streams = torch.arange(1, num_copies + 1, device=x_t.device).repeat_interleave(block_ids.shape[1])[None]
        fields = (block_ids.repeat(1, num_copies), self.blocks.position_ids[:, piece].repeat(1, num_copies), streams)
        query = Tokens(*map(chosen, fields))
        inputs = {
            "input_ids": chosen(x_t.flatten(1)),
            "position_ids": query.position_ids,
            "attention_mask": block_diffusion_mask(query, followed_by(clean, query), self.kind),
            "cache": CommitCache(self.cache, 0),
        }
        if self.timesteps is not None:
            inputs["timesteps"] = chosen(self.timesteps[:, :, piece].flatten(1))
        states = self.model._network(**inputs).last_hidden_state
        if self.config.shift_logits:
            # The token before: of the same block in the noisy stream, of an earlier block in the clean one.
            num_columns, column = states.shape[1], torch.arange(block_ids.shape[1], device=x_t.device)
            is_first = chosen(block_starts(block_ids).repeat(1, num_copies))
            in_clean = num_columns + chosen(column.repeat(1, num_copies))
            read_at = (torch.arange(num_columns, device=x_t.device) - 1).clamp(min=0)
            read_at = torch.where(is_first, in_clean, read_at)[..., None].expand(len(states), -1, states.shape[-1])
            states = torch.cat([states, self.states], dim=1).gather(1, read_at)
        states = states[chosen(masked.flatten(1))]
        targets = self.labels[:, piece].repeat(1, num_copies)[masked.flatten(1)]
        nats = self.model.token_nats(states, targets)
        nelbo = torch.zeros(masked.shape, dtype=torch.float32, device=nats.device)
        return nelbo.masked_scatter(masked, weights[masked].float() * nats)


def followed_by(clean: Tokens, noisy: Tokens) -> Tokens:
    """The clean tokens, then the noisy ones, as keys [batch or 1, clean + noisy]."""
    rows = len(noisy.block_ids)
    first, second = ((tokens.block_ids, tokens.position_ids) for tokens in (clean, noisy))
    ids = (torch.cat([part.expand(rows, -1) for part in pair], dim=1) for pair in zip(first, second))
    return Tokens(*ids, nn.functional.pad(noisy.streams, (clean.block_ids.shape[1], 0)))
