"""The comparison of audio tokenizers for ttt-tiny, from shards of speech to a row of the table."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from modeling_ttt.ttt_codec import TttCodecConfig, TttCodecModel
from training_examples.ttt_tiny import compare_codecs, domain, speech
from training_examples.ttt_tiny.compare_codecs import ComparisonArguments
from training_examples.ttt_tiny.phonemes import build_head, pronunciations


@pytest.fixture
def data(tmp_path):
    """A folder as build_speech.py leaves it: one shard of the assistant's speech, one held-out list."""
    rng = np.random.default_rng(0)
    texts = ["one two", "three four", "blue dog", "six ten", "green fish"]
    assert not any(map(domain.is_held_out, texts))
    (tmp_path / "speech").mkdir()
    waves = [(3000 * rng.standard_normal(9_600)).astype(np.int16) for _ in texts]
    speech.write_shard(tmp_path / "speech" / "assistant-0000.safetensors", [{"text": text} for text in texts], waves)
    (tmp_path / "eval").mkdir()
    soundfile.write(tmp_path / "eval" / "0.flac", rng.standard_normal(9_600) / 10, 24_000)
    row = {"id": "0", "task": "tts", "question": "", "answer": "nine ten", "audio": None, "answer_audio": "0.flac"}
    (tmp_path / "eval" / f"{compare_codecs.LIST}.jsonl").write_text(json.dumps(row) + "\n")
    torch.manual_seed(0)
    codec = TttCodecModel(TttCodecConfig(hidden_size=8, vocoder_hidden_size=8, fsq_levels=[3, 3]))
    codec.save_pretrained(tmp_path / "codec" / "tokenizer")
    head = build_head(codec, pronunciations()[1])
    torch.save({"head": head.state_dict()}, tmp_path / "codec" / "tokenizer" / "training_state.pt")
    return tmp_path


def test_a_codec_gets_a_row_of_what_is_lost_and_what_is_learned(data):
    args = ComparisonArguments(
        [data / "codec" / "tokenizer"], [], data, data / "out", max_steps=2, batch_size=2, hidden_size=16
    )
    torch.set_num_threads(1)
    row = compare_codecs.measure(args, args.codecs[0], {})
    assert row["codes"] == 9 and row["codes_per_second"] == 12.5 and row["texts"] == 5
    assert 0 < row["loss"] < 12.5 * 12 and 0 <= row["accuracy"] <= 1
    assert compare_codecs.measure(args, args.codecs[0], {}) == row, "a seed gives one result"
    text = compare_codecs.table({"original speech": {"decoded": {}}, "codec": row}, [])
    assert row["phoneme_error"] > 0.5 and row["phoneme_error_before_codes"] > 0.5  # nobody has trained them
    assert f"| codec | 9 | 12.5 | 40 | {100 * row['phoneme_error']:.1f} % |" in text


def test_the_twin_learns_what_can_be_learned(data):
    args = ComparisonArguments(
        [data / "codec" / "tokenizer"], [], data, data / "out", max_steps=1, batch_size=2, hidden_size=16
    )
    codec = TttCodecModel.from_pretrained(args.codecs[0]).eval()
    torch.manual_seed(0)
    model, processor = compare_codecs.build_model(codec, 32, 64, 1, 2)
    model.config.audio_objective = "autoregressive"
    collator = compare_codecs.TttDataCollator(processor)
    examples = [compare_codecs.write_example(processor, "one two", [1, 2, 3, 4, 5])] * 4
    before, _ = compare_codecs.held_out_loss(model, collator, examples)
    args.max_steps, args.learning_rate = 150, 1e-2
    compare_codecs.train_twin(args, model, collator, examples)
    after, accuracy = compare_codecs.held_out_loss(model, collator, examples)
    assert after < 0.5 * before and accuracy == 1.0


def test_every_codec_has_a_row_of_its_own():
    names = compare_codecs.row_names
    assert names([Path("a/tokenizer"), Path("b/tokenizer")]) == ["a", "b"]
    assert names([Path("a/tokenizer"), Path("a/decoder")]) == ["a/tokenizer", "a/decoder"]
    assert names([Path("x/a/tokenizer"), Path("y/a/tokenizer")]) == ["x/a/tokenizer", "y/a/tokenizer"]
    with pytest.raises(ValueError, match="--codecs` names a folder twice"):
        ComparisonArguments([Path("a/tokenizer"), Path("a/../a/tokenizer")], [])
    with pytest.raises(ValueError, match="--whisper` has two models of one name"):
        ComparisonArguments([Path("a/tokenizer")], ["first/base", "second/base"])


@pytest.mark.parametrize("option", ["shards", "sentences", "max_steps", "batch_size"])
def test_numbers_below_one_are_refused(option):
    with pytest.raises(ValueError, match=f"--{option}` is -1; it must be at least 1"):
        ComparisonArguments([Path("a/tokenizer")], [], **{option: -1})


def test_speech_that_is_missing_is_said_before_anything_is_heard(data, monkeypatch):
    (data / "speech" / "assistant-0000.safetensors").unlink()
    told = f"--codecs {data / 'codec' / 'tokenizer'} --whisper base --data_dir {data} --output_dir {data / 'out'}"
    monkeypatch.setattr(sys, "argv", ["compare_codecs.py", *told.split()])
    monkeypatch.setattr(compare_codecs, "WhisperJudge", None)
    with pytest.raises(FileNotFoundError, match="no assistant shards in .*speech: run build_speech.py first"):
        compare_codecs.main()


def test_a_batch_is_no_larger_than_what_there_is(data):
    args = ComparisonArguments([data], [], max_steps=1, batch_size=32)
    codec = TttCodecModel.from_pretrained(data / "codec" / "tokenizer").eval()
    model, processor = compare_codecs.build_model(codec, 32, 64, 1, 2)
    examples = [compare_codecs.write_example(processor, "one two", [1, 2, 3])] * 2
    compare_codecs.train_twin(args, model, compare_codecs.TttDataCollator(processor), examples)
