"""The pipeline under Transformers' tests of pipelines: from a folder, in two precisions, one by one and in batches."""

import tempfile
import unittest
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from builders import build_model, build_processor, tone
from transformers import PreTrainedModel, ProcessorMixin, pipeline

from modeling_ttt import TttForConditionalGeneration
from pipelines import TttAudioToAudioPipeline, save_repository

from .archive import PipelineTesterMixin, pipeline_mixin


class AudioToAudioPipelineTests:
    """What the library's tests ask of a task: the pipeline with examples of its inputs, and what comes out."""

    def get_test_pipeline(
        self, model: PreTrainedModel, *args: Any, processor: ProcessorMixin, dtype: str, **kwargs: Any
    ) -> tuple[TttAudioToAudioPipeline, list[Any]]:
        pipe = pipeline("audio-to-audio", model=model, processor=processor, dtype=dtype)
        return pipe, [tone(0.3), {"text": "hello", "audio": tone(0.2)}, [{"role": "user", "content": "hello"}]]

    def run_pipeline_test(self, pipe: TttAudioToAudioPipeline, examples: Sequence[Any]) -> None:
        for answer in [pipe(examples[0]), *pipe(examples)]:
            assert answer["text"] == "hi" and answer["audio"].dtype == np.float32
            assert answer["audio"].shape == (40 * 1280,) and answer["sampling_rate"] == 16_000


class TttPipelineTest(PipelineTesterMixin, unittest.TestCase):
    pipeline_model_mapping = {"audio-to-audio": TttForConditionalGeneration}

    def run_task_tests(self, task: str, dtype: str = "float32") -> None:
        """As the library's, with a folder of ours in place of a repository of the Hub's."""
        summary = {
            "TttForConditionalGeneration": {"tokenizer_classes": ["PreTrainedTokenizerFast"], "processor_classes": []}
        }
        task_test = {"test": f"{__name__}.{AudioToAudioPipelineTests.__name__}"}
        with tempfile.TemporaryDirectory() as folder:
            processor = build_processor()
            save_repository(build_model(processor), processor, Path(folder, "ttt", "TttForConditionalGeneration"))
            with (
                patch.multiple(pipeline_mixin, TRANSFORMERS_TINY_MODEL_PATH=folder, tiny_model_summary=summary),
                patch.dict(pipeline_mixin.pipeline_test_mapping, {task: task_test}),
                patch.dict(pipeline_mixin.PROCESSOR_MAPPING_NAMES, {"ttt": "AutoProcessor"}),
            ):
                try:
                    super().run_task_tests(task, dtype)
                except unittest.SkipTest as skip:
                    self.fail(str(skip))

    def test_pipeline_audio_to_audio(self) -> None:
        self.run_task_tests("audio-to-audio")

    def test_pipeline_audio_to_audio_fp16(self) -> None:
        self.run_task_tests("audio-to-audio", "float16")


# The mixin has tests for every task of the library, of which ours is none.
for _name in dir(PipelineTesterMixin):
    if _name.startswith("test_"):
        setattr(TttPipelineTest, _name, None)
