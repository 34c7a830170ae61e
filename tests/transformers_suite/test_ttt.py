"""The diffusion model under Transformers' tests of models: with its head and without."""

import unittest

from .model_tests import TttModelTester, TttModelTestMixin


class TttTest(TttModelTestMixin, unittest.TestCase):
    pass


class TttQwen3Test(TttModelTestMixin, unittest.TestCase):
    model_tester = TttModelTester("qwen3")


class TttLlamaTest(TttModelTestMixin, unittest.TestCase):
    model_tester = TttModelTester("llama")
