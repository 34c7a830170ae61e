"""TttCodec: the small trained speech tokenizer of ttt-tiny (one codebook, 12.5 codes a second)."""

from .configuration_ttt_codec import TttCodecConfig
from .modeling_ttt_codec import (
    TttCodecDecoderOutput,
    TttCodecEncoderOutput,
    TttCodecModel,
)

__all__ = [
    "TttCodecConfig",
    "TttCodecDecoderOutput",
    "TttCodecEncoderOutput",
    "TttCodecModel",
]
