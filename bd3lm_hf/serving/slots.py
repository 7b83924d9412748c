"""One static cache for many requests: a slot is one row of it, which a request has for itself while it is written."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import StaticLayer

from ..modeling.cache_block_diffusion import CommitCache
from ..modeling.prefix_reuse_block_diffusion import CleanText


class Call(NamedTuple):
    """A forward that a request waits for: the tokens that are read [1, length], and what else the model is given."""

    input_ids: Tensor
    inputs: dict[str, Any]

    @property
    def length(self) -> int:
        return self.input_ids.shape[1]

    @property
    def cache(self) -> CommitCache:
        return self.inputs["cache"]


class Scores(NamedTuple):
    """What a request gets of a forward that it shared: `logits` [1, kept, vocab]."""

    logits: Tensor


class LayerMemory:
    """Keys and values of one layer for all slots [slots, heads, columns, head_dim], made when the first are known."""

    keys: Tensor | None = None
    values: Tensor | None = None

    def __init__(self, num_slots: int, num_columns: int):
        self.num_slots, self.num_columns = num_slots, num_columns

    def make(self, key_states: Tensor, value_states: Tensor) -> None:
        """Makes room, as wide as these states [rows, heads, length, head_dim], of their dtype and device."""
        if self.keys is None:
            # Zeros, since what is masked counts as its value times nothing.
            self.keys, self.values = (
                states.new_zeros(self.num_slots, states.shape[1], self.num_columns, states.shape[3])
                for states in (key_states, value_states)
            )

    def clear(self, slot: int) -> None:
        """Puts zeros in place of what a slot holds."""
        if self.keys is not None:
            self.keys[slot], self.values[slot] = 0.0, 0.0

    def write(self, rows: Tensor, columns: Tensor, key_states: Tensor, value_states: Tensor) -> None:
        """Puts states [rows, heads, length, head_dim] at `rows` [rows, 1] and `columns` [rows, length]."""
        self.make(key_states, value_states)
        self.keys[rows, :, columns] = key_states.transpose(1, 2)
        self.values[rows, :, columns] = value_states.transpose(1, 2)


class SlotLayer(StaticLayer):
    """One row of a layer's memory, of which as many columns are read as are filled."""

    is_compileable = False

    def __init__(self, memory: LayerMemory, slot: int):
        super().__init__(memory.num_columns)
        self.memory, self.slot = memory, slot

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """See `StaticLayer`; the memory is that of all slots."""
        self.memory.make(key_states, value_states)
        self.keys, self.values = (part[self.slot : self.slot + 1] for part in (self.memory.keys, self.memory.values))
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Writes states [1, heads, length, head_dim] after what is filled, and returns all that is filled then."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        self.keys[:, :, start:end], self.values[:, :, start:end] = key_states, value_states
        self.cumulative_length.fill_(end)
        return self.keys[:, :, :end], self.values[:, :, :end]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        return int(self.cumulative_length)


class SlotCache(Cache):
    """The cache of one slot, as `generate` takes it; after a request it still holds that one's text."""

    clean_text: CleanText | None = None

    def __init__(self, memories: list[LayerMemory], slot: int):
        super().__init__(layers=[SlotLayer(memory, slot) for memory in memories])
        self.slot = slot

    def advance(self, num_columns: int) -> None:
        """Counts columns that were written after the filled ones as filled."""
        for layer in self.layers:
            layer.cumulative_length.add_(num_columns)

    def held_ids(self) -> Tensor:
        """The ids of the text that the slot holds, one for each of its columns [columns]."""
        text, num_columns = self.clean_text, self.get_seq_length()
        if text is None or not text.is_plain:
            return torch.zeros(0, dtype=torch.long)
        return text.ids[0, : min(num_columns, text.num_cached)]

    def keep(self, ids: Tensor) -> None:
        """Forgets all but the first columns, whose text is `ids` [columns]."""
        for layer in self.layers:
            layer.cumulative_length.fill_(len(ids))
            if len(ids) and not layer.is_initialized:
                layer.lazy_initialization(layer.memory.keys, layer.memory.values)
        positions = torch.arange(len(ids), device=ids.device)
        self.clean_text = CleanText(ids[None], positions[None], positions.new_tensor([len(ids)]), len(ids))

    def clear(self) -> None:
        """Forgets everything, numbers that are none included."""
        self.keep(torch.zeros(0, dtype=torch.long))
        for layer in self.layers:
            layer.memory.clear(self.slot)


class JointCache(Cache):
    """
    The slots of several calls under one forward, each of whose rows begins where its slot's filled columns end. Every
    position given is written, and counts as filled only if the slot is told so (`SlotCache.advance`).
    """

    def __init__(self, calls: list[Call], memories: list[LayerMemory]):
        caches, self.memories = [call.cache.cache for call in calls], memories
        super().__init__(layers=caches[0].layers)
        self.length, device = max(call.length for call in calls), calls[0].input_ids.device
        slots, starts = [cache.slot for cache in caches], [cache.get_seq_length() for cache in caches]
        self.num_columns = max(start + call.length for start, call in zip(starts, calls, strict=True))
        self.rows = torch.tensor(slots, device=device)[:, None]
        columns = torch.tensor(starts, device=device)[:, None] + torch.arange(self.length, device=device)
        # What fills a row up may lie past the slot, whose last column nobody reads.
        self.columns = columns.clamp(max=memories[0].num_columns - 1)
        # Neighbours are read where they are.
        are_neighbours = slots == [*range(slots[0], slots[0] + len(slots))]
        self.read = slice(slots[0], slots[0] + len(slots)) if are_neighbours else self.rows[:, 0]

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple:
        """Writes states [rows, heads, length, head_dim]; returns what is filled [rows, heads, columns, head_dim]."""
        memory = self.memories[layer_idx]
        memory.write(self.rows, self.columns, key_states, value_states)
        return tuple(part[:, :, : self.num_columns][self.read] for part in (memory.keys, memory.values))

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.num_columns - self.length

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.num_columns, 0


