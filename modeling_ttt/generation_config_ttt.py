"""The generation settings of TtT: what GenerationConfig has, plus how audio spans are denoised."""

import copy
import difflib
import math
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from typing import Any

import torch
from transformers import GenerationConfig

AUDIO_REMASKING_RULES = ("low_confidence", "random", "entropy")

# What `generate` uses where neither the caller nor the checkpoint says otherwise: the published sampler's settings, but
# for its guidance of 0.1, which takes a forward over the whole sequence at every step.
AUDIO_DEFAULTS: dict[str, Any] = {
    "audio_block_size": 26,
    "audio_steps_per_block": 2,
    "audio_remasking": "low_confidence",
    "audio_temperature": 0.0,
    "audio_guidance_scale": 0.0,
    "audio_order_bias": 0.0,
    "max_audio_codes_per_span": 2600,
}
# Inherited options by what they take. The library compares them without asking, and its errors name no option.
INTEGERS = (
    "max_length",
    "max_new_tokens",
    "min_length",
    "min_new_tokens",
    "no_repeat_ngram_size",
    "num_beams",
    "num_return_sequences",
    "top_k",
)
NUMBERS = (
    "epsilon_cutoff",
    "eta_cutoff",
    "length_penalty",
    "max_time",
    "min_p",
    "repetition_penalty",
    "temperature",
    "top_p",
    "typical_p",
)
SWITCHES = (
    "do_sample",
    "output_logits",
    "output_scores",
    "remove_invalid_values",
    "return_dict_in_generate",
    "use_cache",
)
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
# Rules by which a step fixes as many positions as it is sure of, instead of an even split.
SURE_RULES = ("audio_confidence_threshold", "audio_prefix_probability")
FIXING_OPTIONS = ("audio_steps_per_block", *SURE_RULES)
AUDIO_OPTIONS = (*AUDIO_DEFAULTS, *SURE_RULES, "audio_top_k", "audio_top_p", "seed")


