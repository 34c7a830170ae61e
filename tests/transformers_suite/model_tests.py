"""What the tests of all TtT models share: configurations, inputs, and the library's mixins adapted to audio spans."""

import tempfile
from typing import Any
from unittest.mock import patch

import torch

from modeling_ttt import TttConfig, TttForConditionalGeneration, TttModel

from .archive import (
    ConfigTester,
    GenerationTesterMixin,
    ModelTesterMixin,
    TensorParallelTesterMixin,
    TrainingTesterMixin,
)

# Text below 60, codes from 61 to 92. Tests cut vocabularies to 128 or by 15 tokens: these ids survive.
VOCABULARY = {
    "audio_token_id_start": 60,
    "audio_code_id_start": 61,
    "num_audio_codes": 32,
    "mask_token_id": 93,
    "begin_of_audio_token_id": 50,
    "end_of_prompt_audio_token_id": 51,
    "begin_of_last_audio_token_id": 52,
    "end_of_audio_token_id": 94,
    "end_of_last_audio_token_id": 95,
}
BACKBONE = {
    "vocab_size": 115,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 53,
    "eos_token_id": 54,
}
PROMPT_LENGTH = 9


class TttModelTester:
    """
    Configuration and inputs: a prompt of text, user's audio and text; an answer of text, a span and text.

    Args:
        backbone (`str`): model type of the text model.
        text_config (`dict`): settings of the text model beside BACKBONE.
        options: settings of `TttConfig`.
    """

    batch_size, seq_length = 4, 17
    hidden_size, num_hidden_layers, num_attention_heads, num_key_value_heads = 32, 2, 4, 2
    is_training = True
    causal_lm_class = TttForConditionalGeneration

    def __init__(self, backbone: str = "qwen2", text_config: dict[str, Any] | None = None, **options: Any):
        self.arguments = {"text_config": {"model_type": backbone, **BACKBONE, **(text_config or {})}}
        self.arguments |= VOCABULARY | options

    def get_config(self) -> TttConfig:
        return TttConfig(**self.arguments)

    def prepare_config_and_inputs_for_common(self) -> tuple[TttConfig, dict[str, torch.Tensor]]:
        input_ids = torch.randint(1, 50, (self.batch_size, self.seq_length))
        codes = torch.randint(61, 93, (self.batch_size, self.seq_length))
        for audio in (slice(2, 7), slice(10, 14)):
            input_ids[:, audio] = codes[:, audio]
        input_ids[:, [1, 7, 9, 14]] = torch.tensor([50, 51, 52, 95])
        return self.get_config(), {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}


class TttConfigTester(ConfigTester):
    def create_and_test_config_from_pretrained_custom_kwargs(self) -> None:
        """As the library's, which changes the vocabulary alone, but to a size that has room for the audio tokens."""
        config = self.parent.model_tester.get_config()
        with tempfile.TemporaryDirectory() as folder:
            config.save_pretrained(folder)
            changed = TttConfig.from_pretrained(folder, text_config={"vocab_size": 100})
            self.parent.assertDictEqual(
                changed.text_config.to_dict(), {**config.text_config.to_dict(), "vocab_size": 100}
            )
            with self.parent.assertRaisesRegex(ValueError, "`text_config.vocab_size` is 20"):
                TttConfig.from_pretrained(folder, text_config={"vocab_size": 20})


class TttModelTestMixin(ModelTesterMixin, GenerationTesterMixin, TrainingTesterMixin):
    """The library's mixins; a class that inherits it says which model by `model_tester`."""

    model_tester = TttModelTester()
    all_model_classes = (TttModel, TttForConditionalGeneration)
    test_can_init_all_missing_weights_before_2023 = True
    _is_composite = True
    training_overfit_learning_rate = 3e-3
    # The last gradient is that of one draw of noise, which may be any: loss and what is written have to be right.
    training_overfit_batch_size = 8
    training_grad_norm_reduction_threshold = float("-inf")

    def test_config(self) -> None:
        settings = {name: value for name, value in self.model_tester.arguments.items() if name != "text_config"}
        TttConfigTester(self, TttConfig, has_text_modality=True, **settings).run_common_tests()

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        """As the library's, with the answer's own tokens as labels, audio among them."""
        inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels)
        if "labels" in inputs:
            is_prompt = torch.arange(self.model_tester.seq_length) < PROMPT_LENGTH
            inputs["labels"] = inputs["input_ids"].masked_fill(is_prompt, -100)
        return inputs

    def test_causal_lm_loss_honors_shift_labels(self) -> None:
        """Labels that are shifted already are refused: absorbed tokens are predicted in place."""
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        labels = inputs["input_ids"]
        with self.assertRaisesRegex(ValueError, "shift_labels"):
            TttForConditionalGeneration(config)(**inputs, labels=labels, shift_labels=labels)

    def test_resize_tokens_embeddings(self) -> None:
        """As the library's until its end: a vocabulary of 4 tokens has no room for audio and is refused."""
        for model_class in self.all_model_classes:
            with (
                patch.object(type(self), "all_model_classes", (model_class,)),
                self.assertRaisesRegex(ValueError, "`text_config.vocab_size` is 4"),
            ):
                super().test_resize_tokens_embeddings()

    def test_inputs_embeds(self) -> None:
        """As the library's, with the spans that embeddings cannot tell."""
        self.test_inputs_embeds_matches_input_ids()

    def test_inputs_embeds_matches_input_ids(self) -> None:
        """As the library's, for both classes, with the spans that embeddings cannot tell."""
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        for model_class in self.all_model_classes:
            model = model_class(config).eval()
            span_ids = model.base_model.get_span_ids(inputs["input_ids"])
            embeds = model.get_input_embeddings()(inputs["input_ids"])
            with torch.no_grad():
                expected = model(**inputs)[0]
                given = model(inputs_embeds=embeds, attention_mask=inputs["attention_mask"], span_ids=span_ids)[0]
            torch.testing.assert_close(given, expected)

    def _create_text_training_batch(self, batch_size: int, seq_length: int, vocab_size: int) -> dict[str, torch.Tensor]:
        """Text, a span and text, of which the first token is the prompt."""
        tokens = [*range(1, 14), 50, *range(61, 81), 94, *range(14, seq_length - 21)]
        input_ids = torch.tensor([tokens] * batch_size)
        return {"input_ids": input_ids, "labels": input_ids.clone()}

    def _get_trainable_model_class(self) -> type[TttForConditionalGeneration]:
        return TrainedBlocks


class TrainedBlocks(TttForConditionalGeneration):
    """Writes in the blocks that it is trained on here: the configuration's, a whole span or a whole response."""

    def __init__(self, config: TttConfig):
        super().__init__(config)
        length = 21 if config.text_objective == "autoregressive" else 63
        self.generation_config.audio_block_size = config.block_lengths[0] if config.is_block_causal else length


class FixedNoise(TttForConditionalGeneration):
    """Every training loss has the same noise, so that two models can be compared by their losses."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, generator=torch.Generator().manual_seed(0), **kwargs)


class TttTensorParallelTestMixin(TensorParallelTesterMixin):
    """The library's mixin, with the same noise in the sharded model as in the whole one."""

    def _get_tp_model_class(self) -> type[TttForConditionalGeneration]:
        return FixedNoise
