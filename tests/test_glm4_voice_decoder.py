"""GLM-4-Voice's decoder: log-mel frames and waveforms as published, stage by stage, and rows that do not know each
other."""

import copy

import pytest
import torch
from glm4_voice_goldens import golden_case, golden_model
from torch.nn import functional as F

from modeling_ttt.glm4_voice import Glm4VoiceFlowConfig
from modeling_ttt.glm4_voice.flow_glm4_voice import (
    Glm4VoiceGroupNorm,
    count_mel_frames,
    frames_of_length,
    nearest_positions,
)
from modeling_ttt.glm4_voice.vocoder_glm4_voice import short_time_spectrum, waveform_from_spectrum

LENGTHS = [23, 7, 16, 1, 40]


def close(found: torch.Tensor, expected: torch.Tensor, atol: float) -> None:
    torch.testing.assert_close(found, expected, atol=atol, rtol=0)


def random_batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Codes (batch, 1, codes) of LENGTHS, padded with a code, and their mask."""
    codes = torch.randint(96, (len(LENGTHS), 1, max(LENGTHS)), generator=torch.Generator().manual_seed(0))
    return codes, (torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]).long()


@pytest.fixture(params=["sdpa", "eager"])
def model(request):
    shared = golden_model()
    shared.set_attn_implementation(request.param)
    yield shared
    shared.set_attn_implementation("sdpa")


# ---------------------------------------------------------------------- the published numbers


@pytest.fixture(params=["offline", "prompted"])
def flow_case(request):
    case = golden_case("flow", request.param)
    case["codes"] = torch.cat([case["prompt_token"], case["token"]], 1)
    case["prompt_mel"] = case["prompt_feat"].transpose(1, 2)
    return case


@torch.no_grad()
def test_flow_encoder_is_the_published_one(model, flow_case):
    flow, codes = model.flow, flow_case["codes"]
    hidden = flow.encoder(codes, torch.ones_like(codes))
    close(hidden, flow_case["encoder_output"], 2e-5)
    projected = flow.encoder_proj(hidden)
    close(projected, flow_case["encoder_proj_output"], 2e-5)
    num_codes = torch.tensor([codes.shape[1]])
    num_frames = count_mel_frames(num_codes, flow.config)
    assert num_frames.tolist() == [flow_case["mu"].shape[-1]]
    stretched = flow.length_regulator(projected.transpose(1, 2), num_codes, num_frames, int(num_frames.max()))
    close(stretched, flow_case["mu"], 2e-5)


@torch.no_grad()
def test_flow_velocities_are_the_published_ones(model, flow_case):
    flow = model.flow
    condition = flow.build_condition(flow_case["mu"], flow_case["embedding"], flow_case["prompt_mel"])
    stretched, speaker, prompt = condition.chunk(3, 1)
    assert torch.equal(stretched, flow_case["mu"])
    close(speaker[..., -1], flow_case["speaker_condition"], 1e-6)
    close(prompt, flow_case.get("prompt_condition", torch.zeros_like(prompt)), 0)
    state = flow_case["initial_noise"]
    masks = flow.estimator.prepare_masks(torch.tensor([state.shape[-1]]), state.shape[-1])
    time = flow.estimator.time_embedding(flow_case["times"])[0]
    conditional = flow.estimator(state, condition, time, masks)
    unconditional = flow.estimator(state, torch.zeros_like(condition), time, masks)
    close(conditional, flow_case["velocity_conditional_step0"], 2e-5)
    close(unconditional, flow_case["velocity_unconditional_step0"], 2e-5)
    guided = 1.7 * conditional - 0.7 * unconditional
    close(state + flow_case["times"][1] * guided, flow_case["state_after_step1"], 2e-5)


@pytest.mark.parametrize("injected", [True, False])
def test_mel_is_the_published_one(model, flow_case, injected):
    """Without noise of one's own, the default seed draws what the published code drew."""
    mel, num_frames = model.decode_mel(
        flow_case["token"],
        speaker_embedding=flow_case["embedding"],
        prompt_codes=flow_case["prompt_token"],
        prompt_mel=flow_case["prompt_mel"],
        initial_noise=flow_case["initial_noise"] if injected else None,
    )
    close(mel, flow_case["mel"], 1e-4)
    assert num_frames.tolist() == [flow_case["mel"].shape[-1]]


