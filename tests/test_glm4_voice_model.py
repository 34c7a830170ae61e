"""Glm4VoiceModel as a Transformers model: loading, saving, precision, new weights, and its place behind a processor."""

import functools

import pytest
import torch
from accelerate import cpu_offload
from builders import build_processor, run_without_packages, tone
from codec_checks import (
    assert_compiles_whole,
    assert_exports,
    assert_half_precision_works,
    assert_works_from_elsewhere,
    waveforms,
)
from glm4_voice_goldens import golden_model
from transformers import AutoConfig, AutoModel, AutoModelForAudioTokenization

from modeling_ttt.glm4_voice import (
    Glm4VoiceConfig,
    Glm4VoiceEncoderConfig,
    Glm4VoiceFlowConfig,
    Glm4VoiceModel,
    Glm4VoiceVocoderConfig,
)
from modeling_ttt.glm4_voice.flow_glm4_voice import count_mel_frames

SMALL = {
    "encoder_config": {
        "d_model": 32,
        "encoder_layers": 2,
        "encoder_attention_heads": 4,
        "encoder_ffn_dim": 64,
        "codebook_size": 16,
    },
    "flow_config": {
        "codebook_size": 16,
        "embedding_size": 16,
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "intermediate_size": 32,
        "unet_channels": [16, 24, 32],
        "unet_num_layers": 1,
        "unet_num_mid_stages": 1,
        "unet_num_attention_heads": 2,
        "unet_head_dim": 8,
        "num_steps": 2,
    },
    "vocoder_config": {"hidden_size": 32, "pitch_hidden_size": 16},
}
REMOTE = """
import sys, torch
from transformers import AutoConfig, AutoModelForAudioTokenization

folder = sys.argv[1]
config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForAudioTokenization.from_pretrained(folder, trust_remote_code=True).eval()
assert "modeling_ttt" not in sys.modules and config.output_sampling_rate == 22050
codes = model.encode(torch.sin(torch.arange(9000) / 9)[None]).audio_codes
speech = model.decode(codes, num_steps=2).audio_values
torch.save({"codes": codes, "speech": speech}, folder + "/result.pt")
model.save_pretrained(folder + "/again")
"""


def small_model(**changes) -> Glm4VoiceModel:
    torch.manual_seed(0)
    return Glm4VoiceModel(Glm4VoiceConfig(**{**SMALL, **changes})).eval()


def speak(model, **options):
    codes = model.encode(torch.sin(torch.arange(9000) / 9)[None]).audio_codes
    return codes, model.decode(codes, num_steps=2, **options).audio_values


@functools.cache
def golden_speech():
    return speak(golden_model())


@pytest.mark.parametrize("max_shard_size", ["5GB", "100KB"])
def test_saved_models_load_the_same(tmp_path, max_shard_size):
    model = golden_model()
    model.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    assert (tmp_path / "model.safetensors.index.json").exists() == (max_shard_size == "100KB")
    for auto_class in (AutoModelForAudioTokenization, AutoModel):
        loaded, report = auto_class.from_pretrained(tmp_path, output_loading_info=True)
        assert type(loaded) is Glm4VoiceModel and not loaded.training
        assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, loaded.state_dict()[name]), name
    (codes, speech), (expected_codes, expected_speech) = speak(loaded), golden_speech()
    assert torch.equal(codes, expected_codes)
    torch.testing.assert_close(speech, expected_speech, atol=5e-3, rtol=0)
    assert type(AutoConfig.from_pretrained(tmp_path)) is Glm4VoiceConfig


def test_loads_from_its_folder_alone(tmp_path):
    """In a process that has no such package: code and weights come from the folder."""
    folder = tmp_path / "model"
    golden_model().save_pretrained(folder)
    run_without_packages(REMOTE, folder, cwd=tmp_path)
    result = torch.load(folder / "result.pt", weights_only=True)
    codes, speech = golden_speech()
    assert torch.equal(result["codes"], codes)
    torch.testing.assert_close(result["speech"], speech, atol=5e-3, rtol=0)
    assert {path.name for path in (folder / "again").glob("*.py")} == {path.name for path in folder.glob("*.py")}


def test_bfloat16_keeps_what_needs_precision(tmp_path):
    golden_model().save_pretrained(tmp_path)
    model = AutoModelForAudioTokenization.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    kept = {name for name, tensor in model.state_dict().items() if tensor.dtype == torch.float32}
    assert {name.split(".")[0] for name in kept} == {"quantizer", "vocoder"}
    assert {name.split(".")[1] for name in kept if name.startswith("vocoder")} == {"pitch_predictor", "source_proj"}
    codes, _ = speak(model)
    expected, _ = golden_speech()
    assert (codes == expected).float().mean() >= 0.5
    mel, _ = model.decode_mel(expected)
    exact, _ = golden_model().decode_mel(expected)
    assert mel.dtype == torch.float32
    assert (mel - exact).square().mean() < 0.01 * exact.square().mean()
    waveform = model.decode(expected).audio_values
    assert waveform.dtype == torch.float32 and torch.isfinite(waveform).all()
    assert len(model.streaming_decoder(num_steps=2).push(torch.arange(15))) > 0


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_attention_implementation_reaches_every_part(tmp_path, implementation):
    golden_model().save_pretrained(tmp_path)
    model = Glm4VoiceModel.from_pretrained(tmp_path, attn_implementation=implementation)
    assert {part.config._attn_implementation for part in (model, model.encoder, model.flow)} == {implementation}
    assert model.encoder.layers[0].self_attn.config._attn_implementation == implementation


