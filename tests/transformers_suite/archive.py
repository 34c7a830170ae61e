"""Where Transformers' own test mixins are imported from, as if this repository's classes were part of the library."""

import os
import sys
import unittest.mock
from pathlib import Path

import transformers.utils

from .fetch import unpacked_folder

STAND_INS = Path(__file__).parent / "stand_ins"

# `transformers_tests` is a namespace package: what the archive holds, and stand-ins for what it imports but leaves out.
for folder in (STAND_INS, unpacked_folder()):
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
# Its files import the library once more, from the source tree around them; the installed one is the same.
transformers.utils.direct_transformers_import = lambda *args, **kwargs: transformers
# Its pipeline tests read a list of the Hub's tiny models when they are imported; ours is empty.
with unittest.mock.patch.dict(os.environ, {"TRANSFORMERS_TINY_MODEL_PATH": str(STAND_INS)}):
    from transformers_tests import test_pipeline_mixin as pipeline_mixin

# ruff: noqa: E402
from transformers_tests import test_fsdp_mixin as fsdp_mixin
from transformers_tests import test_modeling_common as modeling_common
from transformers_tests import test_tensor_parallel_mixin as tensor_parallel_mixin
from transformers_tests.generation.test_utils import GenerationTesterMixin
from transformers_tests.test_configuration_common import ConfigTester
from transformers_tests.test_fsdp_mixin import FSDPTesterMixin
from transformers_tests.test_modeling_common import ModelTesterMixin
from transformers_tests.test_pipeline_mixin import PipelineTesterMixin
from transformers_tests.test_processing_common import ProcessorTesterMixin
from transformers_tests.test_tensor_parallel_mixin import TensorParallelTesterMixin
from transformers_tests.test_training_mixin import TrainingTesterMixin

__all__ = [
    "ConfigTester",
    "FSDPTesterMixin",
    "GenerationTesterMixin",
    "ModelTesterMixin",
    "PipelineTesterMixin",
    "ProcessorTesterMixin",
    "TensorParallelTesterMixin",
    "TrainingTesterMixin",
    "pipeline_mixin",
]

# Tables by the names of classes say what their heads are for, lists of model types which are run in several processes.
modeling_common.MODEL_MAPPING_NAMES = {**modeling_common.MODEL_MAPPING_NAMES, "ttt": "TttModel"}
modeling_common.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES = {
    **modeling_common.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "ttt": "TttForConditionalGeneration",
}
fsdp_mixin.FSDP_DISTRIBUTED_TEST_MODEL_TYPES = {"ttt"}
tensor_parallel_mixin.TP_DISTRIBUTED_TEST_MODEL_TYPES = {"ttt"}
