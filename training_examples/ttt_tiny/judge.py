"""The judge of ttt-tiny's speech: the recogniser over its domain and its assistant's voice."""

from collections.abc import Sequence

from training_examples.evaluation.recognisers import Recognizer
from training_examples.ttt_tiny import domain

# The first edition's assistant (flite's slt): its mean cepstrum at this warp, over 200 sentences. On 100 answers
# and 100 random sequences in that voice the word error rate is 1.4 % and 10.5 %; with neither, 2.6 % and 14.5 %.
VOICE_WARP = 1.1
VOICE_MEAN = (44.72, 4.1, 14.9, 17.51, 0.29, 0.36, 0.23, 0.44, 0.25, 5.24, 0.42, 7.4, 7.62)


def domain_recognizer(
    num_workers: int = 2, of_slt: bool = False, words: Sequence[str] = (), sentences: Sequence[str] = ()
) -> Recognizer:
    """
    Return the recogniser of ttt-tiny's domain, tuned to no voice or (`of_slt=True`) to the first edition's.

    Args:
        num_workers (`int`, *optional*, defaults to 2): its processes.
        of_slt (`bool`, *optional*, defaults to `False`): whether the voice is the first edition's.
        words, sentences (`Sequence[str]`, *optional*): words beside the domain's, and sentences that hold them.
    """
    return Recognizer(
        [*domain.vocabulary(), *words],
        [*domain.lm_sentences(seed=0, n=20_000), *sentences],
        num_workers=num_workers,
        frequency_warp=VOICE_WARP if of_slt else 1.0,
        cepstral_mean=VOICE_MEAN if of_slt else None,
    )
