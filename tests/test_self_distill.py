"""Self-distillation: which answers of a model are kept, as which examples, and that a killed run goes on."""

import dataclasses
import json
import shutil

import pytest
from builders import build_model, build_processor
from datasets import Dataset

from modeling_ttt import TttForConditionalGeneration
from pipelines import save_repository
from processing import TttProcessor
from training_examples.preparation.mixtures import load_mixture
from training_examples.self_distill import DistillArguments, Distiller, distill, split_example


class Listener:
    """Reads every waveform as the same words."""

    def __init__(self, words: str):
        self.words, self.heard = words, []

    def transcribe(self, waveforms, sampling_rate):
        self.heard += [(len(waveform), sampling_rate) for waveform in waveforms]
        return [self.words] * len(waveforms)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A model that answers everything with "hi" and 40 codes, and examples that expect "hi" or something else."""
    root = tmp_path_factory.mktemp("distill")
    processor = build_processor()
    save_repository(build_model(processor), processor, root / "model")
    examples = []
    for index, answer in enumerate(["hi", "no", "Hi!", "hi"]):
        example = processor.build_example(answer, [5] * (12 + index), task="text_chat", text="a" * (1 + 7 * index))
        examples.append({**example, "length": len(example["input_ids"]), "task": "text_chat"})
    unscored = {**examples[0], "labels": [-100] * len(examples[0]["labels"]), "task": "other"}
    Dataset.from_list([*examples, unscored]).save_to_disk(str(root / "examples"))
    return root, examples


def arguments(root, name: str, **options) -> DistillArguments:
    settings = {"batch_size": 2, "generation": ["audio_block_size=8", "audio_steps_per_block=8"], **options}
    return DistillArguments(str(root / "model"), [str(root / "examples")], root / name, **settings)


def test_answers_with_the_right_text_become_examples_of_the_models_own_codes(folders):
    root, examples = folders
    summary = distill(arguments(root, "text"))
    kept = load_mixture([str(root / "text")])
    assert summary["examples"] == len(kept) == 3
    assert summary["rejected_kinds"] == {"text": 1, "unscored": 1}
    processor = build_processor()
    for row, original in zip(kept, (examples[0], examples[2], examples[3]), strict=True):
        prompt = split_example(original)[0]
        assert row["input_ids"][: len(prompt)] == prompt and row["labels"][: len(prompt)] == [-100] * len(prompt)
        assert row["labels"][len(prompt) :] == row["input_ids"][len(prompt) :]
        (answer,) = processor.post_process([row["input_ids"][len(prompt) :]], decode_audio=False)
        assert answer["text"] == "hi" and answer["audio_codes"].tolist() == [3] * 40
        assert row["length"] == len(row["input_ids"]) and row["task"] == "text_chat"


def test_a_model_that_stops_at_its_last_span_is_taught_the_end_of_the_turn(folders):
    """ttt-tiny's setting, which saves a forward; an answer that was cut off at `max_new_tokens` is none."""
    root, _ = folders
    ids = build_processor().token_ids
    eos = f"eos_token_id=[{ids.end_of_turn_token_id}, {ids.end_of_last_audio_token_id}]"
    options = ["audio_block_size=8", "audio_steps_per_block=8", eos]
    assert distill(arguments(root, "short", generation=options))["examples"] == 3
    kept = load_mixture([str(root / "short")])["labels"]
    assert all(row[-2:] == [ids.end_of_last_audio_token_id, ids.end_of_turn_token_id] for row in kept)
    with pytest.raises(ValueError, match="'unfinished': 4"):
        distill(arguments(root, "cut", generation=[*options, "max_new_tokens=12"]))


def test_a_recogniser_decides_on_the_speech(folders):
    root, _ = folders
    listener = Listener("something else")
    with pytest.raises(ValueError, match="None of 5 answers is kept .*'speech': 3.*--generation.*--other_texts"):
        distill(arguments(root, "misheard"), listener)
    assert [length for length, _ in listener.heard] == [40 * 1280] * 3 and {r for _, r in listener.heard} == {16_000}
    assert distill(arguments(root, "heard"), Listener("hi"))["examples"] == 3
    lenient = arguments(root, "lenient", max_word_error_rate=2.0, other_texts=True)
    assert distill(lenient, Listener("something else"))["examples"] == 4


def test_word_errors_that_nobody_hears_are_refused(folders):
    root, _ = folders
    with pytest.raises(ValueError, match="`--max_word_error_rate` is 0.3, but nobody hears .* `--recogniser`"):
        distill(arguments(root, "unheard", max_word_error_rate=0.3))
    assert not (root / "unheard").exists()


