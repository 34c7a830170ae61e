"""Codecs of Transformers as the audio tokenizer: one or several codebooks, other frame and sampling rates."""

import copy
import importlib.util
import math

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from builders import build_codec, build_model, build_processor, build_tokenizer, tone
from transformers import (
    AutoProcessor,
    DacConfig,
    DacFeatureExtractor,
    DacModel,
    EncodecConfig,
    EncodecFeatureExtractor,
    EncodecModel,
    MimiConfig,
    MimiModel,
    NeuCodecConfig,
    NeuCodecFeatureExtractor,
    NeuCodecModel,
    PocketTTSAudioTokenizerConfig,
    Xcodec2Config,
    Xcodec2FeatureExtractor,
    Xcodec2Model,
)

from modeling_ttt.ttt_codec import TttCodecModel
from pipelines import TttAudioToAudioPipeline
from processing import (
    TttAudioFormat,
    TttProcessor,
    TttStreamer,
    deinterleave,
    flatten_codes,
    load_audio_codec,
    unflatten_codes,
)
from processing.waveform_stream_ttt import WaveformStream, decoder_context

SEMANTIC_ENCODER = {
    "model_type": "wav2vec2-bert",
    "num_hidden_layers": 1,
    "hidden_size": 32,
    "output_hidden_size": 32,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "feature_projection_input_dim": 160,
    "conv_depthwise_kernel_size": 7,
}
SINGLE_CODEBOOK = {
    "hidden_size": 64,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "encoder_hidden_size": 4,
    "semantic_model_config": SEMANTIC_ENCODER,
    "quantization_dim": 96,
    "quantization_levels": [4, 4],
}
PROMPTS = {"spoken_chat": "Chat.", "text_chat": "Talk."}
FORMATS = {
    "mimi": TttAudioFormat(4, 16, 12.5, 24_000, 24_000),
    "dac": TttAudioFormat(3, 16, 50.0, 16_000, 16_000),
    "encodec": TttAudioFormat(2, 16, 75.0, 24_000, 24_000),
    "xcodec2": TttAudioFormat(1, 16, 50.0, 16_000, 16_000),
    "neucodec": TttAudioFormat(1, 16, 50.0, 16_000, 24_000),
}
NEEDS_TORCHAUDIO = ("xcodec2", "neucodec")  # their feature extractors


def build(name):
    """A small random codec."""
    torch.manual_seed(0)
    if name == "mimi":
        config = MimiConfig(
            hidden_size=32,
            num_filters=4,
            num_quantizers=4,
            codebook_size=16,
            codebook_dim=8,
            vector_quantization_hidden_dimension=8,
            num_hidden_layers=2,
            sliding_window=6,
            intermediate_size=32,
            num_attention_heads=2,
            num_key_value_heads=2,
            upsample_groups=32,
        )
        codec = MimiModel(config).eval()
        for layer_name, buffer in codec.named_buffers():
            if layer_name.endswith("embed_sum"):  # zero at first: training moves it
                buffer.normal_()
        return codec
    if name == "dac":
        # A stride of 5 makes the decoder 8 samples short of whole frames.
        ratios = [2, 4, 5, 8]
        config = DacConfig(
            encoder_hidden_size=4,
            decoder_hidden_size=32,
            downsampling_ratios=ratios,
            n_codebooks=3,
            codebook_size=16,
            codebook_dim=4,
        )
        return DacModel(config).eval()
    if name == "encodec":
        config = EncodecConfig(
            target_bandwidths=[0.6, 1.2],  # two codebooks, or four
            hidden_size=16,
            codebook_dim=16,
            codebook_size=16,
            num_filters=4,
            num_lstm_layers=1,
        )
        codec = EncodecModel(config).eval()
        for layer_name, buffer in codec.named_buffers():
            if layer_name.endswith("embed"):  # zero at first: training moves it
                buffer.normal_(std=0.02)
        return codec
    model, config = {"xcodec2": (Xcodec2Model, Xcodec2Config), "neucodec": (NeuCodecModel, NeuCodecConfig)}[name]
    codec = model(config(**SINGLE_CODEBOOK)).eval()
    for parameter in codec.parameters():
        if parameter.ndim > 1:  # the default is so small that every frame gets the same code
            torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    return codec


