"""The diffusion model under Transformers' tests of models, with each backbone that DESIGN.md names."""

import unittest

from .model_tests import TttModelTester, TttModelTestMixin, TttTensorParallelTestMixin


class TttTest(TttModelTestMixin, TttTensorParallelTestMixin, unittest.TestCase):
    pass


class TttQwen3Test(TttModelTestMixin, unittest.TestCase):
    model_tester = TttModelTester("qwen3")


class TttLlamaTest(TttModelTestMixin, unittest.TestCase):
    model_tester = TttModelTester("llama")


class TttBlockCausalTest(TttModelTestMixin, unittest.TestCase):
    model_tester = TttModelTester(span_attention="block_causal", block_lengths=[2])