class TttGenerationConfig(GenerationConfig):
    """
    Generation settings of [`TttForConditionalGeneration`].

    The inherited options (`do_sample`, `temperature`, `top_k`, `top_p`, `repetition_penalty`, `max_new_tokens`, ...)
    act on text. `max_new_tokens` counts every new token: text, begin tokens, codes and end tokens. The options below
    act inside audio spans. As with the inherited options, `None` means "not set": the checkpoint's
    generation_config.json decides, then the default named here. The defaults are those of the published sampler, but
    for its guidance of 0.1.

    Args:
        audio_block_size (`int`, default 26): mask tokens appended to a span at a time, in codes (80 ms each at 12.5
            codes a second).
        audio_steps_per_block (`int`, default 2): denoising steps per block. The block's positions are split evenly
            over the steps, earlier steps taking the remainder. Steps beyond the block size change nothing. Not used
            when `audio_confidence_threshold` or `audio_prefix_probability` is set; but steps, or random remasking, that
            a call of `generate` asks for (as keywords, in a configuration, or changed in a copy of the checkpoint's) go
            before a rule that the checkpoint alone sets. As a keyword, `None` for the rule switches it off, too.
        audio_remasking (`str`, default "low_confidence"): which positions a step fixes. "low_confidence": those whose
            chosen token has the highest probability; "entropy": those whose distribution has the lowest entropy;
            "random": any.
        audio_confidence_threshold (`float` in (0, 1], *optional*): instead of an even split, each step fixes every
            position whose confidence reaches the threshold, and the most confident one where none does, so that a
            block takes between 1 and `audio_block_size` steps. The confidence is the chosen token's probability
            ("low_confidence") or exp(-entropy), one over the effective number of choices ("entropy").
        audio_prefix_probability (`float` in (0, 1], *optional*): each step fixes the longest run of positions, from the
            first undecided one on, of which all are right with at least this probability: the product of their
            confidences. The first one is always fixed. So a block is written from left to right, in 1 to
            `audio_block_size` steps, many codes at a time where the model is sure and one by one where it is not; how
            much may go wrong in a step is bounded, as in EB-Sampler (2505.24857) and in adaptive parallel decoding
            (2506.00413), but in the order of speech and by the model alone. Not together with
            `audio_confidence_threshold`; `audio_order_bias` has no effect on it.
        audio_temperature (`float`, default 0.0): 0 takes the most probable token; above 0 samples.
        audio_top_k (`int`, *optional*), audio_top_p (`float` in (0, 1], *optional*): restrict the sampling to the most
            probable tokens. They have no effect at temperature 0. Confidences are taken before temperature and these.
        audio_guidance_scale (`float`, default 0.0): classifier-free guidance, logits = u + (scale + 1) * (c - u). Above
            0 each step also runs the whole sequence with everything before the block masked (the u above).
        audio_order_bias (`float`, default 0.0): preference for earlier positions where a step fixes the most confident
            ones: this much is taken off the confidence for every position that stands before in the block. Above 0,
            what stands behind a decided end token is no longer denoised, so that steps are spent on what is kept. At
            few steps 0.01 to 0.1 is better than confidence alone.
        max_audio_codes_per_span (`int`, default 2600): a span without an end token is closed after this many codes.
        seed (`int` or list of `int`, *optional*): row r of the batch draws all its noise (text, audio, remasking) from
            its own generator, seeded with `seed + r`, or with `seed[r]` if a list is given. So row r of a batch with
            `seed=s` is reproduced alone with `seed=s + r`. Without it the first row's seed comes from torch's global
            generator. With `num_return_sequences`, rows count after expansion; several answers to a prompt differ where
            text (`do_sample`) or audio (`audio_temperature`, or "random" remasking) is drawn.
    """

    def __init__(self, **kwargs: Any):
        for name in AUDIO_OPTIONS:
            setattr(self, name, kwargs.pop(name, None))
        super().__init__(**kwargs)

    @staticmethod
    def _get_default_generation_params() -> dict[str, Any]:
        return {**GenerationConfig._get_default_generation_params(), **AUDIO_DEFAULTS}

    @classmethod
    def from_model_config(cls, model_config: Any) -> "TttGenerationConfig":
        """Return settings for a model without a generation_config.json: ids come from the model's configuration."""
        upgraded = cls.upgrade(GenerationConfig.from_model_config(model_config))
        upgraded._from_model_config = None  # a file with this mark loses all but the inherited options when loaded
        return upgraded

    @classmethod
    def upgrade(cls, generation_config: GenerationConfig) -> "TttGenerationConfig":
        """
        Return the same settings as an instance of this class; unset audio options stay unset.

        Raises:
            ValueError: if it is no configuration, such as a dictionary.
        """
        if isinstance(generation_config, cls):
            return generation_config
        if not isinstance(generation_config, GenerationConfig):
            raise ValueError(
                f"`generation_config` is a {type(generation_config).__name__}; pass a TttGenerationConfig, or its "
                "options as keywords."
            )
        upgraded = cls()
        upgraded.__dict__.update(copy.deepcopy(generation_config.__dict__))
        # With these as the caller's, and no other, the library does not warn of what they leave without effect.
        upgraded.validate(user_set_attributes={"do_sample", "num_beams"})
        if hasattr(generation_config, "_original_object_hash"):
            upgraded._original_object_hash = hash(upgraded)
        return upgraded

    def update(self, defaults_only: bool = False, allow_custom_entries: bool = False, **kwargs: Any) -> dict[str, Any]:
        """
        As any configuration. With `defaults_only`, where this one says how many positions a step fixes, a rule among
        `kwargs` is not taken.
        """
        if defaults_only and asks_for_fixing(self.__dict__):
            kwargs = {name: value for name, value in kwargs.items() if name not in SURE_RULES}
        return super().update(defaults_only, allow_custom_entries, **kwargs)

    def to_diff_dict(self) -> dict[str, Any]:
        return {k: v for k, v in super().to_diff_dict().items() if k not in AUDIO_OPTIONS or v is not None}

    def validate(self, *args: Any, **kwargs: Any) -> None:
        """
        Check every option, the inherited ones by type too.

        Raises:
            ValueError: naming the option, its value and what to use instead.
        """
        self.__dict__.update(read_options(self.__dict__))
        for name in self.__dict__:
            is_like_ours = name.startswith(("audio_", "max_audio_")) and name not in AUDIO_OPTIONS
            if is_like_ours and (close := difflib.get_close_matches(name, AUDIO_OPTIONS, 1)):
                raise ValueError(f"There is no option `{name}`; did you mean `{close[0]}`?")
        several: Any = getattr(self, "num_return_sequences", None)
        if self.audio_temperature or self.audio_remasking == "random":
            self.num_return_sequences = None  # the library wants `do_sample` for it, but audio is drawn without
        try:
            super().validate(*args, **kwargs)
        finally:
            self.num_return_sequences = several
        positive = ("audio_block_size", "audio_steps_per_block", "max_audio_codes_per_span", "audio_top_k")
        for name in (*positive, "num_return_sequences"):
            value = getattr(self, name)
            if value is not None and (not _is_int(value) or value < 1):
                raise ValueError(f"`{name}` is {value!r}; use an integer of at least 1.")
        if self.audio_remasking is not None and self.audio_remasking not in AUDIO_REMASKING_RULES:
            raise ValueError(f"`audio_remasking` is {self.audio_remasking!r}; use one of {AUDIO_REMASKING_RULES}.")
        for name in ("audio_temperature", "audio_guidance_scale", "audio_order_bias"):
            value = getattr(self, name)
            if value is not None and (not _is_number(value) or value < 0):
                raise ValueError(f"`{name}` is {value!r}; use a finite number of at least 0 (0 switches it off).")
        for name in (*SURE_RULES, "audio_top_p"):
            value = getattr(self, name)
            if value is not None and (not _is_number(value) or not 0 < value <= 1):
                raise ValueError(f"`{name}` is {value!r}; use a number above 0 and at most 1, or None.")
        refuse_two_rules(self.__dict__)
        for name in SURE_RULES:
            if getattr(self, name) is not None and self.audio_remasking == "random":
                raise ValueError(
                    f"`{name}` is {getattr(self, name)!r}, but `audio_remasking` is 'random', whose confidence means "
                    f"nothing; use 'low_confidence' or 'entropy', or no `{name}`."
                )
        seeds = self.seed if isinstance(self.seed, list | tuple) else [self.seed]
        if self.seed is not None and not (seeds and all(_is_int(seed) and 0 <= seed < 2**63 for seed in seeds)):
            raise ValueError(f"`seed` is {self.seed!r}; use an integer from 0 to 2**63 - 1, or a list of one per row.")
        # NumPy's numbers as Python's own, as of the inherited options: a file and a generator take no others.
        for name in AUDIO_OPTIONS:
            value = getattr(self, name)
            if isinstance(value, list | tuple):
                setattr(self, name, list(map(int, value)))
            elif isinstance(value, Integral | Real) and not isinstance(value, bool):
                setattr(self, name, int(value) if isinstance(value, Integral) else float(value))


