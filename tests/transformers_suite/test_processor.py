"""The processor under Transformers' tests of processors, and its feature extractor's saving."""

import unittest
from typing import Any

from builders import build_codec, build_tokenizer
from transformers import EncodecFeatureExtractor

from processing import TttProcessor

from .archive import ProcessorTesterMixin


class TttProcessorTest(ProcessorTesterMixin, unittest.TestCase):
    processor_class = TttProcessor

    @classmethod
    def _setup_feature_extractor(cls) -> EncodecFeatureExtractor:
        return EncodecFeatureExtractor(feature_size=1, sampling_rate=16_000)

    @classmethod
    def _setup_tokenizer(cls) -> Any:
        return build_tokenizer()

    @staticmethod
    def prepare_processor_dict() -> dict[str, Any]:
        return {"audio_tokenizer": build_codec()}
