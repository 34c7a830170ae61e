"""The tokens that TtT adds to a text tokenizer: their strings, their order and their ids, stated once. The order in
which a response uses them lives in interleaving_ttt.py, the one in which a prompt does in tasks_ttt.py."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

START_OF_TURN = "<|im_start|>"
END_OF_TURN = "<|im_end|>"
BEGIN_OF_AUDIO = "<|begin_of_audio|>"
END_OF_PROMPT_AUDIO = "<|end_of_audio|>"
BEGIN_OF_LAST_AUDIO = "<|begin_of_quad|>"
AUDIO_PLACEHOLDER = "<|audio|>"
CODE_FORMAT = "<|audio_{}|>"
MASK = "<|mask_token|>"
END_OF_AUDIO = "<|end_of_audio_new|>"
END_OF_LAST_AUDIO = "<|end_of_audio_span_last|>"

TEXT_TOKENS = (START_OF_TURN, END_OF_TURN, BEGIN_OF_AUDIO, END_OF_PROMPT_AUDIO, BEGIN_OF_LAST_AUDIO)

# String by field of `TttTokenIds`; but for the last, the fields are `TttConfig`'s arguments too.
TOKENS = {
    "audio_token_id_start": AUDIO_PLACEHOLDER,
    "audio_code_id_start": CODE_FORMAT.format(0),
    "mask_token_id": MASK,
    "begin_of_audio_token_id": BEGIN_OF_AUDIO,
    "end_of_prompt_audio_token_id": END_OF_PROMPT_AUDIO,
    "begin_of_last_audio_token_id": BEGIN_OF_LAST_AUDIO,
    "end_of_audio_token_id": END_OF_AUDIO,
    "end_of_last_audio_token_id": END_OF_LAST_AUDIO,
    "end_of_turn_token_id": END_OF_TURN,
}


def audio_tokens(num_codes: int) -> list[str]:
    """
    Return the audio side of a vocabulary in the published order: the placeholder, `num_codes` codes, the mask token
    and the two tokens that end a span of a response.
    """
    return [AUDIO_PLACEHOLDER, *map(CODE_FORMAT.format, range(num_codes)), MASK, END_OF_AUDIO, END_OF_LAST_AUDIO]


def added_tokens(num_codes: int) -> list[str]:
    """
    Return all tokens that a text tokenizer needs for `num_codes` codes, in the published order: the text side
    (`TEXT_TOKENS`), then `audio_tokens`. `tokenizer.add_tokens(..., special_tokens=True)` keeps those it has already.
    """
    return [*TEXT_TOKENS, *audio_tokens(num_codes)]


@dataclass(frozen=True)
class TttTokenIds:
    """
    Ids of the tokens that give a sequence its structure, and the range of the audio codes.

    Ids from `audio_token_id_start` to the last of codes, mask and end tokens are audio-side; all others, below and
    above, are text-side.

    Args:
        audio_token_id_start (`int`): first id of the audio side, `<|audio|>`.
        audio_code_id_start (`int`): id of code 0, `<|audio_0|>`; code `c` has the id `audio_code_id_start + c`.
        num_audio_codes (`int`): number of codes.
        mask_token_id (`int`): `<|mask_token|>` (audio side).
        begin_of_audio_token_id (`int`): `<|begin_of_audio|>`, opens a span (text side).
        end_of_prompt_audio_token_id (`int`): `<|end_of_audio|>`, closes a user's audio (text side).
        begin_of_last_audio_token_id (`int`): `<|begin_of_quad|>`, opens the last span of a response (text side).
        end_of_audio_token_id (`int`): `<|end_of_audio_new|>`, ends a span of a response (audio side).
        end_of_last_audio_token_id (`int`): `<|end_of_audio_span_last|>`, ends the last span (audio side).
        end_of_turn_token_id (`int`): `<|im_end|>` (text side).
    """

    audio_token_id_start: int
    audio_code_id_start: int
    num_audio_codes: int
    mask_token_id: int
    begin_of_audio_token_id: int
    end_of_prompt_audio_token_id: int
    begin_of_last_audio_token_id: int
    end_of_audio_token_id: int
    end_of_last_audio_token_id: int
    end_of_turn_token_id: int

    @classmethod
    def from_tokenizer(cls, tokenizer: Any) -> TttTokenIds:
        """
        Look every id up by its token string.

        Args:
            tokenizer (`PreTrainedTokenizerBase`): a tokenizer that has the tokens of `added_tokens`.

        Raises:
            ValueError: if tokens are missing, or the codes `<|audio_0|>`, `<|audio_1|>`, ... are not consecutive ids.
        """
        vocabulary = tokenizer.get_vocab()
        missing = [token for token in TOKENS.values() if token not in vocabulary]
        if missing:
            raise ValueError(
                f"The tokenizer has no token {', '.join(f'`{token}`' for token in missing)}; add the TtT tokens to it "
                "first."
            )
        ids = {name: vocabulary[token] for name, token in TOKENS.items()}
        num_codes = 0
        while (code_id := vocabulary.get(token := CODE_FORMAT.format(num_codes))) is not None:
            expected = ids["audio_code_id_start"] + num_codes
            if code_id != expected:
                raise ValueError(
                    f"The audio codes must have consecutive ids: `{token}` has id {code_id}, expected {expected}."
                )
            num_codes += 1
        return cls(num_audio_codes=num_codes, **ids)

    def config_arguments(self) -> dict[str, int]:
        """Return the ids as `TttConfig` takes them: all but the end of a turn, which is its `eos_token_id`."""
        arguments = dataclasses.asdict(self)
        del arguments["end_of_turn_token_id"]
        return arguments

    @property
    def audio_token_id_end(self) -> int:
        """One past the last audio-side id."""
        last_code = self.audio_code_id_start + self.num_audio_codes - 1
        return 1 + max(last_code, self.mask_token_id, self.end_of_audio_token_id, self.end_of_last_audio_token_id)

    @property
    def structural(self) -> frozenset[int]:
        """Text-side ids that are structure, not text."""
        return frozenset(
            (
                self.begin_of_audio_token_id,
                self.end_of_prompt_audio_token_id,
                self.begin_of_last_audio_token_id,
                self.end_of_turn_token_id,
            )
        )

    def is_code(self, token_id: int) -> bool:
        """Return whether the id is an audio code, not a begin, end or mask token."""
        return self.audio_code_id_start <= token_id < self.audio_code_id_start + self.num_audio_codes

    def is_audio(self, token_id: int) -> bool:
        """Return whether the id is audio-side: a code, the mask token, the end of a span or the placeholder."""
        return self.audio_token_id_start <= token_id < self.audio_token_id_end

    def is_text(self, token_id: int) -> bool:
        """Return whether the id is text: neither audio-side nor structure."""
        return not self.is_audio(token_id) and token_id not in self.structural

    def codes_to_ids(self, codes: Iterable[int], name: str = "codes") -> list[int]:
        """
        Return the token ids of codes.

        Args:
            codes (`Iterable[int]` of shape `(codes,)`): 0 to num_audio_codes - 1.
            name (`str`, *optional*, defaults to `"codes"`): how errors call them.

        Raises:
            ValueError: if they are not integers in one dimension, or one is outside the codebook.
        """
        try:
            codes = [operator.index(code) for code in to_list(codes)]
        except TypeError as error:
            raise ValueError(
                f"{name}: codes must be integers in one dimension, (codes,). The processor's `flatten_codes` makes "
                "them of an audio tokenizer's (codebooks, frames)."
            ) from error
        for position, code in enumerate(codes):
            if not 0 <= code < self.num_audio_codes:
                raise ValueError(
                    f"{name}: code {code} at position {position} is outside the codebook "
                    f"(0 to {self.num_audio_codes - 1}). Check that the codes come from this model's audio tokenizer."
                )
        return [self.audio_code_id_start + code for code in codes]


def to_list(ids: Any) -> list[int]:
    """Return a 1-D tensor, array or iterable of integers as a plain list."""
    return ids.tolist() if hasattr(ids, "tolist") else list(ids)
