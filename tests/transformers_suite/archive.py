"""Where Transformers' own test mixins are imported from, as if this repository's classes were part of the library."""

import sys
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

from transformers_tests import test_modeling_common as modeling_common  # noqa: E402
from transformers_tests.test_configuration_common import ConfigTester  # noqa: E402
from transformers_tests.generation.test_utils import GenerationTesterMixin  # noqa: E402
from transformers_tests.test_feature_extraction_common import FeatureExtractionSavingTestMixin  # noqa: E402
from transformers_tests.test_modeling_common import ModelTesterMixin  # noqa: E402
from transformers_tests.test_processing_common import ProcessorTesterMixin  # noqa: E402
from transformers_tests import test_tensor_parallel_mixin as tensor_parallel  # noqa: E402
from transformers_tests.test_tensor_parallel_mixin import TensorParallelTesterMixin  # noqa: E402
from transformers_tests.test_training_mixin import TrainingTesterMixin  # noqa: E402

# Its tables by class name say which classes have which head.
tensor_parallel.TP_DISTRIBUTED_TEST_MODEL_TYPES = None  # all
modeling_common.MODEL_MAPPING_NAMES = modeling_common.MODEL_MAPPING_NAMES | {"ttt": "TttModel"}
modeling_common.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES = modeling_common.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES | {"ttt": "TttForConditionalGeneration"}