def feature_extractor_of(name):
    """The codec's own; where it needs torchaudio and that is missing, one that serves for written requests."""
    if name in ("mimi", "encodec"):
        return EncodecFeatureExtractor(feature_size=1, sampling_rate=24_000)
    if name == "dac":
        return DacFeatureExtractor(sampling_rate=16_000, hop_length=320)
    if importlib.util.find_spec("torchaudio") is None:
        return EncodecFeatureExtractor(feature_size=1, sampling_rate=16_000)
    return {"xcodec2": Xcodec2FeatureExtractor, "neucodec": NeuCodecFeatureExtractor}[name]()


class Part:
    """A codec, its processor and what its codes are."""

    def __init__(self, name):
        self.name, self.format, self.codec = name, FORMATS[name], build(name)
        tokenizer = build_tokenizer(self.format.num_codes)
        self.processor = TttProcessor(feature_extractor_of(name), tokenizer, self.codec, system_prompts=PROMPTS)
        self.hears = name not in NEEDS_TORCHAUDIO or importlib.util.find_spec("torchaudio") is not None

    def random_codes(self, frames, seed=0):
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(self.format.codebook_size, (self.format.num_codebooks, frames), generator=generator)

    @torch.no_grad()
    def encode(self, inputs):
        """The codec's own codes (codebooks, frames) of one sound."""
        codes = self.codec.encode(**inputs).audio_codes[0]
        return codes[0] if self.name == "encodec" else codes

    @torch.no_grad()
    def decode(self, codes):
        """The codec's own waveform (samples,) of (codebooks, frames)."""
        if self.name == "encodec":
            return self.codec.decode(codes[None, None], [None]).audio_values.reshape(-1).numpy()
        return self.codec.decode(audio_codes=codes[None]).audio_values.reshape(-1).numpy()


@pytest.fixture(scope="module", params=FORMATS)
def part(request):
    return Part(request.param)


@pytest.fixture(scope="module")
def mimi():
    return Part("mimi")


@pytest.fixture(scope="module")
def dac():
    return Part("dac")


# ---------------------------------------------------------------------- what the codes are


def test_the_format_is_read_from_the_codecs_own_configuration(part):
    assert part.processor.audio_format == TttAudioFormat.from_config(part.codec.config) == part.format
    assert part.processor.num_codebooks == part.format.num_codebooks
    assert part.processor.sampling_rate == part.format.output_sampling_rate


def test_a_frame_rate_that_a_configuration_rounds_up_is_taken_exactly():
    config = DacConfig(downsampling_ratios=[2, 4, 8, 8], sampling_rate=44_100)
    assert config.frame_rate == 87
    assert TttAudioFormat.from_config(config).frame_rate == 44_100 / 512


def test_spans_last_as_long_as_the_published_ones_in_whole_frames(part):
    size = part.processor.audio_chunk_size
    assert size == {"mimi": 104, "dac": 312, "encodec": 312, "xcodec2": 104, "neucodec": 104}[part.name]
    assert size / part.format.num_codebooks / part.format.frame_rate == pytest.approx(26 / 12.5)
    assert f"13 text tokens followed by {size} audio tokens" in part.processor.system_prompts["asr"]


# ---------------------------------------------------------------------- one stream and back


def test_codes_are_flattened_frame_by_frame_with_an_offset_per_codebook():
    codes = torch.tensor([[1, 2, 3], [4, 5, 6]])
    assert flatten_codes(codes, 10).tolist() == [1, 14, 2, 15, 3, 16]
    assert torch.equal(unflatten_codes([1, 14, 2, 15, 3, 16], 2, 10), codes)


