"""The script that makes a card's listening samples and their picture."""

import sys

import matplotlib.pyplot as plt
import numpy as np
import pytest
import soundfile
from builders import build_model, build_processor, tone, write_wav

from training_examples.ttt_tiny import domain, make_samples


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ttt-small")
    processor = build_processor()
    build_model(processor).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture
def make(model, tmp_path, monkeypatch, capsys):
    """Runs the script with a recording and options; gives the folder and what is printed."""

    def run(*options):
        question = write_wav(tmp_path / "Question 1.wav", tone(0.4))
        words = ["--model", str(model), "--output_dir", str(tmp_path / "samples"), "--questions", str(question)]
        monkeypatch.setattr(sys, "argv", ["make_samples.py", *words, *options])
        make_samples.main()
        return tmp_path / "samples", capsys.readouterr().out

    return run


def test_every_answer_is_a_file_and_a_row_and_the_first_is_drawn(make):
    folder, printed = make("Who are you?", "--read_aloud", "two two")
    names = ["question_1", "who_are_you", "read_two_two"]
    assert {path.name for path in folder.iterdir()} == {f"{name}.flac" for name in names} | {"question_1.png"}
    for name in names:
        info = soundfile.info(folder / f"{name}.flac")
        assert (info.channels, info.samplerate, info.frames, info.subtype) == (1, 16_000, 40 * 1280, "PCM_16")
        assert f"(samples/{name}.flac)" in printed
    assert "spoken: question_1" in printed and "typed: Who are you?" in printed and "read aloud: two two" in printed
    pixels = plt.imread(folder / "question_1.png")
    assert pixels.shape[1] > 1000 and pixels.std() > 0.1


def test_options_of_generate_are_taken(make):
    folder, _ = make("--read_aloud", "two", "--generation", "max_new_tokens=8")
    assert soundfile.info(folder / "read_two.flac").frames < 8 * 1280


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["?!"], "'\\?!' has no letter or digit"),
        (["--read_aloud", "..."], "'...' has no letter or digit"),
        (["--questions", "", "--read_aloud", ""], "`--questions` and `--read_aloud` are empty"),
        (["gone.wav"], "gone.wav: there is no such recording"),
        (["two two", "Two, two!"], "written to two_two.flac"),
        (["two", "--generation", "max_new_tokens=1"], "says nothing"),
    ],
)
def test_what_gives_no_samples_is_refused_before_anything_is_written(make, tmp_path, options, message):
    with pytest.raises((OSError, ValueError), match=message):
        make(*options)
    assert not (tmp_path / "samples").exists()


def test_what_is_asked_by_default_is_held_out_and_in_the_domain():
    arguments = make_samples.SampleArguments()
    texts = [question for question in arguments.questions if not question.endswith(".wav")] + arguments.read_aloud
    assert len(arguments.questions + arguments.read_aloud) == 3 and all(map(domain.is_held_out, texts))
    assert {word for text in texts for word in text.split()} <= set(domain.vocabulary())


@pytest.mark.parametrize("rate", [16_000, 24_000])
def test_a_picture_is_drawn_of_any_rate_and_of_silence(rate, tmp_path):
    for name, wave in (("tone", tone(0.5, rate)), ("silence", np.zeros(rate // 4, np.float32))):
        make_samples.draw_speech(wave, rate, "said", "how", tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").stat().st_size > 5000
