"""What rooms, microphones, lines and noises do to speech: levels, lengths, bands, decay; the same for the same seed."""

import numpy as np
import pytest

from training_examples.ttt_tiny import augmentation
from training_examples.ttt_tiny.augmentation import NO_SPEECH, Recording, record, rms

RATES = (16_000, 24_000)


def speech_like(rate, seconds=1.0):
    """Bursts of a buzz with pauses between them."""
    time = np.arange(int(seconds * rate)) / rate
    buzz = sum(np.sin(2 * np.pi * 150 * k * time) / k for k in range(1, 20))
    return (0.2 * buzz * (np.sin(2 * np.pi * 3 * time) > 0)).astype(np.float32)


def band_power(wave, rate, low, high):
    power = np.abs(np.fft.rfft(wave)) ** 2
    frequency = np.fft.rfftfreq(len(wave), 1 / rate)
    return power[(frequency >= low) & (frequency < high)].sum()


def random(seed=0):
    return np.random.default_rng(seed)


NEVER = Recording(silence=0, room=0, noise=0, microphone=0, band=0, clipping=0, coding=0)
ALWAYS = Recording(silence=1, room=1, noise=1, microphone=1, band=1, clipping=1, coding=1)


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("recording", [NEVER, ALWAYS, None])
def test_a_recording_is_finite_in_range_and_decided_by_the_seed(rate, recording):
    wave = speech_like(rate)
    for seed in range(4):
        heard = record(wave, rate, random(seed), recording, [wave])
        assert heard.dtype == np.float32 and heard.ndim == 1 and np.isfinite(heard).all()
        assert np.abs(heard).max() <= 1 and len(wave) <= len(heard) <= len(wave) + 1.4 * rate
        assert np.array_equal(heard, record(wave, rate, random(seed), recording, [wave]))
    assert not np.array_equal(record(wave, rate, random(0), ALWAYS), record(wave, rate, random(1), ALWAYS))


def test_nothing_but_the_level_changes_when_nothing_happens():
    wave = speech_like(16_000)
    heard = record(wave, 16_000, random(), NEVER)
    assert np.allclose(heard, wave * rms(heard) / rms(wave), atol=1e-6)
    levels = [20 * np.log10(rms(record(wave, 16_000, random(seed), NEVER))) for seed in range(40)]
    assert -38.1 < min(levels) < -33 and -17 < max(levels) < -11.9


@pytest.mark.parametrize(
    "option", ["silence", "room", "noise", "microphone", "band", "clipping", "coding"]
)  # each on its own is heard
def test_every_option_changes_the_waveform(option):
    wave = speech_like(24_000)
    plain = record(wave, 24_000, random(3), NEVER)
    other = record(wave, 24_000, random(3), Recording(**{**vars(NEVER), option: 1.0}))
    assert len(other) != len(plain) or not np.allclose(other / rms(other), plain / rms(plain), atol=1e-3)


@pytest.mark.parametrize("decibels", [5.0, 30.0])
def test_noise_lies_as_far_below_the_speech_as_asked(decibels):
    wave = speech_like(16_000)
    noisy = augmentation.add_noise(wave, augmentation.colored_noise(len(wave), 1.0, random()), decibels)
    spoken = wave[np.abs(wave) > 0.03 * np.abs(wave).max()]
    assert 20 * np.log10(rms(spoken) / rms(noisy - wave)) == pytest.approx(decibels, abs=0.01)


def test_noise_falls_with_frequency_as_its_exponent_says():
    for exponent in (0.0, 1.0, 2.0):
        noise = augmentation.colored_noise(160_000, exponent, random())
        octaves = [band_power(noise, 16_000, low, 2 * low) / low for low in (250, 500, 1_000, 2_000)]
        slopes = -10 * np.log10(np.array(octaves[1:]) / octaves[:-1])
        assert np.allclose(slopes, 3.01 * exponent, atol=0.6)
        assert rms(noise) == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("seconds", [0.2, 0.6])
def test_a_room_dies_away_within_its_reverberation_time(rate, seconds):
    response = augmentation.room_response(rate, random(), seconds).astype(np.float64)
    assert response[0] == 1.0 and len(response) == int(seconds * rate)
    decay = 10 * np.log10(np.cumsum(response[:0:-1] ** 2)[::-1])
    start, end = int(0.25 * len(decay)), int(0.75 * len(decay))
    fitted = (decay[start] - decay[end]) / (end - start) * rate  # dB a second
    assert fitted == pytest.approx(60 / seconds, rel=0.2)
    wave = speech_like(rate)
    wet = augmentation.reverberate(wave, response)
    assert len(wet) == len(wave) and rms(wet) == pytest.approx(rms(wave), rel=1e-3)
    assert np.allclose(augmentation.reverberate(wave, np.array([1.0])), wave, atol=1e-5)


def test_a_telephone_leaves_its_band():
    noise = augmentation.colored_noise(24_000, 0.0, random())
    line = augmentation.band_limit(noise, 24_000, 300, 3_400)
    assert band_power(line, 24_000, 500, 3_000) > 0.9 * band_power(noise, 24_000, 500, 3_000)
    assert band_power(line, 24_000, 6_000, 12_000) < 0.01 * band_power(noise, 24_000, 6_000, 12_000)
    assert band_power(line, 24_000, 0, 100) < 0.01 * band_power(noise, 24_000, 0, 100)
    with pytest.raises(ValueError, match="0 < low < high"):
        augmentation.band_limit(noise, 24_000, 500, 400)


