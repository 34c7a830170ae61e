"""The key-value cache of TtT generation: rows of different lengths side by side, without gaps, cheap to cut back."""

from collections.abc import Callable

import torch
from transformers.cache_utils import Cache, DynamicLayer


class TttCacheLayer(DynamicLayer):
    """
    Keys and values of one layer, (rows, key_value_heads, capacity, head_dim). Slot i of a row holds the row's token i
    (padding is never stored), so a row is cut back by overwriting what follows. Unused slots hold finite numbers.
    """

    def __init__(self) -> None:
        super().__init__()
        self.length: int | None = 0  # of every row; None while rows differ
        self.num_known = 0  # how many leading slots hold what `generate` has left there
        self.plan: WritePlan | None = None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Take over dtype, device, heads and head_dim of `(rows, heads, queries, head_dim)`; nothing is stored."""
        self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
        self.keys, self.values = key_states[:0, :, :0], value_states[:0, :, :0]

    def update(self, key_states, value_states, *args, **kwargs):
        """
        Store `(rows in the plan, heads, queries, head_dim)`; return what those rows can see.

        Raises:
            ValueError: if a plain forward extends rows of different lengths.
        """
        plan = self.plan
        if plan is None:  # extended by a plain forward
            start, queries = self._length_of_all("extend"), key_states.shape[-2]
            self.length, self.num_known = start + queries, min(self.num_known, start)
            plan = WritePlan([start] * key_states.shape[0], queries, key_states.device)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.make_room(plan.capacity or key_states.shape[0], plan.end, plan.reserve)
        if plan.slots is None:  # the same ones in every row
            self.keys[plan.rows, :, plan.start : plan.end] = key_states
            self.values[plan.rows, :, plan.start : plan.end] = value_states
        else:
            self.keys[plan.write_rows, :, plan.slots] = key_states.transpose(1, 2)
            self.values[plan.write_rows, :, plan.slots] = value_states.transpose(1, 2)
        return self.keys[plan.rows, :, : plan.end], self.values[plan.rows, :, : plan.end]

    def make_room(self, rows: int, length: int, reserve: int = 0) -> None:
        """Have at least so many rows, and slots in each of them; where there are too few, `reserve` slots or more."""
        more_rows, slots = max(0, rows - self.keys.shape[0]), self.keys.shape[2]
        extra = max(length, slots * 3 // 2, reserve) - slots if length > slots else 0
        if more_rows or extra:
            self.keys = torch.nn.functional.pad(self.keys, (0, 0, 0, extra, 0, 0, 0, more_rows))
            self.values = torch.nn.functional.pad(self.values, (0, 0, 0, extra, 0, 0, 0, more_rows))

    def get_seq_length(self) -> int:
        return self.length or 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def crop(self, tokens_to_remove: int) -> None:
        """
        Forget the last tokens of every row, as many as the negative number says.

        Raises:
            ValueError: if the number is positive, or rows have different lengths.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"`crop({tokens_to_remove})`: give the number of tokens to remove as a negative number.")
        if tokens_to_remove < 0:
            self.length = max(0, self._length_of_all("crop") + tokens_to_remove)
            self.num_known = min(self.num_known, self.length)

    def reset(self) -> None:
        super().reset()
        self.length, self.num_known, self.plan = 0, 0, None

    def select_rows(self, rows: torch.Tensor) -> None:
        """Keep these rows, in this order; one may come several times."""
        if self.is_initialized:
            self.keys, self.values = self.keys[rows.to(self.keys.device)], self.values[rows.to(self.values.device)]

    def _length_of_all(self, what: str) -> int:
        if self.length is None:
            raise ValueError(
                f"The rows of this TttCache have different lengths, so only `generate` can {what} it. Pass it as "
                "`past_key_values` to `generate`, or run the forward without it."
            )
        return self.length


class WritePlan:
    """
    Where one forward writes: row `rows[i]` of a layer writes `queries` slots from `starts[i]`. `rows` None is the first
    ones, in order. `capacity` is how many rows a layer has room for. A ragged plan writes each of the tokens of one
    sequence to a row and slot of its own, and sees all rows.
    """

    def __init__(
        self,
        starts: list[int],
        queries: int,
        device: torch.device,
        rows: list[int] | None = None,
        capacity: int | None = None,
        reserve: int = 0,
    ):
        self.capacity, self.reserve = capacity, reserve
        self.start, self.end = min(starts), max(starts) + queries
        self.rows: slice | torch.Tensor = slice(len(starts)) if rows is None else torch.tensor(rows, device=device)
        self.slots: torch.Tensor | None = None
        if rows is not None or len(set(starts)) > 1:
            self.slots = torch.tensor(starts, device=device)[:, None] + torch.arange(queries, device=device)
            self.write_rows = torch.tensor(rows or range(len(starts)), device=device)[:, None]

    @classmethod
    def ragged(cls, rows: torch.Tensor, slots: torch.Tensor, end: int, capacity: int, reserve: int) -> "WritePlan":
        """Write tokens to `rows` and `slots`, both of shape `(tokens,)`, all before `end`."""
        plan = cls([end], 0, rows.device, None, capacity, reserve)
        plan.rows, plan.write_rows, plan.slots = slice(None), rows[None], slots[None]
        return plan


