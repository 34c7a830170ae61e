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
        """Take over dtype, device and shape of `(rows, heads, queries, head_dim)`; nothing is stored."""
        self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
        self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]

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
            shape = (plan.batch or key_states.shape[0], *key_states.shape[1:])
            self.lazy_initialization(key_states.new_empty(shape), value_states.new_empty(shape))
        if plan.end > self.keys.shape[2]:
            extra = max(plan.end, self.keys.shape[2] * 3 // 2, plan.reserve) - self.keys.shape[2]
            self.keys = torch.nn.functional.pad(self.keys, (0, 0, 0, extra))
            self.values = torch.nn.functional.pad(self.values, (0, 0, 0, extra))
        if plan.rows is None and plan.slots is None:
            self.keys[:, :, plan.start : plan.end] = key_states
            self.values[:, :, plan.start : plan.end] = value_states
            return self.keys[:, :, : plan.end], self.values[:, :, : plan.end]
        self.keys[plan.write_rows, :, plan.slots] = key_states.transpose(1, 2)
        self.values[plan.write_rows, :, plan.slots] = value_states.transpose(1, 2)
        keys, values = self.keys[:, :, : plan.end], self.values[:, :, : plan.end]
        return (keys, values) if plan.rows is None else (keys[plan.rows], values[plan.rows])

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
    Where one forward writes: row `rows[i]` of the cache writes `queries` slots from `starts[i]`. `rows` None is all.
    """

    def __init__(
        self,
        starts: list[int],
        queries: int,
        device: torch.device,
        rows: list[int] | None = None,
        batch: int | None = None,
        reserve: int = 0,
    ):
        self.batch, self.reserve = batch, reserve
        self.start, self.end = min(starts), max(starts) + queries
        self.rows: torch.Tensor | None = None
        self.slots: torch.Tensor | None = None
        if rows is not None or len(set(starts)) > 1:
            self.slots = torch.tensor(starts, device=device)[:, None] + torch.arange(queries, device=device)
            self.rows = None if rows is None else torch.tensor(rows, device=device)
            all_rows = torch.arange(len(starts), device=device) if self.rows is None else self.rows
            self.write_rows = all_rows[:, None]


class TttCache(Cache):
    """
    What `generate` returns as `past_key_values` and takes back for the next turn of a conversation.

    Beside keys and values it remembers the token ids they belong to, so that the next call can take over exactly the
    part of its prompt that is already there, whatever the prompt. What was cut off or written by others since is not
    taken over. `generate` changes the cache it is given; use `copy.deepcopy` to continue one conversation in two ways.
    """

    def __init__(self, num_layers: int, num_rows: int):
        super().__init__(layers=[TttCacheLayer() for _ in range(num_layers)])
        self.num_rows = num_rows
        self._token_ids: list[list[int]] = [[] for _ in range(num_rows)]
        self.block_length: int | None = None  # in which block-causal spans were written, once `generate` has been there
        self._kept = list(range(num_rows))  # which rows the layers still hold; the others are in `_dropped`
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

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self._token_ids = [[] for _ in range(self.num_rows)]
        self._kept, self._dropped = list(range(self.num_rows)), {}

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
        self.num_rows, self._kept = len(rows), list(range(len(rows)))

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

    def write_at(self, rows: list[int], starts: list[int], queries: int, device: torch.device, reserve: int) -> None:
        """Tell the layers where the next forward, over `queries` tokens of each of `rows`, belongs."""
        positions = [self._kept.index(row) for row in rows]
        whole = positions == list(range(len(self._kept)))
        plan = WritePlan(starts, queries, device, None if whole else positions, len(self._kept), reserve)
        for layer in self.layers:
            layer.plan = plan

    def drop_row(self, row: int, length: int | None) -> None:
        """Let a finished row leave the batch; its first `length` tokens are kept aside (None: nothing is)."""
        position = self._kept.index(row)
        keep = [i for i in range(len(self._kept)) if i != position]
        if length is not None:
            self._dropped[row] = [
                (layer.keys[position, :, :length].clone(), layer.values[position, :, :length].clone())
                for layer in self.layers
            ]
        self._kept = [self._kept[i] for i in keep]
        if keep:
            for layer in self.layers:
                layer.keys, layer.values = layer.keys[keep], layer.values[keep]

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
        self._kept, self._dropped = list(range(self.num_rows)), {}


__all__ = ["TttCache"]
