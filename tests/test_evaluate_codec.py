"""The figures of the audio tokenizer alone: what its script refuses."""

import sys

import pytest

from training_examples.ttt_tiny import evaluate_codec, speech


@pytest.mark.parametrize(
    ("option", "message"),
    [("--vocoders nural", "invalid choice: 'nural'"), ("--limit -1", "`--limit` is -1"), ("--batch_size 0", "is 0;")],
)
def test_impossible_options_of_the_audio_tokenizers_figures_are_refused_first(option, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["evaluate_codec.py", *option.split()])
    monkeypatch.setattr(evaluate_codec, "AutoModelForAudioTokenization", None)
    with pytest.raises((ValueError, SystemExit)) as refusal:
        evaluate_codec.main()
    assert message in f"{refusal.value}{capsys.readouterr().err}"


@pytest.mark.parametrize("limit", [0, -1])
def test_a_list_is_never_cut_from_its_end(limit, tmp_path):
    (tmp_path / "tts.jsonl").write_text('{"id": "0"}\n{"id": "1"}\n')
    assert speech.read_list(tmp_path, "tts", 1) == [{"id": "0"}]
    with pytest.raises(ValueError, match=f"limit of rows is {limit}; give at least 1"):
        speech.read_list(tmp_path, "tts", limit)
