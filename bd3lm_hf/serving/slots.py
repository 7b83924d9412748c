"""One static cache for many requests: a slot is one row of it, which a request has for itself while it is written."""

from typing import Any, NamedTuple
from weakref import ref

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import StaticLayer

from ..modeling.prefix_reuse_block_diffusion import CleanText


# For each number of rows of a product oneDNN makes a program that it never forgets, so there shall be few of them.
LENGTH_MULTIPLE = 16


class Call(NamedTuple):
    """
    A forward that one request waits for, or several.

    Attributes:
        input_ids: what is read [rows, length].
        inputs: what else the model is given, but for the cache.
        caches: the slot of each row.
        commits: of the first tokens of each row, how many its slot keeps.
        seen: the columns of the slot that the mask is of, where it is not of all.
    """

    input_ids: Tensor
    inputs: dict[str, Any]
    caches: list["SlotCache"]
    commits: list[int]
    seen: slice | None = None

    @property
    def length(self) -> int:
        """Tokens that are read of each row."""
        return self.input_ids.shape[1]

    @property
    def slot(self) -> int:
        """The first row's."""
        return self.caches[0].slot

    def input(self, name: str) -> Any:
        """What the model is given under a name; clean tokens have the noise level 0 where others have one."""
        if name == "timesteps" and name not in self.inputs:
            return torch.zeros(self.input_ids.shape, device=self.input_ids.device)
        return self.inputs[name]

    def rows(self) -> list["Call"]:
        """The same for each row by itself."""
        return [self._row(row) for row in range(len(self.caches))]

    def _row(self, row: int) -> "Call":
        one = slice(row, row + 1)
        return Call(self.input_ids[one], rows_of(self.inputs, one), self.caches[one], self.commits[one], self.seen)