def test_what_a_codec_encodes_is_restored_exactly(part):
    inputs = {"input_values": torch.randn(1, 1, 16_000)}
    if part.name in NEEDS_TORCHAUDIO:
        inputs["input_features"] = torch.randn(1, 50, 160)
    codes = part.encode(inputs)
    assert len(codes.unique()) > 1
    stream = part.processor.flatten_codes(codes)
    assert stream.shape == (codes.numel(),) and stream.max() < part.processor.token_ids.num_audio_codes
    books = stream // part.format.codebook_size
    assert torch.equal(books, torch.arange(len(stream)) % part.format.num_codebooks)
    assert torch.equal(part.processor.unflatten_codes(stream), codes)


def test_codes_that_are_not_the_codecs_are_refused():
    with pytest.raises(ValueError, match=r"shape \(3,\); expected \(codebooks, frames\)"):
        flatten_codes([1, 2, 3], 10)
    with pytest.raises(ValueError, match="run from 1 to 10, outside a codebook of 10"):
        flatten_codes([[1, 10]], 10)


def test_a_code_of_another_codebook_keeps_the_one_before_and_an_incomplete_frame_is_left_out():
    clean = [1, 14, 2, 15, 3, 16]
    assert unflatten_codes([*clean, 7], 2, 10).tolist() == [[1, 2, 3], [4, 5, 6]]
    assert unflatten_codes([1, 14, 15, 15, 3, 16], 2, 10).tolist() == [[1, 1, 3], [4, 5, 6]]
    assert unflatten_codes([1, 14, 2, 5, 3, 6], 2, 10).tolist() == [[1, 2, 3], [4, 4, 4]]
    assert unflatten_codes([11, 4, 2, 15], 2, 10).tolist() == [[0, 2], [0, 5]]
    assert unflatten_codes([2, 20], 2, 10, previous=torch.tensor([[8], [9]])).tolist() == [[2], [9]]
    assert unflatten_codes([], 2, 10).shape == unflatten_codes([3], 2, 10).shape == (2, 0)


def test_a_span_that_ends_within_a_frame_does_not_shift_the_next(dac):
    ids = dac.processor.token_ids
    first, second = dac.random_codes(4, seed=1), dac.random_codes(3, seed=2)
    spans = [
        [ids.begin_of_audio_token_id, *ids.codes_to_ids(dac.processor.flatten_codes(first))[:-2]],
        [ids.end_of_audio_token_id, 5, ids.begin_of_last_audio_token_id],
        [*ids.codes_to_ids(dac.processor.flatten_codes(second)), ids.end_of_last_audio_token_id],
    ]
    response = [token_id for span in spans for token_id in span]
    text, codes = deinterleave(response, ids, codes_per_frame=3)
    assert text == [5]
    assert torch.equal(dac.processor.unflatten_codes(codes), torch.cat([first[:, :3], second], 1))

    streamer = TttStreamer(dac.processor.tokenizer, ids, dac.codec)
    streamer.put(torch.tensor([1]))
    for start in range(0, len(response), 4):
        streamer.put(torch.tensor(response[start : start + 4]))
    streamer.end()
    waveform = np.concatenate([piece["audio"] for piece in streamer if "audio" in piece])
    assert np.allclose(waveform, dac.processor.decode_audio(codes)[0], atol=1e-5)


# ---------------------------------------------------------------------- the processor


def test_waveforms_become_the_codecs_own_codes_and_codes_its_waveforms(part):
    codes = [part.random_codes(frames, seed=frames) for frames in (7, 3, 7, 1)]
    waveforms = part.processor.decode_audio([part.processor.flatten_codes(row) for row in codes])
    for row, waveform in zip(codes, waveforms, strict=True):
        expected = part.decode(row)
        assert waveform.dtype == np.float32 and waveform.shape == expected.shape
        assert np.allclose(waveform, expected, atol=1e-5)
    if not part.hears:
        pytest.skip("the codec's feature extractor needs torchaudio")
    rate = part.format.sampling_rate
    sounds = [tone(seconds, rate, 200 + 100 * index) for index, seconds in enumerate((0.5, 0.11, 1.003))]
    for sound, stream in zip(sounds, part.processor.encode_audio(sounds), strict=True):
        features = part.processor.feature_extractor(sound, sampling_rate=rate, return_tensors="pt")
        accepted = {k: v for k, v in features.items() if k in ("input_values", "input_features", "input_features_mask")}
        own = part.encode(accepted)
        restored = part.processor.unflatten_codes(stream)
        assert abs(restored.shape[1] - len(sound) / rate * part.format.frame_rate) <= 1
        assert torch.equal(restored, own[:, : restored.shape[1]])


