"""Configuration of a TtT model: a decoder-only Transformer and the layout of its audio vocabulary."""

import copy
import inspect
import os
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, TypedDict, get_args, get_origin

from huggingface_hub.dataclasses import validate_typed_dict
from huggingface_hub.errors import StrictDataclassFieldValidationError
from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

from .pipeline_code_ttt import save_pipeline_code

# Ids that stand on one side of the vocabulary. The strings of these tokens belong to the tokenizer.
TEXT_SIDE_IDS = ("begin_of_audio_token_id", "end_of_prompt_audio_token_id", "begin_of_last_audio_token_id")
AUDIO_SIDE_IDS = ("mask_token_id", "end_of_audio_token_id", "end_of_last_audio_token_id")
SHARED_WITH_BACKBONE = ("tie_word_embeddings", "pad_token_id", "bos_token_id", "eos_token_id")
# What some backbones do to the logits of their own heads, and where it does nothing.
LOGIT_SETTINGS = {"final_logit_softcapping": None, "logit_scale": 1.0, "logits_scaling": 1.0}
PROBABILITIES = (
    "clean_batch_probability",
    "prefix_preservation_probability",
    "span_truncation_probability",
    "block_masking_probability",
    "full_block_probability",
)


class TttConfig(PreTrainedConfig):
    r"""
    Configuration of [`TttModel`] and [`TttForConditionalGeneration`] (Text-to-Talk, arXiv 2509.20072).

    The vocabulary has two sides. The audio side reaches from `audio_token_id_start` to the last of codes, mask and end
    tokens; every other id is text, below it and, where tokens were added later, above it. Real ids are looked up from
    the tokenizer; the defaults only have the shape of a published checkpoint.

    Args:
        text_config (`PreTrainedConfig` or `dict`, *optional*):
            The decoder-only backbone (Qwen2 unless its `model_type` says otherwise). Its `vocab_size` spans both sides.
            It is copied: tying, special tokens and `vocab_size` are set on the copy.
        audio_token_id_start (`int`, *optional*, defaults to 151684): First id of the audio side.
        audio_code_id_start (`int`, *optional*, defaults to 151685): Id of audio code 0; code `c` has the id
            `audio_code_id_start + c`.
        num_audio_codes (`int`, *optional*, defaults to 16384): Size of the codebook.
        mask_token_id (`int`, *optional*, defaults to 168069): The absorbing state of the diffusion (audio side).
        begin_of_audio_token_id (`int`, *optional*, defaults to 151681): Opens a span (text side).
        end_of_prompt_audio_token_id (`int`, *optional*, defaults to 151682): Closes a user's audio (text side).
        begin_of_last_audio_token_id (`int`, *optional*, defaults to 151683): Opens the last span of a response (text
            side).
        end_of_audio_token_id (`int`, *optional*, defaults to 168070): Ends a span of a response (audio side).
        end_of_last_audio_token_id (`int`, *optional*, defaults to 168071): Ends the last span (audio side).
        audio_objective (`str`, *optional*, defaults to `"diffusion"`):
            How audio is trained. The twin (`"autoregressive"`) has causal audio, is trained on the next code and
            written by ordinary generation.
        text_objective (`str`, *optional*, defaults to `"autoregressive"`):
            How text is trained. With `"diffusion"` for both sides the response, text and end of turn included, is
            absorbed and predicted as one bidirectional span. TtT's baselines share everything else; each side's loss is
            averaged over its own labels in all three, so that their parts can be compared.
        causal_prompt_audio (`bool`, *optional*, defaults to `False`):
            Keep audio closed by `end_of_prompt_audio_token_id` causal, as the paper says; by default it is
            bidirectional, as the released weights were trained.
        clean_batch_probability (`float`, *optional*, defaults to 0.3):
            p_mix, how often a training batch is left unmasked (BANOM). Without effect where text is diffused: nothing
            would be left to score.
        prefix_preservation_probability (`float`, *optional*, defaults to 0.3):
            p_prefix, how often a sample keeps the spans before a random one clean and unscored (PPM).
        prefix_preservation_unit (`str`, *optional*, defaults to `"span"`):
            Where such a prefix may end: `"span"`, before a span, as published, or `"token"`, anywhere in one, which
            trains what block-wise sampling meets.
        span_truncation_probability (`float`, *optional*, defaults to 0.5):
            p_trunc, how often the last span of a sample's response is cut short in training (SST). Without effect
            where audio is autoregressive: such a model finds the end code by code.
        span_attention (`str`, *optional*, defaults to `"bidirectional"`):
            Who sees whom inside a response's span. `"bidirectional"`: everybody, as published. `"block_causal"`: a code
            sees the blocks before its own and its own, not later ones (block diffusion, arXiv 2503.09573). Finished
            blocks are then final and cached, and every block of a sample is scored in one forward over its clean tokens
            and noisy copies of its blocks, where text and earlier blocks are always clean: BANOM, PPM and
            `block_masking_probability` are without effect. A user's audio stays whole.
        block_masking_probability (`float`, *optional*, defaults to 0.0):
            How often a sample is cut after a random block of one of its spans, which alone is masked and scored, while
            everything before it stays clean: what block-wise sampling shows the model (block-aligned masking, after
            arXiv 2602.08607). Where the span ends within the block, the block is filled up with the end token.
        block_lengths (`Sequence[int]`, *optional*, defaults to `(26,)`):
            Tokens of a block in training, drawn anew for each sample, all lengths alike. Where nothing is drawn, in
            evaluation and in a plain forward with block-causal spans, the first.
        block_filling_weight (`float`, *optional*, defaults to 0.2):
            How much an end token that fills up a block counts in the loss; any other token counts 1.
        full_block_probability (`float`, *optional*, defaults to 0.0):
            How often a block is masked as a whole, as a sampler's first step sees it, whatever the noise level.
        noise_epsilon (`float`, *optional*, defaults to 0.001): Lower end of the noise level, λ = (1 - ε) t + ε.
        stratified_noise (`bool`, *optional*, defaults to `False`):
            Draw the λ of a batch from equal strata instead of independently (lower variance).
        eval_noise_levels (`Sequence[float]`, *optional*, defaults to `(0.125, 0.375, 0.625, 0.875)`):
            The λ grid of the deterministic loss in eval mode, one forward each.
        tie_word_embeddings (`bool`, *optional*):
            Share input embeddings and output head; the backbone's value if not given.
        pad_token_id, bos_token_id, eos_token_id (`int`, *optional*): The backbone's values if not given.

    Raises:
        TypeError: if `text_config` is neither a config nor a dictionary.
        ValueError: if an id lies on the wrong side, outside the vocabulary or on top of another, or a probability,
            noise level or objective is out of range. The message names the argument. What is passed to
            `from_pretrained` is checked in the same way, and what was set since when a model is built or the
            configuration is saved.
    """

    model_type = "ttt"
    base_model_fsdp_plan: ClassVar[dict] = {}  # the backbone has its own
    # The `Trainer` gathers the other outputs row by row; these are of the whole batch.
    keys_to_ignore_at_inference = ["past_key_values", "text_loss", "audio_loss"]
    sub_configs_defaults = {
        "text_config": SubConfigSpec(
            config_class=AutoConfig,
            model_type="qwen2",
            init_kwargs={
                "vocab_size": 168072,
                "hidden_size": 1536,
                "intermediate_size": 8960,
                "num_hidden_layers": 28,
                "num_attention_heads": 12,
                "num_key_value_heads": 2,
                "tie_word_embeddings": True,
            },
        )
    }

    text_config: dict | PreTrainedConfig | None = None
    audio_token_id_start: int = 151684
    audio_code_id_start: int = 151685
    num_audio_codes: int = 16384
    mask_token_id: int = 168069
    begin_of_audio_token_id: int = 151681
    end_of_prompt_audio_token_id: int = 151682
    begin_of_last_audio_token_id: int = 151683
    end_of_audio_token_id: int = 168070
    end_of_last_audio_token_id: int = 168071
    audio_objective: Literal["diffusion", "autoregressive"] = "diffusion"
    text_objective: Literal["autoregressive", "diffusion"] = "autoregressive"
    causal_prompt_audio: bool = False
    clean_batch_probability: float | int = 0.3
    prefix_preservation_probability: float | int = 0.3
    prefix_preservation_unit: Literal["span", "token"] = "span"
    span_truncation_probability: float | int = 0.5
    span_attention: Literal["bidirectional", "block_causal"] = "bidirectional"
    block_masking_probability: float | int = 0.0
    block_lengths: Sequence[int] = (26,)
    block_filling_weight: float | int = 0.2
    full_block_probability: float | int = 0.0
    noise_epsilon: float | int = 1e-3
    stratified_noise: bool = False
    eval_noise_levels: Sequence[float | int] = (0.125, 0.375, 0.625, 0.875)
    tie_word_embeddings: bool | None = None
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs):
        if not isinstance(self.text_config, dict | PreTrainedConfig | None):
            raise TypeError(f"`text_config` is a {type(self.text_config).__name__}; give a config or a dictionary.")
        self._validate_types()
        self.text_config = copy.deepcopy(self.text_config)  # the caller's object stays as it is
        super().__post_init__(**kwargs)
        # Backbone and head read these from different configs: keep both the same.
        for name in SHARED_WITH_BACKBONE:
            if getattr(self, name) is None:
                setattr(self, name, getattr(self.text_config, name, None))
            setattr(self.text_config, name, getattr(self, name))
        self.eval_noise_levels, self.block_lengths = list(self.eval_noise_levels), list(self.block_lengths)
        self.validate()

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """
        As any configuration, but what is passed beside `config_dict` goes through the checks of a new one. A dictionary
        for `text_config` changes the settings that it names.
        """
        own = cls.__dataclass_fields__.keys() - PreTrainedConfig.__dataclass_fields__.keys()
        given = {name: kwargs.pop(name) for name in list(kwargs) if name in own}
        nested, merged = given.get("text_config"), {**config_dict, **given}
        if isinstance(nested, dict):
            backbone = config_dict.get("text_config") or {}
            backbone = backbone.to_dict() if isinstance(backbone, PreTrainedConfig) else backbone
            merged["text_config"] = {**backbone, **nested}
            merged |= {name: None for name in SHARED_WITH_BACKBONE if name in nested and name not in given}
        return super().from_dict(merged, **kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs) -> None:
        """As any configuration's; the pipeline that it names has its code saved beside it."""
        save_pipeline_code(self, save_directory)
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)

    @property
    def vocab_size(self) -> int:
        """Number of tokens on both sides, the backbone's. Setting it checks that every id still has its row."""
        return self.text_config.vocab_size

    @vocab_size.setter
    def vocab_size(self, value: int) -> None:
        before, self.text_config.vocab_size = self.text_config.vocab_size, value
        try:
            self.validate_ids()
        except ValueError:
            self.text_config.vocab_size = before
            raise

    @property
    def audio_token_id_end(self) -> int:
        """One past the last id of the audio side."""
        last_code = self.audio_code_id_start + self.num_audio_codes - 1
        return 1 + max(last_code, *(getattr(self, name) for name in AUDIO_SIDE_IDS))

    @property
    def is_block_causal(self) -> bool:
        """Whether spans are diffused and their blocks do not see later ones."""
        return self.span_attention == "block_causal" and self.audio_objective == "diffusion"

    def is_audio(self, token_ids: Any) -> Any:
        """Return whether ids are audio-side: a bool for an `int`, a `torch.BoolTensor` for a tensor of any shape."""
        return (token_ids >= self.audio_token_id_start) & (token_ids < self.audio_token_id_end)

    def validate(self) -> None:
        """Raise a `ValueError` that names the first setting that cannot be."""
        self._validate_types()
        super().validate()
        self.validate_ids()
        for name, neutral in LOGIT_SETTINGS.items():
            value = getattr(self.text_config, name, None)
            if value is not None and value != neutral:
                raise ValueError(
                    f"`text_config.{name}` is {value}, but the head here is a plain projection, whose logits would not "
                    f"be those of a {self.text_config.model_type}: set it to {neutral} and train, or choose another."
                )
        self._validate_objective()

    def validate_ids(self) -> None:
        """Raise a `ValueError` that names the first id on the wrong side, outside the vocabulary or on another."""
        self._validate_types()
        vocab_size, start = self.vocab_size, self.audio_token_id_start
        last_code = self.audio_code_id_start + self.num_audio_codes - 1
        if self.num_audio_codes < 1:
            raise ValueError(f"`num_audio_codes` is {self.num_audio_codes}; a codebook has at least one code.")
        if not 0 < start <= self.audio_code_id_start:
            raise ValueError(
                f"`audio_token_id_start` is {start} but must be above 0 and at most `audio_code_id_start` "
                f"({self.audio_code_id_start}): codes are audio-side."
            )
        if last_code >= vocab_size:
            raise ValueError(
                f"`audio_code_id_start` + `num_audio_codes` reaches id {last_code} but `text_config.vocab_size` is "
                f"{vocab_size}: enlarge the vocabulary (`resize_token_embeddings`) or correct the ids."
            )

        seen: dict[int, str] = {}
        for name in TEXT_SIDE_IDS + AUDIO_SIDE_IDS:
            value = getattr(self, name)
            if not 0 <= value < vocab_size:
                raise ValueError(f"`{name}` is {value} but must be at least 0 and below the vocabulary's {vocab_size}.")
            if name in AUDIO_SIDE_IDS and value < start:
                raise ValueError(
                    f"`{name}` is {value} but must be audio-side, at least `audio_token_id_start` ({start})."
                )
            if self.audio_code_id_start <= value <= last_code:
                raise ValueError(
                    f"`{name}` is {value}, which is audio code {value - self.audio_code_id_start}: choose an id "
                    f"outside {self.audio_code_id_start} to {last_code}."
                )
            if name in TEXT_SIDE_IDS and self.is_audio(value):
                raise ValueError(
                    f"`{name}` is {value} but must be text-side, below `audio_token_id_start` ({start}) or above "
                    f"codes, mask and end tokens (from {self.audio_token_id_end})."
                )
            if value in seen:
                raise ValueError(f"`{name}` and `{seen[value]}` are both {value}: every token needs an id of its own.")
            seen[value] = name

    def _validate_types(self) -> None:
        """Raise a `ValueError` that names the first setting of a wrong type; the library checks its own fields only."""
        for name, kind in SETTINGS.__annotations__.items():
            value = getattr(self, name)
            try:
                validate_typed_dict(SETTINGS, {name: value})  # type: ignore[type-var]
            except StrictDataclassFieldValidationError as error:
                raise ValueError(f"`{name}` is {value!r}; give {_in_words(kind)}.") from error

    def _validate_objective(self) -> None:
        """Raise a `ValueError` that names the first probability, noise level or objective out of range."""
        for name in PROBABILITIES:
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"`{name}` is {getattr(self, name)}; a probability lies between 0 and 1.")
        if not 0.0 < self.noise_epsilon < 1.0:
            raise ValueError(f"`noise_epsilon` is {self.noise_epsilon} but must lie between 0 and 1, both excluded.")
        if not self.eval_noise_levels or not all(0.0 < level <= 1.0 for level in self.eval_noise_levels):
            raise ValueError(f"`eval_noise_levels` is {self.eval_noise_levels}; give one or more λ in (0, 1].")
        lengths = self.block_lengths
        if not lengths or not all(n > 0 for n in lengths):
            raise ValueError(f"`block_lengths` is {lengths}; give one or more numbers of tokens, each at least 1.")
        if not 0.0 <= self.block_filling_weight < float("inf"):
            raise ValueError(f"`block_filling_weight` is {self.block_filling_weight}; give a number of at least 0.")
        if self.text_objective == "diffusion" and self.audio_objective == "autoregressive":
            raise ValueError(
                "`text_objective` is 'diffusion' but `audio_objective` is 'autoregressive': text is diffused together "
                "with audio or not at all."
            )
        if self.text_objective == "diffusion" and (self.is_block_causal or self.block_masking_probability > 0):
            raise ValueError(
                "`text_objective` is 'diffusion', which makes a response one span without blocks: use it with "
                "`span_attention='bidirectional'` and `block_masking_probability=0`."
            )


def _in_words(kind: Any) -> str:
    """Return a type as an error asks for it."""
    if get_origin(kind) is Literal:
        return " or ".join(map(repr, get_args(kind)))
    of_items = "a list of " if get_origin(kind) is Sequence else ""
    kind = get_args(kind)[0] if of_items else kind
    words = {int: "an integer", float | int: "a number", bool: "True or False"}
    plural = {int: "integers", float | int: "numbers"}
    return of_items + (plural if of_items else words).get(kind, inspect.formatannotation(kind))


# Settings that are neither the library's nor, checked by its own configuration, the backbone's.
SETTINGS: Any = TypedDict(  # type: ignore[misc]
    "TttSettings",
    {
        name: field.type
        for name, field in TttConfig.__dataclass_fields__.items()
        if name not in {*PreTrainedConfig.__dataclass_fields__, *SHARED_WITH_BACKBONE, "text_config"}
    },
    total=False,
)

TttConfig.register_for_auto_class()

__all__ = ["TttConfig"]