class Scores(NamedTuple):
    """What a call gets of a forward that it shared: `logits` [rows, kept, vocab]."""

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
            # Zeros, since what is masked counts as its value times nothing; written, so that all of the memory is
            # taken at once, and not by and by as texts grow longer.
            self.keys, self.values = (
                states.new_empty(self.num_slots, states.shape[1], self.num_columns, states.shape[3]).zero_()
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
    """One row of a layer's memory, as `generate` knows it: what is read and written there is the [`JointCache`]'s."""

    is_compileable = False

    def __init__(self, cache: "SlotCache", num_columns: int):
        super().__init__(num_columns)
        self._cache = ref(cache)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        return self._cache().num_filled


class SlotCache(Cache):
    """
    The cache of one slot, as `generate` takes it; after a request it still holds that one's text.

    Attributes:
        num_filled: columns that hold the text, the first ones.
        adapter: the one that it was read with, None for the model itself.
    """

    clean_text: CleanText | None = None
    adapter: str | None = None
    num_filled = 0

    def __init__(self, memories: list[LayerMemory], slot: int):
        super().__init__(layers=[SlotLayer(self, memory.num_columns) for memory in memories])
        self.slot, self._memories = slot, memories

    def held_ids(self) -> Tensor:
        """The ids of the text that the slot holds, one for each of its columns [columns]."""
        text = self.clean_text
        if text is None or not text.is_plain:
            return torch.zeros(0, dtype=torch.long)
        return text.ids[0, : min(self.num_filled, text.num_cached)]

    def keep(self, ids: Tensor) -> None:
        """Forgets all but the first columns, whose text is `ids` [columns]."""
        self.num_filled = len(ids)
        positions = torch.arange(len(ids), device=ids.device)
        self.clean_text = CleanText(ids[None], positions[None], positions.new_tensor([len(ids)]), len(ids))

    def is_finite(self) -> bool:
        """
        Whether all that was written is numbers, those of blocks under denoising too. What is none in one layer makes
        the same token's keys and values none in all layers after it, so the last is asked.
        """
        last = self._memories[-1]
        return last.keys is None or all(bool(part[self.slot].isfinite().all()) for part in (last.keys, last.values))

    def clear(self) -> None:
        """Forgets everything, numbers that are none included."""
        self.keep(torch.zeros(0, dtype=torch.long))
        for memory in self._memories:
            memory.clear(self.slot)


class JointCache(Cache):
    """
    The slots of the rows of one forward, each of which begins where its slot's filled columns end. All `length`
    positions given are written, of which a slot keeps what it is told to (`SlotCache.num_filled`).

    Args:
        caches: the slot of each row.
        lengths: what is read of each row; the rest of `length` fills it up.
        length: positions of each row of the forward.
        memories: keys and values.
        device: theirs.
        seen: the columns that masks are of, where they are not of all.
    """

    def __init__(
        self,
        caches: list[SlotCache],
        lengths: list[int],
        length: int,
        memories: list[LayerMemory],
        device: torch.device,
        seen: slice | None = None,
    ):
        super().__init__(layers=caches[0].layers)
        self.memories, self.length = memories, length
        slots, starts = [cache.slot for cache in caches], [cache.num_filled for cache in caches]
        ends = [start + read for start, read in zip(starts, lengths, strict=True)]
        self.seen = slice(0, max(ends)) if seen is None else seen
        self.rows = torch.tensor(slots, device=device)[:, None]
        columns = torch.tensor(starts, device=device)[:, None] + torch.arange(length, device=device)
        # What fills a row up may lie past the slot, whose last column nobody reads.
        self.columns = columns.clamp(max=memories[0].num_columns - 1)
        # Neighbours are read where they are.
        are_neighbours = slots == [*range(slots[0], slots[0] + len(slots))]
        self.read = slice(slots[0], slots[0] + len(slots)) if are_neighbours else self.rows[:, 0]

    @property
    def num_columns(self) -> int:
        """Columns that are seen."""
        return self.seen.stop - self.seen.start

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple:
        """Writes states [rows, heads, length, head_dim]; returns what is seen [rows, heads, columns, head_dim]."""
        memory = self.memories[layer_idx]
        memory.write(self.rows, self.columns, key_states, value_states)
        return tuple(part[:, :, self.seen][self.read] for part in (memory.keys, memory.values))

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

    def take(self, ids: Tensor, num_clean: int, adapter: str | None = None) -> tuple[SlotCache, int]:
        """
        A free slot that holds as much as any slot does of the first `num_clean` tokens of a prompt `ids` [length], in
        whole blocks that were read with the same adapter; and how many tokens these are.
        """
        lengths = [
            self._num_shared(cache, ids[:num_clean]) if cache.adapter == adapter else 0 for cache in self.caches
        ]
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
        best.adapter = adapter
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

    def forward(self, calls: list[Call]) -> list[Scores]:
        """One forward for all `calls`: what each gets of it."""
        caches = [cache for call in calls for cache in call.caches]
        lengths = [call.length for call in calls for _ in call.caches]
        # Slots in their order may be read where they are.
        order = sorted(range(len(caches)), key=lambda row: caches[row].slot)
        ordered = [caches[row] for row in order], [lengths[row] for row in order]
        length, device = self._padded(max(lengths)), calls[0].input_ids.device
        seen = calls[0].seen if len(calls) == 1 else None
        joint = JointCache(*ordered, length, self.memories, device, seen)
        input_ids, inputs = calls[0].input_ids, calls[0].inputs
        if len(calls) > 1 or length > calls[0].length:
            input_ids = joined([call.input_ids for call in calls], length)
            names = {name for call in calls for name in call.inputs}
            parts = {name: [call.input(name) for call in calls] for name in names}
            inputs = {name: joined_inputs(parts[name], calls, joint) for name in names - {"logits_to_keep"}}
            inputs["logits_to_keep"] = joined(parts["logits_to_keep"])
        is_ordered = order == [*range(len(order))]
        if not is_ordered:
            input_ids, inputs = input_ids[order], rows_of(inputs, order)
        logits = self.model(input_ids=input_ids, cache=joint, **inputs).logits
        if not is_ordered:
            logits = logits[torch.tensor(order, device=device).argsort()]
        parts = [logits]
        if len(calls) > 1:
            widths = [call.inputs["logits_to_keep"].shape[1] for call in calls]
            parts = logits.split([len(call.caches) for call in calls])
            # Of their own, for what is kept of one row must not keep all rows.
            parts = [part[:, :width].clone() for part, width in zip(parts, widths, strict=True)]
        scores = [Scores(part) for part in parts]
        # Last, since a forward that fails before is run again.
        for call in calls:
            for cache, number in zip(call.caches, call.commits, strict=True):
                cache.num_filled += number
        return scores

    def _padded(self, length: int) -> int:
        """The tokens that are read of each row, of a prompt a whole number of `LENGTH_MULTIPLE`."""
        return length if length <= 2 * self.block_size else -(-length // LENGTH_MULTIPLE) * LENGTH_MULTIPLE


def rows_of(value: Any, rows: list[int] | slice) -> Any:
    """Some rows of an input of the model, which may be a dictionary of such."""
    if isinstance(value, dict):
        return {name: rows_of(part, rows) for name, part in value.items()}
    return value[rows]


def joined(parts: list[Tensor], width: int = 0) -> Tensor:
    """Tensors of several rows each as one [all rows, width or the widest], filled up with their last column."""
    width = max(width, *(part.shape[1] for part in parts))
    return torch.cat([torch.cat([part, part[:, -1:].expand(-1, width - part.shape[1])], dim=1) for part in parts])


def joined_inputs(parts: list[Any], calls: list[Call], joint: JointCache) -> Any:
    """
    One input of all `calls` as one of all rows. What fills up the queries of a mask sees the first column, and nobody
    sees it.
    """
    if isinstance(parts[0], dict):
        return {name: joined_inputs([part[name] for part in parts], calls, joint) for name in parts[0]}
    if parts[0].dim() < 4:
        return joined(parts, joint.length)
    is_bool = parts[0].dtype == torch.bool
    seen, unseen = (True, False) if is_bool else (0.0, torch.finfo(parts[0].dtype).min)
    numbers = [len(call.caches) for call in calls]
    mask = parts[0].new_full((sum(numbers), 1, joint.length, joint.num_columns), unseen)
    for rows, part in zip(mask.split(numbers), parts, strict=True):
        num_queries, num_keys = part.shape[2:]
        rows[:, :, :num_queries, :num_keys] = part
        rows[:, :, num_queries:, 0] = seen
    return mask


class ForwardCost(NamedTuple):
    """
    What decides who shares a forward.

    Attributes:
        overhead: what one more forward costs, in tokens that it could have read: it reads all weights once more.
        most_tokens: of prompts in a forward, since more make it no faster; None for as many as there are.
    """

    overhead: int
    most_tokens: int | None = None


def groups_of(calls: list[Any], cost: ForwardCost, short: int) -> list[list[Any]]:
    """
    The calls, or steps, that share a forward. A shorter one is filled up to the longest of its forward, where that
    costs less than another forward. What is not longer than `short` reads no prompt.
    """
    # Of a long text that is read without its first columns the mask has no place among others.
    groups = [[call] for call in calls if call.seen is not None and call.seen.start > 0]
    rest = [call for call in calls if call.seen is None or call.seen.start == 0]
    shared: list[list[Any]] = []
    for length in sorted({call.length for call in rest}, reverse=True):
        alike = [call for call in rest if call.length == length]
        if shared and len(alike) * (shared[-1][0].length - length) <= cost.overhead:
            shared[-1] += alike
        else:
            shared.append(alike)
    for group in shared:
        length = group[0].length
        is_bounded = cost.most_tokens is not None and length > short
        number = max(cost.most_tokens // length, 1) if is_bounded else len(group)
        # Slots in their order may be read where they are.
        group.sort(key=lambda call: call.slot)
        groups += [group[start : start + number] for start in range(0, len(group), number)]
    return groups
