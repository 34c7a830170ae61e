"""GLM-4-Voice's audio tokenizer (16 kHz speech in, 16,384 codes at 12.5 a second, 22,050 Hz speech out)."""

from .configuration_glm4_voice import (
    Glm4VoiceConfig,
    Glm4VoiceEncoderConfig,
    Glm4VoiceFlowConfig,
    Glm4VoiceVocoderConfig,
)
from .modeling_glm4_voice import (
    Glm4VoiceDecoderOutput,
    Glm4VoiceEncoderOutput,
    Glm4VoiceModel,
    Glm4VoiceStreamingDecoder,
)

__all__ = [
    "Glm4VoiceConfig",
    "Glm4VoiceDecoderOutput",
    "Glm4VoiceEncoderConfig",
    "Glm4VoiceEncoderOutput",
    "Glm4VoiceFlowConfig",
    "Glm4VoiceModel",
    "Glm4VoiceStreamingDecoder",
    "Glm4VoiceVocoderConfig",
]
