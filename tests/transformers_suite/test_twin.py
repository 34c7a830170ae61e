"""The autoregressive twin under Transformers' tests of models."""

import unittest

from .model_tests import TttModelTester, TttModelTestMixin


class TwinTest(TttModelTestMixin, unittest.TestCase):
    model_tester = TttModelTester(audio_objective="autoregressive")


class BaselineTest(TttModelTestMixin, unittest.TestCase):
    model_tester = TttModelTester(text_objective="diffusion")