def test_audio_of_any_rate_is_resampled_to_what_the_codec_takes(mimi):
    (stream,) = mimi.processor.encode_audio({"array": tone(0.8, 16_000), "sampling_rate": 16_000})
    assert len(stream) == 10 * 4
    assert len(mimi.processor(audio=tone(0.8, 16_000), sampling_rate=16_000)["input_ids"][0]) > 40


def test_an_answer_cut_off_anywhere_gives_whole_frames(dac):
    codes = dac.random_codes(20)
    response = dac.processor.build_response("hi", dac.processor.flatten_codes(codes))
    for length in range(len(response) + 1):
        (answer,) = dac.processor.post_process([response[:length]], decode_audio=False)
        frames = dac.processor.unflatten_codes(answer["audio_codes"])
        assert len(answer["audio_codes"]) == frames.numel()
        assert torch.equal(frames, codes[:, : frames.shape[1]])
    assert torch.equal(frames, codes)
    (answer,) = dac.processor.post_process([response[:4]])  # one code of a frame
    assert answer["audio"].shape == (0,)


def test_a_processor_is_saved_with_such_a_codec_in_its_subfolder(part, tmp_path):
    part.processor.save_pretrained(tmp_path)
    assert (tmp_path / "audio_tokenizer" / "model.safetensors").exists()
    stream = part.processor.flatten_codes(part.random_codes(6))
    for load in (TttProcessor.from_pretrained, AutoProcessor.from_pretrained):
        loaded = load(tmp_path)
        assert type(loaded.audio_tokenizer) is type(part.codec) and not loaded.audio_tokenizer.training
        assert loaded.audio_format == part.format
        assert loaded.audio_chunk_size == part.processor.audio_chunk_size
        assert np.allclose(loaded.decode_audio(stream)[0], part.processor.decode_audio(stream)[0], atol=1e-5)
    bare = TttProcessor.from_pretrained(tmp_path, load_audio_tokenizer=False)
    assert bare.num_codebooks == part.format.num_codebooks
    assert torch.equal(bare.flatten_codes(part.random_codes(6)), stream)
    assert bare.build_response("hi", stream) == part.processor.build_response("hi", stream)


@torch.no_grad()
@pytest.mark.parametrize(("name", "chunk_size"), [("mimi", 52), ("encodec", 312)])
def test_a_codec_is_loaded_with_other_codebooks_than_it_was_saved_with(name, chunk_size, tmp_path):
    part = Part(name)
    part.codec.save_pretrained(tmp_path)
    smaller = load_audio_codec(tmp_path, num_quantizers=2)
    sound = {"input_values": torch.from_numpy(tone(0.5, 24_000))[None, None]}
    processor = TttProcessor(part.processor.feature_extractor, build_tokenizer(32), smaller)
    assert (processor.num_codebooks, processor.audio_chunk_size) == (2, chunk_size)
    (stream,) = processor.encode_audio(tone(0.5, 24_000))
    assert torch.equal(processor.unflatten_codes(stream), part.encode(sound)[:2])
    if name == "encodec":  # encodes with its narrowest bandwidth unless told
        larger = load_audio_codec(tmp_path, num_quantizers=4)
        assert TttAudioFormat.from_config(larger.config).num_codebooks == 4
        assert torch.equal(larger.encode(**sound).audio_codes[0, 0, :2], part.encode(sound))


