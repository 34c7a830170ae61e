"""Audio in: one sound in every form that users have it, what each form brings along, and what is refused by name."""

import base64
import collections
import functools
import http.server
import io
import re
import shutil
import subprocess
import threading
import warnings
from urllib.parse import quote

import numpy as np
import pytest
import soundfile
import torch
from builders import build_processor, tone, write_wav
from transformers.utils import is_torchcodec_available

from processing import audio_input_ttt
from processing.audio_input_ttt import is_single_audio, load_waveform, resample


@pytest.fixture(scope="module")
def processor():
    return build_processor()


class Samples:
    """The form of torchcodec's decoded samples."""

    def __init__(self, data, sample_rate):
        self.data, self.sample_rate = data, sample_rate


class Decoder:
    """The form of torchcodec's decoder, which `datasets` hands out for an audio column."""

    def __init__(self, data, sample_rate):
        self.samples = Samples(data, sample_rate)

    def get_all_samples(self):
        return self.samples


# ---------------------------------------------------------------------- audio in


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """1.3 s of int16-exact sound, and the file that holds it."""
    samples = np.round(tone(1.3) * 32768).astype(np.int16)
    path = write_wav(tmp_path_factory.mktemp("audio") / "a sound.wav", samples)
    return samples, path


@pytest.fixture(scope="module")
def address(sound):
    """http address of the file, served from this machine."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    handler = functools.partial(Handler, directory=sound[1].parent)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/{quote(sound[1].name)}"
    server.shutdown()


def written(content):
    """A file in memory as it is after it was written: at its end."""
    file = io.BytesIO()
    file.write(content)
    return file


def forms(sound, address):
    samples, path = sound
    exact = samples.astype(np.float32) / 32768
    yield "float array", exact
    yield "float64 array", exact.astype(np.float64)
    yield "int16 array", samples
    yield "list", exact.tolist()
    yield "tensor", torch.tensor(exact)
    yield "bfloat-free tensor of two channels", torch.tensor(np.stack([exact, exact]))
    yield "samples first", np.stack([exact, exact], axis=1)
    yield "path", path
    yield "string", str(path)
    yield "file address", path.as_uri()
    yield "http address", address
    yield "data address", "data:audio/wav;base64," + base64.b64encode(path.read_bytes()).decode()
    yield "base64", base64.b64encode(path.read_bytes()).decode()
    yield "scheme in capitals", address.replace("http", "HTTP", 1)
    yield "file scheme in capitals", path.as_uri().replace("file", "FILE", 1)
    encoded = base64.encodebytes(path.read_bytes()).decode()
    yield "base64 in lines", encoded
    yield "base64 in lines of another system", encoded.replace("\n", "\r\n")
    yield "data address in lines", "DATA:audio/wav;base64," + encoded
    yield "data address, escaped", "data:audio/wav;base64," + quote(encoded, safe="")
    yield "array of bytes", np.frombuffer(path.read_bytes(), np.uint8)
    yield "tensor of bytes", torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8)
    yield "mapping of an array of bytes", {"bytes": np.frombuffer(path.read_bytes(), np.uint8)}
    yield "bytes", path.read_bytes()
    yield "bytearray", bytearray(path.read_bytes())
    yield "view of bytes", memoryview(path.read_bytes())
    yield "view of samples", memoryview(exact)
    yield "file in memory", io.BytesIO(path.read_bytes())
    yield "file in memory, written", written(path.read_bytes())
    yield "open file", open(path, "rb")
    yield "samples and rate", (exact, 16_000)
    yield "rate and samples", (16_000, samples)
    yield "batch of one", torch.tensor(exact)[None, None]
    yield "mapping", {"array": exact, "sampling_rate": 16_000}
    yield "mapping of a file in memory", {"audio": io.BytesIO(path.read_bytes())}
    yield "undecoded dataset item", {"bytes": path.read_bytes(), "path": "elsewhere.wav"}
    yield "undecoded local dataset item", {"bytes": None, "path": str(path)}
    yield "decoded dataset item", Decoder(torch.tensor(exact)[None], 16_000)
    yield "decoded samples", Samples(torch.tensor(exact)[None], 16_000)


def test_every_form_of_one_sound_gives_the_same_waveform_and_codes(processor, sound, address):
    expected = sound[0].astype(np.float32) / 32768
    items = list(forms(sound, address))
    for name, audio in items:
        assert np.array_equal(load_waveform(audio, 16_000), expected), name
    codes = processor.encode_audio([audio for _, audio in items])
    assert len(codes) == len(items) and len(codes[0]) == 17  # ceil(1.3 * 12.5)
    assert all(torch.equal(row, codes[0]) for row in codes)


def test_8_bit_samples_stay_samples():
    sound = np.arange(256, dtype=np.uint8)
    for audio in (sound, torch.tensor(sound), sound[None]):
        assert np.array_equal(load_waveform(audio, 16_000), (np.arange(256) - 128) / 128)


def test_every_form_is_one_audio(sound, address):
    for name, audio in forms(sound, address):
        assert is_single_audio(audio), name
        assert not is_single_audio([audio]), name


@pytest.mark.parametrize("rate_key", ["sampling_rate", "sample_rate", "samplerate", "sr"])
@pytest.mark.parametrize("key", ["array", "raw", "audio", "waveform", "samples"])
def test_a_mapping_of_samples_and_their_rate_is_resampled(key, rate_key):
    sound = np.round(tone(0.5, sampling_rate=8_000) * 32768).astype(np.int16)
    expected = load_waveform(sound, 16_000, source_rate=8_000)
    exact = sound.astype(np.float32) / 32768
    samples = [sound, sound.astype(np.int32) * 65536, exact, exact.astype(np.float64), exact[None], exact.tolist()]
    samples += [torch.tensor(exact), torch.tensor(exact)[None, None], memoryview(exact), sound.astype(">i2")]
    for item in samples:
        for container in (dict, collections.UserDict, collections.OrderedDict):
            for rate in (8_000, 8_000.0, np.int64(8_000), torch.tensor(8_000)):
                mapping = container({key: item, rate_key: rate, "text": "also there"})
                assert np.array_equal(load_waveform(mapping, 16_000), expected), (type(item), container, rate)
    for item in (exact.astype(np.float16), torch.tensor(exact).bfloat16()):
        rough = load_waveform({key: item, rate_key: 8_000}, 16_000)
        assert rough.shape == expected.shape and np.abs(rough - expected).max() < 0.01


def test_a_rate_of_its_own_goes_before_one_that_is_passed(sound):
    samples, path = sound
    for audio in (path, (samples, 16_000), {"raw": samples, "sample_rate": 16_000}, {"audio": (16_000, samples)}):
        assert len(load_waveform(audio, 16_000, source_rate=8_000)) == len(samples)
    assert len(load_waveform({"array": samples}, 16_000, source_rate=8_000)) == 2 * len(samples)


def test_an_open_file_is_read_from_where_it_stands_and_again_from_its_start(sound):
    samples, path = sound
    file = io.BytesIO(b"before" + path.read_bytes())
    file.seek(6)
    assert len(load_waveform(file, 16_000)) == len(samples)
    file = io.BytesIO(path.read_bytes())
    assert np.array_equal(load_waveform(file, 16_000), load_waveform(file, 16_000))


def test_floats_of_16_bit_scale_are_warned_of_by_name():
    with pytest.warns(UserWarning, match="audio 3 holds floats up to 9830.* Divide 16-bit samples by 32768"):
        load_waveform(tone(0.1) * 32768, 16_000, name="audio 3")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_waveform(tone(0.1) * 20, 16_000)  # too loud, but sound


ENCODERS = {"m4a": "aac", "webm": "libopus", "mp4": "aac", "mkv": "flac", "aac": "aac", "mov": "pcm_s16le"}


@pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="ffmpeg is not installed")
@pytest.mark.parametrize("container", ENCODERS)
def test_containers_soundfile_cannot_read_are_decoded_by_ffmpeg(sound, tmp_path, container):
    path = tmp_path / f"sound.{container}"
    command = ["ffmpeg", "-v", "error", "-i", sound[1], "-c:a", ENCODERS[container], "-strict", "-2", path]
    if subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip(f"this ffmpeg cannot write {container}")
    expected = sound[0].astype(np.float32) / 32768
    waveform = load_waveform(path, 16_000)
    assert abs(len(waveform) - len(expected)) < 2200  # coders fill their last frame
    best = np.abs(np.correlate(waveform, expected[4000:8000])).max() / np.sum(expected[4000:8000] ** 2)
    assert best > 0.95
    assert np.array_equal(load_waveform(path.read_bytes(), 16_000), waveform)
    assert np.array_equal(load_waveform({"file": io.BytesIO(path.read_bytes())}, 16_000), waveform)


@pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="ffmpeg is not installed")
def test_ffmpeg_opens_no_list_of_other_files(sound, tmp_path):
    other = tmp_path / "other.ts"
    if subprocess.run(["ffmpeg", "-v", "error", "-i", sound[1], "-c:a", "aac", other], capture_output=True).returncode:
        pytest.skip("this ffmpeg cannot write aac")
    playlist = f"#EXTM3U\n#EXT-X-TARGETDURATION:5\n#EXTINF:2,\n{other}\n#EXT-X-ENDLIST\n".encode()
    script = b"ffconcat version 1.0\nfile other.ts\n"
    for name, content in (("list.m3u8", playlist), ("list.mp4", playlist), ("script.m4a", script)):
        (tmp_path / name).write_bytes(content)
        decoded = ["ffmpeg", "-v", "error", "-y", "-i", tmp_path / name, tmp_path / "read.wav"]
        assert subprocess.run(decoded, capture_output=True).returncode == 0, name  # left alone, it would
        for audio in (tmp_path / name, content):
            with pytest.raises(ValueError, match="cannot be read as audio"):
                load_waveform(audio, 16_000)


@pytest.mark.parametrize("decoder", ["ffmpeg", "none"])
def test_an_mp3_that_is_none_is_not_said_to_be_missing(decoder, tmp_path, monkeypatch):
    if decoder == "none":
        monkeypatch.setenv("PATH", str(tmp_path))
        if is_torchcodec_available():
            pytest.skip("torchcodec decodes in place of ffmpeg")
    elif shutil.which("ffmpeg") is None:
        pytest.skip("ffmpeg is not installed")
    page, noise = tmp_path / "page.mp3", tmp_path / "noise.mp3"
    page.write_bytes(b"<html>a page that says that there is nothing here</html>")
    noise.write_bytes(np.random.default_rng(0).bytes(20_000))
    for path in (page, noise):
        with pytest.raises(ValueError, match=r"\.mp3' cannot be read as audio \(no whole frame of MP3 in it") as error:
            load_waveform(path, 16_000)
        for misleading in ("does not exist", "Invalid argument", "0x"):
            assert misleading not in str(error.value)


def test_samples_of_unknown_rate_are_taken_for_the_models_with_a_warning(monkeypatch):
    said: list[str] = []
    monkeypatch.setattr(audio_input_ttt.logger, "warning_once", said.append)
    sound = tone(0.1)
    for known in ({"array": sound, "sampling_rate": 8_000}, (sound, 8_000)):
        load_waveform(known, 16_000)
    load_waveform(sound, 16_000, 8_000)
    assert said == []
    np.testing.assert_array_equal(load_waveform(sound, 16_000), sound)
    assert len(said) == 1 and "16000 Hz is assumed" in said[0] and "`sampling_rate`" in said[0]


@pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="ffmpeg is not installed")
def test_a_film_without_sound_is_no_audio(tmp_path):
    film = tmp_path / "silent.mov"
    command = ["ffmpeg", "-v", "error", "-f", "lavfi", "-i", "color=size=16x16:duration=0.1", "-c:v", "rawvideo", film]
    if subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("this ffmpeg cannot make a film")
    with pytest.raises(ValueError, match="cannot be read as audio") as error:
        load_waveform(film, 16_000)
    assert "map" not in str(error.value)  # what ffmpeg advises those who called it themselves


@pytest.mark.skipif(is_torchcodec_available(), reason="torchcodec decodes in place of ffmpeg")
def test_without_a_decoder_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    path = tmp_path / "talk.m4a"
    path.write_bytes(b"\0\0\0\x18ftypM4A words")
    for audio, reason in (
        (b"these are words", "Format not recognised"),
        (path, "a 'm4a' file, which soundfile cannot"),
    ):
        with pytest.raises(ValueError, match=f"cannot be read as audio .*{reason}.*install ffmpeg or torchcodec"):
            load_waveform(audio, 16_000)


@pytest.mark.parametrize(("container", "share"), [("WAV", 0.5), ("AIFF", 0.5), ("AU", 0.5), ("WAV", 1.0)])
def test_a_file_that_is_cut_off_is_taken_with_a_warning(sound, container, share):
    file = io.BytesIO()
    soundfile.write(file, sound[0], 16_000, format=container, subtype="PCM_16")
    part = file.getvalue()[: int(share * file.tell())]
    whole, there = len(sound[0]) / 16_000, share * len(sound[0]) / 16_000
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        waveform = load_waveform(part, 16_000, name="question.wav")
    assert len(waveform) / 16_000 == pytest.approx(there, abs=0.01)
    said = [str(warning.message) for warning in caught]
    assert len(said) == (share < 1)
    for message in said:
        named, taken = map(float, re.findall(r"[\d.]+(?= seconds| are there)", message))
        assert message.startswith("question.wav") and abs(named - whole) < 0.06 and abs(taken - there) < 0.06


@pytest.mark.parametrize("size", [0xFFFFFFFF, 0x7FFFFFFF])
def test_a_stream_that_names_no_length_is_whole(sound, size):
    file = io.BytesIO()
    soundfile.write(file, sound[0], 16_000, format="WAV", subtype="PCM_16")
    place = file.getvalue().index(b"data") + 4
    content = file.getvalue()[:place] + size.to_bytes(4, "little") + file.getvalue()[place + 4 :]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(load_waveform(content, 16_000)) == len(sound[0])


def test_channels_are_averaged():
    left, right = tone(0.1), tone(0.1, frequency=500)
    assert np.allclose(load_waveform(np.stack([left, right]), 16_000), (left + right) / 2, atol=1e-7)
    with pytest.warns(UserWarning, match="audio 3 is one recording of 20 channels.* pass them as a list"):
        load_waveform(np.stack([left] * 20), 16_000, name="audio 3")


@pytest.mark.parametrize("rate", [8_000, 11_025, 22_050, 44_100, 48_000])
def test_any_sampling_rate_becomes_the_models_as_librosa_does_it(rate):
    import librosa

    sound = tone(0.5, sampling_rate=rate)
    ours = load_waveform({"array": sound, "sampling_rate": rate}, 16_000)
    assert np.array_equal(ours, librosa.resample(sound, orig_sr=rate, target_sr=16_000))
    assert np.array_equal(ours, load_waveform(sound, 16_000, source_rate=rate))
    assert np.abs(ours[800:-800] - tone(0.5)[800:-800]).max() < 0.01
    assert resample(sound, rate, rate) is sound


def test_files_of_another_rate_and_stereo_are_read(processor, tmp_path):
    sound = tone(0.5, sampling_rate=44_100)
    path = write_wav(tmp_path / "stereo.flac", np.stack([sound, sound], axis=1), 44_100)
    assert len(processor.encode_audio(path)[0]) == 7  # ceil(0.5 * 12.5)


def test_dataset_columns_are_taken(processor, sound):
    datasets = pytest.importorskip("datasets")
    column = datasets.Audio(sampling_rate=16_000, decode=False)
    dataset = datasets.Dataset.from_dict({"audio": [str(sound[1])] * 2}).cast_column("audio", column)
    expected = processor.encode_audio(sound[1])[0]
    assert all(torch.equal(codes, expected) for codes in processor.encode_audio(dataset["audio"]))


def test_codes_of_a_batch_are_those_of_its_rows_and_lengths_are_exact(processor):
    sounds = [tone(seconds, frequency=200 + 90 * i) for i, seconds in enumerate([0.05, 0.08, 0.081, 1.0, 2.3])]
    batch = processor.encode_audio(sounds, batch_size=3)
    for sound, codes in zip(sounds, batch, strict=True):
        assert codes.dtype == torch.long and len(codes) == -(-len(sound) // 1280)
        assert torch.equal(codes, processor.encode_audio(sound)[0])


def test_silence_and_clipping_are_valid(processor):
    square = np.sign(np.sin(np.arange(16_000) / 20)).astype(np.float32) * 3
    assert [len(codes) for codes in processor.encode_audio([np.zeros(16_000), square])] == [13, 13]


def test_unusable_audio_is_refused_by_name(processor, tmp_path):
    good = tone(0.1)
    empty_file, text_file = tmp_path / "empty.wav", tmp_path / "words.wav"
    empty_file.touch()
    text_file.write_text("these are words")
    slow = write_wav(tmp_path / "slow.wav", good, 100)
    cases = [
        (np.zeros(0), ValueError, r"audio 1 is empty \(0 samples\)"),
        (np.array([0.0, np.nan, 0.0]), ValueError, "audio 1 holds nan at sample 1"),
        (np.array([np.inf, 0.0]), ValueError, "audio 1 holds inf at sample 0"),
        (
            {"array": np.array([0.0] * 5 + [np.nan]), "sampling_rate": 8_000},
            ValueError,
            "audio 1 holds nan at sample 5",
        ),
        (write_wav(tmp_path / "none.wav", np.zeros(0)), ValueError, "audio 1 is empty"),
        (empty_file, ValueError, "audio 1: the file .*empty.wav' has no content"),
        (text_file, ValueError, "audio 1: .*words.wav' cannot be read as audio"),
        (b"these are words", ValueError, "audio 1: the data cannot be read as audio"),
        (tmp_path, ValueError, "audio 1: .* is a folder"),
        ("what is two plus two", FileNotFoundError, "audio 1: there is no file 'what is two.*text goes into `text`"),
        ("data:audio/wav;base64,???", ValueError, "audio 1: the `data:` address is not valid base64"),
        ("http://127.0.0.1:9/none.wav", ValueError, "audio 1: could not fetch"),
        ("http://127.0.0.1:9/a b.wav", ValueError, "audio 1: could not fetch"),
        (None, ValueError, "audio 1 is None"),
        ({"array": good}, ValueError, "audio 1 has an `array` but no `sampling_rate`"),
        ({"array": good, "sampling_rate": -1}, ValueError, "audio 1 has sampling rate -1"),
        ({"array": good, "sampling_rate": 16}, ValueError, "audio 1 has sampling rate 16; give it in Hz"),
        ({"array": good, "sampling_rate": "16k"}, ValueError, "audio 1 has sampling rate 16k"),
        ({"array": good, "sampling_rate": np.nan}, ValueError, "audio 1 has sampling rate nan"),
        ((good, good[1:]), ValueError, "audio 1 is a tuple whose items do not make one array"),
        ((good, 16), ValueError, "audio 1 has sampling rate 16; give it in Hz"),
        ({"raw": good, "sampling_rate": 8_000, "sample_rate": 16_000}, ValueError, "audio 1 has .* leave one out"),
        (io.StringIO("these are words"), ValueError, "audio 1: .* reads str, not bytes. Open it with mode 'rb'"),
        (io.BytesIO(), ValueError, r"audio 1: the file has no content \(0 bytes\)"),
        ({"words": 1}, ValueError, r"audio 1 is a mapping with keys \['words'\]"),
        (slow, ValueError, r"audio 1: '.*slow.wav' has sampling rate 100; give it in Hz"),
        (slow.read_bytes(), ValueError, "audio 1: the data has sampling rate 100; give it in Hz"),
        (np.zeros((2, 2, 2)), ValueError, r"audio 1 has shape \(2, 2, 2\)"),
        (np.array(["a", "b"]), ValueError, "audio 1 holds values of type <U1"),
        (np.array([1, 70_000]), ValueError, "audio 1 holds integers of type int64"),
    ]
    for audio, error, message in cases:
        with pytest.raises(error, match=message):
            processor.encode_audio([good, audio])
    with pytest.raises(FileNotFoundError, match=r"audio 0: there is no file .*\(10002 characters\)") as error:
        processor.encode_audio("a, " * 3333 + "b")
    assert len(str(error.value)) < 300
    with pytest.raises(ValueError, match="audio 0 has sampling rate 0"):
        processor.encode_audio(good, sampling_rate=0)
