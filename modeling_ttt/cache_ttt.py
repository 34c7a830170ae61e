"""The key-value cache of TtT generation: rows of different lengths side by side, without gaps, cheap to cut back."""

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
        self.plan: WritePlan | None = None

    def update(self, key_states, value_states, *args, **kwargs):
        """key_states, value_states: (rows in the plan, heads, queries, head_dim). Returns what those rows can see."""
        plan = self.plan
        if plan is None:  # extended by a plain forward
            if self.length is None:
                raise ValueError(
                    "The rows of this TttCache have different lengths, so only `generate` can extend it. Pass it as "
                    "`past_key_values` to `generate`, or run the forward without it."
                )
            start, self.length = self.length, self.length + key_states.shape[-2]
            plan = WritePlan([start] * key_states.shape[0], key_states.shape[-2], key_states.device)
        if not self.is_initialized:
            self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
            shape = (plan.batch or key_states.shape[0], key_states.shape[1], 0)
            self.keys = key_states.new_zeros(*shape, key_states.shape[3])
            self.values = value_states.new_zeros(*shape, value_states.shape[3])
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
        self.length = max(0, (self.length or 0) - abs(tokens_to_remove))

    def reset(self) -> None:
        super().reset()
        self.length, self.plan = 0, None


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
    part of its prompt that is already there, whatever the prompt. `generate` changes the cache it is given; use
    `copy.deepcopy` to continue one conversation in two ways.
    """

    def __init__(self, num_layers: int, num_rows: int):
        super().__init__(layers=[TttCacheLayer() for _ in range(num_layers)])
        self.num_rows = num_rows
        self.token_ids: list[list[int]] = [[] for _ in range(num_rows)]
        self._kept = list(range(num_rows))  # which rows the layers still hold; the others are in `_dropped`
        self._dropped: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {}

    @classmethod
    def from_dynamic_cache(cls, cache: Cache, token_ids: list[list[int]], columns: list[torch.Tensor]) -> "TttCache":
        """
        Takes over a cache whose slot i is column i of the padded prompt. token_ids: what each row's cached columns
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
        converted.token_ids = [list(ids) for ids in token_ids]
        return converted

    def reset(self) -> None:
        """Forgets everything."""
        super().reset()
        self.token_ids = [[] for _ in range(self.num_rows)]
        self._kept, self._dropped = list(range(self.num_rows)), {}

    @property
    def rows_held(self) -> int:
        """Rows still in the batch."""
        return len(self._kept)

    def write_at(self, rows: list[int], starts: list[int], queries: int, device: torch.device, reserve: int) -> None:
        """Tells the layers where the next forward, over `queries` tokens of each of `rows`, belongs."""
        positions = [self._kept.index(row) for row in rows]
        whole = positions == list(range(len(self._kept)))
        plan = WritePlan(starts, queries, device, None if whole else positions, len(self._kept), reserve)
        for layer in self.layers:
            layer.plan = plan

    def drop_row(self, row: int, length: int | None) -> None:
        """A finished row leaves the batch; its first `length` tokens are kept aside (None: nothing is)."""
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
        """Puts every row back in place, trimmed to what is final. token_ids: the cached tokens of each row."""
        self.token_ids = token_ids
        lengths = [len(ids) for ids in token_ids]
        for index, layer in enumerate(self.layers):
            layer.plan = None
            layer.length = lengths[0] if len(set(lengths)) == 1 else None
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
