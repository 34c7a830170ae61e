"""The processor under Transformers' tests of processors."""

import unittest
from typing import Any
from unittest.mock import patch

from builders import build_codec, build_tokenizer
from transformers import EncodecFeatureExtractor, PreTrainedTokenizerFast

from processing import TttProcessor

from .archive import ProcessorTesterMixin


class TttProcessorTest(ProcessorTesterMixin, unittest.TestCase):
    processor_class = TttProcessor
    audio_token = "<|audio|>"
    # Audio becomes codes, and codes are tokens.
    audio_input_name = audio_input_name_values = "input_ids"
    settings = {"text_chunk_size": 7, "audio_chunk_size": 14}

    @classmethod
    def setUpClass(cls) -> None:
        """A class with code of its own to save names it in its settings; the library's have none."""
        cls.enterClassContext(patch.object(TttProcessor, "_auto_class", None))
        super().setUpClass()

    @classmethod
    def _setup_feature_extractor(cls) -> EncodecFeatureExtractor:
        return EncodecFeatureExtractor(feature_size=1, sampling_rate=16_000)

    @classmethod
    def _setup_tokenizer(cls) -> PreTrainedTokenizerFast:
        return build_tokenizer()

    @classmethod
    def prepare_processor_dict(cls) -> dict[str, Any]:
        return {"audio_tokenizer": build_codec(), **cls.settings}

    def test_processor_to_json_string(self) -> None:
        """As the library's, but for the audio tokenizer, which is saved beside the settings."""
        with patch.object(type(self), "prepare_processor_dict", lambda *_: self.settings):
            super().test_processor_to_json_string()

    def _test_apply_chat_template(self, *args: Any) -> None:
        """As the library's, but for the options of videos that it hands to every processor: ours refuses them."""
        original = TttProcessor.apply_chat_template

        def apply_chat_template(processor, *args, processor_kwargs=None, **kwargs):
            if processor_kwargs == {"num_frames": 2, "fps": None}:
                with self.assertRaisesRegex(TypeError, "num_frames"):
                    original(processor, *args, processor_kwargs=processor_kwargs, **kwargs)
                processor_kwargs = None
            return original(processor, *args, processor_kwargs=processor_kwargs, **kwargs)

        with patch.object(TttProcessor, "apply_chat_template", apply_chat_template):
            super()._test_apply_chat_template(*args)
