"""ttt-talk: what it writes and prints, where answers go, exit statuses."""

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from builders import build_model, build_processor, tone, write_wav
from transformers import Qwen2Config, Qwen2ForCausalLM

from pipelines import TttAudioToAudioPipeline, save_repository, ttt_talk

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    prompts = {"spoken_chat": "Chat.", "tts": "Read.", "text_chat": "Talk.", "captioning": "Look."}
    own = {"translate": {"system_prompt": "Translate.", "needs_text": True}, "sing": "Sing."}
    processor = build_processor(system_prompts=prompts | own)
    save_repository(build_model(processor), processor, folder)
    return str(folder)


@pytest.fixture
def question(tmp_path):
    return str(write_wav(tmp_path / "question.wav", tone(0.4)))


@pytest.fixture
def talk(model, monkeypatch, tmp_path, capsys):
    """Runs the command in an empty folder; gives its exit status, output and errors."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        try:
            status = ttt_talk.main(["--model", model, "--device", "cpu", *arguments])
        except SystemExit as stop:
            status = stop.code
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


def assert_speech(path):
    info = soundfile.info(path)
    assert (info.format, info.subtype, info.samplerate, info.channels) == ("WAV", "PCM_16", 16_000, 1)
    assert info.frames == 40 * 1280


def test_a_question_is_answered_in_text_and_speech(talk, question, tmp_path):
    assert talk(question, "reply.wav") == (0, "hi\n", "ttt-talk: the answer is in reply.wav\n")
    assert_speech(tmp_path / "reply.wav")
    assert talk(question, "reply.wav", "--quiet") == (0, "hi\n", "")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["question.wav", "reply.wav"]


def test_without_a_name_the_answer_lies_beside_the_question(talk, question, tmp_path):
    assert talk(question)[0] == 0
    assert_speech(tmp_path / "question.reply.wav")


def test_an_earlier_answer_is_overwritten_and_a_recording_is_not(talk, question, tmp_path):
    recording = write_wav(tmp_path / "recording.wav", tone(0.4))
    before = recording.read_bytes()
    for arguments in ([question, "reply.wav"], [question], ["--text", "hi", "reply.wav"], ["--text", "hi"]):
        for _ in range(2):
            assert talk(*arguments)[0] == 0
    for arguments, remedy in (
        ([question, "recording.wav"], "if both files are questions, add --output_dir"),
        (["--text", "hi", "recording.wav"], "to ask about it, add --task captioning"),
        (["--text", "hi", "--task", "text_chat", "recording.wav"], "Give the answer another name"),
        (["other/recording.wav", "--output_dir", "."], "Give the answer another name"),
    ):
        status, _, errors = talk(*arguments)
        assert status == 2 and "recording.wav exists and is no answer of ttt-talk" in errors and remedy in errors
    assert recording.read_bytes() == before


def test_text_is_answered_and_read_aloud(talk, tmp_path):
    assert talk("--text", "how are you")[:2] == (0, "hi\n")
    assert_speech(tmp_path / "reply.wav")
    assert talk("--task", "tts", "--text", "one two", "sub/folder/spoken.wav")[0] == 0
    assert_speech(tmp_path / "sub" / "folder" / "spoken.wav")


def test_standard_input_is_a_question_and_standard_output_an_answer(
    model, question, tmp_path, monkeypatch, capfdbinary
):
    with open(question) as recording:
        monkeypatch.setattr(sys, "stdin", recording)
        assert ttt_talk.main(["--model", model, "--device", "cpu", "-", "-"]) == 0
    out, errors = capfdbinary.readouterr()
    assert errors == b"hi\n"
    (tmp_path / "piped.wav").write_bytes(out)
    assert_speech(tmp_path / "piped.wav")


def test_an_answer_that_nobody_reads_ends_without_a_traceback(model, question, tmp_path):
    program = f"{sys.executable} -m pipelines.ttt_talk --model {model} --device cpu {question} -"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = ["bash", "-c", f"{program} | true; exit ${{PIPESTATUS[0]}}"]
    closed = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert closed.returncode == 1 and "Traceback" not in closed.stderr and "Exception" not in closed.stderr


def test_standard_input_and_output_stand_for_files(talk, question, tmp_path, monkeypatch):
    def ask(*arguments):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(Path(question).read_bytes())))
        return talk(*arguments)

    assert ask("-")[:2] == (0, "hi\n")
    assert_speech(tmp_path / "reply.wav")
    assert ask("-", "named.wav")[:2] == (0, "hi\n")
    assert ask("-", question, "--output_dir", "replies")[1] == f"-: hi\n{question}: hi\n"
    for path in ("named.wav", "replies/reply.wav", "replies/question.wav"):
        assert_speech(tmp_path / path)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))
    status, _, errors = talk("-", "named.wav")
    assert status == 1 and "no content (0 bytes)" in errors


def test_tasks_of_the_processors_own_can_be_asked(talk, question, tmp_path):
    assert talk("--task", "translate", "--text", "guten Tag", "translated.wav")[0] == 0
    assert talk("--task", "sing", question, "sung.wav")[0] == 0
    assert talk("--task", "sing", "--text", "la la")[0] == 0  # it needs neither
    for path in ("translated.wav", "sung.wav", "reply.wav"):
        assert_speech(tmp_path / path)
    assert "--task translate needs --text" in talk("--task", "translate", question)[2]


def test_a_processor_of_its_own_folder(talk, question, model, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(model, bare, ignore=shutil.ignore_patterns("*processor*", "tokenizer*", "audio_tokenizer"))
    status, _, errors = talk(question, "--model", str(bare))
    assert status == 1 and f"{bare} has no processor that can be loaded; name one with --processor" in errors
    assert talk(question, "--model", str(bare), "--processor", model)[0] == 0


def test_text_can_go_with_a_recording(talk, question, tmp_path):
    assert talk(question, "--task", "captioning", "--text", "Which sound?")[0] == 0
    assert_speech(tmp_path / "question.reply.wav")


def test_several_questions_go_into_a_folder_and_a_bad_one_does_not_stop_the_rest(talk, question, tmp_path):
    other = str(write_wav(tmp_path / "other.flac", tone(0.2)))
    (tmp_path / "bad.wav").write_text("no audio")
    status, out, err = talk(question, "bad.wav", other, "--output_dir", "replies")
    assert status == 1
    assert out == f"{question}: hi\n{other}: hi\n"
    assert "bad.wav" in err and "cannot be read as audio" in err
    assert sorted(path.name for path in (tmp_path / "replies").iterdir()) == ["other.wav", "question.wav"]


def test_json_gives_one_object_per_answer(talk, question):
    status, out, _ = talk("--json", "--seed", "3", "--steps", "4", question)
    record = json.loads(out)
    assert status == 0 and record["text"] == "hi" and record["input"] == question
    assert record["output"].endswith("question.reply.wav") and record["duration"] == 3.2


def test_an_answer_without_speech_is_read_aloud(talk, question, tmp_path, monkeypatch):
    answers = iter([[{"text": "just text"}], [{"audio": np.zeros(51_200, np.float32), "sampling_rate": 16_000}]])
    requests = []

    def pipe(self, *inputs, **options):
        requests.append((inputs, options["text"], options["task"]))
        return next(answers)

    monkeypatch.setattr(TttAudioToAudioPipeline, "__call__", pipe)
    status, out, err = talk(question)
    assert (status, out) == (0, "just text\n") and "reading it aloud" in err
    assert requests == [((question,), None, None), ((None,), "just text", "tts")]
    assert_speech(tmp_path / "question.reply.wav")


def test_a_player_is_used_where_one_is_installed(talk, question, tmp_path, monkeypatch):
    played = tmp_path / "played"
    player = tmp_path / "bin" / "paplay"
    player.parent.mkdir()
    player.write_text(f'#!/bin/sh\necho "$@" > {played}\n')
    player.chmod(0o755)
    monkeypatch.setenv("PATH", f"{player.parent}:/bin")
    monkeypatch.setattr(ttt_talk, "PLAYERS", (["no-such-player"], ["paplay"]))
    assert talk("--play", question)[0] == 0
    assert played.read_text().strip().endswith("question.reply.wav")
    monkeypatch.setattr(ttt_talk, "PLAYERS", (["no-such-player"],))
    status, _, err = talk("--play", question)
    assert status == 0 and "no player found" in err


@pytest.mark.parametrize(
    ("variables", "expected"),
    [({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, "None")],
)
def test_idle_threads_give_up_their_cores_unless_the_environment_says_how_they_wait(variables, expected):
    kept = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    asked = (
        "import os, sys; sys.argv = ['ttt-talk']; from pipelines import ttt_talk; ttt_talk.limit_spinning(); "
        "print(os.environ.get('GOMP_SPINCOUNT'))"
    )
    ran = subprocess.run(
        [sys.executable, "-c", asked], env=kept | variables, cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert ran.stdout.strip() == expected


def test_threads_are_those_asked_for_or_of_the_environment_or_leave_cores_to_others(monkeypatch):
    chosen = []
    monkeypatch.setattr("torch.get_num_threads", lambda: 8)
    monkeypatch.setattr("torch.set_num_threads", chosen.append)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    ttt_talk.set_threads(None)
    ttt_talk.set_threads(None, spare=1)
    ttt_talk.set_threads(None, spare=8)
    ttt_talk.set_threads(3, spare=1)
    assert chosen == [8, 7, 1, 3]
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    ttt_talk.set_threads(None, spare=1)
    assert chosen == [8, 7, 1, 3]  # PyTorch has read the variable itself
    ttt_talk.set_threads(2)
    assert chosen[-1] == 2


def test_threads_of_the_command_line_are_those_that_compute(talk, question):
    before = torch.get_num_threads()
    try:
        assert talk("--threads", "3", question)[0] == 0
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to answer"),
        (["--task", "asr"], "--task asr needs an audio file, or --text"),
        (["--task", "asr", "--text", "hi"], "--task asr needs an audio file\n"),
        (["--task", "captioning", "--text", "hi", "--output_dir", "out"], "--task captioning needs an audio file\n"),
        (["--task", "tts", "a.wav"], "--task tts needs --text"),
        (["--task", "tts", "--text", " "], "--text is empty"),
        (["a.wav", "--steps", "0"], "--steps must be at least 1"),
        (["a.wav", "--threads", "0"], "--threads must be at least 1, got 0"),
        (["a.wav", "--seed", "-1"], "--seed must be at least 0, got -1"),
        (["a.wav", "--dtype", "float"], "invalid choice: 'float'"),
        (["--text", "hi", "a.wav", "b.wav"], "--text takes one file at most"),
        (["a.wav", "reply.mp3"], "ends in .wav"),
        (["a.wav", "a.wav"], "would be overwritten"),
        (["x/a.wav", "y/a.wav", "--output_dir", "out"], "would both be written to"),
        (["--task", "dance", "a.wav"], "--task dance is none of the processor's: spoken_chat,"),
        (["a.wav", "-", "--json"], "the speech goes to standard output: leave out --json"),
        (["a.wav", "-", "--play"], "leave out --play"),
        (["-", "-", "-"], "would both be written to reply.wav"),
        (["--text", "hi", "question.wav"], "question.wav exists"),
        (["a.wav", "question.wav/reply.wav"], "question.wav is no folder. Name another folder"),
        (["a.wav", "b.wav", "--output_dir", "question.wav/out"], "question.wav is no folder"),
        (["--text", "hi", "--max_new_tokens", "99999"], "--max_new_tokens is 99999, but the model has 2048 positions"),
    ],
)
def test_wrong_arguments_exit_with_2_before_any_model_is_loaded(talk, question, arguments, message, monkeypatch):
    monkeypatch.setattr(ttt_talk, "load_pipeline", lambda *arguments: pytest.fail("loaded"))
    status, out, err = talk(*arguments)
    assert status == 2 and out == "" and message in err and "usage: ttt-talk" in err


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written_to_is_refused(talk, question, tmp_path):
    (tmp_path / "locked").mkdir(mode=0o555)
    status, _, err = talk(question, "locked/reply.wav")
    assert status == 2 and "locked may not be written to. Name another folder" in err


def test_what_fails_exits_with_1_and_says_why(talk, question, model, tmp_path, monkeypatch, capsys):
    shutil.copytree(model, tmp_path / "cut")
    with open(tmp_path / "cut" / "model.safetensors", "r+b") as file:
        file.truncate(100)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text('{"model_type":')
    small = {"vocab_size": 9, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2}
    Qwen2ForCausalLM(Qwen2Config(**small, num_hidden_layers=1, num_key_value_heads=1)).save_pretrained(tmp_path / "llm")
    for arguments, message in [
        (["missing.wav"], "there is no file missing.wav. A typed question goes into --text"),
        ([question, "--model", "no/such/model"], "there is no folder no/such/model"),
        ([question, "--model", "/missing"], "there is no folder /missing"),
        ([question, "--model", "nobody/nothing"], "nobody/nothing"),
        ([question, "--device", "cuda:99"], "cannot use --device cuda:99"),
        ([question, "--device", "gpu"], "cannot use --device gpu"),
        ([question, "--max_new_tokens", "1"], "Try a larger --max_new_tokens"),
        ([question, "--model", str(tmp_path)], "holds no config.json"),
        ([question, "--model", str(tmp_path / "llm")], "llm holds a model of type 'qwen2', not 'ttt'"),
        ([question, "--model", f"{model}/audio_tokenizer"], "holds a model of type 'ttt_codec', not 'ttt'"),
        ([question, "--model", str(tmp_path / "cut")], "cut cannot be loaded"),
        ([question, "--model", str(tmp_path / "broken")], "not a valid JSON file"),
        ([question, "--processor", str(tmp_path / "llm")], "llm has no processor that can be loaded"),
        ([question, "a" * 251 + ".wav"], "aa.wav (File name too long)"),
        ([question, "--steps", "1000", "--max_new_tokens", "2047"], "max_position_embeddings"),
    ]:
        status, out, err = talk(*arguments)
        assert status == 1 and message in err and "Traceback" not in err, arguments
    monkeypatch.setattr(ttt_talk, "load_pipeline", lambda *arguments: {}["bug"])
    status, _, err = talk(question)
    assert status == 1 and err == "ttt-talk: error: KeyError: 'bug'\n"
    assert "Traceback" in talk(question, "--traceback")[2]
    monkeypatch.setattr(ttt_talk, "DEFAULT_MODEL", tmp_path / "gone")
    assert ttt_talk.main([question]) == 1
    assert "the default model is not at" in capsys.readouterr().err


def test_the_default_model_is_the_one_in_the_repository():
    assert ttt_talk.DEFAULT_MODEL == ROOT / "model_cards" / "ttt-tiny"


def test_help_has_examples_and_does_not_wait_for_torch(tmp_path):
    program = (
        "import sys; sys.argv = ['ttt-talk', '--help']\n"
        "from pipelines.ttt_talk import main\n"
        "try:\n    main()\n"
        "except SystemExit as stop:\n    assert stop.code == 0\n"
        "assert not {'torch', 'transformers', 'librosa'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "ttt-talk question.wav reply.wav" in done.stdout and "Exit status" in done.stdout
