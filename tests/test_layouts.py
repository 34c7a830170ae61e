"""Layouts of corpora, in the very form in which they are published: found by looking, read in parts, nothing run."""

import gzip
import io
import json
import tarfile

import datasets
import numpy as np
import pytest
import soundfile
from builders import tone, write_wav
from datasets import disable_progress_bars

from training_examples.preparation.layouts import LAYOUTS, find_layout
from training_examples.preparation.recordings import AudioLimits, load_recording
from training_examples.preparation.records import RejectedError
from training_examples.preparation.sources import open_source

TEXTS = ["The birch canoe slid on the smooth planks.", 'He said "no", twice: 1|2 is no', "null", "Füße, 你好"]
RATE = 16_000


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    disable_progress_bars()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def wave(index):
    return tone(0.4 + 0.1 * index, frequency=200 + 100 * index)


def make_ljspeech(folder):
    (folder / "wavs").mkdir()
    lines = []
    for index, text in enumerate(TEXTS):
        text = text.replace("|", " ")
        write_wav(folder / "wavs" / f"LJ001-000{index}.wav", wave(index))
        lines.append(f"LJ001-000{index}|{text}|{text.lower()}\n")
    (folder / "metadata.csv").write_text("".join(lines), encoding="utf-8")
    return [text.replace("|", " ") for text in TEXTS]


def make_common_voice(folder):
    (folder / "clips").mkdir()
    columns = (
        "client_id path sentence_id sentence sentence_domain up_votes down_votes age gender accents variant locale"
    )
    lines = ["\t".join([*columns.split(), "segment"]) + "\n"]
    for index, text in enumerate(TEXTS):
        soundfile.write(folder / "clips" / f"common_voice_en_{index}.mp3", wave(index), RATE)
        row = [f"c{index}", f"common_voice_en_{index}.mp3", f"s{index}", text, "", "2", "0", "", "", "", "", "en", ""]
        lines.append("\t".join(row) + "\n")
    for name, some in (("validated", lines), ("dev", lines[:2])):
        (folder / f"{name}.tsv").write_text("".join(some), encoding="utf-8")
    return TEXTS


def make_kaldi(folder):
    recording = np.concatenate([wave(index) for index in range(len(TEXTS))])
    write_wav(folder / "rec1.wav", recording)
    (folder / "wav.scp").write_text("rec1 rec1.wav\n")
    start, segments = 0.0, []
    for index in range(len(TEXTS)):
        end = start + 0.4 + 0.1 * index
        segments.append(f"utt{index} rec1 {start:.2f} {end:.2f}\n")
        start = end
    (folder / "segments").write_text("".join(segments))
    (folder / "text").write_text("".join(f"utt{i} {text}\n" for i, text in enumerate(TEXTS)), encoding="utf-8")
    (folder / "utt2spk").write_text("".join(f"utt{i} spk{i % 2}\n" for i in range(len(TEXTS))))
    return TEXTS


def make_nemo(folder):
    (folder / "audio").mkdir()
    rows = []
    for index, text in enumerate(TEXTS):
        padded = np.concatenate([tone(0.5, frequency=900), wave(index), tone(0.3, frequency=900)])
        samples = wave(index) if index == 0 else padded
        write_wav(folder / "audio" / f"{index}.wav", samples)
        row = {"audio_filepath": f"audio/{index}.wav", "duration": 0.4 + 0.1 * index, "text": text}
        rows.append(row if index == 0 else {**row, "offset": 0.5})
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (folder / "train_manifest.json").write_text(lines, encoding="utf-8")
    (folder / "val_manifest.json").write_text(lines.splitlines()[0] + "\n", encoding="utf-8")
    return TEXTS


def add(tar, name, content):
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


def make_webdataset(folder):
    for shard in range(2):
        with tarfile.open(folder / f"shard-00000{shard}.tar", "w") as tar:
            for index in range(2 * shard, 2 * shard + 2):
                file = io.BytesIO()
                soundfile.write(file, wave(index), RATE, format="FLAC")
                add(tar, f"speech/{index:06d}.flac", file.getvalue())
                add(tar, f"speech/{index:06d}.json", json.dumps({"speaker": f"spk{index}", "text": "other"}).encode())
                add(tar, f"speech/{index:06d}.txt", TEXTS[index].encode())
    return TEXTS


