"""Waveforms of ttt-tiny to codes, in batches."""

from pathlib import Path

import numpy as np
import torch

from modeling_ttt.ttt_codec import TttCodecModel
from training_examples.ttt_tiny.waveforms import pad


@torch.no_grad()
def encode(codec: TttCodecModel, waves: list[np.ndarray]) -> list[list[int]]:
    """Return codes of int16 waveforms, in batches of similar length."""
    order = sorted(range(len(waves)), key=lambda index: len(waves[index]))
    codes: list[list[int]] = [[]] * len(waves)
    for start in range(0, len(order), 32):
        rows = order[start : start + 32]
        batch, lengths = pad([waves[row] for row in rows], codec.config.hop_length)
        mask = torch.arange(batch.shape[1]) < lengths[:, None]
        output = codec.encode(batch, mask)
        for row, row_codes, row_mask in zip(rows, output.audio_codes[:, 0], output.audio_codes_mask, strict=True):
            codes[row] = row_codes[row_mask.bool()].tolist()
    return codes


def load_codec(folder: Path) -> TttCodecModel:
    """Return the audio tokenizer."""
    return TttCodecModel.from_pretrained(folder).eval()