class TttCache(Cache):
    """
    What `generate` returns as `past_key_values` and takes back for the next turn of a conversation.

    Beside keys and values it remembers the token ids they belong to, so that the next call can take over exactly the
    part of its prompt that is already there, whatever the prompt. What was cut off or written by others since is not
    taken over. `generate` changes the cache it is given; use `copy.deepcopy` to continue one conversation in two ways.
    """

    def __init__(self, num_layers: int, num_rows: int, max_rows: int = 0):
        super().__init__(layers=[TttCacheLayer() for _ in range(num_layers)])
        self.num_rows = num_rows
        self._token_ids: list[list[int]] = [[] for _ in range(num_rows)]
        self.block_length: int | None = None  # in which block-causal spans were written, once `generate` has been there
        self._kept = list(range(num_rows))  # which row is in each slot of the layers; the others are in `_dropped`
        self._capacity = max(num_rows, max_rows)  # slots of the layers, for which they make room at once
        self._dropped: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {}

    @property
    def token_ids(self) -> list[list[int]]:
        """Of each row, the tokens whose keys and values are there as `generate` computed them."""
        known = min((layer.num_known for layer in self.layers), default=0)
        return [ids[:known] for ids in self._token_ids]

    @classmethod
    def from_dynamic_cache(cls, cache: Cache, token_ids: list[list[int]], columns: list[torch.Tensor]) -> "TttCache":
        """
        Take over a cache whose slot i is column i of the padded prompt. token_ids: what each row's cached columns
        hold, without padding; columns: the unpadded columns of each row.
        """
        converted = cls(len(cache.layers), len(token_ids))
        longest = max(map(len, token_ids))
        for layer, source in zip(converted.layers, cache.layers, strict=True):
            layer.dtype, layer.device, layer.is_initialized = source.keys.dtype, source.keys.device, True
            layer.keys = source.keys.new_zeros(*source.keys.shape[:2], longest, source.keys.shape[3])
            layer.values = source.values.new_zeros(*source.values.shape[:2], longest, source.values.shape[3])
            for row, kept in enumerate(columns):
                layer.keys[row, :, : len(kept)] = source.keys[row, :, kept]
                layer.values[row, :, : len(kept)] = source.values[row, :, kept]
            layer.num_known = longest
        converted._token_ids = [list(ids) for ids in token_ids]
        return converted

    def copy_to(self, cache: Cache, mask: torch.Tensor) -> None:
        """
        Put into a cache whose slot i is column i of padded sequences the columns that every row has; it holds nothing
        else afterwards. mask: where each row's tokens stand, of shape `(rows, columns)`, more of them than are cached.
        """
        columns = [row.nonzero().squeeze(-1) for row in mask]
        width = min(int(own[len(ids)]) for own, ids in zip(columns, self._token_ids, strict=True))
        cache.reset()
        for index, layer in enumerate(self.layers):
            states = []
            for source in (layer.keys, layer.values):
                states.append(source.new_zeros(*source.shape[:2], width, source.shape[3]))
                for row, own in enumerate(columns):
                    kept = own[own < width]
                    states[-1][row, :, kept] = source[row, :, : len(kept)]
            cache.update(*states, index)

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self._token_ids = [[] for _ in range(self.num_rows)]
        self._kept, self._dropped, self._capacity = list(range(self.num_rows)), {}, self.num_rows

    def drop_spans(self, is_audio: Callable[[int], bool]) -> None:
        """Forget everything from the first audio-side token of each row on, as `is_audio` tells of an id."""
        for ids in self._token_ids:
            first = next((place for place, token in enumerate(ids) if is_audio(token)), len(ids))
            del ids[first:]

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep these rows, in this order: indices or a mask, of shape `(rows,)`."""
        rows = torch.arange(self.num_rows)[torch.as_tensor(indices, device="cpu")]
        self._token_ids = [list(self._token_ids[row]) for row in rows.tolist()]
        lengths = list(map(len, self._token_ids))
        for layer in self.layers:
            layer.select_rows(rows)
            if layer.length is None and min(lengths) == max(lengths):
                layer.length = min(lengths)
        self.num_rows = self._capacity = len(rows)
        self._kept = list(range(len(rows)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row, one copy beside the other."""
        self.batch_select_indices(torch.arange(self.num_rows).repeat_interleave(repeats))

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Put row `beam_idx[i]` in the place of row i."""
        self.batch_select_indices(beam_idx)

    @property
    def rows_held(self) -> int:
        """How many rows are still in the batch."""
        return len(self._kept)

    @property
    def num_bytes(self) -> int:
        """Memory of the keys and values."""
        layers = [layer for layer in self.layers if layer.is_initialized]
        return sum(states.numel() * states.element_size() for layer in layers for states in (layer.keys, layer.values))

    def slot(self, row: int) -> int:
        """Where in the layers a row is."""
        return self._kept.index(row)

    def write_at(self, rows: list[int], starts: list[int], queries: int, device: torch.device, reserve: int) -> None:
        """Tell the layers where the next forward, over `queries` tokens of each of `rows`, belongs."""
        slots = [self._kept.index(row) for row in rows]
        in_order = slots == list(range(len(slots)))
        plan = WritePlan(starts, queries, device, None if in_order else slots, self._capacity, reserve)
        for layer in self.layers:
            layer.plan = plan

    def write_ragged(self, slots: torch.Tensor, positions: torch.Tensor, end: int, reserve: int) -> None:
        """Tell the layers where each token of the next forward belongs, which runs several rows as one sequence."""
        plan = WritePlan.ragged(slots, positions, end, self._capacity, reserve)
        for layer in self.layers:
            layer.plan = plan

    def add_row(self, row: int, source: "TttCache | None" = None, of_source: int = 0, length: int = 0) -> None:
        """
        Let a row join the batch under a number of its own, with the first `length` tokens of row `of_source` of another
        cache.
        """
        slot = len(self._kept)
        self._kept.append(row)
        self._capacity = max(self._capacity, len(self._kept))
        if source is None or not length:
            return
        for layer, other in zip(self.layers, source.layers, strict=True):
            if not layer.is_initialized:
                layer.lazy_initialization(other.keys, other.values)
            layer.make_room(self._capacity, length, length + 512)
            layer.keys[slot, :, :length] = other.keys[of_source, :, :length]
            layer.values[slot, :, :length] = other.values[of_source, :, :length]

    def take_row(self, row: int, token_ids: list[int]) -> "TttCache":
        """Return a cache of one row, with the keys and values of its first tokens, which are `token_ids`."""
        taken, slot = type(self)(len(self.layers), 1), self._kept.index(row)
        taken._token_ids = [list(token_ids)]
        for layer, other in zip(taken.layers, self.layers, strict=True):
            layer.dtype, layer.device, layer.is_initialized = other.dtype, other.device, True
            layer.keys = other.keys[slot : slot + 1, :, : len(token_ids)].clone()
            layer.values = other.values[slot : slot + 1, :, : len(token_ids)].clone()
            layer.length = layer.num_known = len(token_ids)
        return taken

    def drop_row(self, row: int, length: int | None) -> None:
        """
        Let a row leave the batch; the last one takes its slot. Its first `length` tokens are kept aside, none for None.
        """
        slot, last = self._kept.index(row), len(self._kept) - 1
        for layer in self.layers:
            if length is not None:
                kept = layer.keys[slot, :, :length].clone(), layer.values[slot, :, :length].clone()
                self._dropped.setdefault(row, []).append(kept)
            if slot != last and layer.is_initialized and layer.keys.shape[0] > last:
                layer.keys[slot], layer.values[slot] = layer.keys[last], layer.values[last]
        self._kept[slot] = self._kept[last]
        del self._kept[last]

    def close(self, token_ids: list[list[int]]) -> None:
        """Put every row back in place, trimmed to what is final. token_ids: the cached tokens of each row."""
        self._token_ids = token_ids
        lengths = [len(ids) for ids in token_ids]
        for index, layer in enumerate(self.layers):
            layer.plan = None
            layer.length = lengths[0] if len(set(lengths)) == 1 else None
            layer.num_known = max(lengths)
            keys, values = layer.keys, layer.values
            shape = (self.num_rows, keys.shape[1], max(lengths))
            layer.keys = keys.new_zeros(*shape, keys.shape[3])
            layer.values = values.new_zeros(*shape, values.shape[3])
            for row, length in enumerate(lengths):
                if row in self._dropped:
                    row_keys, row_values = self._dropped[row][index]
                else:
                    position = self._kept.index(row)
                    row_keys, row_values = keys[position, :, :length], values[position, :, :length]
                layer.keys[row, :, :length] = row_keys
                layer.values[row, :, :length] = row_values
        self._kept, self._dropped, self._capacity = list(range(self.num_rows)), {}, self.num_rows


__all__ = ["TttCache"]
