"""Text, waveforms and audio codes to model inputs and back, and batches for training."""

from transformers import AutoProcessor

from modeling_ttt import TttConfig

from .audio_tokenizer_ttt import load_audio_codec, load_feature_extractor
from .codebooks_ttt import TttAudioFormat, flatten_codes, unflatten_codes
from .collator_ttt import TttDataCollator, pack_examples
from .interleaving_ttt import deinterleave, interleave
from .processing_ttt import TttProcessor
from .streaming_ttt import TttStreamer
from .tasks_ttt import TASKS, TttTask
from .vocabulary_ttt import TttTokenIds

AutoProcessor.register(TttConfig, TttProcessor, exist_ok=True)

__all__ = [
    "TASKS",
    "TttAudioFormat",
    "TttDataCollator",
    "TttProcessor",
    "TttStreamer",
    "TttTask",
    "TttTokenIds",
    "deinterleave",
    "flatten_codes",
    "interleave",
    "load_audio_codec",
    "load_feature_extractor",
    "pack_examples",
    "unflatten_codes",
]
