"""What codes keep of what is said: phonemes of the words, a head that predicts them, and how many it gets wrong."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from rapidfuzz.distance import Levenshtein
from torch import nn
from torch.nn import functional as F

from modeling_ttt.ttt_codec import TttCodecModel
from training_examples.ttt_tiny.waveforms import pad

# What of an audio tokenizer's configuration decides its codes.
ENCODER_OPTIONS = (
    *("sampling_rate", "hop_length", "mel_hop_length", "n_fft", "num_mel_bins", "fsq_levels"),
    *("hidden_size", "num_encoder_blocks", "encoder_kernel_size"),
)
ROUNDING = 0.02  # of a weight's norm: more than half precision changes, and less than training


class PhonemeHead(nn.Module):
    """Predicts phonemes at every 20 ms, four positions per code of 80 ms; used in training only.

    One classifier sees the quantised codes (they must carry what is said), a second the encoder's features before
    pooling (it learns much sooner, and pulls the encoder out of CTC's blank plateau).
    """

    def __init__(self, dims: int, positions: int, feature_size: int, num_phonemes: int, hidden_size: int = 256):
        super().__init__()
        self.positions = positions
        self.proj_in = nn.Linear(dims, hidden_size)
        self.convs = nn.ModuleList(nn.Conv1d(hidden_size, hidden_size, 3, padding=1) for _ in range(2))
        self.upsample = nn.Linear(hidden_size, positions * hidden_size)
        self.proj_out = nn.Linear(hidden_size, num_phonemes + 1)
        self.proj_features = nn.Linear(feature_size, num_phonemes + 1)

    def forward(self, features: torch.Tensor, grid: torch.Tensor) -> list[torch.Tensor]:
        """
        Return log-probabilities from the codes and from the features, each of shape
        `(codes * positions, batch, phonemes + 1)`; the blank is 0.

        Args:
            features (`torch.Tensor` of shape `(batch, codes * positions, feature_size)`): of the encoder, before
                pooling.
            grid (`torch.Tensor` of shape `(batch, codes, dims)`): quantised codes.
        """
        hidden = self.proj_in(grid).transpose(1, 2)
        for conv in self.convs:
            hidden = hidden + F.gelu(conv(hidden))
        hidden = self.upsample(hidden.transpose(1, 2)).reshape(len(grid), grid.shape[1] * self.positions, -1)
        logits = (self.proj_out(F.gelu(hidden)), self.proj_features(features))
        return [x.float().log_softmax(-1).transpose(0, 1) for x in logits]


def pronunciations() -> tuple[dict[str, list[int]], int]:
    """Return the phoneme ids (from 1) of every word of pocketsphinx's dictionary, and how many phonemes there are."""
    import pocketsphinx

    words: dict[str, list[str]] = {}
    for line in Path(pocketsphinx.get_model_path("en-us/cmudict-en-us.dict")).read_text().splitlines():
        word, *phones = line.split()
        words.setdefault(word, phones)
    ids = {phone: index + 1 for index, phone in enumerate(sorted({p for phones in words.values() for p in phones}))}
    return {word: [ids[phone] for phone in phones] for word, phones in words.items()}, len(ids)


def build_head(model: TttCodecModel, num_phonemes: int) -> PhonemeHead:
    """Return an untrained head for the codes of `model`."""
    config = model.config
    return PhonemeHead(len(config.fsq_levels), config.frames_per_code // 2, config.hidden_size, num_phonemes)


def read_head(folder: Path) -> dict[str, torch.Tensor] | None:
    """Return the weights of the trained head that train_codec.py keeps in `folder`; None if there is none."""
    path = folder / "training_state.pt"
    state = torch.load(path, weights_only=True) if path.exists() else {}
    head = state.get("head")
    if head is None:
        return None
    # It used to be kept untrained in the other stages: their optimiser, in which a head comes last, knows none.
    moments = state.get("optimizer", {}).get("state", {})
    trained = [moments[index]["exp_avg"].shape for index in sorted(moments)]
    return head if not trained or trained[-len(head) :] == [value.shape for value in head.values()] else None


def load_head(folder: Path, model: TttCodecModel, num_phonemes: int) -> PhonemeHead:
    """
    Return the head that train_codec.py keeps beside the audio tokenizer of its stages `tokenizer` and `head`, to be
    used with the codes of `model`.

    Raises:
        FileNotFoundError: If `folder` is of another stage, or was published without it.
        ValueError: If the audio tokenizer in `folder` makes other codes than `model`.
    """
    weights = read_head(folder)
    if weights is None:
        raise FileNotFoundError(
            f"{folder} has no trained phoneme head: name the folder of train_codec.py's stage `tokenizer` or `head`"
        )
    check_encoder(folder, model)
    head = build_head(model, num_phonemes)
    head.load_state_dict(weights)
    return head


def describe_other_encoder(other: TttCodecModel, model: TttCodecModel) -> str | None:
    """Return in which way `other` makes other codes than `model`; None if their encoders differ by rounding at most."""
    for option in ENCODER_OPTIONS:
        theirs, ours = (getattr(config, option, None) for config in (other.config, model.config))
        if theirs != ours:
            return f"its `{option}` is {theirs}, not {ours}"
    weights = model.encoder.state_dict()
    for key, value in other.encoder.state_dict().items():
        if (value.float() - weights[key].float().cpu()).norm() > ROUNDING * value.float().norm():
            return "their encoders' weights differ"
    return None


def check_encoder(folder: Path, model: TttCodecModel) -> None:
    """
    Compare the encoder in `folder` with that of `model`, whose weights may have been rounded.

    Raises:
        ValueError: If they make other codes, naming both.
    """
    difference = describe_other_encoder(TttCodecModel.from_pretrained(folder), model)
    if difference is not None:
        name = f"the one in {model.name_or_path}" if model.name_or_path else "the one it is to serve"
        raise ValueError(
            f"the phoneme head in {folder} is of another audio tokenizer than {name}: {difference}; train one of its "
            "own with `train_codec.py --stage head --model` and its folder"
        )


def most_likely(log_probs: torch.Tensor) -> list[int]:
    """Return the phonemes of the likeliest path through `(positions, phonemes + 1)`: repetitions and blanks dropped."""
    path = torch.unique_consecutive(log_probs.argmax(-1))
    return path[path != 0].tolist()


@torch.no_grad()
def phoneme_error_rates(
    model: TttCodecModel,
    head: PhonemeHead,
    sentences: Sequence[tuple[str, np.ndarray]],
    words: Mapping[str, Sequence[int]],
) -> tuple[float, float]:
    """
    Return the share of phonemes that `head` gets wrong from the codes of `sentences`, and from the features before.

    Args:
        model (`TttCodecModel`): the audio tokenizer.
        head (`PhonemeHead`): trained with it.
        sentences (sequence of `(str, np.ndarray)`): texts and their int16 waveforms, each of shape `(samples,)`.
        words (`Mapping[str, Sequence[int]]`): `pronunciations`.
    """
    wrong, count = [0, 0], 0
    for text, wave in sentences:
        said = [phoneme for word in text.split() for phoneme in words[word]]
        samples = pad([wave], model.config.hop_length)[0].to(model.device)
        mask = torch.ones(1, samples.shape[1] // model.config.hop_length, dtype=torch.long, device=model.device)
        features = model.encoder.extract_features(model.log_mel(samples), mask)
        grid = model.quantizer(model.encoder.project(features))
        for place, log_probs in enumerate(head(features, grid)):
            wrong[place] += Levenshtein.distance(most_likely(log_probs[:, 0]), said)
        count += len(said)
    return wrong[0] / count, wrong[1] / count
