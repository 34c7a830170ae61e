"""TtT models: configuration, model, objective and generation. Importing this package registers the auto classes."""

from .attention_ttt import compute_span_ids
from .configuration_ttt import TttConfig
from .generation_config_ttt import TttGenerationConfig
from .generation_ttt import TttGenerateOutput, TttGenerationMixin
from .glm4_voice import Glm4VoiceConfig, Glm4VoiceModel
from .modeling_ttt import TttCausalLMOutputWithPast, TttForConditionalGeneration, TttModel, TttPreTrainedModel
from .ttt_codec import TttCodecConfig, TttCodecModel

__all__ = [
    "Glm4VoiceConfig",
    "Glm4VoiceModel",
    "TttCausalLMOutputWithPast",
    "TttCodecConfig",
    "TttCodecModel",
    "TttConfig",
    "TttForConditionalGeneration",
    "TttGenerateOutput",
    "TttGenerationConfig",
    "TttGenerationMixin",
    "TttModel",
    "TttPreTrainedModel",
    "compute_span_ids",
]
