"""The decoding loop of the purely diffused baseline (`text_objective="diffusion"`): the whole response, text and audio
alike, is one span that block diffusion writes. TtT's own loop is in decoding_ttt.py."""

from typing import Any

from transformers.utils import logging

from .decoding_ttt import UNDECIDED, Call, Row, TttDecoder

logger = logging.get_logger(__name__)


class ResponseDecoder(TttDecoder):
    """
    One call of `generate` of the purely diffused model.

    1. Prompts: one forward stores their keys and values, which the response never changes.
    2. Append a block of `audio_block_size` mask tokens to the response, never past the limit.
    3. One forward over the response alone, behind the cache, gives the block's logits over the whole vocabulary.
    4. Fix the most confident undecided positions, as inside an audio span of TtT; back to 3 until the block is decided.
    5. The response ends at the first end-of-sequence token; what stands after it is dropped. Without one, back to 2.

    The options that act inside TtT's audio spans (`audio_steps_per_block`, `audio_remasking`, `audio_temperature`, ...)
    act on the whole response here. There is no guidance, and nothing is written left to right: processors of text are
    not asked, stopping criteria after each block.

    Raises:
        ValueError: if `audio_guidance_scale` is not 0.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.first_candidate, self.last_candidate = 0, self.vocab_size - 1
        self.forbidden_in_span = [self.mask_token]
        self.text_first = False

    @classmethod
    def check(cls, call: Call) -> None:
        """Raise a ValueError for guidance; warn of what has no effect."""
        if call.options.audio_guidance_scale:
            raise ValueError(
                f"`audio_guidance_scale` is {call.options.audio_guidance_scale}; a diffused response has none, use 0."
            )
        if call.processors:
            names = sorted(type(processor).__name__ for processor in call.processors)
            logger.warning_once(f"{names} have no effect: a diffused response is not written left to right.")

    def _end_tokens(self, row: Row) -> set[int]:
        return row.call.eos_tokens

    def _find_open_span(self, ids: list[int]) -> int | None:
        """Step 1: behind every prompt the response is the open span."""
        return len(ids)

    def _start_block(self, row: Row) -> None:
        """Step 2."""
        super()._start_block(row)
        row.block = row.block[: row.call.max_new_tokens - row.new_tokens]

    def _finish_block(self, row: Row) -> None:
        """Step 5, once everything up to the first end of the sequence is decided."""
        end = self._first_end(row)
        if end is not None and row.block[end] == UNDECIDED:
            return
        written, row.block = row.block[: None if end is None else end + 1], []
        row.ids += written
        if end is not None or row.new_tokens >= row.call.max_new_tokens:
            row.reason = "length" if end is None else "stop"
        self._stream(row, written)
        self._stop([row])
        if not row.done:
            self._start_block(row)


__all__ = ["ResponseDecoder"]
