"""The decoding loop of TtT: rows of a batch write text left to right and audio spans by block diffusion, on one cache.

What a user may ask for is checked in generation_ttt.py; how codes are drawn is in denoising_ttt.py.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers.generation import (
    EncoderNoRepeatNGramLogitsProcessor,
    EncoderRepetitionPenaltyLogitsProcessor,
    EosTokenCriteria,
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    LogitsProcessorList,
    MaxLengthCriteria,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    PrefixConstrainedLogitsProcessor,
    SequenceBiasLogitsProcessor,
    StoppingCriteriaList,
    StopStringCriteria,
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
# What looks for sequences of ids, of which padding must be no part.
SEQUENCE_READERS = (
    EncoderNoRepeatNGramLogitsProcessor,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    SequenceBiasLogitsProcessor,
    StopStringCriteria,
)
NO_TOKEN = 2**31 - 1  # so they are shown an id that no vocabulary has
# Options of a denoising step: rows that share them are denoised together.
DENOISING_OPTIONS = (
    "audio_steps_per_block",
    "audio_remasking",
    "audio_confidence_threshold",
    "audio_prefix_probability",
    "audio_temperature",
    "audio_top_k",
    "audio_top_p",
    "audio_guidance_scale",
    "audio_order_bias",
)
MOST_UNCONDITIONAL_STARTS = 64  # remembered
UNDECIDED = -1  # in a block: not fixed yet, shown to the model as the mask token


@dataclass(eq=False)
class Row:
    """One row of the batch. `ids` are final; `block` is being denoised; the first `cached` ids are in the cache."""

    call: "Call"
    index: int  # in its call
    ids: list[int]
    prompt_length: int
    generator: torch.Generator | None
    key: int = -1  # of its row in the cache, once it is there
    cached: int = 0
    reused: int = 0  # of the prompt, taken over from an earlier cache
    span_start: int | None = None  # of the span being written or, in its last forward, committed
    block: list[int] = field(default_factory=list)
    step: int = 0  # denoising steps done in this block
    forwards: int = 0
    denoising_steps: int = 0  # of these, in all blocks
    reason: str | None = None  # why it ended: "stop", "length", or "failed" where what its call brought along raised

    @property
    def done(self) -> bool:
        return self.reason is not None

    @property
    def new_tokens(self) -> int:
        return len(self.ids) - self.prompt_length


class Call:
    """
    What one call of `generate` asks for, as GenerationMixin prepared it, and the rows that it writes.

    Args:
        config ([`TttConfig`]): of the model.
        input_ids, attention_mask (`torch.LongTensor` of shape `(rows, width)`): the prompts; the mask may be `None`.
        options ([`TttGenerationConfig`]), processors, criteria, streamer: prepared.

    Raises:
        ValueError: if a row has no token but padding, or one that the model does not have.
    """

    def __init__(
        self,
        config: Any,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        options: Any,
        processors: LogitsProcessorList,
        criteria: StoppingCriteriaList,
        streamer: BaseStreamer | None = None,
    ):
        self.config, self.input_ids, self.attention_mask = config, input_ids, attention_mask
        self.options, self.streamer = options, streamer
        self.asked: set[int] = set()  # rows whose next token is being chosen; what processors see of others is made up
        self.width, self.max_new_tokens = input_ids.shape[1], options.max_length - input_ids.shape[1]
        self.eos_tokens: set[int] = set()
        self.criteria = StoppingCriteriaList()  # but for the end of the sequence and lengths
        for criterion in criteria:
            if isinstance(criterion, EosTokenCriteria):
                self.eos_tokens |= set(criterion.eos_token_id.tolist())
            elif isinstance(criterion, MaxLengthCriteria):
                self.max_new_tokens = min(self.max_new_tokens, criterion.max_length - self.width)
            else:
                self.criteria.append(self._of_rows(criterion))
        self.min_new_tokens = (options.min_length or 0) - self.width
        # With block-causal spans, blocks stand on a grid from the start of their span, and finished ones are final.
        self.block_length = options.audio_block_size if config.is_block_causal else None
        wants = options.return_dict_in_generate
        self.scores: list[torch.Tensor] | None = [] if wants and options.output_scores else None
        self.logits: list[torch.Tensor] | None = [] if wants and options.output_logits else None
        self.error: Exception | None = None

        # Rows of equal keys are processed and drawn together, of whichever call they are.
        alone = self.scores is not None or self.logits is not None
        self.score_processors_only = all(type(processor) in SCORE_PROCESSORS for processor in processors)
        self.text_key: Any = self if alone or not self.score_processors_only else _settings(processors, options)
        self.audio_key = tuple(getattr(options, name) for name in DENOISING_OPTIONS)

        if attention_mask is None:
            prompts = input_ids.tolist()
        else:
            prompts = [ids[kept.bool()].tolist() for ids, kept in zip(input_ids, attention_mask, strict=True)]
        vocab_size = config.get_text_config().vocab_size
        for i, ids in enumerate(prompts):
            if not ids:
                raise ValueError(f"Row {i} of `inputs` is padding throughout; give every row a prompt.")
            if min(ids) < 0 or max(ids) >= vocab_size:
                wrong = next(token for token in ids if not 0 <= token < vocab_size)
                raise ValueError(
                    f"Row {i} of `inputs` holds {wrong}, but the model has the token ids 0 to {vocab_size - 1}: use "
                    "the tokenizer that belongs to it."
                )
        generators = make_generators(options, len(prompts), input_ids.device)
        self.rows = [
            Row(self, i, ids, len(ids), generator)
            for i, (ids, generator) in enumerate(zip(prompts, generators, strict=True))
        ]
        self.processors = LogitsProcessorList([self._of_rows(processor) for processor in processors])

    def _of_rows(self, reader: Any) -> Any:
        """
        A processor or criterion of the call, so that it says of a row what it says of the row alone.

        - What reads sequences of ids, or the prompt's, does not take padding for a part of them.
        - `prefix_allowed_tokens_fn` is asked of rows whose next token is being chosen, and no others: after tokens that
          nobody wrote it may allow nothing, which is an error.
        """
        kind, options = type(reader), self.options
        if kind is PrefixConstrainedLogitsProcessor:
            allowed = reader._prefix_allowed_tokens_fn
            return PrefixConstrainedLogitsProcessor(lambda row, ids: allowed(row, ids) if row in self.asked else [0], 1)
        if kind is EncoderRepetitionPenaltyLogitsProcessor and options.encoder_repetition_penalty is not None:
            return kind(options.encoder_repetition_penalty, self.shown_ids(0))
        if kind is EncoderNoRepeatNGramLogitsProcessor and options.encoder_no_repeat_ngram_size is not None:
            prompts, size = self.shown_ids(0), options.encoder_no_repeat_ngram_size
            reader = kind(size, prompts if size == 1 else self._without_padding(prompts))
        if kind in SEQUENCE_READERS and getattr(reader, "ngram_size", None) != 1:  # single tokens may be shown twice
            return lambda ids, scores: reader(self._without_padding(ids), scores)
        return reader

    def _without_padding(self, ids: torch.Tensor) -> torch.Tensor:
        """What `shown_ids` gave, with an id that is no token in the place of the padding."""
        padding = torch.tensor([self.width - row.prompt_length for row in self.rows], device=ids.device)
        return ids.masked_fill(torch.arange(ids.shape[1], device=ids.device) < padding[:, None], NO_TOKEN)

    def shown_ids(self, new_tokens: int) -> torch.Tensor:
        """Every row with exactly `new_tokens` new tokens, (rows, width + new tokens), cut or filled to that."""
        width = self.width + new_tokens
        shown = []
        for row in self.rows:
            ids = row.ids[: row.prompt_length + new_tokens]
            ids = ids + [ids[-1]] * (row.prompt_length + new_tokens - len(ids))
            shown.append([ids[0]] * (width - len(ids)) + ids)
        return torch.tensor(shown, device=self.input_ids.device)


@contextmanager
def own_errors(rows: Sequence[Row]) -> Iterator[None]:
    """Where what a call brings along (processors, criteria, streamer) raises, its rows end, and no others."""
    try:
        yield
    except Exception as error:
        for call in {row.call for row in rows}:
            call.error = call.error or error
            for row in call.rows:
                row.reason = row.reason or "failed"


def refuse_nan(row: Row, logits: torch.Tensor) -> None:
    """Raise a ValueError where the model gave a row no numbers."""
    if logits.isnan().any():
        raise ValueError(
            f"The model's logits for row {row.index} are NaN after {row.new_tokens} new tokens: its weights hold NaN, "
            "or its dtype overflows. Load it with `dtype=torch.float32` or `torch.bfloat16`."
        )


def _settings(processors: LogitsProcessorList, options: Any) -> tuple[Any, ...]:
    """What processors of scores do, and whether tokens are drawn, as a key."""
    each = [(type(processor), *sorted((k, float(v)) for k, v in vars(processor).items())) for processor in processors]
    return (options.do_sample, *each)


def group_rows(rows: Sequence[Row], key: Callable[[Row], Any]) -> list[list[int]]:
    """Return the positions in `rows` of those that share a key, group by group."""
    groups: dict[Any, list[int]] = {}
    for i, row in enumerate(rows):
        groups.setdefault(key(row), []).append(i)
    return list(groups.values())


class TttDecoder:
    """
    The decoding loop: rows of one call or of many, which may come and go between forwards. They do not see each other,
    so each is written as if it were alone. See [`TttGenerationMixin.generate`] for the algorithm; the steps carry its
    numbers.

    Args:
        model ([`TttForConditionalGeneration`]): the model.
        cache ([`TttCache`]): where the rows' keys and values are.
        expected_length (`int`): most tokens of a row, for which the cache makes room.
        runner_class (`type`, *optional*): runs the forwards.
    """

    def __init__(self, model: Any, cache: TttCache, expected_length: int, runner_class: type[TttRunner] = TttRunner):
        config = model.config
        self.device, self.vocab_size = model.device, config.get_text_config().vocab_size
        self.get_span_ids = model.model.get_span_ids

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

        # Where attention tells a user's audio from a response's by its closing token, no response may write that one.
        self.never_after_audio: int | None = None
        if config.is_block_causal or config.causal_prompt_audio:
            closing = config.end_of_prompt_audio_token_id
            self.never_after_audio = (
                closing if closing < self.audio_start else closing - self.audio_end + self.audio_start
            )
        self.max_positions = getattr(config.get_text_config(), "max_position_embeddings", None)
        self.trained_block_length = config.block_lengths[0] if config.is_block_causal else None
        self.cache = cache
        self.runner = runner_class(model, cache, self.mask_token, expected_length)
        self.rows: list[Row] = []  # that are being written
        self.next_key = cache.num_rows
        self.unconditional_starts: dict[tuple[int, int], torch.Tensor] = {}
        # Which rows go first changes no token, only the cost. A CPU that computes rectangles pays for every position of
        # them: text, one position a row, is written first, and rows meet at the start of their spans. Accelerators pay
        # for every forward: each advances all rows.
        self.text_first = self.device.type == "cpu" and self.runner.fills_up

    @classmethod
    def check(cls, call: Call) -> None:
        """Raise a ValueError for what cannot be served, before any forward."""
        config = call.config
        ends = (config.end_of_audio_token_id, config.end_of_last_audio_token_id)
        for token in sorted(call.eos_tokens.difference(ends)):
            if config.is_audio(token):
                raise ValueError(
                    f"`eos_token_id` has {token}, a code or the mask token, after which nothing ends: a block of codes "
                    f"is written at once. Use text tokens, or those that end a span ({ends[0]} and {ends[1]})."
                )

    # ---- the loop ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def run(self, call: Call, keep_cache: bool) -> None:
        """Write every row of one call to its end. Results: its rows, `cache` and the counts of `runner`."""
        try:
            done = self.admit(call, self.cache)
            while True:
                if call.error is not None:
                    raise call.error
                for row in done:  # leaves the cache's batch, so that the others go on without it
                    if self.cache.rows_held > 1:
                        self.cache.drop_row(row.key, row.cached if keep_cache else None)
                if not self.rows:
                    break
                done = self.step()
        except BaseException:
            self.cache.reset()  # interrupted half-way: the caller's cache holds nothing rather than something wrong
            raise
        if keep_cache:
            self.cache.close([row.ids[: row.cached] for row in call.rows])
        if call.streamer is not None:
            call.streamer.end()

    @torch.no_grad()
    def admit(self, call: Call, cache: TttCache) -> list[Row]:
        """
        Step 1: run a call's prompts, each without what `cache`, one row for each, already holds, and let the rows join
        those that are being written. Returns the rows that are done already.
        """
        if call.block_length is not None and (cache.block_length or self.trained_block_length) != call.block_length:
            cache.drop_spans(self.is_audio)
        cache.block_length = call.block_length
        rows, last = call.rows, self._prefill(call, cache)
        for row in rows:
            row.key = row.index
            if cache is not self.cache:
                row.key, self.next_key = self.next_key, self.next_key + 1
                self.cache.add_row(row.key, cache, row.index, row.cached)
        self.rows += rows
        for row in rows:
            if row.span_start is not None:
                self._start_block(row)
        text = [row for row in rows if row.span_start is None]
        if text:
            assert last is not None
            self._append_text(text, last[[row.index for row in text]])
        return self._take_done()

    @torch.no_grad()
    def step(self) -> list[Row]:
        """Run one forward. Returns the rows that it ended; they are still in the cache's batch."""
        text = [row for row in self.rows if row.span_start is None] if self.text_first else []
        self._advance(text or self.rows)
        return self._take_done()

    def release(self, row: Row, keep_cache: bool = False) -> TttCache | None:
        """Take a row out of the batch, done or not; return a cache of what is final of it, if that is to be kept."""
        self.rows = [other for other in self.rows if other is not row]
        if row.key < 0:
            return None
        kept = self.cache.take_row(row.key, row.ids[: row.cached]) if keep_cache and row.cached else None
        if kept is not None:
            kept.block_length = row.call.block_length
        self.cache.drop_row(row.key, None)
        self.runner.forget(row.key)
        row.key = -1
        return kept

    def _take_done(self) -> list[Row]:
        done = [row for row in self.rows if row.done]
        if done:
            self.rows = [row for row in self.rows if not row.done]
        return done

    def _prefill(self, call: Call, cache: TttCache) -> torch.Tensor | None:
        """Run what the cache lacks of the prompts; return the last hidden state of each, (rows, hidden_size)."""
        rows = call.rows
        for row, cached in zip(rows, cache.token_ids, strict=True):
            row.span_start = self._find_open_span(row.ids)
            row.reused = row.cached = min(self._reusable(row.ids, cached), self._num_final(row))
        targets = [self._num_final(row) for row in rows]
        queries = [row.ids[row.cached : target] for row, target in zip(rows, targets, strict=True)]
        last = None
        if any(queries):
            self._count(rows)
            hidden = self.runner.prompt(cache, queries, [row.cached for row in rows], self._prompt_span_ids(call))
            last = torch.stack([of_row[len(ids) - 1] for of_row, ids in zip(hidden, queries, strict=True)])
        for row, target in zip(rows, targets, strict=True):
            row.cached = target
        return last

    def _num_final(self, row: Row) -> int:
        """How many tokens of a row see nothing that is still to be written: all, or those before its span or block."""
        if row.span_start is None:
            return len(row.ids)
        written, length = len(row.ids) - row.span_start, row.call.block_length
        return row.span_start + (0 if length is None else written // length * length)

    def _find_open_span(self, ids: list[int]) -> int | None:
        """Where the span starts in which a prompt stops, at its begin token or behind codes; it goes on there."""
        if ids[-1] not in self.end_of and (ids[-1] in self.end_tokens or not self.is_audio(ids[-1])):
            return None
        start = len(ids)
        while start > 0 and self.is_audio(ids[start - 1]):
            start -= 1
        return start

    def _advance(self, rows: list[Row]) -> None:
        """
        One forward for some rows: a denoising step where a block is open (step 3); otherwise a text token, after text
        (step 2) or after a finished span, which this forward commits (step 4).
        """
        rows = sorted(rows, key=lambda row: self.cache.slot(row.key))
        hidden = self._step(rows)
        denoising = [i for i, row in enumerate(rows) if row.block]
        writing = [i for i, row in enumerate(rows) if not row.block]
        for row in rows:
            row.denoising_steps += bool(row.block)
            row.cached = self._num_final(row) if row.block else len(row.ids)
        if denoising:
            self._denoise([rows[i] for i in denoising], [hidden[i] for i in denoising])
        if writing:
            for i in writing:
                rows[i].span_start = None
            self._append_text([rows[i] for i in writing], torch.stack([hidden[i][-1] for i in writing]))

    def _step(self, rows: list[Row]) -> Sequence[torch.Tensor]:
        """One forward over what the rows have beyond the cache, each (queries, hidden_size)."""
        self._count(rows)
        return self.runner.step(
            [row.key for row in rows],
            [row.ids[row.cached :] + self._shown(row.block) for row in rows],
            [row.cached for row in rows],
            [row.span_start for row in rows],
            [row.call.block_length for row in rows],
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
        behind_audio = [i for i, row in enumerate(rows) if self.is_audio(row.ids[-1])]
        if self.never_after_audio is not None and behind_audio:
            logits[behind_audio, self.never_after_audio] = -torch.inf
        groups = group_rows(rows, lambda row: row.call.text_key)
        for positions in groups:
            of_group = [rows[i] for i in positions]
            with own_errors(of_group):
                self._append_drawn(of_group, logits if len(groups) == 1 else logits[positions])
        self._stop(rows)
        for row in rows:
            if row.span_start is not None and not row.done:
                self._start_block(row)

    def _append_drawn(self, rows: list[Row], logits: torch.Tensor) -> None:
        """Process the logits, (rows, text vocab), of rows with the same settings, and draw their tokens."""
        scores = self._process(rows, logits)
        noise = None
        if rows[0].call.options.do_sample:
            noise = torch.stack([exponential(scores.shape[1:], row.generator) for row in rows])
            scores = scores.log_softmax(dim=-1)
        tokens = draw(scores, noise)
        chosen = scores.gather(1, tokens[:, None]).squeeze(1).tolist()
        tokens = torch.where(tokens < self.audio_start, tokens, tokens + self.audio_end - self.audio_start)
        for i, (row, token) in enumerate(zip(rows, tokens.tolist(), strict=True)):
            if not chosen[i] > -torch.inf:
                with own_errors([row]):
                    refuse_nan(row, logits[i])
                    raise ValueError(
                        f"No text token is left to choose for row {row.index} after {row.new_tokens} new tokens. Let "
                        "`logits_processor`, `prefix_allowed_tokens_fn` and forced tokens allow one, and without NaN: "
                        "codes and the ends of spans are not chosen with them."
                    )
                continue
            row.ids.append(token)
            if token in self.end_of:
                row.span_start = len(row.ids)
            if token in row.call.eos_tokens:
                row.reason = "stop"
            elif row.new_tokens >= row.call.max_new_tokens:
                row.reason = "length"
            self._stream(row, [token])

    def _process(self, rows: list[Row], logits: torch.Tensor) -> torch.Tensor:
        """
        The logits after the user's processors and sampling options, text side only, (rows, text vocab).

        Processors see the whole vocabulary (audio at -inf) and the whole batch, as they would in ordinary generation;
        rows that have written differently much are shown one length after the other. Left padding is shown as the row's
        first token, so that penalties and lengths come out as they would for the row alone; to the library's processors
        of n-grams and sequences it is none.
        """
        call = rows[0].call
        if call.logits is not None:
            call.logits.append(self._widen(logits))
        if call.score_processors_only:
            for processor in call.processors:
                logits = processor(None, logits)
        else:
            processed = torch.empty_like(logits)
            for length in sorted({row.new_tokens for row in rows}):
                of_length = [i for i, row in enumerate(rows) if row.new_tokens == length]
                call.asked = {rows[i].index for i in of_length}
                index = torch.tensor([rows[i].index for i in of_length], device=self.device)
                scores = self._widen(logits).new_zeros(len(call.rows), self.vocab_size)
                scores[index] = self._widen(logits[of_length])
                scores = call.processors(call.shown_ids(length), scores)
                processed[of_length] = self._narrow(scores[index]).to(processed.dtype)
            logits = processed
        if call.scores is not None:
            call.scores.append(self._widen(logits))
        return logits

    def _skip_scores(self, row: Row, number: int) -> None:
        """Audio is not written left to right: its tokens get rows of -inf, which take no memory."""
        for scores in (row.call.scores, row.call.logits):
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

    def _stop(self, rows: list[Row]) -> None:
        """Ask the stopping criteria (other than eos and length) about rows that have just grown."""
        for positions in group_rows(rows, lambda row: row.call):
            call = rows[positions[0]].call
            if not call.criteria:
                continue
            with own_errors(call.rows):
                for length in sorted({rows[i].new_tokens for i in positions if not rows[i].done}):
                    verdict = call.criteria(call.shown_ids(length), None).tolist()
                    for row in (rows[i] for i in positions):
                        if row.new_tokens == length and not row.done and verdict[row.index]:
                            row.reason = "stop"

    # ---- audio -------------------------------------------------------------------------------------------------------

    def _start_block(self, row: Row) -> None:
        """Step 3a: mask tokens at the end of the span. A block never reaches past the model's last position."""
        size = row.call.options.audio_block_size
        if row.call.block_length is not None and row.span_start is not None:
            size -= (len(row.ids) - row.span_start) % row.call.block_length  # a prompt may stop within a block
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
            if row.call.options.audio_order_bias:  # what stands behind a decided end is dropped anyway
                ends = self._end_tokens(row)
                end = next((j for j, token in enumerate(row.block) if token in ends), sizes[i])
                undecided[i, end:] = False
        logits = self.runner.project(states, self.first_candidate, self.last_candidate + 1)  # (rows, block, candidates)

        groups = group_rows(rows, lambda row: row.call.audio_key)
        for positions in groups:
            width = max(sizes[i] for i in positions)
            of_group = slice(None) if len(groups) == 1 else positions
            self._denoise_alike([rows[i] for i in positions], logits[of_group, :width], undecided[of_group, :width])

    def _denoise_alike(self, rows: list[Row], logits: torch.Tensor, undecided: torch.Tensor) -> None:
        """
        Steps 3b (guidance) to 3e for rows with the same settings. logits: (rows, block, candidates), undecided: (rows,
        block).
        """
        options, sizes = rows[0].call.options, [len(row.block) for row in rows]
        unconditional = self._unconditional(rows, logits.shape[1]) if options.audio_guidance_scale else None

        is_nan = logits.isnan() if unconditional is None else logits.isnan() | unconditional.isnan()
        broken = is_nan.flatten(1).any(dim=1).tolist()

        # 3c and 3d. A token for every position; the most confident of the undecided ones stay.
        tokens, fixed = denoise(
            logits,
            undecided.to(self.device),
            sizes,
            [row.step for row in rows],
            options,
            [row.generator for row in rows],
            self.forbidden_in_span,
            unconditional,
        )
        chosen = torch.where(fixed, tokens + self.first_candidate, UNDECIDED).tolist()
        for i, (row, tokens_of_row) in enumerate(zip(rows, chosen, strict=True)):
            if broken[i]:
                with own_errors([row]):
                    refuse_nan(row, logits[i] if unconditional is None else logits[i] + unconditional[i])
                continue
            row.step += 1
            row.block = [new if old == UNDECIDED else old for old, new in zip(row.block, tokens_of_row, strict=False)]
            self._finish_block(row)

    def _finish_block(self, row: Row) -> None:
        """
        Step 3e: end the block once it is decided. What stands after the first end token is dropped, so the block is
        decided as soon as everything up to that token is.
        """
        end = self._first_end(row)
        if end is not None and row.block[end] == UNDECIDED:
            return
        assert row.span_start is not None
        codes, row.block = row.block, []
        closing = None
        if end is not None:
            codes, closing = codes[:end], codes[end]
        # A limit leaves the codes before it as they are and always leaves room for the end token.
        room = min(
            row.call.options.max_audio_codes_per_span - (len(row.ids) - row.span_start),
            row.call.max_new_tokens - row.new_tokens - 1,
        )
        if len(codes) > room or (closing is None and len(codes) == room):
            codes, closing = codes[: max(room, 0)], self._proper_end(row)
        row.ids += codes
        self._skip_scores(row, len(codes))
        if closing is None:
            self._stop([row])
            if row.done:
                closing = self._proper_end(row)
        if closing is None:
            self._stream(row, codes)
            if not row.done:
                self._start_block(row)
            return
        row.ids.append(closing)
        self._skip_scores(row, 1)
        if not row.done and closing in row.call.eos_tokens and row.new_tokens >= row.call.min_new_tokens:
            row.reason = "stop"
        if not row.done and row.new_tokens >= row.call.max_new_tokens:
            row.reason = "length"
        self._stream(row, [*codes, closing])
        self._stop([row])

    def _end_tokens(self, row: Row) -> set[int]:
        """What ends the span that a row is writing."""
        return self.end_tokens

    def _first_end(self, row: Row) -> int | None:
        """Where the first end token, or the first undecided position, stands in a row's block."""
        ends = self._end_tokens(row)
        return next((i for i, token in enumerate(row.block) if token in ends or token == UNDECIDED), None)

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
            if self.trained_block_length is None:
                whole = [[self.mask_token] * n + block for n, block in zip(masks, sequences, strict=True)]
                hidden: Sequence[torch.Tensor] = [
                    states[n:] for n, states in zip(masks, self.runner.bidirectional(whole), strict=True)
                ]
            else:
                hidden = self.runner.behind_masks([row.key for row in of_first], sequences, masks)
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

    def _prompt_span_ids(self, call: Call) -> torch.Tensor:
        """Span ids of the prompts without their padding, (rows, longest prompt), -1 outside spans."""
        longest = max(row.prompt_length for row in call.rows)
        ids = torch.tensor([row.ids + [-1] * (longest - len(row.ids)) for row in call.rows], device=self.device)
        lengths = torch.tensor([row.prompt_length for row in call.rows], device=self.device)
        is_real = torch.arange(longest, device=self.device) < lengths[:, None]
        span_ids = self.get_span_ids(ids, is_real.long(), block_length=call.block_length)
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

    def _stream(self, row: Row, tokens: list[int]) -> None:
        if row.call.streamer is not None and tokens:
            with own_errors([row]):
                row.call.streamer.put(torch.tensor(tokens))


__all__ = ["Call", "Row", "TttDecoder"]