@pytest.mark.parametrize("case", ["plain", "cached"])
@torch.no_grad()
def test_vocoder_is_the_published_one_stage_by_stage(case):
    vocoder, golden = golden_model().vocoder, golden_case("hift", case)
    mel, num_frames = golden["mel"], torch.tensor([golden["mel"].shape[-1]])
    close(vocoder.predict_pitch(mel, num_frames), golden["f0"], 3e-3)
    source = vocoder.build_source(golden["f0"], golden["phase_drawn"], golden["sine_noise"])
    close(source, golden["source_before_cache"][:, 0], 1e-4)
    assert torch.equal(source, vocoder.build_source(golden["f0"], golden["phase_used"], golden["sine_noise"]))
    spectrum, _ = vocoder.predict_spectrum(mel, num_frames, golden["source"][:, 0])
    close(spectrum, golden["conv_post_output"], 1e-5)
    close(vocoder.synthesize(mel, num_frames, golden["source"][:, 0]), golden["waveform"], 1e-5)


@pytest.mark.parametrize("case", ["plain", "cached"])
@torch.no_grad()
def test_vocoder_is_the_published_one_from_end_to_end(case):
    golden = golden_case("hift", case)
    cached = golden["cache_source"][:, 0] if case == "cached" else None
    num_frames = torch.tensor([golden["mel"].shape[-1]])
    waveform, source = golden_model().vocoder(
        golden["mel"], num_frames, golden["phase_drawn"], golden["sine_noise"], cached
    )
    close(waveform, golden["waveform"], 2e-3)
    close(source, golden["source"][:, 0], 2e-3)


@pytest.mark.parametrize(("num_codes", "num_frames"), [(1, 6), (10, 68), (20, 137), (25, 172), (23, 158), (24, 165)])
def test_codes_give_the_published_number_of_frames(num_codes, num_frames):
    assert count_mel_frames(torch.tensor(num_codes), Glm4VoiceFlowConfig()) == num_frames == 441 * num_codes // 64


def test_frames_of_a_length_are_counted_in_the_same_way_without_a_tensor():
    config, codes = Glm4VoiceFlowConfig(), torch.arange(20_000)
    assert [frames_of_length(number, config) for number in codes.tolist()] == count_mel_frames(codes, config).tolist()


def test_frame_counts_round_as_published():
    """Exact in float32 up to 3391 codes; beyond, it is now and then one less."""
    codes = torch.arange(1, 10_000)
    missing = codes * 441 // 64 - count_mel_frames(codes, Glm4VoiceFlowConfig())
    assert not missing[:3391].any() and set(missing.tolist()) == {0, 1}


def test_codes_are_stretched_as_interpolate_does():
    lengths = torch.arange(1, 300)
    frames = count_mel_frames(lengths, Glm4VoiceFlowConfig())
    positions = nearest_positions(lengths, frames, int(frames.max()))
    exact_differs = []
    for row, (length, count) in enumerate(zip(lengths.tolist(), frames.tolist(), strict=True)):
        ramp = torch.arange(length, dtype=torch.float32)[None, None]
        assert torch.equal(positions[row, :count], F.interpolate(ramp, count, mode="nearest")[0, 0].long()), length
        exact = torch.arange(count) * length // count
        exact_differs += [length] if not torch.equal(positions[row, :count], exact) else []
    assert exact_differs[:4] == [16, 24, 32, 40]  # rounding to float32 is part of the published numbers


# ---------------------------------------------------------------------- batches


def test_group_norm_leaves_padding_out():
    norm = Glm4VoiceGroupNorm(4, 8)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    hidden, lengths = torch.randn(2, 8, 11), [11, 5]
    mask = (torch.arange(11) < torch.tensor(lengths)[:, None])[:, None].float()
    together = norm(hidden, mask)
    for row, length in enumerate(lengths):
        close(together[row, :, :length], norm(hidden[row : row + 1, :, :length])[0], 1e-5)


