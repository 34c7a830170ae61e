"""What a request may ask of generation: the field `ttt`, our one addition to OpenAI's wire formats, and what OpenAI's
own fields mean to `generate`."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from modeling_ttt.generation_config_ttt import FIXING_OPTIONS, asks_for_fixing, refuse_two_rules

from .schema import Wire


def own_pace(speed: float) -> float:
    """
    Take the one pace that there is.

    Raises:
        ValueError: for any other.
    """
    if speed != 1.0:
        raise ValueError("the pace is the model's own, 1.0")
    return speed


# The model has one voice of its own; clients must name one, and most send one of these.
Voice = Literal[
    "default", "alloy", "ash", "ballad", "cedar", "coral", "echo", "fable", "marin", "nova", "onyx", "sage", "shimmer",
    "verse",
]  # fmt: skip
Speed = Annotated[float, AfterValidator(own_pace), Field(json_schema_extra={"const": 1.0})]
Probability = Annotated[float, Field(gt=0.0, le=1.0)]
LEAST_TEMPERATURE = 1e-5  # logits divided by less may be infinite; the likeliest token is what they come to


class TttOptions(Wire):
    """
    The field `ttt` of a request or session; clients of OpenAI's libraries pass it in `extra_body`.

    Args:
        task (`str`, *optional*): one of the processor's; it chooses the system prompt.
        others (*optional*): options of `TttGenerationConfig` by their names, and `seed`.
    """

    task: str | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    max_new_tokens: Annotated[int, Field(ge=1, le=100_000)] | None = None
    audio_block_size: Annotated[int, Field(ge=1, le=10_000)] | None = None
    audio_steps_per_block: Annotated[int, Field(ge=1, le=1000)] | None = None
    audio_confidence_threshold: Probability | None = None
    audio_prefix_probability: Probability | None = None
    audio_temperature: Annotated[float, Field(ge=0.0, le=10.0)] | None = None
    audio_top_k: Annotated[int, Field(ge=1)] | None = None
    audio_top_p: Probability | None = None
    audio_order_bias: Annotated[float, Field(ge=0.0, le=100.0)] | None = None
    max_audio_codes_per_span: Annotated[int, Field(ge=1, le=100_000)] | None = None

    @model_validator(mode="after")
    def _has_one_rule(self) -> Self:
        refuse_two_rules(self.__dict__, FIXING_OPTIONS)
        return self

    def generate_options(self) -> dict[str, Any]:
        """Return what goes to `generate`."""
        return self.model_dump(exclude={"task", "seed"}, exclude_none=True)

    def updated(self, other: TttOptions | None) -> TttOptions:
        """Return these options with those that another sets; its steps or rule take the place of those of these."""
        if other is None:
            return self
        update = other.model_dump(exclude_unset=True)
        if asks_for_fixing(update):
            update = dict.fromkeys(FIXING_OPTIONS) | update
        return self.model_copy(update=update)


def sampling(temperature: float | None, top_p: float | None) -> dict[str, Any]:
    """Return options of `generate` for OpenAI's `temperature` and `top_p`; with neither, or next to no temperature,
    text is the likeliest."""
    if temperature is None and top_p is None:
        return {}
    if temperature is not None and temperature < LEAST_TEMPERATURE:
        return {"do_sample": False}
    options: dict[str, Any] = {"do_sample": True, "temperature": temperature, "top_p": top_p}
    return {name: value for name, value in options.items() if value is not None}