def test_new_weights_are_initialised_everywhere(tmp_path):
    """Also those built without memory and filled later, as in loading a file that lacks some."""
    model = small_model()
    reference = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name, tensor in reference.items():
        if name.endswith("bias") and tensor.ndim == 1:
            assert not tensor.any(), name
        elif "norm" in name or name.endswith("alpha"):
            assert (tensor == 1).all(), name
        else:
            assert torch.isfinite(tensor).all() and 0 < tensor.std() < 1, name
    torch.testing.assert_close(reference["encoder.embed_positions.weight"][0, 16:], torch.ones(16))  # cosines of zero
    with torch.device("meta"):
        built = Glm4VoiceModel(model.config)
    built.to_empty(device="cpu").init_weights()
    for name, tensor in built.state_dict().items():
        assert torch.isfinite(tensor).all(), name
        found, expected = tensor.square().mean().sqrt(), reference[name].square().mean().sqrt()
        torch.testing.assert_close(found, expected, rtol=0.5, atol=0.02)

    kept = {name: tensor for name, tensor in reference.items() if "resblocks" not in name and "encoder" not in name}
    loaded = Glm4VoiceModel.from_pretrained(None, config=model.config, state_dict=kept)
    for name, tensor in loaded.state_dict().items():
        if name in kept:
            assert torch.equal(tensor, reference[name]), name
    torch.testing.assert_close(loaded.encoder.embed_positions.weight, reference["encoder.embed_positions.weight"])
    assert (loaded.vocoder.resblocks[0].activations1[0].alpha == 1).all()


def smallest_model() -> Glm4VoiceModel:
    """One layer of everything."""
    encoder, flow, vocoder = (dict(SMALL[name]) for name in SMALL)
    encoder["encoder_layers"] = 1
    flow |= {"unet_channels": [16], "num_regulator_layers": 1, "num_steps": 1}
    vocoder |= {
        "num_pitch_layers": 1,
        "resblock_kernel_sizes": [3],
        "resblock_dilation_sizes": [[1]],
        "source_resblock_dilation_sizes": [[1], [1]],
    }
    return small_model(encoder_config=encoder, flow_config=flow, vocoder_config=vocoder)


@torch.no_grad()
def test_hearing_and_speaking_compile_whole():
    assert_compiles_whole(smallest_model(), "forward", waveforms()[0])


@torch.no_grad()
def test_hearing_and_speaking_can_be_exported():
    """Rows without padding have the noise that they have anyway, also where a mask says so."""
    model, (waves, mask) = smallest_model(), waveforms()
    codes = model.encode(waves).audio_codes
    assert_exports(model, "encode", waves, mask)
    assert_exports(model, "decode", codes)
    assert_exports(model, "decode", codes, torch.ones_like(codes[:, 0]))


@torch.no_grad()
def test_a_graph_takes_noise_that_is_given():
    model = smallest_model()
    codes, frames = torch.arange(5)[None], count_mel_frames(torch.tensor([5]), model.config.flow_config)
    generators = model.make_generators(torch.Generator().manual_seed(3), 1)
    noise = [model.draw_initial_noise(frames, generators), *model.draw_source_noise(frames, generators)]
    names = ("initial_noise", "source_phase", "source_noise")
    assert_exports(model, "decode", codes, **dict(zip(names, noise, strict=True)))


