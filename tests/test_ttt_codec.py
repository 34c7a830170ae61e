"""The audio tokenizer: exact lengths, rows that do not know each other, streamed and whole decoding alike."""

import numpy as np
import pytest
import torch
from codec_checks import (
    assert_compiles_whole,
    assert_exports,
    assert_half_precision_works,
    assert_works_from_elsewhere,
    waveforms,
)
from transformers import AutoModelForAudioTokenization

from modeling_ttt.ttt_codec import TttCodecConfig, TttCodecModel
from modeling_ttt.ttt_codec.modeling_ttt_codec import (
    TttCodecFiniteScalarQuantizer,
    TttCodecStreamingDecoder,
    overlap_add,
)
from processing.waveform_stream_ttt import BoundedContextDecoder, WaveformStream, push_together

HOP = 1280


@pytest.fixture(scope="module")
def codec() -> TttCodecModel:
    torch.manual_seed(0)
    return TttCodecModel(TttCodecConfig(hidden_size=32, vocoder_hidden_size=32)).eval()


def noise(*shape: int) -> torch.Tensor:
    return 0.1 * torch.randn(*shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("samples", [1, HOP - 1, HOP, HOP + 1, 10 * HOP, 10 * HOP + 7])
@torch.no_grad()
def test_n_samples_give_exactly_the_ceiling_of_n_over_1280_codes(codec, samples):
    codes = codec.encode(noise(1, samples)).audio_codes
    assert codes.shape == (1, 1, -(-samples // HOP))
    assert codec.decode(codes).audio_values.shape == (1, 1, codes.shape[-1] * HOP)


@torch.no_grad()
def test_codes_of_a_row_do_not_depend_on_neighbours_or_padding(codec):
    waves = noise(3, 20 * HOP)
    lengths = [20 * HOP, 7 * HOP + 5, 1]
    mask = torch.stack([torch.arange(20 * HOP) < length for length in lengths])
    garbage = torch.where(mask, waves, torch.full_like(waves, 0.9))  # padding must not be heard, whatever it holds
    together = codec.encode(garbage, mask)
    for row, length in enumerate(lengths):
        alone = codec.encode(waves[row : row + 1, :length]).audio_codes[0, 0]
        valid = together.audio_codes_mask[row].bool()
        assert torch.equal(together.audio_codes[row, 0, valid], alone)
        assert not together.audio_codes[row, 0, ~valid].any()


@pytest.mark.parametrize("vocoder", ["neural", "griffin_lim"])
@torch.no_grad()
def test_speech_of_a_row_does_not_depend_on_neighbours_or_padding(codec, vocoder):
    codes = torch.randint(400, (2, 1, 24), generator=torch.Generator().manual_seed(2))
    mask = torch.ones(2, 24, dtype=torch.long)
    mask[1, 9:] = 0
    together = codec.decode(codes, mask, vocoder=vocoder).audio_values
    alone = codec.decode(codes[1:, :, :9], vocoder=vocoder).audio_values
    assert torch.allclose(together[1:, :, : 9 * HOP], alone, atol=1e-5)
    assert not together[1, :, 9 * HOP :].any()


@pytest.mark.parametrize("step", [1, 3, 26, 100])
@pytest.mark.parametrize("decoder_class", [TttCodecStreamingDecoder, BoundedContextDecoder])
@torch.no_grad()
def test_streamed_decoding_equals_whole_decoding(codec, step, decoder_class):
    codes = torch.randint(400, (60,), generator=torch.Generator().manual_seed(3))
    whole = codec.decode(codes[None]).audio_values[0, 0]
    decoder = decoder_class(codec)
    for _ in range(2):  # the second stream starts afresh
        chunks = [decoder.push(part) for part in codes[None, None].split(step, dim=-1)] + [decoder.flush()]
        assert torch.allclose(torch.cat(chunks), whole, atol=1e-5)


@torch.no_grad()
def test_streaming_waits_no_longer_than_its_stated_lookahead(codec):
    codes = torch.randint(400, (40,), generator=torch.Generator().manual_seed(4))
    context = codec.config.decoder_context_codes
    assert len(BoundedContextDecoder(codec).push(codes[None, None])) == (40 - context) * HOP
    assert len(codec.streaming_decoder().push(codes)) >= (40 - context) * HOP
    changed = codes.clone()
    changed[-1] = (changed[-1] + 1) % 400
    first, second = (codec.decode(x[None]).audio_values[0, 0] for x in (codes, changed))
    different = (first - second).abs() > 1e-6
    assert different.any() and int(different.nonzero()[0]) >= (39 - context) * HOP


@pytest.mark.parametrize("count", [1, 2, 6, 7, 8, 15])
@torch.no_grad()
def test_short_streams_last_as_long_as_their_codes(codec, count):
    codes = torch.randint(400, (count,), generator=torch.Generator().manual_seed(5))
    decoder = codec.streaming_decoder()
    spoken = torch.cat([*map(decoder.push, codes.split(1)), decoder.flush()])
    assert torch.allclose(spoken, codec.decode(codes[None]).audio_values[0, 0], atol=1e-5)
    assert len(decoder.flush()) == 0


@pytest.mark.parametrize(
    "config",
    [{"code_kernel_size": 1}, {"num_code_blocks": 0, "num_mel_blocks": 0}, {"mel_kernel_size": 9}, {"hop_length": 320}],
)
@torch.no_grad()
def test_codecs_of_other_sizes_are_streamed(config):
    torch.manual_seed(0)
    codec = TttCodecModel(TttCodecConfig(hidden_size=16, vocoder_hidden_size=16, **config)).eval()
    codes = torch.randint(400, (40,), generator=torch.Generator().manual_seed(6))
    stream = WaveformStream(codec)
    assert isinstance(stream.decoder, BoundedContextDecoder) == ("code_kernel_size" in config)
    spoken = np.concatenate([*(stream.push(part.tolist()) for part in codes.split(3)), stream.flush()])
    assert np.allclose(spoken, codec.decode(codes[None]).audio_values[0, 0], atol=1e-5)


@torch.no_grad()
def test_no_code_is_decoded_twice(codec, monkeypatch):
    steps = []
    block = codec.vocoder.blocks[-1]
    forward = block.forward
    monkeypatch.setattr(block, "forward", lambda hidden, mask: steps.append(hidden.shape[1]) or forward(hidden, mask))
    decoder = codec.streaming_decoder()
    for part in torch.arange(104).split(26):
        decoder.push(part)
    decoder.flush()
    edge = codec.config.vocoder_kernel_size - 1  # what every pass but the first reads again of a layer's inputs
    assert sum(steps) == 104 * codec.config.frames_per_code + len(steps) * edge


@torch.no_grad()
def test_streams_that_go_through_together_are_what_they_are_alone(codec):
    generator = torch.Generator().manual_seed(7)
    sequences = [torch.randint(400, (length,), generator=generator) for length in (50, 3, 0, 31)]
    streams, spoken = [WaveformStream(codec) for _ in sequences], [[] for _ in sequences]
    for start in range(0, 60, 9):
        parts = [sequence[start : start + 9].tolist() for sequence in sequences]
        is_last = [start < max(len(sequence), 1) <= start + 9 for sequence in sequences]
        for pieces, waveform in zip(spoken, push_together(streams, parts, is_last), strict=True):
            pieces.append(torch.from_numpy(waveform))
    for sequence, pieces in zip(sequences, spoken, strict=True):
        whole = codec.decode(sequence[None]).audio_values[0, 0]
        assert torch.allclose(torch.cat(pieces), whole, atol=1e-5)


@torch.no_grad()
def test_where_a_code_is_none_no_stream_has_taken_anything(codec):
    decoders, codes = [codec.streaming_decoder() for _ in range(2)], torch.arange(20)
    first = codec.streaming_decoder().push_together(decoders, [codes, codes], [False, False])
    with pytest.raises(ValueError, match=r"\[0, 400\), found 0 to 400"):
        TttCodecStreamingDecoder.push_together(decoders, [codes, codes + 381], [False, False])
    rest = [decoder.flush() for decoder in decoders]
    whole = codec.decode(codes[None]).audio_values[0, 0]
    assert all(torch.allclose(torch.cat(pair), whole, atol=1e-5) for pair in zip(first, rest, strict=True))


def test_a_vocoder_whose_phase_depends_on_everything_is_streamed_as_a_whole(codec):
    slow = TttCodecModel(TttCodecConfig(**{**codec.config.to_dict(), "vocoder": "griffin_lim"})).eval()
    stream = WaveformStream(slow)
    assert len(stream.push(range(30))) == 0 and len(stream.flush()) == 30 * HOP
    with pytest.raises(ValueError, match="griffin_lim"):
        TttCodecStreamingDecoder(slow)


def test_every_code_has_a_point_of_its_own_and_back():
    quantizer = TttCodecFiniteScalarQuantizer([5, 5, 4, 4])
    codes = torch.arange(400)
    grid = quantizer.to_grid(codes)
    assert len(grid.unique(dim=0)) == 400
    assert torch.equal(quantizer.to_codes(grid), codes)
    assert quantizer.to_codes(quantizer(20 * torch.randn(5000, 4))).unique().numel() <= 400


def test_quantiser_lets_gradients_through():
    points = torch.randn(3, 4, requires_grad=True)
    TttCodecFiniteScalarQuantizer([5, 5, 4, 4])(points).sum().backward()
    assert (points.grad > 0).all()


def test_overlap_add_restores_a_doubly_windowed_signal():
    signal = noise(1, 40 * 160)
    window = torch.hann_window(640)
    padded = torch.nn.functional.pad(signal, (240, 240))
    frames = padded.unfold(-1, 640, 160) * window * window
    restored = overlap_add(frames, 160) / 1.5
    assert torch.allclose(restored[:, 640:-640], signal[:, 640:-640], atol=1e-5)


@pytest.mark.parametrize("vocoder", ["neural", "griffin_lim"])
def test_m_codes_give_exactly_1280_m_samples_for_none_too(codec, vocoder):
    assert codec.decode(torch.zeros(2, 0).long(), vocoder=vocoder).audio_values.shape == (2, 1, 0)
    mask = torch.tensor([[1, 1, 1], [0, 0, 0]])
    output = codec.decode(torch.ones(2, 3).long(), mask, vocoder=vocoder)
    assert output.audio_values.shape == (2, 1, 3 * HOP) and output.audio_lengths.tolist() == [3 * HOP, 0]
    assert output.audio_values[0].any() and not output.audio_values[1].any()


@torch.no_grad()
def test_hearing_and_speaking_compile_whole_and_can_be_exported():
    config = TttCodecConfig(hidden_size=16, vocoder_hidden_size=16, num_mel_blocks=1, num_vocoder_blocks=1)
    codec, (waves, mask) = TttCodecModel(config).eval(), waveforms()
    codes, codes_mask = codec.encode(waves, mask).values()
    assert_compiles_whole(codec, "forward", waves, mask)
    assert_exports(codec, "encode", waves, mask)
    assert_exports(codec, "decode", codes, codes_mask)
    assert_exports(codec, "decode", codes, codes_mask, vocoder="griffin_lim")


@torch.no_grad()
def test_weights_may_be_elsewhere(codec, tmp_path):
    assert_works_from_elsewhere(codec, tmp_path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision_hears_and_speaks(codec, dtype, tmp_path):
    assert_half_precision_works(codec, tmp_path, dtype)


@torch.no_grad()
def test_griffin_lim_finds_a_waveform_of_the_log_mel_frames(codec):
    """Of sines that slide: the frames of what it finds come closer with every iteration."""
    time = torch.arange(20 * HOP) / 16_000
    wave = 0.3 * torch.sin(2 * torch.pi * (200 + 150 * time) * time)[None]
    mel, mask = codec.log_mel(wave), torch.ones(1, 160, dtype=torch.long)
    errors = []
    for iterations in (0, 4, 32):
        model = TttCodecModel(TttCodecConfig(griffin_lim_iterations=iterations))
        errors.append((model.log_mel(model._griffin_lim(mel, mask)) - mel).square().mean().item())
    assert errors[0] > errors[1] > errors[2] and errors[2] < 0.02


def test_loads_through_the_auto_class_with_equal_results(codec, tmp_path):
    codec.save_pretrained(tmp_path)
    loaded = AutoModelForAudioTokenization.from_pretrained(tmp_path)
    assert isinstance(loaded, TttCodecModel)
    codes = torch.arange(30)[None]
    with torch.no_grad():
        assert torch.equal(loaded.decode(codes).audio_values, codec.decode(codes).audio_values)
        assert torch.equal(loaded.encode(noise(1, 9000)).audio_codes, codec.encode(noise(1, 9000)).audio_codes)


def test_bad_input_is_refused_by_name(codec):
    with pytest.raises(ValueError, match="2 channels"):
        codec.encode(noise(1, 2, 3000))
    with pytest.raises(ValueError, match="samples > 0"):
        codec.encode(torch.zeros(1, 0))
    with pytest.raises(ValueError, match=r"\[0, 400\), found 0 to 400"):
        codec.decode(torch.tensor([[0, 400]]))
    for codes in (torch.zeros(1, 2, 3).long(), torch.zeros(3).long(), torch.zeros(1, 3)):
        with pytest.raises(ValueError, match=r"integers of shape \(batch, codes\) or \(batch, 1, codes\), not"):
            codec.decode(codes)
    with pytest.raises(ValueError, match=r"padding_mask has shape \(2, 2000\)"):
        codec.encode(noise(2, 3000), torch.ones(2, 2000))
    with pytest.raises(ValueError, match="vocoder must be one of"):
        codec.decode(torch.tensor([[0]]), vocoder="wavenet")
    with pytest.raises(ValueError, match=r"fsq_levels \(\[5, 1\]\) must be 2 or more"):
        TttCodecConfig(fsq_levels=[5, 1])
    with pytest.raises(ValueError, match="hop_length"):
        TttCodecConfig(hop_length=1000)
