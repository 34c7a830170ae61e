"""The numbers made with GLM-4-Voice's published code: small models in the published formats, the waveforms they were
made from, and our model converted from them."""

import functools
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from conftest import FIXTURES
from safetensors.torch import load_file

from modeling_ttt.glm4_voice import Glm4VoiceModel
from modeling_ttt.glm4_voice.convert_glm4_voice_to_hf import convert

GOLDENS = FIXTURES / "glm4_voice"


def write_published_folders(folder: Path) -> tuple[Path, Path]:
    """A tokenizer and a decoder folder with the files a published repository has."""
    tokenizer, decoder = folder / "tokenizer", folder / "decoder"
    tokenizer.mkdir(parents=True)
    decoder.mkdir()
    for name in ("config.json", "preprocessor_config.json", "model.safetensors"):
        shutil.copy(GOLDENS / "tokenizer" / name, tokenizer)
    shutil.copy(GOLDENS / "flow" / "config.yaml", decoder)
    for name in ("flow", "hift"):
        torch.save(load_file(GOLDENS / name / f"{name}.safetensors"), decoder / f"{name}.pt")
    return tokenizer, decoder


@functools.cache
def golden_model() -> Glm4VoiceModel:
    """The converted model, loaded from its folder; shared, so leave it as it is."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer, decoder = write_published_folders(Path(folder) / "published")
        convert(tokenizer, decoder, Path(folder) / "converted")
        return Glm4VoiceModel.from_pretrained(Path(folder) / "converted").eval()


@functools.cache
def golden_tensors(part: str, name: str = "tensors") -> dict[str, torch.Tensor]:
    """The tensors of a part ("tokenizer", "flow", "hift")."""
    return load_file(GOLDENS / part / f"{name}.safetensors")


def golden_case(part: str, case: str, name: str = "tensors") -> dict[str, torch.Tensor]:
    """The tensors whose names begin with `case.`, without that."""
    tensors = golden_tensors(part, name)
    return {key.removeprefix(f"{case}."): tensor for key, tensor in tensors.items() if key.startswith(f"{case}.")}


@functools.cache
def golden_description(part: str) -> dict[str, Any]:
    return json.loads((GOLDENS / part / "golden.json").read_text())


@functools.cache
def golden_waveform(name: str) -> torch.Tensor:
    """The waveform "waveform" or "long", (samples,) at 16 kHz, by the formula of the tokenizer's golden.json."""
    description = golden_description("tokenizer")[name]
    parameters = description["formula_parameters"]
    time = np.arange(description["samples"]) / 16_000
    samples = np.zeros(len(time))
    for amplitude, frequency, chirp, modulation, phase in parameters["sweeps"]:
        sweep = np.sin(2 * np.pi * (frequency * time + 0.5 * chirp * time**2))
        samples += amplitude * sweep * (0.5 + 0.5 * np.sin(2 * np.pi * modulation * time + phase))
    state, noise = parameters["lcg_seed"], np.empty(len(time))
    for index in range(len(time)):
        state = (1_664_525 * state + 1_013_904_223) % 2**32
        noise[index] = state / 2**31 - 1
    samples += parameters["noise_amp"] * noise * (0.5 + 0.5 * np.sin(2 * np.pi * parameters["noise_am"] * time))
    pcm = np.round(np.clip(samples, -1, 1) * 32_767).astype(np.int16)
    return torch.from_numpy(pcm.astype(np.float32) / 32_768)


def golden_batch() -> list[torch.Tensor]:
    """The three parts of the long waveform that were encoded together."""
    description, waveform = golden_description("tokenizer")["batch"], golden_waveform("long")
    return [
        waveform[start : start + length]
        for start, length in zip(description["starts"], description["lengths"], strict=True)
    ]


def pad_waveforms(waveforms: list[torch.Tensor], value: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Waveforms (samples,) as one batch with its padding mask, (batch, samples) each."""
    padded = torch.nn.utils.rnn.pad_sequence(waveforms, batch_first=True, padding_value=value)
    lengths = torch.tensor([len(waveform) for waveform in waveforms])
    return padded, (torch.arange(padded.shape[1]) < lengths[:, None]).long()