def test_an_encodec_that_writes_more_than_codes_is_refused():
    for options in ({"normalize": True}, {"chunk_length_s": 1.0, "overlap": 0.01}, {"audio_channels": 2}):
        with pytest.raises(ValueError, match="has scales beside its codes, which tokens cannot hold"):
            TttAudioFormat.from_config(EncodecConfig(**options))
    assert TttAudioFormat.from_config(EncodecConfig()) == TttAudioFormat(2, 1024, 75.0, 24_000, 24_000)
    assert TttAudioFormat.from_config(EncodecConfig(target_bandwidths=[6.0])).num_codebooks == 8


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["ttt_codec", "mimi", "dac", "encodec"])
def test_an_audio_tokenizer_in_half_precision_hears_and_speaks(name, dtype):
    if name == "ttt_codec":
        processor = build_processor(audio_tokenizer=build_codec().to(dtype))
        codes = torch.arange(16)
    else:
        part = Part(name)
        part.codec.to(dtype)
        processor, codes = part.processor, part.processor.flatten_codes(part.random_codes(9))
    heard = processor.encode_audio([tone(0.5, processor.feature_extractor.sampling_rate), tone(0.3)])
    assert all(len(row) and row.dtype == torch.long for row in heard)
    (waveform,) = processor.decode_audio(codes)
    assert waveform.dtype == np.float32 and np.isfinite(waveform).all() and len(waveform)
    streamer = processor.streamer()
    streamer.put(torch.tensor([1]))
    streamer.put(torch.tensor(processor.build_response("hi", codes)))
    streamer.end()
    assert sum(len(piece["audio"]) for piece in streamer if "audio" in piece) == len(waveform)


def test_parts_that_do_not_belong_together_are_refused(mimi, tmp_path):
    extractor, codec = mimi.processor.feature_extractor, mimi.codec
    with pytest.raises(ValueError, match="prepares 16000 Hz, but MimiModel takes 24000 Hz"):
        TttProcessor(EncodecFeatureExtractor(sampling_rate=16_000), build_tokenizer(64), codec)
    with pytest.raises(ValueError, match="64 codes in 4 codebooks, but .* only 16"):
        TttProcessor(extractor, build_tokenizer(16), codec)
    with pytest.raises(ValueError, match="64 codes in 4 codebooks, but .* for 80"):
        TttProcessor(extractor, build_tokenizer(80), codec)
    with pytest.raises(ValueError, match="`audio_chunk_size` is 26; it must be a multiple of the 4 codebooks"):
        TttProcessor(extractor, build_tokenizer(64), codec, audio_chunk_size=26)
    with pytest.raises(ValueError, match="has 4 codebooks, but the processor is one for 2"):
        TttProcessor(extractor, build_tokenizer(64), codec, num_codebooks=2)
    with pytest.raises(ValueError, match="PocketTTSAudioTokenizerConfig has no `codebook_size`"):
        TttAudioFormat.from_config(PocketTTSAudioTokenizerConfig())
    mimi.processor.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="prepares 24000 Hz, but DacModel takes 16000"):
        TttProcessor.from_pretrained(tmp_path, audio_tokenizer=build("dac"))


def test_a_sound_too_short_for_a_code_is_refused_by_name():
    pytest.importorskip("torchaudio")
    processor = Part("xcodec2").processor
    with pytest.raises(ValueError, match=r"audio 1 \(300 samples\) is too short: Xcodec2Model has no code"):
        processor.encode_audio([tone(0.5), tone(0.5)[:300]])


class UnevenCodec(TttCodecModel):
    """Gives a whole number of 300-sample blocks, as a vocoder after a resampled log-mel does."""

    def decode(self, audio_codes, audio_codes_mask=None, **kwargs):
        output = super().decode(audio_codes, audio_codes_mask, **kwargs)
        output.audio_lengths = output.audio_lengths // 300 * 300
        return output


def test_rows_of_a_batch_are_as_long_as_the_codec_says():
    codec = UnevenCodec(build_codec().config).eval()
    processor = build_processor(audio_tokenizer=codec)
    rows = [[1, 2, 3], [4] * 7, [5]]
    together = processor.decode_audio(rows)
    assert [len(waveform) for waveform in together] == [3600, 8700, 1200]
    for row, waveform in zip(rows, together, strict=True):
        assert np.allclose(waveform, processor.decode_audio(row)[0], atol=1e-5)


# ---------------------------------------------------------------------- streams