def test_spectra_of_a_row_end_at_its_own_end():
    """Both transforms agree with PyTorch's for every row of a padded batch."""
    signal, lengths = torch.randn(2, 64), torch.tensor([64, 40])
    together = short_time_spectrum(signal, lengths, 16, 4)
    window = torch.hann_window(16)
    magnitude, phase = torch.rand(2, 9, 17), torch.randn(2, 9, 17)
    mask = (torch.arange(17) < lengths[:, None] // 4 + 1)[:, None].float()
    waveforms = waveform_from_spectrum(magnitude, phase, mask, 4)
    for row, length in enumerate(lengths.tolist()):
        frames = length // 4 + 1
        alone = torch.stft(signal[row, :length], 16, 4, window=window, return_complex=True)
        close(together[row, :, :frames], torch.cat([alone.real, alone.imag]), 1e-5)
        spectrum = torch.polar(magnitude, phase)[row, :, :frames]
        close(waveforms[row, :length], torch.istft(spectrum, 16, 4, window=window), 1e-5)


def test_mel_of_a_row_does_not_depend_on_neighbours_or_padding(model):
    codes, mask = random_batch()
    together, num_frames = model.decode_mel(codes, mask)
    for row, length in enumerate(LENGTHS):
        alone, _ = model.decode_mel(codes[row : row + 1, :, :length])
        assert alone.shape[-1] == num_frames[row]
        torch.testing.assert_close(together[row, :, : alone.shape[-1]], alone[0], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_waveform_of_a_row_does_not_depend_on_neighbours_or_padding():
    """From the same source: to predict the pitch again would add its rounding up in the phase."""
    model, lengths = golden_model(), torch.tensor([24, 9, 2])
    mel = torch.randn(3, 80, 24)
    phase, noise = model.draw_source_noise(lengths, model.make_generators(None, 3))
    pitch = model.vocoder.predict_pitch(mel, lengths)
    source = model.vocoder.build_source(pitch, phase, noise)
    together = model.vocoder.synthesize(mel, lengths, source)
    for row, count in enumerate(lengths.tolist()):
        own = slice(row, row + 1), slice(None), slice(count)
        close(pitch[row, :count], model.vocoder.predict_pitch(mel[own], lengths[row : row + 1])[0], 3e-3)
        alone = model.vocoder.synthesize(mel[own], lengths[row : row + 1], source[row : row + 1, : 256 * count])
        close(together[row, : 256 * count], alone[0], 1e-5)
        assert not together[row, 256 * count :].any()


def test_decoding_a_batch_is_decoding_its_rows():
    """In float64, where rounding is no excuse, from codes to waveform."""
    model = copy.deepcopy(golden_model()).double()
    codes, mask = random_batch()
    speaker, prompt_mel = torch.randn(len(LENGTHS), 192), torch.randn(len(LENGTHS), 80, 30)
    prompt = {"prompt_codes": torch.arange(5), "num_steps": 3}
    together = model.decode(codes, mask, speaker_embedding=speaker, prompt_mel=prompt_mel, **prompt)
    for row, length in enumerate(LENGTHS):
        own = slice(row, row + 1)
        alone = model.decode(
            codes[own, :, :length], speaker_embedding=speaker[own], prompt_mel=prompt_mel[own], **prompt
        )
        assert alone.audio_lengths[0] == together.audio_lengths[row] == alone.audio_values.shape[-1]
        close(together.audio_values[row, :, : alone.audio_values.shape[-1]], alone.audio_values[0], 1e-9)
        assert not together.audio_values[row, :, alone.audio_values.shape[-1] :].any()


def test_an_empty_row_is_silent_and_disturbs_no_other():
    codes, mask = random_batch()
    both = golden_model().decode(codes[:2], mask[:2], num_steps=2)
    mask[1] = 0
    output = golden_model().decode(codes[:2], mask[:2], num_steps=2)
    assert output.audio_lengths.tolist() == [256 * 158, 0]
    assert torch.equal(output.audio_values[0], both.audio_values[0]) and not output.audio_values[1].any()


# ---------------------------------------------------------------------- options


def test_decoding_is_deterministic_and_injected_noise_takes_the_place_of_drawn_noise():
    model, codes = golden_model(), random_batch()[0][:1, :, :9]
    first = model.decode(codes).audio_values
    assert torch.equal(first, model.decode(codes).audio_values)
    (generator,) = model.make_generators(None, 1)
    num_frames = count_mel_frames(torch.tensor([9]), model.config.flow_config)
    initial_noise = model.draw_initial_noise(num_frames, [generator])
    phase, noise = model.draw_source_noise(num_frames, [generator])
    assert phase.abs().max() <= torch.pi and phase.shape == (1, 6, 1)
    options = {"initial_noise": initial_noise, "source_phase": phase, "source_noise": noise}
    assert torch.equal(first, model.decode(codes, **options).audio_values)
    for name, value in options.items():
        assert not torch.equal(first, model.decode(codes, **{name: 0.5 * value}).audio_values), name


def test_generators_belong_to_rows():
    model, codes = golden_model(), random_batch()[0][:2, :, :9]
    codes[1] = codes[0]

    def seeded(*seeds):
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    default, same = model.decode(codes).audio_values, model.decode(codes, generator=seeded(42, 42)).audio_values
    assert torch.equal(default, same)
    first, second = model.decode(codes, generator=seeded(1, 2)).audio_values
    assert not torch.allclose(first, second, atol=1e-2)
    shared, alike = model.decode(codes, generator=torch.Generator().manual_seed(1)).audio_values
    assert not torch.allclose(shared, alike, atol=1e-2)
    with pytest.raises(ValueError, match="3 items for a batch of 2"):
        model.decode(codes, generator=seeded(1, 2, 3))


def test_steps_guidance_speaker_and_prompt_are_heard():
    model, codes = golden_model(), random_batch()[0][:1, :, :9]
    default, _ = model.decode_mel(codes)
    settings = [
        {"num_steps": 4},
        {"guidance_scale": 0.0},
        {"speaker_embedding": torch.ones(1, 192)},
        {"prompt_codes": torch.arange(4), "prompt_mel": torch.randn(1, 80, 27)},
    ]
    for options in settings:
        mel, num_frames = model.decode_mel(codes, **options)
        assert not torch.allclose(mel[..., :60], default[..., :60], atol=1e-3), options
        assert (
            num_frames.item()
            == mel.shape[-1]
            == count_mel_frames(torch.tensor(9 + 4 * ("prompt_codes" in options)), model.config.flow_config)
            - (27 if "prompt_codes" in options else 0)
        )


@torch.no_grad()
def test_guidance_is_the_sum_of_its_two_branches():
    """Both branches run in one forward; zero guidance leaves the unconditional one out."""
    flow = golden_model().flow
    condition, noise, num_frames = torch.randn(1, 240, 20), torch.randn(1, 80, 20), torch.tensor([20])
    conditional, unconditional = (
        flow.solve(noise, told, num_frames, 1, 0.0) - noise for told in (condition, torch.zeros_like(condition))
    )
    guided = flow.solve(noise, condition, num_frames, 1, 0.7) - noise
    close(guided, 1.7 * conditional - 0.7 * unconditional, 1e-5)


def test_bad_input_is_refused_by_name():
    model, codes = golden_model(), torch.zeros(1, 5, dtype=torch.long)
    with pytest.raises(ValueError, match=r"\[0, 96\), found 0 to 96"):
        model.decode(torch.tensor([[0, 96]]))
    with pytest.raises(ValueError, match=r"\[0, 96\), found -1 to -1"):
        model.decode(codes, prompt_codes=torch.tensor([-1]))
    with pytest.raises(ValueError, match="holds no codes"):
        model.decode(torch.zeros(1, 1, 0, dtype=torch.long))
    with pytest.raises(ValueError, match=r"initial_noise must have shape \(1, 80, 34\), not \(1, 80, 3\)"):
        model.decode(codes, initial_noise=torch.zeros(1, 80, 3))
    with pytest.raises(ValueError, match=r"prompt_mel must have shape \(1, 80, 7\), not \(1, 7, 7\)"):
        model.decode(codes, prompt_mel=torch.zeros(1, 7, 7))
    with pytest.raises(ValueError, match="prompt_mel has 34 frames, as many as prompt and codes together"):
        model.decode(codes, prompt_mel=torch.zeros(1, 80, 34))
    with pytest.raises(ValueError, match="num_steps is 0; the solver takes at least 1 step"):
        model.decode(codes, num_steps=0)
    with pytest.raises(ValueError, match="guidance_scale is -0.1; use at least 0"):
        model.decode(codes, guidance_scale=-0.1)
    with pytest.raises(ValueError, match=r"speaker_embedding must have shape \(1, 192\), not \(192,\)"):
        model.decode(codes, speaker_embedding=torch.zeros(192))
    with pytest.raises(ValueError, match=r"audio_codes must be \(batch, codes\) or .* not \(1, 2, 5\)"):
        model.decode(torch.zeros(1, 2, 5, dtype=torch.long))
    with pytest.raises(ValueError, match=r"audio_codes_mask must have shape \(1, 5\), not \(1, 4\)"):
        model.decode(codes, torch.ones(1, 4))
