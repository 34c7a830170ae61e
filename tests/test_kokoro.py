"""Kokoro's words, voices and the quicker form of its model, on a lexicon and a graph small enough to print."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from training_examples.ttt_tiny import kokoro, synthesis

onnxruntime = pytest.importorskip("onnxruntime")


@pytest.fixture
def folder(tmp_path):
    """A folder laid out as Kokoro's, with four words, two voices and no model."""
    (tmp_path / "voices").mkdir()
    (tmp_path / "model.onnx").touch()
    (tmp_path / "vocab.json").write_text(json.dumps({"vocab": {"a": 1, "b": 2, " ": 3, ".": 4, "?": 5}}))
    gold = {
        "cat": "kˈæt",
        "apple": "ˈæpəl",
        "Paris": "pˈɛɹɪs",
        "box": "bˈɑks",
        "live": {"DEFAULT": "lˈɪv", "ADJ": "lˈIv"},
    }
    (tmp_path / "us_gold.json").write_text(json.dumps(gold))
    (tmp_path / "us_silver.json").write_text(json.dumps({"lady": "lˈAdi", "cat": "wrong"}))
    for number, name in enumerate(("one", "two"), start=1):
        np.full((3, 256), number, np.float32).tofile(tmp_path / "voices" / f"{name}.bin")
    return tmp_path


def test_words_become_the_sounds_of_running_speech(folder):
    speaker = kokoro.Kokoro(folder)
    assert speaker.phonemes("the cat") == "ðə kˈæt."
    assert speaker.phonemes("the apple is a cat", "question") == "ði ˈæpəl ɪz ɐ kˈæt?"
    assert speaker.phonemes("cat apple", "list") == "kˈæt, ˈæpəl."
    assert speaker.pronounce("paris") == "pˈɛɹɪs"  # a name
    assert speaker.pronounce("live") == "lˈɪv"  # several readings


@pytest.mark.parametrize(
    ("word", "sounds"),
    [("cats", "kˈæts"), ("apples", "ˈæpəlz"), ("boxes", "bˈɑksᵻz"), ("ladies", "lˈAdiz"), ("lives", "lˈɪvz")],
)
def test_regular_endings_need_no_entry(folder, word, sounds):
    assert kokoro.Kokoro(folder).pronounce(word) == sounds


def test_what_cannot_be_said_is_refused(folder):
    speaker = kokoro.Kokoro(folder)
    with pytest.raises(ValueError, match=r"\['zyzzyva'\]"):
        speaker.phonemes("a zyzzyva cat")
    with pytest.raises(ValueError, match="'song'"):
        speaker.phonemes("cat", "song")
    with pytest.raises(ValueError, match="'three'.*'one', 'two'"):
        speaker.style("three", 1)
    with pytest.raises(ValueError, match="0.9, not to 1"):
        speaker.style("one:0.5+two:0.4", 1)
    with pytest.raises(FileNotFoundError, match="model.onnx.*KOKORO_DIR"):
        kokoro.Kokoro(folder / "voices")


def test_a_mixture_of_voices_is_a_voice(folder):
    speaker = kokoro.Kokoro(folder)
    assert speaker.style("two", 99).shape == (1, 256)  # more phonemes than rows: the last one
    assert np.allclose(speaker.style("one:0.25+two:0.75", 2), 1.75)


def convolutions():
    """A model of three integer convolutions in a row: a dilated one, one of a single tap, and one of stride 2."""
    onnx = pytest.importorskip("onnx")
    from onnx import TensorProto, helper, numpy_helper

    rng, nodes, tensors, current = np.random.default_rng(0), [], [], "x"
    settings = [
        ((6, 4, 3), {"dilations": [2], "pads": [2, 2]}),
        ((5, 6, 1), {}),
        ((4, 5, 3), {"strides": [2], "pads": [1, 1]}),
    ]
    for index, (shape, attributes) in enumerate(settings):
        tensors += [
            numpy_helper.from_array(rng.integers(0, 256, shape, dtype=np.uint8), f"w{index}"),
            numpy_helper.from_array(np.uint8(100 + 50 * index), f"z{index}"),
        ]
        quantized = [f"q{index}", f"scale{index}", f"zero{index}"]
        nodes += [
            helper.make_node("DynamicQuantizeLinear", [current], quantized),
            helper.make_node(
                "ConvInteger",
                [quantized[0], f"w{index}", quantized[2], f"z{index}"],
                [f"c{index}"],
                name=f"conv{index}",
                kernel_shape=[shape[2]],
                **attributes,
            ),
            helper.make_node("Cast", [f"c{index}"], [f"y{index}"], to=TensorProto.FLOAT),
        ]
        current = f"y{index}"
    graph = helper.make_graph(
        nodes,
        "convolutions",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4, None])],
        [helper.make_tensor_value_info(current, TensorProto.FLOAT, [1, 4, None])],
        tensors,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), onnx


def run(model, inputs):
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": inputs})[0]


def test_the_quicker_model_computes_the_same_numbers():
    from training_examples.ttt_tiny.quicken_kokoro import quicken

    model, onnx = convolutions()
    inputs = np.random.default_rng(1).standard_normal((1, 4, 23)).astype(np.float32)
    expected = run(model, inputs)
    assert quicken(model) == 2
    onnx.checker.check_model(model)
    assert [node.op_type for node in model.graph.node].count("ConvInteger") == 1  # the one of stride 2 stays
    assert np.array_equal(run(model, inputs), expected)
    assert quicken(model) == 0


@pytest.mark.skipif("KOKORO_DIR" not in os.environ, reason="KOKORO_DIR names no folder with Kokoro's model")
def test_kokoro_speaks_at_the_level_speed_and_length_asked_for():
    words = "seven plus eight is fifteen"
    wave = synthesis.speak(words, synthesis.ASSISTANT_VOICE)
    assert wave.dtype == np.float32 and 1.0 < len(wave) / synthesis.SAMPLING_RATE < 3.0
    assert np.abs(wave).max() <= synthesis.PEAK
    quick = synthesis.speak(words, synthesis.Delivery("kokoro:am_adam:0.5+af_sky:0.5", rate=1.3, pitch=1.1))
    slow = synthesis.speak(words, synthesis.Delivery("kokoro:am_adam:0.5+af_sky:0.5", rate=0.8))
    assert len(quick) < 0.75 * len(slow)
    assert Path(os.environ["KOKORO_DIR"], "voices").is_dir()


def test_speech_is_trimmed_and_brought_to_one_level():
    rate, burst = synthesis.SAMPLING_RATE, 0.5 * np.sin(np.arange(4_800) / 5)
    wave = np.concatenate([np.zeros(9_600), burst, np.zeros(4_800), burst, np.full(9_600, 1e-4)])
    trimmed = synthesis.trim(wave)
    assert len(trimmed) == 3 * 4_800 + 2 * int(0.05 * rate)
    assert len(synthesis.trim(burst)) == 4_800 + 2 * int(0.05 * rate)  # silence is added where there is none
    for gain in (0.02, 1.0):
        level = synthesis.level(gain * trimmed)
        assert np.sqrt(np.mean(level[np.abs(level) > 1e-3] ** 2)) == pytest.approx(synthesis.SPEECH_RMS, rel=0.02)
    click = np.concatenate([0.1 * burst, [1.0]])
    assert np.abs(synthesis.level(click)).max() == pytest.approx(synthesis.PEAK)


def test_an_unknown_engine_is_refused():
    with pytest.raises(ValueError, match="'festival:kal'"):
        synthesis.speak("one", "festival:kal")
