"""What TtT is compared with under Transformers' tests of models: the autoregressive twin, and diffusion alone."""

import unittest

from .archive import FSDPTesterMixin
from .model_tests import TttModelTester, TttModelTestMixin, TttTensorParallelTestMixin


class TwinTest(TttModelTestMixin, TttTensorParallelTestMixin, FSDPTesterMixin, unittest.TestCase):
    """Its loss has no noise, so it is the one that is trained in several processes and in one, and compared."""

    model_tester = TttModelTester(audio_objective="autoregressive")
    training_grad_norm_reduction_threshold = 0.9

    def _get_tiny_config(self):
        config = self.model_tester.get_config()
        return type(config), config.to_diff_dict()


class DiffusionOnlyTest(TttModelTestMixin, unittest.TestCase):
    model_tester = TttModelTester(text_objective="diffusion")
