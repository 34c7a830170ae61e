"""Both audio tokenizers under Transformers' tests of models, as its own codecs (DAC, Mimi) are."""

import unittest
from typing import Any

import torch
from transformers import PreTrainedConfig

from modeling_ttt.glm4_voice import Glm4VoiceConfig, Glm4VoiceModel
from modeling_ttt.ttt_codec import TttCodecConfig, TttCodecModel

from .archive import ConfigTester, ModelTesterMixin


class CodecTester:
    """Configuration and inputs: noise of a quarter of a second, which is more than three codes."""

    batch_size, num_samples = 2, 4_000
    is_training = False

    def __init__(self, config_class: type[PreTrainedConfig], **settings: Any):
        self.config_class, self.settings = config_class, settings

    def get_config(self) -> PreTrainedConfig:
        return self.config_class(**self.settings)

    def prepare_config_and_inputs_for_common(self) -> tuple[PreTrainedConfig, dict[str, torch.Tensor]]:
        return self.get_config(), {"input_values": 0.1 * torch.randn(self.batch_size, 1, self.num_samples)}


class CodecTestMixin(ModelTesterMixin):
    """A codec has no attentions, hidden states or token embeddings to return or change."""

    has_attentions = False
    test_resize_embeddings = False
    test_can_init_all_missing_weights_before_2023 = True

    def test_config(self) -> None:
        tester = ConfigTester(
            self,
            self.model_tester.config_class,
            has_text_modality=False,
            common_properties=["sampling_rate", "codebook_size", "num_codebooks", "frame_rate", "hop_length"],
            **self.config_arguments,
        )
        tester.run_common_tests()


class TttCodecTest(CodecTestMixin, unittest.TestCase):
    all_model_classes = (TttCodecModel,)
    config_arguments = {
        "fsq_levels": [4, 4],
        "hidden_size": 16,
        "num_encoder_blocks": 1,
        "num_code_blocks": 1,
        "num_mel_blocks": 1,
        "vocoder_hidden_size": 16,
        "num_vocoder_blocks": 1,
    }
    model_tester = CodecTester(TttCodecConfig, **config_arguments)


class Glm4VoiceTest(CodecTestMixin, unittest.TestCase):
    all_model_classes = (Glm4VoiceModel,)
    _is_composite = True
    config_arguments = {"noise_seed": 1, "stream_block_sizes": [25, 50]}
    model_tester = CodecTester(
        Glm4VoiceConfig,
        **config_arguments,
        encoder_config={
            "d_model": 32,
            "encoder_layers": 2,
            "encoder_attention_heads": 4,
            "encoder_ffn_dim": 64,
            "codebook_size": 16,
        },
        flow_config={
            "codebook_size": 16,
            "embedding_size": 16,
            "hidden_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "intermediate_size": 32,
            "unet_channels": [16, 24],
            "unet_num_layers": 1,
            "unet_num_mid_stages": 1,
            "unet_num_attention_heads": 2,
            "unet_head_dim": 8,
            "num_steps": 2,
        },
        vocoder_config={"hidden_size": 32, "pitch_hidden_size": 16},
    )