@pytest.mark.parametrize("trusts", [False, True])
def test_model_and_processor_are_told_whether_code_may_run(folders, monkeypatch, trusts):
    root, _ = folders
    told = []
    for kind in (TttForConditionalGeneration, TttProcessor):

        def load(*args, load=kind.from_pretrained, **options):
            told.append(options["trust_remote_code"])
            return load(*args, **options)

        monkeypatch.setattr(kind, "from_pretrained", load)
    distill(arguments(root, f"trusts {trusts}", max_records=1, trust_remote_code=trusts))
    assert told == [trusts, trusts]


def test_the_recogniser_is_opened_with_the_language_that_is_spoken(folders, monkeypatch):
    root, _ = folders
    told = []

    def judge(name, prompt, num_threads, language):
        told.append((name, prompt, num_threads, language))
        return Listener("hi")

    monkeypatch.setattr("training_examples.evaluation.listening.WhisperJudge", judge)
    options = {"recogniser": "base", "language": "de", "max_records": 1, "threads": 1}
    assert distill(arguments(root, "german", **options))["examples"] == 1
    assert told == [("base", None, 1, "de")]  # the prompt that has English numbers spelled is for English


def test_texts_that_the_language_has_no_words_for_are_not_taken_for_right(folders):
    """English has no form of Chinese signs: without a guard nothing of them could be wrong."""
    root, _ = folders
    processor = build_processor()

    def judge(language, heard, said="今天", right="今天"):
        distiller = Distiller(None, processor, Listener(heard), arguments(root, "unwritten", language=language))
        (verdict,) = distiller.judge([split_example(example(right))[1]], [split_example(example(said))[1]])
        return None if verdict is None else verdict.kind

    def example(text):
        return processor.build_example(text, [3] * 12, task="text_chat", text="a")

    assert judge("zh", "今天") is None and judge("zh", "明天") == "speech"
    assert judge("en", "") == "language"
    assert judge("zh", "明天", said="明天") == judge("en", "", said="明天") == "text"


def test_a_model_that_was_trained_on_does_not_go_on_with_the_answers_of_another(folders):
    root, _ = folders
    shutil.copytree(root / "model", root / "growing")
    args = dataclasses.replace(arguments(root, "grown"), model=str(root / "growing"), max_records=2)
    distill(args)
    settings = root / "growing" / "generation_config.json"
    settings.write_text(settings.read_text() + "\n")
    with pytest.raises(ValueError, match="was begun otherwise: model was"):
        distill(args)


def test_only_the_tasks_and_the_number_asked_for_are_answered(folders):
    root, _ = folders
    assert distill(arguments(root, "two", max_records=2))["records"] == 2
    assert distill(arguments(root, "tasks", tasks=["text_chat"]))["records"] == 4
    with pytest.raises(ValueError, match="no examples of \\['asr'\\]"):
        distill(arguments(root, "none", tasks=["asr"]))


def test_a_run_goes_on_with_its_first_missing_shard(folders):
    root, _ = folders
    whole = distill(arguments(root, "whole", shard_size=2))
    shards = sorted((root / "whole" / "data").glob("*.parquet"))
    before = [shard.read_bytes() for shard in shards]
    shards[1].unlink()
    (root / "whole" / ".train" / "0000-000001.json").unlink()
    listener = Listener("hi")
    assert distill(arguments(root, "whole", shard_size=2), listener) == whole
    assert len(listener.heard) == 2  # those of the missing shard alone
    assert [shard.read_bytes() for shard in shards] == before
    with pytest.raises(ValueError, match="--max_word_error_rate was 0.0 and is 0.5"):
        distill(arguments(root, "whole", shard_size=2, max_word_error_rate=0.5), listener)


def test_the_last_answer_of_a_conversation_is_the_one_that_is_written_anew():
    labels = [-100, -100, 5, 6, -100, -100, 7, 8, -100]
    assert split_example({"input_ids": list(range(9)), "labels": labels}) == ([0, 1, 2, 3, 4, 5], [6, 7])


def test_arguments_that_cannot_be_meant_are_named(tmp_path):
    for options, message in (
        ({"batch_size": 0}, "`--batch_size` is 0"),
        ({"max_word_error_rate": -1.0}, "`--max_word_error_rate` is -1.0"),
    ):
        with pytest.raises(ValueError, match=message):
            arguments(tmp_path, "out", **options)
    with pytest.raises(ValueError, match="--generation` audio_block_size: every item needs the form"):
        arguments(tmp_path, "out", generation=["audio_block_size"]).generation_options()
    options = arguments(tmp_path, "out", generation=["seed=[1, 2]", "audio_remasking=entropy"]).generation_options()
    assert json.dumps(options) == '{"seed": [1, 2], "audio_remasking": "entropy"}'
