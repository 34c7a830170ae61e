"""GLM-4-Voice's streaming decoder: the published blocks and their overlap, however the codes come in."""

import pytest
import torch
from glm4_voice_goldens import golden_case, golden_model, golden_tensors

from processing.waveform_stream_ttt import StreamingDecoder, WaveformStream

HOP = 256


class Recorder:
    """Keeps what goes into the flow and the vocoder of each block, and what comes out of them."""

    def __init__(self, model, monkeypatch):
        self.mels, self.flow_mels, self.prompts, self.sources, self.waveforms = [], [], [], [], []
        self.initial_noises, self.phases, self.noises, self.cached_sources = [], [], [], []
        decode_mel, vocode = model.decode_mel, model.vocoder.forward

        def decode(codes, prompt_codes, prompt_mel, **options):
            mel, num_frames = decode_mel(codes, prompt_codes=prompt_codes, prompt_mel=prompt_mel, **options)
            self.flow_mels.append(mel.clone())
            self.prompts.append((prompt_codes, prompt_mel))
            self.initial_noises.append(options["initial_noise"])
            return mel, num_frames

        def vocoder(mel, num_frames, phase, noise, cached_source):
            waveform, source = vocode(mel, num_frames, phase, noise, cached_source)
            for kept, value in (
                (self.mels, mel),
                (self.phases, phase),
                (self.noises, noise),
                (self.cached_sources, mel.new_zeros(1, 0) if cached_source is None else cached_source),
                (self.waveforms, waveform),
                (self.sources, source),
            ):
                kept.append(value)
            return waveform, source

        monkeypatch.setattr(model, "decode_mel", decode)
        monkeypatch.setattr(model.vocoder, "forward", vocoder)


def stream(decoder, codes, step):
    return torch.cat([*(decoder.push(part) for part in codes.split(step)), decoder.flush()])


def random_codes(count):
    return torch.randint(96, (count,), generator=torch.Generator().manual_seed(0))


def close(found, expected, atol):
    torch.testing.assert_close(found, expected, atol=atol, rtol=0)


def test_a_stream_is_the_published_one_block_by_block(monkeypatch):
    model, golden = golden_model(), golden_tensors("flow", "stream")
    seen = Recorder(model, monkeypatch)
    decoder = model.streaming_decoder()
    pieces = [decoder.push(golden["token"]), decoder.flush()]
    close(decoder.window, golden["mel_window"], 1e-12)
    first, second, last = golden["returned_speech_lengths"].tolist()
    assert [len(piece) for piece in pieces] == [first + second, last]
    close(torch.cat(pieces)[None], golden["speech"], 5e-3)
    for index in range(3):
        call = golden_case("flow", f"call{index}", "stream")
        codes, mel = seen.prompts[index]
        mel_length = call["returned_mel"].shape[-1]
        assert torch.equal(codes, call["prompt_token"][0].long())
        close(mel, call["prompt_feat"].transpose(1, 2), 1e-4)
        close(seen.flow_mels[index], call["flow_mel"], 1e-4)
        close(seen.mels[index], call["returned_mel"], 1e-4)
        close(seen.initial_noises[index], call["initial_noise"], 1e-6)
        close(seen.phases[index], call["phase_drawn"], 1e-6)
        close(seen.noises[index], call["sine_noise"], 1e-6)
        close(model.vocoder.predict_pitch(call["returned_mel"], torch.tensor([mel_length])), call["f0"], 3e-3)
        close(seen.cached_sources[index], call["cache_source"].reshape(1, -1), 5e-3)
        close(seen.sources[index], call["source"][:, 0], 5e-3)
        trimmed = call["trimmed_tail"].reshape(1, -1)
        assert trimmed.shape[1] == (0 if index == 2 else HOP)
        close(seen.waveforms[index][:, seen.waveforms[index].shape[1] - trimmed.shape[1] :], trimmed, 5e-3)


@pytest.mark.parametrize("step", [1, 7, 10, 25, 26])
def test_a_stream_does_not_depend_on_how_codes_come_in(step):
    golden = golden_tensors("flow", "stream")
    decoder = golden_model().streaming_decoder()
    for _ in range(2):  # the second stream starts afresh
        close(stream(decoder, golden["token"][0], step)[None], golden["speech"], 5e-3)


