"""Batches of waveforms that ttt-tiny's audio tokenizer learns on."""

from pathlib import Path

import numpy as np
import pytest
import torch
from builders import build_codec

from training_examples.ttt_tiny.phonemes import PhonemeHead
from training_examples.ttt_tiny.train_codec import CodecArguments, Critic, configure, load_for_stage
from training_examples.ttt_tiny.waveforms import augment, backgrounds, bands, colors, pad, room_spectra

RATE = 24_000


def speech(batch: int = 8, seconds: float = 1.0) -> torch.Tensor:
    torch.manual_seed(0)
    time = torch.arange(int(seconds * RATE)) / RATE
    tones = torch.sin(2 * torch.pi * torch.empty(batch, 1).uniform_(100, 1000) * time)
    return 0.1 * tones * (1 + torch.sin(2 * torch.pi * 3 * time))


def decibels(waves: torch.Tensor) -> torch.Tensor:
    return 20 * waves.square().mean(-1).sqrt().log10()


def test_waveforms_are_padded_to_whole_codes_after_the_silence_asked_for():
    waves = [np.full(10, 32767, np.int16), np.full(5, -32767, np.int16)]
    batch, lengths = pad(waves, 8, before=[0, 7])
    assert batch.shape == (2, 16) and lengths.tolist() == [10, 12]
    assert batch[0].tolist() == [1.0] * 10 + [0.0] * 6
    assert batch[1].tolist() == [0.0] * 7 + [-1.0] * 5 + [0.0] * 4
    assert pad(waves, 8)[1].tolist() == [10, 5]


def test_recordings_stay_in_range_at_a_level_of_their_own():
    waves = speech()
    recorded = augment(waves, RATE)
    assert recorded.shape == waves.shape and recorded.isfinite().all() and recorded.abs().max() <= 1
    assert (decibels(recorded) > -39).all() and (decibels(recorded) < -11).all()


def test_nothing_but_the_level_changes_in_clean_rows():
    waves = speech()
    recorded = augment(waves, RATE, clean_share=1.0)
    torch.testing.assert_close(recorded / recorded.norm(dim=-1, keepdim=True), waves / waves.norm(dim=-1, keepdim=True))


def test_silence_stays_finite():
    assert augment(torch.zeros(2, RATE), RATE).isfinite().all()


def test_rooms_hold_the_energy_they_are_told():
    response = torch.fft.irfft(room_spectra(16, RATE, RATE), RATE)
    assert torch.allclose(response[:, 0], torch.tensor(1.0), atol=1e-4)
    ratio = 10 * response[:, 1:].square().sum(-1).log10()
    assert (ratio > -15.1).all() and (ratio < -3.9).all()


def test_telephones_and_microphones_leave_their_band():
    frequency = torch.fft.rfftfreq(RATE, 1 / RATE)
    gains = bands(64, frequency)
    assert (gains[:, 1000] > 0.9).all(), "1 kHz passes"
    assert (gains[:, 11_000] < 0.3).all() and (gains[:, 10] < 0.01).all()
    color = colors(64, frequency, decibels=6.0)
    assert (20 * color.log10()).abs().max() <= 6.0 + 1e-3


def test_backgrounds_have_a_mean_square_of_one():
    spectra = torch.fft.rfft(speech(16))
    noise = backgrounds(spectra)
    torch.testing.assert_close(noise.abs().square().mean(-1), torch.ones(16))


@pytest.mark.parametrize(("rate", "codes"), [(12.5, 1920), (25.0, 960)])
def test_the_options_name_the_codec(rate, codes):
    config = configure(CodecArguments("tokenizer", codes_per_second=rate, fsq_levels=[8, 5, 5, 5]))
    assert config.hop_length == codes and config.codebook_size == 1000 and config.frame_rate == rate
    head = PhonemeHead(4, config.frames_per_code // 2, 8, 3)
    positions = 3 * config.frames_per_code // 2
    for log_probs in head(torch.zeros(2, positions, 8), torch.zeros(2, 3, 4)):
        assert log_probs.shape == (positions, 2, 4)


def test_a_rate_that_frames_do_not_divide_is_refused():
    for options, message in (
        ({"codes_per_second": 30}, "codes_per_second 30"),
        ({"codes_per_second": 0}, "codes_per_second 0"),
        ({"sampling_rate": 22_050}, "sampling_rate 22050: 10 ms must be whole samples"),
    ):
        with pytest.raises(ValueError, match=message):
            configure(CodecArguments("tokenizer", **options))


@pytest.mark.parametrize(
    ("stage", "options", "message"),
    [
        ("decoder", {"eval_dir": Path("gone")}, "--eval_dir takes part in the stage tokenizer and head alone"),
        ("decoder", {"phoneme_weight": 9.0}, "--phoneme_weight takes part in the stage tokenizer alone"),
        ("decoder", {"fsq_levels": [2, 2]}, "--fsq_levels takes part in the stage tokenizer and vocoder alone"),
        ("head", {"sampling_rate": 16_000}, "--sampling_rate .* leave it out of the stage head"),
        ("head", {"batch_size": 1}, "--batch_size is 1; it must be at least 2 in the stage head"),
        ("vocoder", {"batch_size": 0}, "--batch_size is 0; it must be at least 1"),
        ("vocoder", {"save_every": 0}, "--save_every is 0; it must be at least 1"),
        ("vocoder", {"model": Path("gone")}, "--model gone: there is no audio tokenizer"),
    ],
)
def test_options_without_effect_are_refused(stage, options, message):
    with pytest.raises(ValueError, match=message):
        CodecArguments(stage, **options)


def test_a_stage_goes_on_from_what_there_is_or_says_what_is_missing(tmp_path, capsys):
    for stage in ("tokenizer", "vocoder"):
        with pytest.raises(ValueError, match=f"goes on from {tmp_path / stage}, .*run the stage {stage} first"):
            load_for_stage(CodecArguments("decoder", output_dir=tmp_path), tmp_path / "decoder")
        build_codec().save_pretrained(tmp_path / stage)
    folder = tmp_path / "tokenizer"
    resumed = load_for_stage(CodecArguments("tokenizer", model=tmp_path / "vocoder", fsq_levels=[4, 4]), folder)
    assert resumed.config.fsq_levels == [4, 4] and "vocoder is not read again" in capsys.readouterr().out
    with pytest.raises(ValueError, match=rf"--fsq_levels is \[3, 3\], but .* from {folder}, where it is \[4, 4\]"):
        load_for_stage(CodecArguments("tokenizer", fsq_levels=[3, 3]), folder)
    with pytest.raises(ValueError, match="--sampling_rate is 24000, but .* where it is 16000"):
        load_for_stage(CodecArguments("vocoder", model=folder, sampling_rate=24_000), tmp_path / "new")


def test_the_critic_learns_to_tell_noise_from_speech_and_teaches_the_decoder_alone():
    torch.manual_seed(0)
    critic = Critic(rows=4, samples=4_000)
    critic.optimizer.param_groups[0]["lr"] = 3e-3
    real = speech(8, 0.25)
    losses = []
    for _ in range(12):
        decoded = (0.1 * torch.randn(8, real.shape[1])).requires_grad_()
        found = critic.losses(real, decoded)
        (found["adversarial"] + found["matching"]).backward()
        assert decoded.grad is not None and decoded.grad.abs().sum() > 0
        assert not found["critic"].requires_grad
        critic.forget_gradients()
        losses.append(float(found["critic"]))
    assert losses[0] == pytest.approx(2.0, abs=0.3) and losses[-1] < 0.7 * losses[0]
    assert all(parameter.grad is None for parameter in critic.model.parameters())