def make_lhotse(folder):
    with gzip.open(folder / "cuts.jsonl.gz", "wt", encoding="utf-8") as lines:
        for index, text in enumerate(TEXTS):
            left = np.concatenate([tone(0.5, frequency=900), wave(index), tone(0.3, frequency=900)])
            write_wav(folder / f"rec{index}.wav", np.stack([left * 0.1, left], 1))
            duration = len(left) / RATE
            recording = {
                "id": f"rec{index}",
                "sources": [{"type": "file", "channels": [0, 1], "source": f"rec{index}.wav"}],
                "sampling_rate": RATE,
                "num_samples": len(left),
                "duration": duration,
                "channel_ids": [0, 1],
            }
            said = {"id": f"sup{index}", "recording_id": f"rec{index}", "start": 0.0, "duration": 0.4 + 0.1 * index}
            said |= {"channel": 1, "text": text, "speaker": f"spk{index}", "language": "English"}
            said["alignment"] = {"word": [["The", 0.0, 0.1, None]]}
            cut = {"id": f"cut{index}", "start": 0.5, "duration": 0.4 + 0.1 * index, "channel": 1}
            cut |= {"supervisions": [said], "recording": recording, "type": "MonoCut"}
            lines.write(json.dumps(cut, ensure_ascii=False) + "\n")
    return TEXTS


MAKERS = {
    "ljspeech": make_ljspeech,
    "common_voice": make_common_voice,
    "kaldi": make_kaldi,
    "nemo": make_nemo,
    "webdataset": make_webdataset,
    "lhotse": make_lhotse,
}


def read(location, **options):
    """The records of a source with their waveforms at 16 kHz."""
    (source,) = open_source(str(location), **options)
    rows = [row for chunk in source.chunks(0, 3, {}) for row in chunk.records]
    assert {"audio", "text"} <= set(source.column_names)
    return rows, [load_recording(row["audio"], source.root, RATE) for row in rows]


def test_every_layout_has_a_test():
    assert list(MAKERS) == list(LAYOUTS)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", MAKERS)
def test_a_layout_is_found_by_looking_and_read(name, streaming, tmp_path):
    folder = tmp_path / "mön [korpus] 1"  # a name that is a pattern, too
    folder.mkdir()
    texts = MAKERS[name](folder)
    rows, waves = read(folder, streaming=streaming)
    assert [row["text"] for row in rows] == texts
    for index, samples in enumerate(waves):
        if name == "common_voice":  # MP3: as long and as loud
            assert abs(len(samples) - len(wave(index))) < 0.1 * RATE
            assert np.sqrt(np.mean(samples**2)) == pytest.approx(0.3 / np.sqrt(2), rel=0.1)
        else:
            np.testing.assert_allclose(samples, wave(index), atol=1e-4)
    assert rows == read(folder, layout=name)[0]


def test_the_file_of_a_layout_may_be_named(tmp_path):
    named = {
        "ljspeech": "metadata.csv",
        "common_voice": "validated.tsv",
        "kaldi": "wav.scp",
        "nemo": "train_manifest.json",
        "webdataset": "shard-*.tar",
        "lhotse": "cuts.jsonl.gz",
    }
    for name, file in named.items():
        (tmp_path / name).mkdir()
        MAKERS[name](tmp_path / name)
        if name == "common_voice":
            os_clips = tmp_path / name / "clips"
            assert os_clips.is_dir()
        assert len(read(tmp_path / name / file)[0]) == 4, name


def test_columns_of_the_layouts_keep_what_else_they_have(tmp_path):
    for name in ("ljspeech", "kaldi", "webdataset", "lhotse"):
        (tmp_path / name).mkdir()
        MAKERS[name](tmp_path / name)
    assert read(tmp_path / "ljspeech")[0][0]["normalized_text"] == TEXTS[0].lower()
    assert [row["speaker"] for row in read(tmp_path / "kaldi")[0]] == ["spk0", "spk1"] * 2
    assert [row["speaker"] for row in read(tmp_path / "webdataset")[0]] == [f"spk{i}" for i in range(4)]
    assert read(tmp_path / "lhotse")[0][1]["speaker"] == "spk1"


def test_splits_are_those_of_the_names(tmp_path):
    make_nemo(tmp_path)
    assert len(read(tmp_path)[0]) == 4
    assert len(read(tmp_path, split="validation")[0]) == 1
    with pytest.raises(ValueError, match="`--split` test.*train_manifest.json, val_manifest.json"):
        read(tmp_path, split="test")
    voice = tmp_path / "voice"
    voice.mkdir()
    make_common_voice(voice)
    assert len(read(voice, split="dev")[0]) == 1 == len(read(voice, split="validation")[0])
    with pytest.raises(ValueError, match="`--split` test.*dev, validated"):
        read(voice, split="test")
    kaldi = tmp_path / "kaldi" / "eval"
    kaldi.mkdir(parents=True)
    make_kaldi(kaldi)
    assert len(read(kaldi.parent, split="eval")[0]) == 4