@pytest.mark.parametrize("count", [1, 5, 6, 10, 11, 20, 21, 57])
def test_each_block_after_the_second_loses_a_frame(count):
    speech = stream(golden_model().streaming_decoder(num_steps=1), random_codes(count), 26)
    num_blocks = -(-count // 10)
    assert len(speech) == HOP * (441 * count // 64 - max(0, num_blocks - 2))


def test_from_the_third_block_on_the_prompt_is_a_frame_too_long(monkeypatch):
    model = golden_model()
    seen = Recorder(model, monkeypatch)
    stream(model.streaming_decoder(num_steps=1), random_codes(57), 26)
    drifts = [mel.shape[-1] - (441 * len(codes) // 64 - 34) for codes, mel in seen.prompts[1:]]
    assert drifts == [0, 1, 1, 1, 1]


@pytest.mark.parametrize("count", [1, 12, 57])
def test_without_drift_a_stream_is_as_long_as_the_whole(count, monkeypatch):
    model, codes = golden_model(), random_codes(count)
    whole = model.decode(codes[None], num_steps=1).audio_lengths[0]
    seen = Recorder(model, monkeypatch)
    speech = stream(model.streaming_decoder(keep_drift=False, num_steps=1), codes, 9)
    assert len(speech) == whole
    for spoken, mel in seen.prompts[1:]:
        assert mel.shape[-1] == 441 * len(spoken) // 64 - 34  # what has been spoken, less what is held back


def test_a_block_waits_for_the_code_after_it():
    decoder = golden_model().streaming_decoder(num_steps=1)
    assert len(decoder.push(random_codes(10))) == 0
    assert len(decoder.push(torch.tensor([3]))) == HOP * (68 - 34 - 1)


def test_blocks_may_grow(monkeypatch):
    model = golden_model()
    seen = Recorder(model, monkeypatch)
    stream(model.streaming_decoder(block_sizes=[6, 12, 20], num_steps=1), random_codes(70), 4)
    ends = [len(spoken) for spoken, _ in seen.prompts]
    assert ends == [0, 6, 18, 38, 58]


def test_a_single_block_is_decoded_as_a_whole():
    model, codes = golden_model(), random_codes(30)
    streamed = stream(model.streaming_decoder(block_sizes=[30]), codes, 30)
    close(streamed, model.decode(codes[None]).audio_values[0, 0], 1e-6)


def test_a_prompt_stands_before_the_first_block():
    model, codes = golden_model(), random_codes(14)
    options = {"prompt_codes": torch.arange(7), "prompt_mel": torch.randn(1, 80, 48), "num_steps": 3}
    options["speaker_embedding"] = torch.ones(1, 192)
    whole = model.decode(codes[None], **options).audio_values[0, 0]
    decoder = model.streaming_decoder(block_sizes=[14], **options)
    for _ in range(2):  # and before the next stream's first block
        close(stream(decoder, codes, 5), whole, 1e-6)


def test_flushing_nothing_gives_nothing():
    assert len(golden_model().streaming_decoder().flush()) == 0


def test_a_first_block_that_would_be_held_back_is_refused():
    with pytest.raises(ValueError, match=r"`block_sizes` is \[5, 20\]: the first block gives 34 log-mel frames"):
        golden_model().streaming_decoder(block_sizes=[5, 20])
    with pytest.raises(ValueError, match="the first block gives 8 log-mel frames"):
        golden_model().streaming_decoder(prompt_mel=torch.zeros(1, 80, 60))


def test_it_is_the_streaming_decoder_that_a_processor_looks_for(monkeypatch):
    model = golden_model()
    stream_of_model = WaveformStream(model)
    assert isinstance(stream_of_model.decoder, StreamingDecoder)
    assert type(stream_of_model.decoder) is type(model.streaming_decoder())
    monkeypatch.setattr(model, "streaming_decoder", lambda: object())
    with pytest.raises(TypeError, match="returned a object, which lacks `push`"):
        WaveformStream(model)