def test_a_microphone_colors_within_its_limits():
    noise = augmentation.colored_noise(24_000, 0.0, random())
    colored = augmentation.color(noise, 24_000, random(1), decibels=6.0)
    gains = [
        10 * np.log10(band_power(colored, 24_000, low, low + 500) / band_power(noise, 24_000, low, low + 500))
        for low in range(0, 11_500, 500)
    ]
    assert max(np.abs(gains)) <= 6.0 and np.std(gains) > 0.5


def test_clipping_cuts_the_share_it_is_told_and_keeps_the_peak():
    wave = speech_like(16_000)
    cut = augmentation.clip(wave, 0.02)
    assert np.abs(cut).max() == pytest.approx(np.abs(wave).max(), rel=1e-4)
    assert np.mean(np.abs(cut) >= np.abs(cut).max() * 0.9999) == pytest.approx(0.02, abs=0.005)
    assert np.array_equal(augmentation.clip(wave, 0.0), wave)
    assert not augmentation.clip(np.zeros(10, np.float32), 0.5).any()
    with pytest.raises(ValueError, match="share"):
        augmentation.clip(wave, 1.0)


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("coding", ["mp3", "opus"])
def test_coding_loses_a_little_and_does_not_shift(rate, coding):
    wave = augmentation.band_limit(speech_like(rate), rate, 100, 3_000)
    ratios = []
    for compression in (0.0, 0.99):
        heard = augmentation.transcode(wave, rate, coding, compression)
        assert len(heard) == len(wave)
        correlation = np.fft.irfft(np.fft.rfft(heard, 2 * len(wave)) * np.conj(np.fft.rfft(wave, 2 * len(wave))))
        shift = (int(correlation.argmax()) + len(wave)) % (2 * len(wave)) - len(wave)
        assert abs(shift) <= 2
        ratios.append(rms(wave) / rms(heard - wave))
    assert ratios[0] > ratios[1] > 1


def test_a_coding_that_cannot_be_is_refused():
    wave = speech_like(16_000)
    with pytest.raises(ValueError, match="'aac'"):
        augmentation.transcode(wave, 16_000, "aac")
    with pytest.raises(ValueError, match="44100 Hz"):
        augmentation.transcode(wave, 44_100, "opus")
    with pytest.raises(ValueError, match="compression"):
        augmentation.transcode(wave, 16_000, "mp3", 1.0)


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("kind", NO_SPEECH)
def test_sounds_without_speech_are_of_any_level_and_decided_by_the_seed(kind, rate):
    speech = [speech_like(rate, seconds) for seconds in (0.3, 1.0)]
    waves = [augmentation.no_speech(kind, rate, rate, random(seed), speech) for seed in range(8)]
    assert all(wave.shape == (rate,) and np.abs(wave).max() <= 1 and wave.dtype == np.float32 for wave in waves)
    assert np.array_equal(waves[0], augmentation.no_speech(kind, rate, rate, random(0), speech))
    levels = [rms(wave) for wave in waves]
    assert max(levels) < 10 ** (-50 / 20) if kind == "silence" else min(levels) > 0


def test_an_unknown_sound_and_babble_of_nobody_are_refused():
    with pytest.raises(ValueError, match="'rain'"):
        augmentation.no_speech("rain", 100, 16_000, random())
    with pytest.raises(ValueError, match="empty"):
        augmentation.no_speech("babble", 100, 16_000, random())


def test_words_are_spliced_with_gaps_between_them_only():
    words = [np.full(100, value, np.float32) for value in (0.1, 0.2, 0.3)]
    spliced = augmentation.splice(words, 1_000, 0.06)
    assert len(spliced) == 300 + 2 * 60
    assert not spliced[100:160].any() and np.all(spliced[160:260] == np.float32(0.2)) and spliced[-1] == np.float32(0.3)
    assert np.array_equal(augmentation.splice(words[:1], 1_000, 0.06), words[0])
    with pytest.raises(ValueError, match="empty"):
        augmentation.splice([], 1_000, 0.06)


def test_silence_is_put_on_both_sides():
    padded = augmentation.pad_silence(np.ones(10, np.float32), 100, 0.2, 0.05)
    assert padded.tolist() == [0] * 20 + [1] * 10 + [0] * 5


def test_what_can_be_said_is_spliced_of_the_words_that_are_there():
    words = {"one": np.full(10, 0.1, np.float32), "two": np.full(20, 0.2, np.float32)}
    for seed in range(5):
        text, wave = augmentation.splice_at_random(words, ["one two", "two three", "two"], 100, random(seed))
        assert text in ("one two", "two") and np.unique(wave[wave > 0]).tolist() == sorted(
            words[word][0] for word in text.split()
        )
        assert len(wave) <= 30 + 25
    with pytest.raises(ValueError, match="none of 1"):
        augmentation.splice_at_random(words, ["three"], 100, random())
