"""Text, waveforms and audio codes to model inputs and back, and batches for training."""

from .collator_ttt import TttDataCollator
from .interleaving_ttt import TttTokenIds, deinterleave, interleave

__all__ = ["TttDataCollator", "TttTokenIds", "deinterleave", "interleave"]
