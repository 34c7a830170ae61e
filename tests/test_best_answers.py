"""The clearest of several answers: how codes are judged, what is chosen, and which examples follow."""

import sys

import numpy as np
import pytest
import torch
from builders import build_codec, build_model, build_processor
from datasets import Dataset, DatasetDict, load_from_disk
from torch.nn import functional

from pipelines import save_repository
from training_examples.training.samples import split_example
from training_examples.ttt_tiny import best_answers
from training_examples.ttt_tiny.best_answers import BestArguments, Reader, choose, read_setting
from training_examples.ttt_tiny.phonemes import build_head, pronunciations

SETTINGS = ["8:8:0.03", "4:4:0"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model that answers everything with "hi" and 40 codes 3, an untrained phoneme head, and five examples."""
    root = tmp_path_factory.mktemp("best")
    processor, codec = build_processor(), build_codec()
    save_repository(build_model(processor), processor, root / "model")
    codec.save_pretrained(root / "aligner")
    torch.manual_seed(0)
    head = build_head(codec, pronunciations()[1])
    torch.save({"head": head.state_dict()}, root / "aligner" / "training_state.pt")
    examples = []
    for index, (answer, task) in enumerate([("hi", "tts"), ("no", "tts"), ("hi", "text_chat"), ("hi", "asr")]):
        example = processor.build_example(answer, [5] * (12 + index), task="text_chat", text="a" * (1 + 7 * index))
        examples.append({**example, "length": len(example["input_ids"]), "task": task})
    messages = [("user", [{"type": "audio", "audio_codes": [5] * 9}]), ("assistant", [{"type": "text", "text": "hi"}])]
    example = processor.build_conversation_example([{"role": role, "content": said} for role, said in messages])
    examples.append({**example, "length": len(example["input_ids"]), "task": "asr"})
    DatasetDict({"train": Dataset.from_list(examples)}).save_to_disk(str(root / "examples"))
    return root, examples


@pytest.fixture(scope="module")
def reader(folder):
    codec, (spellings, count) = build_codec().eval(), pronunciations()
    head = best_answers.load_head(folder[0] / "aligner", codec, count).eval()
    processor = build_processor()
    return Reader(build_model(processor).eval(), processor, head, codec, spellings, batch_size=2)


@pytest.mark.parametrize("setting", ["8:8", "8:8:x", "a:8:0", "8:8:0:1", ""])
def test_a_setting_of_another_form_is_refused(setting):
    with pytest.raises(ValueError, match="CODES:STEPS:ORDER_BIAS"):
        read_setting(setting)


@pytest.mark.parametrize(
    "options",
    [
        {"keep": 0.0},
        {"keep": 1.1},
        {"settings": []},
        {"part": "2:2"},
        {"part": "1"},
        {"part": "-1:2"},
        {"listen_to": 3},
    ],
)
def test_impossible_options_are_refused(options, tmp_path):
    with pytest.raises(ValueError, match="--" + next(iter(options))):
        BestArguments("model", "examples", tmp_path, tmp_path / "out", **options)


def test_codes_are_judged_by_the_likelihood_of_the_phonemes(reader):
    texts, codes = ["hi", "no no", "hi"], [[3] * 4, [7, 1, 2, 9, 4, 4], [1]]
    losses, errors = reader.judge(texts, codes)
    for text, row, loss in zip(texts, codes, losses, strict=True):
        said = [phoneme for word in text.split() for phoneme in reader.spellings[word]]
        log_probs = reader._log_probs(torch.tensor(row))
        alone = functional.ctc_loss(
            log_probs[:, None], torch.tensor([said]), torch.tensor([len(log_probs)]), torch.tensor([len(said)]),
            reduction="sum",
        )  # fmt: skip
        assert loss == pytest.approx(alone.item() / len(said), rel=1e-5)
    assert np.isfinite(errors).all()
    losses, errors = reader.judge(["no no no no no no no no", "hi"], [[1], []])  # too few codes, and none
    assert np.isinf(losses).all() and np.isinf(errors[1])


def test_the_clearest_answer_to_each_text_is_chosen(reader, monkeypatch, capsys):
    answers = {name: reader.read(["hi", "no"], read_setting(name), name) for name in SETTINGS}
    assert all(answer[0] is not None and answer[1] is None for answer in answers.values())  # "no" is answered with "hi"
    token = reader.processor.token_ids.audio_code_id_start
    other = [token + 6 if item == token + 3 else item for item in answers["8:8:0.03"][0]]
    said = {"8:8:0.03": [other, None], "4:4:0": answers["4:4:0"]}
    monkeypatch.setattr(reader, "read", lambda texts, options, title: said[title])
    options = [read_setting(name) for name in SETTINGS]
    found = choose(reader, ["hi", "no"], options, SETTINGS, keep=1.0)
    losses = reader.judge(["hi", "hi"], [[6] * 40, [3] * 40])[0]
    assert found == {"hi": other if losses[0] < losses[1] else answers["4:4:0"][0]}
    assert "4:4:0: 1 of 2 texts" in capsys.readouterr().out
    recorded = {"no": {tuple(other)}, "hi": {tuple(other), tuple(answers["4:4:0"][0])}}
    monkeypatch.setattr(reader, "read", lambda texts, options, title: [None, None])
    assert choose(reader, ["hi", "no"], options, SETTINGS, 1.0, recorded) == {**found, "no": other}
    assert "recorded: 2 of 2 texts" in capsys.readouterr().out
    monkeypatch.setattr(reader, "read", lambda texts, options, title: said[title])
    assert list(choose(reader, ["hi", "no"], options, SETTINGS, keep=0.2)) == ["hi"]  # one at least
    with pytest.raises(ValueError, match="none of 1 texts is read"):
        monkeypatch.setattr(reader, "read", lambda texts, options, title: [None])
        choose(reader, ["no"], options, SETTINGS, keep=1.0)


class Hears:
    """Says "hi" of every waveform that is as long as told, and "no" of the others; counts them."""

    def __init__(self, samples):
        self.samples, self.heard = samples, 0

    def open(self):
        return self

    def transcribe(self, waveforms, sampling_rate):
        self.heard += len(waveforms)
        return ["hi" if len(wave) == self.samples else "no" for wave in waveforms]


def test_a_recogniser_chooses_among_the_likeliest(reader, monkeypatch, capsys):
    """The first answer that it hears right, in the order of their likelihood, whatever is likelier."""
    ids, codec = reader.processor.token_ids, reader.processor.audio_tokenizer
    (answer,) = reader.read(["hi"], read_setting(SETTINGS[0]), "hi")
    token = ids.audio_code_id_start + 3
    first = answer.index(token)
    answers = [[*answer[: first + count], *answer[first + 40 :]] for count in (10, 20, 30)]
    losses = reader.judge(["hi"] * 3, [reader.parts(answer)[1] for answer in answers])[0]
    order = np.argsort(losses)
    monkeypatch.setattr(reader, "read", lambda texts, options, title: [answers[int(title)]])
    options = [read_setting(SETTINGS[0])] * 3

    def chosen(listener, most=8):
        return answers.index(choose(reader, ["hi"], options, "012", 1.0, listener=listener, listen_to=most)["hi"])

    lengths = [codec.decode(torch.tensor([[3] * count])).audio_values.shape[-1] for count in (10, 20, 30)]
    assert len(set(lengths)) == 3
    for place, index in enumerate(order):
        listener = Hears(lengths[index])
        assert chosen(listener) == index and listener.heard == place + 1
    assert "heard without an error: 0.0 % of the texts in the likeliest answer, 100.0 %" in capsys.readouterr().out
    assert chosen(Hears(lengths[order[2]]), most=2) == order[0]  # nothing is heard right: the likeliest
    assert chosen(None) == order[0]


def test_answers_that_stop_at_their_last_span_are_read_too(reader):
    """As ttt-tiny's do; in the examples they have the end of the turn."""
    ids = reader.processor.token_ids
    eos = [ids.end_of_turn_token_id, ids.end_of_last_audio_token_id]
    (answer,) = reader.read(["hi"], {**read_setting(SETTINGS[0]), "eos_token_id": eos}, "short")
    assert answer[-2:] == [ids.end_of_last_audio_token_id, ids.end_of_turn_token_id]


def test_an_aligner_of_another_audio_tokenizer_is_refused(folder, monkeypatch, tmp_path):
    root, _ = folder
    codec = build_codec()
    with torch.no_grad():
        codec.encoder.proj_out.weight[0] *= 1.2
    codec.save_pretrained(tmp_path)
    (tmp_path / "training_state.pt").write_bytes((root / "aligner" / "training_state.pt").read_bytes())
    told = ["--model", root / "model", "--dataset", root / "examples", "--aligner", tmp_path]
    monkeypatch.setattr(sys, "argv", ["best_answers.py", *map(str, told), "--output_dir", str(tmp_path / "best")])
    with pytest.raises(ValueError, match=f"{tmp_path} is of another audio tokenizer than the one in {root / 'model'}"):
        best_answers.main()


@pytest.mark.parametrize(("unspoken", "recorded"), [(False, False), (True, True)])
def test_chosen_speech_takes_the_place_of_what_was_recorded(unspoken, recorded, folder, monkeypatch):
    root, examples = folder
    told = ["--model", root / "model", "--dataset", root / "examples", "--aligner", root / "aligner"]
    told += ["--output_dir", root / "best", "--settings", *SETTINGS, "--new_texts", 2, "--keep", 1, "--threads", 1]
    told += ["--keep_unspoken", unspoken, "--recorded", recorded]
    monkeypatch.setattr(sys, "argv", ["best_answers.py", *map(str, told)])
    best_answers.main()
    rows = load_from_disk(str(root / "best"))["train"].to_list()
    kept = [row for row in rows if row["task"] == "asr"]
    assert kept == (examples[-1:] if unspoken else [])  # the other one's speech is not the assistant's to choose
    rows = [row for row in rows if row["task"] != "asr"]
    # New texts were not read, and "no" is said in its recording alone.
    assert sorted(row["task"] for row in rows) == ["text_chat", "tts", "tts"][: 2 + recorded]
    processor, said = build_processor(), set()
    for row in rows:
        prompts = [split_example(example)[0] for example in examples]
        prompt, answer = split_example(row)
        assert prompt in prompts and row["length"] == len(row["input_ids"])
        (turn,) = processor.post_process([answer], decode_audio=False)
        said.add((turn["text"], tuple(turn["audio_codes"].tolist())))
    if recorded:  # by an untrained head, whatever is likelier: all that say a text say it alike
        assert sorted(text for text, _ in said) == ["hi", "no"] and ("no", (5,) * 13) in said
    else:
        assert said == {("hi", (3,) * 40)}
