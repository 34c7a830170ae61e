"""Lists of what people say, made of recordings that the test writes itself in the layout of Debian's packages."""

import json

import numpy as np
import pytest
import soundfile

from training_examples.ttt_tiny import human_lists
from training_examples.ttt_tiny.synthesis import SAMPLING_RATE


def tone(rate, seconds, frequency):
    """A tone with half a second of silence on both sides."""
    return np.pad(0.3 * np.sin(2 * np.pi * frequency * np.arange(int(rate * seconds)) / rate), rate // 2)


@pytest.fixture
def humans(tmp_path):
    """The digits of two speakers at two rates, two animals, and PocketSphinx's sentences."""
    stamps, sphinx = tmp_path / human_lists.STAMPS, tmp_path / human_lists.SPHINX
    (stamps / "symbols/math").mkdir(parents=True)
    for digit in range(10):
        for name, rate in (("{}.ogg", 11_025), ("{}_en_GB.ogg", 44_100)):
            path = stamps / "symbols/math" / name.format(digit)
            soundfile.write(path, tone(rate, 0.3 + digit / 100, 200 + 50 * digit), rate)
    (stamps / "animals").mkdir()
    for name, text in (("dog", "A dog.\n"), ("wombat", "A wombat.\n"), ("nobody", None)):
        soundfile.write(stamps / "animals" / f"{name}_desc.ogg", tone(44_100, 0.4, 300), 44_100)
        if text is not None:
            (stamps / "animals" / f"{name}.txt").write_text(text)
    for name in (*human_lists.DICTATIONS, *human_lists.OTHERS):
        (sphinx / name).parent.mkdir(parents=True, exist_ok=True)
        samples = (tone(16_000, 0.5, 250) * 32767).astype(np.int16)
        if name.endswith(".raw"):
            samples.tofile(sphinx / name)
        else:
            soundfile.write(sphinx / name, samples, 16_000)
    return tmp_path


def test_digits_of_two_people_and_a_control_treated_alike(humans, tmp_path, monkeypatch):
    monkeypatch.setattr(human_lists, "speak", lambda text, voice: tone(SAMPLING_RATE, 0.4, 300))
    monkeypatch.setattr(
        "sys.argv", ["human_lists", "--humans", str(humans), "--output_dir", str(tmp_path), "--strings", "5"]
    )
    human_lists.main()
    folder = tmp_path / "eval"
    lists = {path.stem: [json.loads(line) for line in path.open()] for path in folder.glob("*.jsonl")}
    assert {name: len(rows) for name, rows in lists.items()} == {
        "human_digits": 30, "control_digits": 30, "human_words": 3, "human_other": 11,
    }  # fmt: skip
    assert [row["answer"] for row in lists["human_digits"]] == [row["answer"] for row in lists["control_digits"]]
    assert {row["voice"] for row in lists["human_digits"]} == {"human:american", "human:british"}
    assert {row["answer"] for row in lists["human_words"]} == {"dog", "two nine three four zero", "five five"}
    for row in lists["human_digits"]:
        wave, rate = soundfile.read(folder / row["audio"])
        words = row["answer"].split()
        assert rate == SAMPLING_RATE and 2 <= len(words) <= 5 or row["kind"] == "single"
        spoken = sum(0.3 + human_lists.DIGITS.index(word) / 100 for word in words)
        # Trimmed words with 30 ms left around them, gaps of 60 ms, 100 ms at the ends.
        assert len(wave) / rate == pytest.approx(
            spoken + 0.06 * len(words) + 0.06 * (len(words) - 1) + 0.2, abs=0.02 + 0.035 * len(words)
        )
        assert not wave[: rate // 20].any() and not wave[-rate // 20 :].any()
        assert np.sqrt(np.mean(wave[np.abs(wave) > 0.003] ** 2)) == pytest.approx(human_lists.RMS, rel=0.1)


def test_a_missing_recording_says_where_it_comes_from(tmp_path):
    with pytest.raises(FileNotFoundError, match="tuxpaint-stamps-default"):
        human_lists.read_recording(tmp_path / "0.ogg")
