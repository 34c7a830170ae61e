"""GLM-4-Voice's speech encoder: the published codes, stage by stage and whole, and rows that do not know each other."""

import hashlib

import pytest
import torch
from glm4_voice_goldens import (
    golden_batch,
    golden_case,
    golden_description,
    golden_model,
    golden_tensors,
    golden_waveform,
    pad_waveforms,
)

HOP = 1280


def close(found: torch.Tensor, expected: torch.Tensor, atol: float) -> None:
    torch.testing.assert_close(found, expected, atol=atol, rtol=0)


def features_of(waveforms: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-mel frames and their mask of waveforms that are padded to whole codes."""
    padded, mask = pad_waveforms(waveforms)
    padded = torch.nn.functional.pad(padded, (0, -padded.shape[1] % HOP))
    return golden_model().extract_features(padded, mask.sum(-1))


def codes_of(waveforms: list[torch.Tensor], value: float = 0.0, **options) -> list[torch.Tensor]:
    """Valid codes of each row of a batch whose padding holds `value`."""
    output = golden_model().encode(*pad_waveforms(waveforms, value), **options)
    pairs = zip(output.audio_codes, output.audio_codes_mask, strict=True)
    return [codes[0, mask.bool()] for codes, mask in pairs]


@pytest.mark.parametrize("name", ["waveform", "long"])
def test_the_waveforms_are_the_goldens_own(name):
    pcm = (golden_waveform(name) * 32_768).to(torch.int16)
    assert hashlib.sha256(pcm.numpy().tobytes()).hexdigest() == golden_description("tokenizer")[name]["int16_sha256"]


def test_features_are_the_published_ones():
    golden = golden_case("tokenizer", "waveform")
    features, mask = features_of([golden["audio"]])
    close(features, golden["input_features"], 1e-4)
    assert torch.equal(mask, golden["attention_mask"])


def test_features_of_a_batch_are_the_published_ones_but_for_a_last_frame():
    """The published batch lets the zeros after a row into its last frame, where the row alone is mirrored."""
    golden = golden_case("tokenizer", "batch")
    features, mask = features_of(golden_batch())
    assert torch.equal(mask, golden["attention_mask"])
    for index, frames in enumerate(mask.sum(-1).tolist()):
        settled = frames - (frames % 8 == 0)  # other rows are padded to a whole code, with zeros of their own
        close(features[index, :, :settled], golden["input_features"][index, :, :settled], 1e-4)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("case", ["waveform", "batch"])
@torch.no_grad()
def test_hidden_states_and_codes_are_the_published_ones(case, implementation):
    model, golden = golden_model(), golden_case("tokenizer", case)
    model.set_attn_implementation(implementation)
    hidden = model.encoder(golden["input_features"], golden["attention_mask"])
    model.set_attn_implementation("sdpa")
    close(hidden, golden["hidden_before_quantization"], 5e-5)
    codes = model.quantizer(hidden)
    assert torch.equal(codes, golden["quantized_token_ids"])
    if "last_hidden_state" in golden:
        close(model.quantizer.embed(codes), golden["last_hidden_state"], 5e-5)


@pytest.mark.parametrize("name", ["waveform", "long"])
def test_codes_of_a_waveform_are_the_published_ones(name):
    golden = golden_tensors("tokenizer")
    output = golden_model().encode(golden_waveform(name)[None])
    assert torch.equal(output.audio_codes[0, 0], golden[f"{name}.tokens"])


@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_codes_of_a_batch_are_the_published_ones(batch_size):
    golden = golden_tensors("tokenizer")
    long, short = codes_of([golden_waveform("long"), golden_waveform("waveform")], batch_size=batch_size)
    assert torch.equal(long, golden["pair.tokens_long"]) and torch.equal(short, golden["pair.tokens_wave"])
    output = golden_model().encode(*pad_waveforms(golden_batch()), batch_size=batch_size)
    assert torch.equal(output.audio_codes_mask, golden["batch.pooled_attention_mask"].long())
    rows = codes_of(golden_batch(), batch_size=batch_size)
    assert [len(row) for row in rows] == golden_description("tokenizer")["batch"]["valid_token_counts"]
    for index, row in enumerate(rows):
        assert torch.equal(row, golden[f"batch.valid_token_ids.{index}"])


def test_codes_of_a_row_do_not_depend_on_neighbours_or_padding():
    parts = ((0, 20 * HOP), (9000, 9000 + 7 * HOP), (5, 6))
    waveforms = [golden_waveform("waveform")[start:end] for start, end in parts]
    together = codes_of(waveforms, value=0.9)  # padding must not be heard, whatever it holds
    for waveform, codes in zip(waveforms, together, strict=True):
        assert torch.equal(codes, golden_model().encode(waveform[None]).audio_codes[0, 0])


@torch.no_grad()
def test_hidden_states_of_a_row_do_not_depend_on_neighbours():
    """Also where a row ends with a whole code, whose last frame is mirrored at the row's end."""
    model, waveforms = golden_model(), golden_batch()
    features, mask = features_of(waveforms)
    together = model.encoder(features, mask)
    for index, waveform in enumerate(waveforms):
        alone = model.encoder(*features_of([waveform]))
        close(together[index, : alone.shape[1]], alone[0], 1e-5)


@pytest.mark.parametrize("samples", [1, HOP - 1, HOP, HOP + 1, 10 * HOP + 7])
def test_n_samples_give_exactly_the_ceiling_of_n_over_1280_codes(samples):
    output = golden_model().encode(golden_waveform("waveform")[None, None, :samples])
    assert output.audio_codes.shape == (1, 1, -(-samples // HOP))
    assert output.audio_codes_mask.all()


def test_padding_has_the_code_zero_and_a_row_may_be_empty():
    waveforms, mask = pad_waveforms([golden_waveform("waveform")[:9000], golden_waveform("long")[:3000]])
    mask[1] = 0
    output = golden_model().encode(waveforms, mask)
    assert output.audio_codes_mask.sum(-1).tolist() == [8, 0]
    assert not output.audio_codes[1].any()


def test_chunks_of_thirty_seconds_do_not_see_each_other():
    long = golden_waveform("long")
    whole = golden_model().encode(long[None]).audio_codes[0, 0]
    parts = [golden_model().encode(part[None]).audio_codes[0, 0] for part in long.split(480_000)]
    assert [len(part) for part in parts] == golden_description("tokenizer")["long"]["segments_tokens"]
    assert torch.equal(whole, torch.cat(parts))


def test_bad_input_is_refused_by_name():
    with pytest.raises(ValueError, match="2 channels"):
        golden_model().encode(torch.zeros(1, 2, 3000))
    with pytest.raises(ValueError, match="samples > 0"):
        golden_model().encode(torch.zeros(1, 0))
    with pytest.raises(ValueError, match=r"padding_mask must have .* shape \(1, 3000\), not \(1, 2999\)"):
        golden_model().encode(torch.zeros(1, 3000), torch.ones(1, 2999))