@pytest.mark.parametrize(
    ("name", "context"),
    [
        ("mimi", (None, 0)),
        ("encodec", (None, 6)),
        ("dac", (11, 11)),
        ("xcodec2", (None, None)),
        ("neucodec", (None, None)),
    ],
)
def test_a_stream_joins_to_the_waveform_of_the_whole(name, context):
    part = Part(name)
    assert decoder_context(part.codec) == context
    codes = part.random_codes(40)
    flat = part.processor.flatten_codes(codes).tolist()
    stream, pieces = WaveformStream(part.codec), []
    step = 5 * part.format.num_codebooks
    for start in range(0, len(flat), step):
        pieces.append(stream.push(flat[start : start + step]))
    early = sum(map(len, pieces))
    pieces.append(stream.flush())
    whole = part.decode(codes)
    joined = np.concatenate(pieces)
    assert joined.shape == whole.shape
    assert np.abs(joined - whole).max() <= 1e-5 * max(1.0, np.abs(whole).max())
    if context[1] is None:
        assert early == 0  # attention in both directions: nothing is final before the end
    else:
        assert early == (40 - context[1]) * part.format.samples_per_frame
        assert context[0] is None or stream.decoder.frames.shape[-1] <= sum(context) + 5  # older frames are dropped


def test_a_repaired_stream_is_the_repaired_whole(dac):
    flat = dac.processor.flatten_codes(dac.random_codes(30)).tolist()
    flat[15] = flat[46] = 40  # of the third codebook, where the first belongs
    stream = WaveformStream(dac.codec)
    pieces = [stream.push(flat[start : start + 15]) for start in range(0, len(flat), 15)]
    joined = np.concatenate([*pieces, stream.flush()])
    assert np.allclose(joined, dac.processor.decode_audio(flat)[0], atol=1e-5)


# ---------------------------------------------------------------------- a model that speaks with it


def test_a_model_answers_through_the_pipeline_at_the_codecs_rate(part):
    model = build_model(part.processor)
    pipe = TttAudioToAudioPipeline(model=model, processor=part.processor, device="cpu")
    # The model says code 3 of the first codebook forty times: the other codebooks are held at 0.
    frames = 40 // part.format.num_codebooks
    codes = torch.zeros(part.format.num_codebooks, frames, dtype=torch.long)
    codes[0] = 3
    expected = part.decode(codes)
    assert math.isclose(len(expected), frames * part.format.samples_per_frame, abs_tol=8)
    requests = [("hello", "text_chat")]
    if part.hears:
        requests.append(({"array": tone(0.4, 16_000), "sampling_rate": 16_000}, "spoken_chat"))
    for request, task in requests:
        answer = pipe(request, task=task)
        assert answer["text"] == "hi" and answer["sampling_rate"] == part.format.output_sampling_rate
        assert np.allclose(answer["audio"], expected, atol=1e-5)
    pieces = list(pipe("hello", task="text_chat", stream=True))
    spoken = [piece for piece in pieces if "audio" in piece]
    assert {piece["sampling_rate"] for piece in spoken} == {part.format.output_sampling_rate}
    assert np.allclose(np.concatenate([piece["audio"] for piece in spoken]), expected, atol=1e-5)


# ---------------------------------------------------------------------- weights elsewhere


@pytest.mark.parametrize("name", ["mimi", "dac", "encodec"])
def test_an_offloaded_codec_hears_and_speaks_as_it_does_in_place(name):
    here = Part(name)
    away = copy.copy(here.processor)
    away.audio_tokenizer = cpu_offload(copy.deepcopy(here.codec), execution_device=torch.device("cpu"))
    assert away.audio_tokenizer.device.type == "meta"
    sound, codes = tone(0.5, here.processor.feature_extractor.sampling_rate), flatten_codes(here.random_codes(6), 16)

    def heard_and_spoken(processor):
        stream = WaveformStream(processor.audio_tokenizer)
        spoken = np.concatenate([stream.push(codes), stream.flush()])
        return processor.encode_audio([sound])[0], processor.decode_audio([codes])[0], spoken

    for found, expected in zip(heard_and_spoken(away), heard_and_spoken(here.processor), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-6)