class Slots:
    """
    The slots of a model's cache, and the forwards that the requests in them share.

    Args:
        model: a block diffusion language model.
        num_slots: requests that are written at once.
        num_columns: positions that each slot has room for; blocks under denoising take some as well.
    """

    def __init__(self, model: Any, num_slots: int, num_columns: int):
        self.model, self.block_size = model, model.config.block_size
        # One more for what nobody reads.
        self.memories = [LayerMemory(num_slots, num_columns + 1) for _ in range(model.config.num_hidden_layers)]
        self.caches = [SlotCache(self.memories, slot) for slot in range(num_slots)]
        # The one that was used longest ago first.
        self.free = list(self.caches)

    def take(self, ids: Tensor, num_clean: int) -> tuple[SlotCache, int]:
        """
        A free slot that holds as much as any slot does of the first `num_clean` tokens of a prompt `ids` [length], in
        whole blocks; and how many these are.
        """
        lengths = [self._num_shared(cache, ids[:num_clean]) for cache in self.caches]
        longest = max(lengths)
        best = next((cache for cache in self.free if lengths[cache.slot] == longest), None)
        if best is None:
            best = self.free[0]
            source = lengths.index(longest)
            for memory in self.memories:
                for part in (memory.keys, memory.values):
                    part[best.slot, :, :longest] = part[source, :, :longest]
        self.free.remove(best)
        best.keep(ids[:longest])
        return best, longest

    def give_back(self, cache: SlotCache, is_whole: bool) -> None:
        """Frees a slot; what it holds is of use to others if its request ended well."""
        if not is_whole:
            cache.clear()
        self.free.append(cache)

    def _num_shared(self, cache: SlotCache, ids: Tensor) -> int:
        held = cache.held_ids()[: len(ids)].to(ids.device)
        num_alike = int((held == ids[: len(held)]).long().cumprod(0).sum())
        return num_alike // self.block_size * self.block_size

    def forward(self, calls: list[Call]) -> list[Any]:
        """One forward for all `calls`: what each gets of it."""
        if len(calls) == 1:
            return [self.model(input_ids=calls[0].input_ids, **calls[0].inputs)]
        joint = JointCache(calls, self.memories)
        names = calls[0].inputs.keys() - {"cache", "attention_mask"}
        inputs = {name: joined([call.inputs[name] for call in calls]) for name in names}
        inputs["attention_mask"] = joined_masks([call.inputs["attention_mask"] for call in calls], joint)
        input_ids = joined([call.input_ids for call in calls])
        logits = self.model(input_ids=input_ids, **(inputs | {"cache": joint})).logits
        for call in calls:
            call.cache.cache.advance(call.cache.num_commit)
        widths = [call.inputs["logits_to_keep"].shape[1] for call in calls]
        # Of their own, for what is kept of one row must not keep all rows.
        return [Scores(logits[row : row + 1, :width].clone()) for row, width in enumerate(widths)]


def joined(parts: list[Tensor]) -> Tensor:
    """Tensors of one row each [1, width or less] as one [rows, width], filled up with their last column."""
    width = max(part.shape[1] for part in parts)
    return torch.cat([torch.cat([part, part[:, -1:].expand(1, width - part.shape[1])], dim=1) for part in parts])


def joined_masks(parts: list[Any], joint: JointCache) -> Any:
    """Masks of one row each as one of all rows; what fills a row up sees the first column, and nobody sees it."""
    if isinstance(parts[0], dict):
        return {name: joined_masks([part[name] for part in parts], joint) for name in parts[0]}
    is_bool = parts[0].dtype == torch.bool
    seen, unseen = (True, False) if is_bool else (0.0, torch.finfo(parts[0].dtype).min)
    mask = parts[0].new_full((len(parts), 1, joint.length, joint.num_columns), unseen)
    for row, part in enumerate(parts):
        num_queries, num_keys = part.shape[2:]
        mask[row, :, :num_queries, :num_keys] = part[0]
        mask[row, :, num_queries:, 0] = seen
    return mask


def groups_of(calls: list[Call], overhead: int) -> list[list[Call]]:
    """
    The calls that share a forward. A shorter call is filled up to the longest of its forward, which pays while that
    takes fewer tokens than another forward costs, `overhead` in tokens.
    """
    # Of a long text that is read without its first columns the mask has no place among others.
    groups = [[call] for call in calls if call.cache.seen is not None and call.cache.seen.start > 0]
    rest = [call for call in calls if call.cache.seen is None or call.cache.seen.start == 0]
    shared: list[list[Call]] = []
    for length in sorted({call.length for call in rest}, reverse=True):
        alike = [call for call in rest if call.length == length]
        if shared and len(alike) * (shared[-1][0].length - length) <= overhead:
            shared[-1] += alike
        else:
            shared.append(alike)
    # Slots in their order may be read where they are.
    return groups + [sorted(group, key=lambda call: call.cache.cache.slot) for group in shared]