@torch.no_grad()
def test_weights_may_be_elsewhere(tmp_path):
    model = small_model()
    assert_works_from_elsewhere(model, tmp_path)
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert len(model.streaming_decoder(num_steps=1).push(torch.arange(15))) > 0
    assert model.quantizer.embed(torch.arange(4)[None]).shape == (1, 4, 32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision_hears_and_speaks(dtype, tmp_path):
    assert_half_precision_works(small_model(), tmp_path, dtype)


def test_columns_that_are_padding_in_every_row_change_nothing():
    model, codes, mask = small_model(), torch.arange(12).reshape(2, 6), torch.zeros(2, 6, dtype=torch.long)
    mask[0, :4], mask[1, :3] = 1, 1
    padded, cut = model.decode(codes, mask), model.decode(codes[:, :4], mask[:, :4])
    assert torch.equal(padded.audio_values, cut.audio_values)


def test_a_new_model_hears_and_speaks():
    model = small_model()
    codes, speech = speak(model)
    assert codes.unique().numel() > 1 and codes.max() < 16
    assert torch.isfinite(speech).all() and speech.std() > 0
    output = model(torch.sin(torch.arange(9000) / 9)[None])
    assert torch.equal(output.audio_codes, codes) and output.audio_values.shape == speech.shape


def test_deeper_u_nets_and_other_upsampling_work():
    """Three frame rates; a vocoder with three upsamplings of other rates."""
    vocoder = {
        "upsample_rates": [4, 4, 4],
        "upsample_kernel_sizes": [8, 8, 8],
        "source_resblock_kernel_sizes": [3, 3, 3],
        "source_resblock_dilation_sizes": [[1], [1], [1]],
        "resblock_kernel_sizes": [3],
        "resblock_dilation_sizes": [[1, 3]],
    }
    model = small_model(vocoder_config={**SMALL["vocoder_config"], **vocoder})
    codes, mask = torch.arange(14).reshape(2, 7), torch.ones(2, 7, dtype=torch.long)
    mask[1, 4:] = 0
    together = model.double().decode(codes, mask)
    alone = model.decode(codes[1:, :4])
    assert together.audio_values.shape == (2, 1, 256 * 48)
    torch.testing.assert_close(
        together.audio_values[1:, :, : alone.audio_values.shape[-1]], alone.audio_values, atol=1e-9, rtol=0
    )


def test_the_configuration_says_what_goes_in_and_out():
    config = Glm4VoiceConfig()
    assert (config.sampling_rate, config.output_sampling_rate) == (16_000, 22_050)
    assert (config.frame_rate, config.hop_length) == (12.5, 1280)
    assert (config.codebook_size, config.num_codebooks) == (16_384, 1)
    assert Glm4VoiceConfig(**config.to_dict()).to_dict() == config.to_dict()


def test_parts_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"`encoder_config.codebook_size` \(16384\) is more than can be decoded"):
        Glm4VoiceConfig(flow_config={"codebook_size": 100})
    with pytest.raises(ValueError, match="makes 12.5 codes a second, the flow takes 25"):
        Glm4VoiceConfig(flow_config={"code_rate": 25.0})
    with pytest.raises(ValueError, match="`num_mel_bins` is 80 in `flow_config` and 100 in `vocoder_config`"):
        Glm4VoiceConfig(vocoder_config={"num_mel_bins": 100})
    with pytest.raises(ValueError, match=r"`hop_length` is 256 in `flow_config` and 512"):
        Glm4VoiceConfig(vocoder_config={"istft_hop_length": 8})
    with pytest.raises(ValueError, match=r"`encoder_attention_heads` \(7\) must divide `d_model`"):
        Glm4VoiceEncoderConfig(encoder_attention_heads=7)
    with pytest.raises(ValueError, match=r"`chunk_length` \(20 s\) does not fill"):
        Glm4VoiceEncoderConfig(chunk_length=20)
    with pytest.raises(ValueError, match=r"`num_attention_heads` \(7\) must divide `hidden_size`"):
        Glm4VoiceFlowConfig(num_attention_heads=7)
    with pytest.raises(ValueError, match="`upsample_kernel_sizes` has 1 items, `upsample_rates` has 2"):
        Glm4VoiceVocoderConfig(upsample_kernel_sizes=[16])


def test_a_processor_takes_it_as_its_audio_tokenizer(tmp_path):
    """Rows of unequal length go through it together, and each gets what it gets alone."""
    model = small_model()
    processor = build_processor(audio_tokenizer=model)
    sounds = [tone(0.5), tone(0.2, frequency=900)]
    rows = processor.encode_audio(sounds)
    assert [len(row) for row in rows] == [7, 3]
    waveforms = processor.decode_audio([row.tolist() for row in rows])
    for sound, row, waveform in zip(sounds, rows, waveforms, strict=True):
        assert torch.equal(row, model.encode(torch.from_numpy(sound)[None]).audio_codes[0, 0])
        alone = model.decode(row[None]).audio_values[0, 0]
        torch.testing.assert_close(torch.from_numpy(waveform), alone, atol=5e-3, rtol=0)
    processor.save_pretrained(tmp_path)
    loaded = type(processor).from_pretrained(tmp_path)
    assert type(loaded.audio_tokenizer) is Glm4VoiceModel
    assert torch.equal(loaded.encode_audio(sounds[0])[0], rows[0])


def test_a_processor_gives_it_unequal_rows_in_one_batch(monkeypatch):
    model, seen = small_model(), []
    decode = model.decode

    def record(audio_codes, **options):
        seen.append(tuple(audio_codes.shape))
        return decode(audio_codes, **options)

    monkeypatch.setattr(model, "decode", record)
    build_processor(audio_tokenizer=model).decode_audio([[1, 2, 3], [4] * 7])
    assert seen == [(2, 1, 7)]
