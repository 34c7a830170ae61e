"""The decoding loop of TtT: rows of a batch write text left to right and audio spans by block diffusion, on one cache.

What a user may ask for is checked in generation_ttt.py; how codes are drawn is in denoising_ttt.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers.generation import (
    EosTokenCriteria,
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    LogitsProcessorList,
    MaxLengthCriteria,
    MinPLogitsWarper,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)
from transformers.generation.streamers import BaseStreamer

from .cache_ttt import TttCache
from .denoising_ttt import denoise, draw, exponential, make_generators
from .runner_ttt import TttRunner

# Processors that look at each row's scores only: they need neither the ids nor the other rows.
SCORE_PROCESSORS = (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)
MOST_UNCONDITIONAL_STARTS = 64  # remembered in a call
UNDECIDED = -1  # in a block: not fixed yet, shown to the model as the mask token


@dataclass
class Row:
    """One row of the batch. `ids` are final; `block` is being denoised; the first `cached` ids are in the cache."""

    index: int
    ids: list[int]
    prompt_length: int
    cached: int
    generator: torch.Generator | None
    span_start: int | None = None  # of the span being written or, in its last forward, committed
    block: list[int] = field(default_factory=list)
    step: int = 0  # denoising steps done in this block
    done: bool = False
    forwards: int = 0

    @property
    def new_tokens(self) -> int:
        return len(self.ids) - self.prompt_length


class TttDecoder:
    """One call of `generate`. See [`TttGenerationMixin.generate`] for the algorithm; the steps carry its numbers."""

    def __init__(
        self,
        model: Any,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        generation_config: Any,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        streamer: BaseStreamer | None,
        cache: TttCache | None,
        keep_cache: bool,
    ):
        config = model.config
        self.options, self.streamer = generation_config, streamer
        self.device, self.vocab_size = input_ids.device, config.get_text_config().vocab_size
        self.input_ids, self.keep_cache = input_ids, keep_cache

        # Token ids.
        self.mask_token = config.mask_token_id
        self.is_audio = config.is_audio
        self.audio_start, self.audio_end = config.audio_token_id_start, config.audio_token_id_end
        self.end_of = {
            config.begin_of_audio_token_id: config.end_of_audio_token_id,
            config.begin_of_last_audio_token_id: config.end_of_last_audio_token_id,
        }
        self.end_tokens = set(self.end_of.values())
        codes = range(config.audio_code_id_start, config.audio_code_id_start + config.num_audio_codes)
        self.first_candidate = min(codes.start, *self.end_tokens)
        self.last_candidate = max(codes.stop - 1, *self.end_tokens)
        outside_codes = {*range(self.first_candidate, codes.start), *range(codes.stop, self.last_candidate + 1)}
        self.forbidden_in_span = [token - self.first_candidate for token in sorted(outside_codes - self.end_tokens)]

        # Limits, text options.
        self.max_new_tokens = generation_config.max_length - input_ids.shape[1]
        self.max_positions = getattr(config.get_text_config(), "max_position_embeddings", None)
        self.processors = logits_processor
        self.score_processors_only = all(type(processor) in SCORE_PROCESSORS for processor in logits_processor)
        self.eos_tokens: set[int] = set()
        self.criteria = StoppingCriteriaList()
        for criterion in stopping_criteria:
            if isinstance(criterion, EosTokenCriteria):
                self.eos_tokens |= set(criterion.eos_token_id.tolist())
            elif isinstance(criterion, MaxLengthCriteria):
                self.max_new_tokens = min(self.max_new_tokens, criterion.max_length - input_ids.shape[1])
            else:
                self.criteria.append(criterion)
        wants = generation_config.return_dict_in_generate
        self.scores: list[torch.Tensor] | None = [] if wants and generation_config.output_scores else None
        self.logits: list[torch.Tensor] | None = [] if wants and generation_config.output_logits else None

        # With block-causal spans, blocks stand on a grid from the start of their span, and finished ones are final.
        self.block_length = generation_config.audio_block_size if config.is_block_causal else None

        # Rows and cache.
        if attention_mask is None:
            prompts = input_ids.tolist()
        else:
            prompts = [ids[kept.bool()].tolist() for ids, kept in zip(input_ids, attention_mask, strict=True)]
        generators = make_generators(generation_config, len(prompts), self.device)
        self.rows = [Row(i, ids, len(ids), 0, generators[i]) for i, ids in enumerate(prompts)]
        self.prompt_span_ids = self._prompt_span_ids(model)
        if cache is None:
            cache = TttCache(config.get_text_config().num_hidden_layers, len(self.rows))
        if self.block_length is not None and (cache.block_length or config.block_lengths[0]) != self.block_length:
            cache.drop_spans(self.is_audio)
        self.cache, cache.block_length = cache, self.block_length
        longest = max(row.prompt_length for row in self.rows) + self.max_new_tokens + 1
        self.runner = TttRunner(model, cache, self.mask_token, longest, self.block_length)
        self.unconditional_starts: dict[tuple[int, int], torch.Tensor] = {}
        # Rows do not see each other, so which go first changes no token, only the cost. A CPU pays for every position:
        # text, one position a row, is written first, and rows meet at the start of their spans. Accelerators pay for
        # every forward: each advances all rows.
        self.text_first = self.device.type == "cpu"

    # ---- the loop ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def run(self) -> None:
        """Write every row to its end. Results: `rows`, `cache` and the counts of `runner`."""
        try:
            self._prefill()
            self._retire(self.rows)
            while live := [row for row in self.rows if not row.done]:
                text = [row for row in live if row.span_start is None] if self.text_first else []
                self._advance(text or live)
                self._retire(live)
        except BaseException:
            self.cache.reset()  # interrupted half-way: the caller's cache holds nothing rather than something wrong
            raise
        if self.keep_cache:
            self.cache.close([row.ids[: row.cached] for row in self.rows])
        if self.streamer is not None:
            self.streamer.end()

    def _prefill(self) -> None:
        """Step 1: the prompts, each without what the cache already holds."""
        for row, cached in zip(self.rows, self.cache.token_ids, strict=True):
            row.cached = self._reusable(row.ids, cached)
            row.span_start = self._find_open_span(row.ids)
            row.cached = min(row.cached, self._num_final(row))
        targets = [self._num_final(row) for row in self.rows]
        queries = [row.ids[row.cached : target] for row, target in zip(self.rows, targets, strict=True)]
        if any(queries):
            self._count(self.rows)
            hidden = self.runner.prompt(queries, [row.cached for row in self.rows], self.prompt_span_ids)
        for row, target in zip(self.rows, targets, strict=True):
            row.cached = target
            if row.span_start is not None:
                self._start_block(row)
        text = [row for row in self.rows if row.span_start is None]
        if text:
            last = torch.tensor([len(queries[row.index]) - 1 for row in text], device=self.device)
            index = torch.tensor([row.index for row in text], device=self.device)
            self._append_text(text, hidden[index, last])

    def _num_final(self, row: Row) -> int:
        """How many tokens of a row see nothing that is still to be written: all, or those before its span or block."""
        if row.span_start is None:
            return len(row.ids)
        written = len(row.ids) - row.span_start
        return row.span_start + (0 if self.block_length is None else written // self.block_length * self.block_length)

    def _find_open_span(self, ids: list[int]) -> int | None:
        """Where the span starts in which a prompt stops, at its begin token or behind codes; it goes on there."""
        if ids[-1] not in self.end_of and (ids[-1] in self.end_tokens or not self.is_audio(ids[-1])):
            return None
        start = len(ids)
        while start > 0 and self.is_audio(ids[start - 1]):
            start -= 1
        return start

    def _retire(self, rows: list[Row]) -> None:
        """Rows that are done leave the cache's batch, so that the others go on without them."""
        for row in rows:
            if row.done and self.cache.rows_held > 1:
                self.cache.drop_row(row.index, row.cached if self.keep_cache else None)

    def _advance(self, rows: list[Row]) -> None:
        """
        One forward for some rows: a denoising step where a block is open (step 3); otherwise a text token, after text
        (step 2) or after a finished span, which this forward commits (step 4).
        """
        lengths = [len(row.ids) - row.cached + len(row.block) for row in rows]
        hidden = self._step(rows)
        denoising = [i for i, row in enumerate(rows) if row.block]
        writing = [i for i, row in enumerate(rows) if not row.block]
        for row in rows:
            row.cached = self._num_final(row) if row.block else len(row.ids)
        if denoising:
            self._denoise([rows[i] for i in denoising], [hidden[i, : lengths[i]] for i in denoising])
        if writing:
            for i in writing:
                rows[i].span_start = None
            last = torch.stack([hidden[i, lengths[i] - 1] for i in writing])
            self._append_text([rows[i] for i in writing], last)

    def _step(self, rows: list[Row]) -> torch.Tensor:
        """One forward over what the rows have beyond the cache, (rows, longest, hidden_size)."""
        self._count(rows)
        return self.runner.step(
            [row.index for row in rows],
            [row.ids[row.cached :] + self._shown(row.block) for row in rows],
            [row.cached for row in rows],
            [row.span_start for row in rows],
        )

    def _shown(self, block: list[int]) -> list[int]:
        """A block as the model sees it: mask tokens where it is undecided."""
        return [self.mask_token if token == UNDECIDED else token for token in block]

    def _count(self, rows: list[Row]) -> None:
        for row in rows:
            row.forwards += 1

    # ---- text --------------------------------------------------------------------------------------------------------

    def _append_text(self, rows: list[Row], hidden: torch.Tensor) -> None:
        """Choose the next text token of each row. hidden: (rows, hidden_size)."""
        logits = self.runner.project(hidden, 0, self.audio_start)  # (rows, text vocab)
        if self.audio_end < self.vocab_size:  # text tokens that were added above the audio side
            logits = torch.cat([logits, self.runner.project(hidden, self.audio_end, self.vocab_size)], dim=1)
        scores = self._process(rows, logits)
        noise = None
        if self.options.do_sample:
            noise = torch.stack([exponential(scores.shape[1:], row.generator) for row in rows])
            scores = scores.log_softmax(dim=-1)
        tokens = draw(scores, noise)
        tokens = torch.where(tokens < self.audio_start, tokens, tokens + self.audio_end - self.audio_start)
        for row, token in zip(rows, tokens.tolist(), strict=True):
            row.ids.append(token)
            self._stream([token])
            if token in self.end_of:
                row.span_start = len(row.ids)
            row.done = token in self.eos_tokens or row.new_tokens >= self.max_new_tokens
        self._stop(rows)
        for row in rows:
            if row.span_start is not None and not row.done:
                self._start_block(row)

    def _process(self, rows: list[Row], logits: torch.Tensor) -> torch.Tensor:
        """
        The logits after the user's processors and sampling options, text side only, (rows, text vocab).

        Processors see the whole vocabulary (audio at -inf) and the whole batch, as they would in ordinary generation;
        rows that have written differently much are shown one length after the other. Left padding is shown as the row's
        first token, so that penalties and lengths come out as they would for the row alone.
        """
        if self.logits is not None:
            self.logits.append(self._widen(logits))
        if self.score_processors_only:
            for processor in self.processors:
                logits = processor(None, logits)
        else:
            processed = torch.empty_like(logits)
            for length in sorted({row.new_tokens for row in rows}):
                of_length = [i for i, row in enumerate(rows) if row.new_tokens == length]
                index = torch.tensor([rows[i].index for i in of_length], device=self.device)
                scores = self._widen(logits).new_zeros(len(self.rows), self.vocab_size)
                scores[index] = self._widen(logits[of_length])
                scores = self.processors(self._shown_ids(length), scores)
                processed[of_length] = self._narrow(scores[index]).to(processed.dtype)
            logits = processed
        if self.scores is not None:
            self.scores.append(self._widen(logits))
        return logits

    def _skip_scores(self, number: int) -> None:
        """Audio is not written left to right: its tokens get rows of -inf, which take no memory."""
        for scores in (self.scores, self.logits):
            if scores is not None:
                nothing = torch.full((1, 1), -torch.inf, device=self.device).expand(1, self.vocab_size)
                scores += [nothing] * number

    def _widen(self, logits: torch.Tensor) -> torch.Tensor:
        """Of the text side, (rows, text vocab), to the whole vocabulary, (rows, vocab)."""
        audio = logits.new_full((len(logits), self.audio_end - self.audio_start), -torch.inf)
        return torch.cat([logits[:, : self.audio_start], audio, logits[:, self.audio_start :]], dim=1)

    def _narrow(self, scores: torch.Tensor) -> torch.Tensor:
        """The inverse of `_widen`."""
        return torch.cat([scores[:, : self.audio_start], scores[:, self.audio_end :]], dim=1)

    def _shown_ids(self, new_tokens: int) -> torch.Tensor:
        """Every row with exactly `new_tokens` new tokens, (batch, prompt width + new tokens), cut or filled to that."""
        width = self.input_ids.shape[1] + new_tokens
        shown = []
        for row in self.rows:
            ids = row.ids[: row.prompt_length + new_tokens]
            ids = ids + [ids[-1]] * (row.prompt_length + new_tokens - len(ids))
            shown.append([ids[0]] * (width - len(ids)) + ids)
        return torch.tensor(shown, device=self.device)

    def _stop(self, rows: list[Row]) -> bool:
        """Ask the stopping criteria (other than eos and length) about rows that have just grown: is one done by it?"""
        stopped = False
        if not self.criteria:
            return stopped
        for length in sorted({row.new_tokens for row in rows if not row.done}):
            verdict = self.criteria(self._shown_ids(length), None).tolist()
            for row in rows:
                if row.new_tokens == length and not row.done and verdict[row.index]:
                    row.done = stopped = True
        return stopped

    # ---- audio -------------------------------------------------------------------------------------------------------

    def _start_block(self, row: Row) -> None:
        """Step 3a: mask tokens at the end of the span. A block never reaches past the model's last position."""
        size = self.options.audio_block_size
        if self.block_length is not None and row.span_start is not None:
            size -= (len(row.ids) - row.span_start) % self.block_length  # a prompt may stop within a block
        if self.max_positions is not None:
            size = max(1, min(size, self.max_positions - len(row.ids)))
        row.block, row.step = [UNDECIDED] * size, 0

    def _denoise(self, rows: list[Row], hidden: Sequence[torch.Tensor]) -> None:
        """Steps 3b to 3d for rows with a block. hidden: each (queries, hidden_size), the block at the end."""
        # 3b. Logits of the blocks, codes and end tokens only.
        sizes = [len(row.block) for row in rows]
        states = hidden[0].new_zeros(len(rows), max(sizes), hidden[0].shape[-1])  # (rows, block, hidden_size)
        undecided = torch.zeros(len(rows), max(sizes), dtype=torch.bool)
        for i, row in enumerate(rows):
            states[i, : sizes[i]] = hidden[i][-sizes[i] :]
            undecided[i, : sizes[i]] = torch.tensor([token == UNDECIDED for token in row.block])
            if self.options.audio_order_bias:  # what stands behind a decided end is dropped anyway
                end = next((j for j, token in enumerate(row.block) if token in self.end_tokens), sizes[i])
                undecided[i, end:] = False
        logits = self.runner.project(states, self.first_candidate, self.last_candidate + 1)  # (rows, block, candidates)
        unconditional = self._unconditional(rows, max(sizes)) if self.options.audio_guidance_scale else None

        # 3c and 3d. A token for every position; the most confident of the undecided ones stay.
        tokens, fixed = denoise(
            logits,
            undecided.to(self.device),
            sizes,
            [row.step for row in rows],
            self.options,
            [row.generator for row in rows],
            self.forbidden_in_span,
            unconditional,
        )
        chosen = torch.where(fixed, tokens + self.first_candidate, UNDECIDED).tolist()
        for row, tokens_of_row in zip(rows, chosen, strict=True):
            row.step += 1
            row.block = [new if old == UNDECIDED else old for old, new in zip(row.block, tokens_of_row, strict=False)]
            self._finish_block(row)

    def _finish_block(self, row: Row) -> None:
        """
        Step 3e: end the block once it is decided. What stands after the first end token is dropped, so the block is
        decided as soon as everything up to that token is.
        """
        end = next((i for i, token in enumerate(row.block) if token in self.end_tokens or token == UNDECIDED), None)
        if end is not None and row.block[end] == UNDECIDED:
            return
        assert row.span_start is not None
        codes, row.block = row.block, []
        closing = None
        if end is not None:
            codes, closing = codes[:end], codes[end]
        # A limit leaves the codes before it as they are and always leaves room for the end token.
        room = min(
            self.options.max_audio_codes_per_span - (len(row.ids) - row.span_start),
            self.max_new_tokens - row.new_tokens - 1,
        )
        if len(codes) > room or (closing is None and len(codes) == room):
            codes, closing = codes[: max(room, 0)], self._proper_end(row)
        row.ids += codes
        self._skip_scores(len(codes))
        if closing is None and self._stop([row]):
            closing = self._proper_end(row)
        if closing is None:
            self._stream(codes)
            self._start_block(row)
            return
        row.ids.append(closing)
        self._skip_scores(1)
        self._stream([*codes, closing])
        row.done = row.done or row.new_tokens >= self.max_new_tokens
        self._stop([row])

    def _proper_end(self, row: Row) -> int:
        """The end token that belongs to the begin token of the row's span."""
        begin = row.ids[row.span_start - 1] if row.span_start else None
        return self.end_of.get(begin, next(iter(self.end_of.values())))

    def _unconditional(self, rows: list[Row], width: int) -> torch.Tensor:
        """
        Logits of the blocks when everything before them is masked, (rows, block, candidates): one bidirectional span
        from the start of the sequence, without the cache. An untouched block's depend on the length alone. With
        block-causal spans what is masked does not see the block, and is computed once for a length.
        """
        results: dict[int, torch.Tensor] = {}
        owners: list[list[int]] = []  # which rows a sequence is for
        sequences: list[list[int]] = []
        starts: dict[tuple[int, int], int] = {}
        for i, row in enumerate(rows):
            key = (len(row.ids), len(row.block))
            if row.step == 0 and key in self.unconditional_starts:
                results[i] = self.unconditional_starts[key]
            elif row.step == 0 and key in starts:
                owners[starts[key]].append(i)
            else:
                if row.step == 0:
                    starts[key] = len(sequences)
                sequences.append(self._shown(row.block))
                owners.append([i])
        if sequences:
            of_first = [rows[of_sequence[0]] for of_sequence in owners]
            masks = [len(row.ids) for row in of_first]
            if self.block_length is None:
                whole = [[self.mask_token] * n + block for n, block in zip(masks, sequences, strict=True)]
                hidden: Sequence[torch.Tensor] = [
                    states[n:] for n, states in zip(masks, self.runner.bidirectional(whole), strict=True)
                ]
            else:
                hidden = list(self.runner.behind_masks([row.index for row in of_first], sequences, masks))
            for row, of_sequence, states in zip(of_first, owners, hidden, strict=True):
                logits = self.runner.project(states[: len(row.block)], self.first_candidate, self.last_candidate + 1)
                results |= dict.fromkeys(of_sequence, logits)
                self._count([rows[i] for i in of_sequence])
                if row.step == 0:
                    self.unconditional_starts[len(row.ids), len(row.block)] = logits
        while len(self.unconditional_starts) > MOST_UNCONDITIONAL_STARTS:
            self.unconditional_starts.pop(next(iter(self.unconditional_starts)))
        padded = [nn.functional.pad(results[i], (0, 0, 0, width - len(results[i]))) for i in range(len(rows))]
        return torch.stack(padded)

    # ---- prompt and cache --------------------------------------------------------------------------------------------

    def _prompt_span_ids(self, model: Any) -> torch.Tensor:
        """Span ids of the prompts without their padding, (rows, longest prompt), -1 outside spans."""
        longest = max(row.prompt_length for row in self.rows)
        ids = torch.tensor([row.ids + [0] * (longest - len(row.ids)) for row in self.rows], device=self.device)
        lengths = torch.tensor([row.prompt_length for row in self.rows], device=self.device)
        is_real = torch.arange(longest, device=self.device) < lengths[:, None]
        span_ids = model.model.get_span_ids(ids, is_real.long(), block_length=self.block_length)
        return span_ids.masked_fill(~is_real, -1)

    def _reusable(self, ids: list[int], cached: list[int]) -> int:
        """
        How many leading tokens of a prompt the cache holds exactly as needed: equal tokens, cut back so that the last
        token (it gives the next one's logits) and whole spans (their tokens saw each other) are computed again.
        """
        length = 0
        for ours, theirs in zip(ids[:-1], cached, strict=False):
            if ours != theirs:
                break
            length += 1
        cuts_a_span = any(length < len(other) and self.is_audio(other[length]) for other in (ids, cached))
        if cuts_a_span:
            while length > 0 and self.is_audio(ids[length - 1]):
                length -= 1
        return length

    # ---- streaming ---------------------------------------------------------------------------------------------------

    def _stream(self, tokens: list[int]) -> None:
        if self.streamer is not None and tokens:
            self.streamer.put(torch.tensor(tokens))


__all__ = ["TttDecoder"]