def asks_for_fixing(options: Mapping[str, Any]) -> bool:
    """
    Return whether `options` ask for steps, for one of `SURE_RULES`, or for random remasking, which goes with neither of
    these rules.
    """
    named = any(options.get(name) is not None for name in FIXING_OPTIONS)
    return named or options.get("audio_remasking") == "random"


def refuse_two_rules(options: Mapping[str, Any], names: Sequence[str] = SURE_RULES) -> None:
    """
    Check that `options` say in one way alone how many positions a step fixes.

    Args:
        options (`Mapping`): of generation.
        names (`Sequence[str]`, *optional*, defaults to `SURE_RULES`):
            Of these one may be set. In a configuration steps may stand beside a rule, for calls that switch it off;
            where a client asks for both (`FIXING_OPTIONS`), it means one of them.

    Raises:
        ValueError: if two are.
    """
    rules = [f"`{name}` is {options[name]!r}" for name in names if options.get(name) is not None]
    if len(rules) > 1:
        raise ValueError(
            f"{' and '.join(rules)}: they are {len(rules)} rules for the same choice. Leave all but one out, or set "
            "them to None."
        )


def read_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """
    Return the inherited options among `options` that take an integer, a number, a switch or token ids, as Python's own.

    Raises:
        ValueError: if one is of another type, naming it, its value and what to use.
    """
    read = {}
    for names, is_one, convert, what in (
        (INTEGERS, _is_int, int, "an integer"),
        (NUMBERS, _is_number, float, "a finite number"),
        (SWITCHES, lambda value: isinstance(value, bool), bool, "True or False"),
        (TOKEN_IDS, _are_token_ids, lambda value: value, "an id, or for several a list of them"),
    ):
        for name in names:
            value = options.get(name)
            if value is not None and not is_one(value):
                raise ValueError(f"`{name}` is {value!r}; use {what}.")
            if value is not None:
                read[name] = convert(value)
    return read


def _is_int(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def _are_token_ids(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return not value.is_floating_point()
    return all(map(_is_int, value)) if isinstance(value, list | tuple) else _is_int(value)


__all__ = [
    "AUDIO_DEFAULTS",
    "AUDIO_OPTIONS",
    "AUDIO_REMASKING_RULES",
    "FIXING_OPTIONS",
    "SURE_RULES",
    "TttGenerationConfig",
    "asks_for_fixing",
    "read_options",
    "refuse_two_rules",
]
