"""Where the words of a recording are: forced alignment by the phoneme head that trains with the audio tokenizer."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from modeling_ttt.ttt_codec import TttCodecModel
from training_examples.ttt_tiny.phonemes import PhonemeHead
from training_examples.ttt_tiny.waveforms import pad

BLANK = 0
POSITION_SECONDS = 0.02
LEAST_CONFIDENCE = 0.5  # mean probability of a word's phonemes, below which it is not cut out


def align(log_probs: np.ndarray, said: Sequence[int]) -> list[tuple[int, int]]:
    """
    Return the first and the last position, inclusive, of each phoneme on CTC's likeliest path that says `said`.

    Args:
        log_probs (`np.ndarray` of shape `(positions, phonemes + 1)`): log-probabilities; 0 is the blank.
        said (`Sequence[int]`): phonemes, from 1.

    Raises:
        ValueError: If there are too few positions for the phonemes, or no phonemes.
    """
    if not said:
        raise ValueError("`said` is empty: there is nothing to align")
    labels = np.full(2 * len(said) + 1, BLANK)
    labels[1::2] = said
    # From two states before a state can be reached, where that skips a blank between unlike phonemes.
    skips = np.zeros(len(labels), bool)
    skips[3::2] = labels[3::2] != labels[1:-2:2]
    score = np.full(len(labels), -np.inf)
    score[:2] = log_probs[0, labels[:2]]
    origins = np.zeros((len(log_probs), len(labels)), int)
    for position in range(1, len(log_probs)):
        one = np.concatenate([[-np.inf], score[:-1]])
        two = np.where(skips, np.concatenate([[-np.inf, -np.inf], score[:-2]]), -np.inf)
        choices = np.stack([score, one, two])
        origins[position] = choices.argmax(0)
        score = choices.max(0) + log_probs[position, labels]
    state = len(labels) - 1 if score[-1] >= score[-2] else len(labels) - 2
    if score[state] == -np.inf:
        raise ValueError(f"{len(said)} phonemes do not fit into {len(log_probs)} positions")
    found = [(len(log_probs), -1)] * len(said)
    for position in range(len(log_probs) - 1, -1, -1):
        if state % 2:
            first, last = found[state // 2]
            found[state // 2] = (min(first, position), max(last, position))
        state -= origins[position, state]
    return found


@torch.no_grad()
def cut_words(
    model: TttCodecModel,
    head: PhonemeHead,
    wave: np.ndarray,
    text: str,
    words: Mapping[str, Sequence[int]],
) -> list[tuple[str, np.ndarray]]:
    """
    Return the words of a recording with the part of it that says each, cut half way between the last phoneme of one
    word and the first of the next. Words that the head is not sure of are left out, and all where `text` does not fit.

    Args:
        model (`TttCodecModel`): the audio tokenizer.
        head (`PhonemeHead`): trained with it.
        wave (`np.ndarray` of shape `(samples,)`): int16, at the rate of the audio tokenizer.
        text (`str`): what is said, of words in `words`.
        words (`Mapping[str, Sequence[int]]`): `pronunciations`.
    """
    said = [list(words[word]) for word in text.split()]
    samples, _ = pad([wave], model.config.hop_length)
    mask = torch.ones(1, samples.shape[1] // model.config.hop_length, dtype=torch.long)
    features = model.encoder.extract_features(model.log_mel(samples), mask)
    log_probs = head(features, model.quantizer(model.encoder.project(features)))[1][:, 0].numpy()
    phonemes = [phoneme for word in said for phoneme in word]
    try:
        places = align(log_probs, phonemes)
    except ValueError:
        return []
    confidence = [
        np.exp(log_probs[first : last + 1, p].max()) for (first, last), p in zip(places, phonemes, strict=True)
    ]
    ends = np.cumsum([len(word) for word in said])
    starts = ends - [len(word) for word in said]
    bounds = [0.0, *((places[end - 1][1] + 1 + places[end][0]) / 2 for end in ends[:-1]), len(log_probs)]
    cuts = np.round(np.array(bounds) * POSITION_SECONDS * model.config.sampling_rate).astype(int)
    return [
        (word, wave[cuts[place] : cuts[place + 1]])
        for place, word in enumerate(text.split())
        if np.mean(confidence[starts[place] : ends[place]]) >= LEAST_CONFIDENCE and cuts[place] < len(wave)
    ]


__all__ = ["align", "cut_words"]