def test_a_layout_that_is_another_or_not_clear_is_refused(tmp_path):
    make_kaldi(tmp_path)
    with pytest.raises(ValueError, match="`--layout` ljspeech.*needs metadata.csv"):
        read(tmp_path, layout="ljspeech")
    with pytest.raises(ValueError, match="`--layout` is 'klingon'; choose from ljspeech"):
        read(tmp_path, layout="klingon")
    make_webdataset(tmp_path)
    with pytest.raises(ValueError, match="may be read as kaldi, webdataset; say which with `--layout`"):
        read(tmp_path)
    assert len(read(tmp_path, layout="webdataset")[0]) == 4
    (tmp_path / "plain").mkdir()
    assert find_layout(tmp_path / "plain", "train") is None


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("sox in.wav -t wav - |", "shell command.*not run here"),
        ("touch {} |", "shell command"),
        ("-", "shell command"),
        ("raw.ark:8721", "lies in an archive"),
    ],
)
def test_commands_of_kaldi_are_refused_and_never_run(entry, message, tmp_path):
    make_kaldi(tmp_path)
    (tmp_path / "wav.scp").write_text(f"rec1 rec1.wav\nrec2 {entry.format(tmp_path / 'was-run')}\n")
    with pytest.raises(ValueError, match=message) as error:
        open_source(str(tmp_path))
    assert "rec2" in str(error.value) and not (tmp_path / "was-run").exists()


def test_the_split_of_a_folder_with_metadata_is_the_one_whose_name_says_it(tmp_path):
    for split, count in (("train", 3), ("valid", 2)):
        (tmp_path / split).mkdir()
        for row in range(count):
            write_wav(tmp_path / split / f"{row}.wav", wave(row))
        lines = [f"{row}.wav,{split} {row}" for row in range(count)]
        (tmp_path / split / "metadata.csv").write_text("\n".join(["file_name,text", *lines]), encoding="utf-8")
    for wanted, found in (("train", "train"), ("valid", "valid"), ("validation", "valid"), ("dev", "valid")):
        (source,) = open_source(str(tmp_path), wanted)
        rows = [row for chunk in source.chunks(0, 9, {}) for row in chunk.records]
        assert {row["text"].split()[0] for row in rows} == {found}
    with pytest.raises(ValueError, match="`--split` test: .* has train, valid"):
        open_source(str(tmp_path), "test")
    for split, speaker in (("train", "anna"), ("valid", "ben")):
        (tmp_path / split).rename(tmp_path / speaker)
    assert len(open_source(str(tmp_path), "test")) == 2  # no name says anything of splits


@pytest.mark.parametrize("name", ["wav.scp", "text", "segments", "utt2spk"])
def test_two_lines_of_kaldi_that_differ_are_refused(tmp_path, name):
    """Else a recording would be given the text of another."""
    make_kaldi(tmp_path)
    lines = (tmp_path / name).read_text()
    key = lines.split()[0]
    (tmp_path / name).write_text(f"{lines}{lines.splitlines()[0]}\n")
    assert len(read(tmp_path)[0]) == 4
    (tmp_path / name).write_text(f"{lines}{key} rec0 7 8\n")
    with pytest.raises(ValueError, match=f"{name}, line {len(lines.splitlines()) + 1}: {key} is 'rec0 7 8' here and"):
        read(tmp_path)


def test_a_tar_that_has_a_file_twice_is_refused(tmp_path):
    with tarfile.open(tmp_path / "shard.tar", "w") as tar:
        for text in ("one", "two"):
            member = tarfile.TarInfo("a.txt")
            member.size = len(text)
            tar.addfile(member, io.BytesIO(text.encode()))
    with pytest.raises(ValueError, match="a.txt is in it twice"):
        read(tmp_path)


def test_kaldi_without_segments_and_with_gaps(tmp_path):
    make_kaldi(tmp_path)
    (tmp_path / "segments").unlink()
    (tmp_path / "text").write_text("rec1 all of it\nlost nobody has it\n")
    (source,) = open_source(str(tmp_path))
    rows = [row for chunk in source.chunks(0, 9, {}) for row in chunk.records]
    assert [(row["id"], row["text"]) for row in rows] == [("rec1", "all of it"), ("lost", "nobody has it")]
    assert len(load_recording(rows[0]["audio"], source.root, RATE)) == sum(len(wave(i)) for i in range(4))
    with pytest.raises(RejectedError, match="lost is in text alone"):
        load_recording(rows[1]["audio"], source.root, RATE)
    (tmp_path / "segments").write_text("utt0 rec1 0.0 -1\nutt1 rec9 0 1\n")
    (tmp_path / "text").write_text("utt0 to the end\nutt1 x\n")
    (source,) = open_source(str(tmp_path))
    rows = [row for chunk in source.chunks(0, 9, {}) for row in chunk.records]
    assert len(load_recording(rows[0]["audio"], source.root, RATE)) == sum(len(wave(i)) for i in range(4))
    with pytest.raises(RejectedError, match="rec9 is not in wav.scp"):
        load_recording(rows[1]["audio"], source.root, RATE)
    (tmp_path / "segments").write_text("utt0 rec1 zero 1\n")
    with pytest.raises(ValueError, match="utt0 needs a recording, its start and its end"):
        open_source(str(tmp_path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"recording": None, "type": "MixedCut"}, "MixedCut cut0 has no recording"),
        ({"sources": [{"type": "command", "channels": [1], "source": "touch was-run"}]}, "is a command, not a file"),
        ({"transforms": [{"name": "Speed", "kwargs": {"factor": 1.1}}]}, "changed by Speed"),
        ({"sources": [{"type": "file", "channels": [0], "source": "rec0.wav"}]}, "no channel 1"),
    ],
)
def test_cuts_that_are_more_than_a_part_of_a_file_are_named(change, message, tmp_path):
    make_lhotse(tmp_path)
    with gzip.open(tmp_path / "cuts.jsonl.gz", "rt", encoding="utf-8") as lines:
        cuts = [json.loads(line) for line in lines]
    if "recording" in change:
        cuts[0] |= change
    else:
        cuts[0]["recording"] |= change
    (tmp_path / "cuts.jsonl.gz").unlink()
    (tmp_path / "cuts.jsonl").write_text("".join(json.dumps(cut) + "\n" for cut in cuts))
    (source,) = open_source(str(tmp_path))
    rows = next(source.chunks(0, 9, {})).records
    with pytest.raises(RejectedError, match=message):
        load_recording(rows[0]["audio"], source.root, RATE)
    assert len(load_recording(rows[1]["audio"], source.root, RATE)) == len(wave(1))
    assert not (tmp_path / "was-run").exists()


# ------------------------------------------------------------------ parts of recordings and limits


def test_parts_of_recordings(tmp_path):
    left, right = tone(2.0, frequency=300), tone(2.0, frequency=500)
    write_wav(tmp_path / "two.wav", np.stack([left, right], 1))

    def part(**what):
        return load_recording({"path": "two.wav", **what}, tmp_path, RATE)

    np.testing.assert_allclose(part(offset=0.5, duration=1.0, channel=1), right[8000:24000], atol=1e-4)
    np.testing.assert_allclose(part(offset=1.5), ((left + right) / 2)[24000:], atol=1e-4)
    np.testing.assert_allclose(part(duration=9.0, channel=0), left, atol=1e-4)
    for what, message in (
        ({"offset": -1.0}, "no part of a recording"),
        ({"offset": 0.0, "duration": 0.0}, "no part of a recording"),
        ({"offset": 5.0}, "empty"),
        ({"channel": 2}, "no channel 2"),
    ):
        with pytest.raises(RejectedError, match=message):
            part(**what)
    with pytest.raises(RejectedError, match="gone.wav") as error:
        load_recording({"path": "gone.wav", "offset": 1.0}, tmp_path, RATE)
    assert error.value.kind == "missing audio"


def test_limits_of_audio():
    limits = AudioLimits(min_seconds=0.5, max_seconds=2.0)
    quiet, clipped = tone(1.0) * 1e-3, np.clip(tone(1.0) * 5, -1, 1)
    limits.check(tone(1.0), RATE)
    for samples, kind, said in (
        (tone(0.4), "short audio", "0.40 s"),
        (tone(2.5), "long audio", "2.5 s"),
        (np.zeros(RATE, np.float32), "silent audio", "-200 dB"),
        (quiet, "silent audio", "-73 dB"),
        (clipped, "clipped audio", "at full scale"),
    ):
        with pytest.raises(RejectedError, match=said) as error:
            limits.check(samples, RATE)
        assert error.value.kind == kind
    one_word = np.concatenate([np.zeros(RATE // 2, np.float32), tone(0.2), np.zeros(RATE // 2, np.float32)])
    limits.check(one_word, RATE)
    AudioLimits(min_level=-90.0).check(quiet, RATE)
    AudioLimits(max_clipping=1.0).check(clipped, RATE)


def test_limits_of_speaking_rate():
    limits = AudioLimits(min_speaking_rate=2.0, max_speaking_rate=30.0)
    limits.check_speaking_rate("fifteen letters", 1.0)
    for text, seconds, kind in (("hi", 3.0, "slow speech"), ("far too many words " * 5, 1.0, "fast speech")):
        with pytest.raises(RejectedError, match="characters in") as error:
            limits.check_speaking_rate(text, seconds)
        assert error.value.kind == kind
    AudioLimits().check_speaking_rate("x" * 1000, 0.1)
