"""What a run of the training scripts leaves behind and says: cards, pushes, answers to held-out examples, from where it
goes on; and its batches by tokens."""

import copy
import json
import pickle
import random
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
import yaml
from builders import build_model, build_processor
from datasets import Dataset, DatasetDict, load_from_disk
from hub_standin import hub
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from pipelines import save_repository
from training_examples import finetune_lora, train_ttt
from training_examples.command_line import ScriptParser
from training_examples.training import metrics, samples
from training_examples.training.arguments import ModelArguments, TttTrainingArguments, check_group
from training_examples.training.batches import BatchCollator, TokenBatches, bucket_by_length
from training_examples.training.card import MARK
from training_examples.training.metrics import TrainingScores
from training_examples.training.resuming import describe_resuming
from training_examples.training.samples import choose_examples, split_example, what_was_asked, word_error_rate
from training_examples.training.trainer import describe_cutting

pytestmark = pytest.mark.usefixtures("undrawn_curves")


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """A model that answers "hi" and code 3 (`model`), and 24 + 6 examples of two tasks (`data`)."""
    folder = tmp_path_factory.mktemp("runs")
    processor = build_processor()
    save_repository(build_model(processor), processor, folder / "model")
    rng, rows = random.Random(0), []
    for index in range(30):
        task = ("tts", "text_chat")[index % 2]
        codes = [rng.randrange(16) for _ in range(rng.randrange(6, 40))]
        row = processor.build_example("hi", codes, task=task, text="hello" * rng.randrange(1, 4), system_prompt="talk")
        rows.append(row | {"length": len(row["input_ids"]), "task": task})
    data = Dataset.from_list(rows)
    splits = {"train": data.select(range(24)), "eval": data.select(range(24, 30))}
    DatasetDict(splits).save_to_disk(str(folder / "data"))
    return folder


def start(workspace, output, script=train_ttt, **options):
    """Runs a training script for four steps; returns its output folder."""
    settings = {"model": workspace / "model", "dataset": workspace / "data", "output_dir": output, "max_steps": 4}
    settings |= {"per_device_train_batch_size": 4, "logging_steps": 2, "save_strategy": "no", "report_to": "none"}
    settings |= {"disable_tqdm": True, "use_cpu": True, "threads": 1, "learning_rate": 1e-3, **options}
    words = []
    for name, value in settings.items():
        words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [script.__name__, *words])
        script.main()
    return output


def log_of(folder):
    return [json.loads(line) for line in (folder / "log_history.jsonl").read_text().splitlines()]


def test_a_short_run_shows_its_loss_without_being_asked(tmp_path):
    words = ["--output_dir", str(tmp_path), "--max_steps", "40", "--use_cpu"]
    (training,) = ScriptParser(TttTrainingArguments).parse_args_into_dataclasses(words)
    assert training.logging_steps * 4 <= training.max_steps


# ---------------------------------------------------------------------- cards and pushes


def test_a_run_leaves_a_card_of_its_data_recipe_and_figures(workspace, tmp_path):
    output = start(
        workspace, tmp_path / "run", eval_strategy="steps", eval_steps=4, save_strategy="steps", save_steps=2
    )
    card = ModelCard.load(output / "README.md")
    assert (card.data.license, card.data.library_name, card.data.pipeline_tag) == (
        "unknown", "transformers", "audio-to-audio",
    )  # fmt: skip
    assert "**Licence: fill in.**" in card.text and "curves.png" in card.text and (output / "curves.png").is_file()
    recipe = yaml.safe_load(card.text.split("```yaml\n")[1].split("```")[0])
    assert recipe["max_steps"] == 4 and recipe["learning_rate"] == 1e-3 and recipe["per_device_train_batch_size"] == 4
    evaluation = next(entry for entry in log_of(output) if "eval_loss" in entry)
    assert f"{evaluation['eval_audio_loss']:.4g}" in card.text
    early = ModelCard.load(output / "checkpoint-2" / "README.md")
    assert "trained for 2 steps" in early.text and "trained for 4 steps" in card.text


def test_nothing_that_is_read_names_a_folder_of_the_machine(workspace, tmp_path):
    model = shutil.copytree(workspace / "model", tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    config["text_config"]["_name_or_path"] = str(tmp_path / "llm")  # as checkpoints had it once
    (model / "config.json").write_text(json.dumps(config))
    output = start(workspace, tmp_path / "run", model=model, save_strategy="steps", save_steps=2)
    files = [path for suffix in ("*.json", "*.md", "*.jinja") for path in output.rglob(suffix)]
    assert len(files) > 10
    for path in files:
        assert str(tmp_path.parent.parent) not in path.read_text(encoding="utf-8"), path


def test_an_edited_card_stays_and_a_written_one_is_renewed(workspace, tmp_path):
    output = tmp_path / "run"
    output.mkdir()
    (output / "README.md").write_text("# Mine\n")
    start(workspace, output, max_steps=1)
    assert (output / "README.md").read_text() == "# Mine\n"
    (output / "README.md").write_text(f"{MARK}\n# Old\n")
    start(workspace, output, max_steps=2, license="apache-2.0")
    card = ModelCard.load(output / "README.md")
    assert "trained for 2 steps" in card.text and card.data.license == "apache-2.0"
    assert "fill in.**" not in card.text


def test_a_card_inherits_what_the_models_own_card_says(workspace, tmp_path):
    model = shutil.copytree(workspace / "model", tmp_path / "model")
    (model / "README.md").write_text("---\nlicense: mit\nbase_model: owner/llm\nlanguage: en\n---\n# It\n")
    output = start(workspace, tmp_path / "run", model=model, max_steps=1)
    data = ModelCard.load(output / "README.md").data
    assert (data.license, data.base_model, data.language) == ("mit", "owner/llm", "en")


def test_an_adapter_has_our_card_in_every_checkpoint_and_so_has_the_merged_model(workspace, tmp_path):
    options = {"r": 2, "base_model_name": "owner/talker", "merge_to": tmp_path / "merged", "max_steps": 2}
    options |= {"save_strategy": "steps", "save_steps": 1}
    output = start(workspace, tmp_path / "adapter", finetune_lora, **options)
    for folder in (output, output / "checkpoint-1"):
        card = ModelCard.load(folder / "README.md")
        assert (card.data.base_model, card.data.library_name, card.data.pipeline_tag) == (
            "owner/talker", "peft", "audio-to-audio",
        )  # fmt: skip
        assert MARK in card.content and "A LoRA adapter" in card.text and "Model Card for" not in card.text
        assert "More Information Needed" not in card.text and str(workspace) not in card.content
    merged = ModelCard.load(tmp_path / "merged" / "README.md")
    assert merged.data.library_name == "transformers" and "curves.png" not in merged.text


def test_a_run_is_pushed_whole(workspace, tmp_path, monkeypatch):
    with hub(monkeypatch) as standin:
        options = {"push_to_hub": True, "hub_model_id": "someone/talks", "hub_token": "hf_x", "eval_strategy": "steps"}
        output = start(workspace, tmp_path / "run", save_strategy="steps", save_steps=2, **options)
    pushed = standin.files["someone/talks"]
    assert {"config.json", "model.safetensors", "processor_config.json", "modeling_ttt.py", "pipeline_ttt.py"} <= set(
        pushed
    )
    assert {"audio_tokenizer/model.safetensors", "README.md", "curves.png", "log_history.jsonl"} <= set(pushed)
    assert not any(path.startswith("checkpoint-") for path in pushed)
    assert pushed["README.md"].decode() == (output / "README.md").read_text()
    assert "trained for 4 steps" in pushed["README.md"].decode() and "someone/talks" in pushed["README.md"].decode()
    assert pushed["model.safetensors"] == (output / "model.safetensors").read_bytes()


def test_nothing_that_is_pushed_names_a_folder_of_the_machine_or_the_token(workspace, tmp_path, monkeypatch):
    """Pickled options and TensorBoard's files neither, nor checkpoints where they are pushed, too."""
    monkeypatch.chdir(tmp_path)
    options = {"push_to_hub": True, "hub_model_id": "someone/talks", "hub_token": "hf_secret", "save_steps": 2}
    options |= {"report_to": "tensorboard", "eval_strategy": "steps", "eval_steps": 2}
    with hub(monkeypatch) as standin:
        start(workspace, tmp_path / "run", save_strategy="best", metric_for_best_model="loss", **options)
        more = {"save_strategy": "steps", "hub_strategy": "all_checkpoints", "load_best_model_at_end": True}
        start(workspace, "other", **options | more | {"hub_model_id": "someone/hears"})
    pushed = standin.files["someone/talks"] | {
        f"other/{path}": data for path, data in standin.files["someone/hears"].items()
    }
    names = {path.rpartition("/")[2].split(".")[0] for path in pushed}
    assert {"training_args", "events", "trainer_state", "optimizer"} <= names
    for path, content in pushed.items():
        for secret in (str(tmp_path.parent.parent), str(workspace), "hf_secret"):
            assert secret.encode() not in content, path


def test_options_that_are_pickled_are_clean_and_copies_are_whole(tmp_path):
    options = TttTrainingArguments(output_dir=str(tmp_path / "a" / "run"), hub_token="hf_secret", use_cpu=True)
    assert (options.output_dir, options.hub_token) == (str(tmp_path / "a" / "run"), "hf_secret")
    read = pickle.loads(pickle.dumps(options))
    assert (read.output_dir, read.hub_token, read.learning_rate) == ("a/run", None, options.learning_rate)
    assert options.to_dict()["output_dir"] == "a/run"
    for copied in (copy.copy(options), copy.deepcopy(options)):
        assert copied is not options and vars(copied).keys() == vars(options).keys()
        assert (copied.output_dir, copied.hub_token) == (options.output_dir, options.hub_token)


def test_checkpoints_that_name_the_best_by_a_folder_of_the_machine_are_not_pushed(workspace, tmp_path):
    options = {"push_to_hub": True, "hub_token": "hf_x", "hub_strategy": "checkpoint", "metric_for_best_model": "loss"}
    with pytest.raises(ValueError, match="--hub_strategy checkpoint would push .*: give --output_dir relative"):
        start(workspace, tmp_path / "run", **options)


def test_an_adapter_of_a_local_folder_is_not_pushed(workspace, tmp_path):
    with pytest.raises(ValueError, match="--push_to_hub would publish an adapter that names its model by a folder"):
        start(workspace, tmp_path / "run", finetune_lora, push_to_hub=True, hub_token="hf_x")


# ---------------------------------------------------------------------- going on


def test_a_run_says_from_where_it_goes_on_and_what_it_passes_over(workspace, tmp_path, capsys):
    options = {"save_strategy": "steps", "save_steps": 2}
    start(workspace, tmp_path / "run", **options, max_steps=2)
    assert "Training goes on" not in capsys.readouterr().out
    (tmp_path / "run" / "checkpoint-3").mkdir()
    start(workspace, tmp_path / "run", **options)
    said = capsys.readouterr().out
    assert f"Training goes on from {tmp_path / 'run' / 'checkpoint-2'}; checkpoint-3 was not written to its end" in said
    assert "passed over. It was written under other options: --max_steps was 2 and is 4." in said


def test_a_run_says_which_options_its_checkpoint_was_written_without(tmp_path):
    (tmp_path / "checkpoint-2").mkdir()
    recipe = yaml.safe_dump({"dataset": ["data/a"], "packing": True, "learning_rate": 2e-5})
    (tmp_path / "checkpoint-2" / "README.md").write_text(f"# It\n\n## Recipe\n\nAs a file:\n\n```yaml\n{recipe}```\n")
    (tmp_path / "checkpoint-2" / "trainer_state.json").write_text("{}")
    checkpoint = str(tmp_path / "checkpoint-2")
    same = {"dataset": ["data/a"], "packing": True, "learning_rate": 2e-5}
    assert describe_resuming(tmp_path, checkpoint, same) == f"Training goes on from {checkpoint}."
    said = describe_resuming(tmp_path, checkpoint, {"dataset": ["data/b"], "packing": True, "r": 8})
    assert said == (
        f"Training goes on from {checkpoint}. It was written under other options: --dataset was ['data/a'] and is "
        "['data/b']; --learning_rate was 2e-05 and is not set; --r was not set and is 8."
    )
    (tmp_path / "checkpoint-2" / "README.md").write_text("# Mine\n")
    assert describe_resuming(tmp_path, checkpoint, {"r": 8}) == f"Training goes on from {checkpoint}."


def test_what_is_said_before_a_run_goes_on(tmp_path):
    assert describe_resuming(tmp_path, None) is None
    for step in (3, 4):
        (tmp_path / f"checkpoint-{step}").mkdir()
    said = describe_resuming(tmp_path, None)
    assert said == (
        "Training starts anew; checkpoint-4, checkpoint-3 were not written to their end and are passed over."
    )


def test_tokens_a_second_are_those_of_the_steps_since_the_last_log(monkeypatch):
    """A step takes a second; finding the place in the data, logging, evaluating and saving take a hundred each."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: clock.now)
    monkeypatch.setattr(metrics, "reduce", lambda table, reduction: table)
    scores, args = TrainingScores(), SimpleNamespace(include_num_input_tokens_seen="all")
    state = SimpleNamespace(num_input_tokens_seen=70_000, log_history=[])  # a resumed run
    scores.on_train_begin(args, state, None, model=torch.nn.Linear(1, 1))
    clock.now += 100
    speeds = []
    for step in range(1, 7):
        scores.on_step_begin(args, state, None)
        state.num_input_tokens_seen += 500
        clock.now += 1
        scores.total = torch.ones(2, 3)
        scores.on_step_end(args, state, None)
        if step % 2 == 0:
            clock.now += 100
            logs = {"loss": 1.0}
            state.log_history.append(dict(logs))
            scores.on_log(args, state, None, logs=logs)
            speeds.append(logs["train_tokens_per_second"])
            for event in (scores.on_evaluate, scores.on_save):
                clock.now += 100
                event(args, state, None)
    assert speeds == [500.0] * 3


def test_a_side_that_was_not_scored_is_not_logged(workspace, tmp_path):
    """Batches that are all left clean score text alone: audio has neither a loss nor an accuracy of 0."""
    output = start(workspace, tmp_path / "run", clean_batch_probability=1.0)
    entries = [entry for entry in log_of(output) if "loss" in entry]
    assert entries and all("text_loss" in entry for entry in entries)
    assert not any(name.startswith("audio") for entry in entries for name in entry)


# ---------------------------------------------------------------------- hearing it learn


class Listener:
    """Hears "hi" in everything."""

    def __init__(self, name, prompt, num_threads, language):
        self.name, Listener.told = name, (prompt, language)

    def transcribe(self, waveforms, sampling_rate):
        return ["hi"] * len(waveforms)


def test_a_run_answers_held_out_examples_in_text_and_speech(workspace, tmp_path, monkeypatch, capsys):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setattr("training_examples.evaluation.listening.WhisperJudge", Listener)
    options = {"sample_steps": 2, "num_samples": 2, "report_to": "tensorboard", "max_steps": 3}
    options |= {"recogniser": "base", "language": "de"}
    output = start(workspace, tmp_path / "run", **options, learning_rate=0.0)
    files = sorted(path.name for path in (output / "samples").iterdir())
    steps = [f"step-00000{step}{end}" for step in (2, 3) for end in ("-0.wav", "-1.wav", ".jsonl")]
    assert files == ["expected-0.wav", "expected-1.wav", *steps]
    rows = [json.loads(line) for line in (output / "samples" / "step-000002.jsonl").read_text().splitlines()]
    assert [row["task"] for row in rows] == ["tts", "text_chat"]
    assert all(row[name] == "hi" for row in rows for name in ("expected", "answered", "heard"))
    assert all(row["ended"] for row in rows)
    assert all(row["asked"] and not row["asked"].replace("hello", "") for row in rows)  # and nothing of the template
    seconds = soundfile.info(output / "samples" / "step-000002-0.wav").duration
    assert seconds == pytest.approx(rows[0]["seconds"], abs=0.01) and seconds > 0.5
    assert "step 2: answers to held-out examples\n  'hi' came as 'hi' (heard as 'hi')" in capsys.readouterr().out
    board = EventAccumulator(str(next(output.rglob("events.out*"))), size_guidance={"audio": 0}).Reload()
    assert {"samples/0/answered", "samples/1/answered", "samples/0/expected"} <= set(board.Tags()["audio"])
    assert [event.value for event in board.Scalars("samples/word_error_rate")] == [0.0, 0.0]
    assert "| hi | hi | hi |" in (output / "README.md").read_text()
    assert Listener.told == (None, "de")  # the prompt that has English numbers spelled is for English


def test_what_was_asked_is_the_question_without_its_template():
    processor = build_processor()
    codes = list(range(processor.num_codebooks * 10))
    seconds = f"{len(codes) / processor.num_codebooks / processor.audio_format.frame_rate:.1f}"
    said = {"type": "audio", "audio_codes": codes}
    earlier = [{"role": "user", "content": "oh"}, {"role": "assistant", "content": "hi"}]
    for content, asked in (
        ("hi hi", "hi hi"),
        ([said], f"(spoken, {seconds} s)"),
        ([{"type": "text", "text": "hi"}, said], f"hi (spoken, {seconds} s)"),
    ):
        for before in ([], [{"role": "system", "content": "oh oh"}], earlier):
            turns = [*before, {"role": "user", "content": content}, {"role": "assistant", "content": "oh"}]
            prompt, _ = split_example(processor.build_conversation_example(turns))
            assert what_was_asked(prompt, processor) == asked
    assert what_was_asked(processor.tokenizer("hi oh", add_special_tokens=False)["input_ids"], processor) == "hi oh"


def test_a_run_that_answers_learns_the_same(workspace, tmp_path):
    quiet = start(workspace, tmp_path / "quiet")
    talking = start(workspace, tmp_path / "talking", sample_steps=1, num_samples=2)
    for name, value in load_file(quiet / "model.safetensors").items():
        assert torch.equal(value, load_file(talking / "model.safetensors")[name]), name


def test_an_adapter_in_training_answers_too(workspace, tmp_path):
    output = start(workspace, tmp_path / "run", finetune_lora, sample_steps=4, num_samples=1, r=2)
    assert (output / "samples" / "step-000004-0.wav").is_file()


def test_examples_to_answer_are_of_every_task_and_not_too_long(workspace):
    data = DatasetDict.load_from_disk(str(workspace / "data"))["eval"]
    chosen = choose_examples(data, 4, 1000)
    assert [row["task"] for row in chosen] == ["tts", "text_chat"] * 2
    assert choose_examples(data, 4, 10) == []
    assert all(split_example(row)[1][-1] == row["input_ids"][-1] for row in chosen)


def test_word_errors_are_those_of_what_was_heard():
    rows = [{"answered": "one two", "heard": "one too many"}, {"answered": "", "heard": "hm"}, {"answered": "four"}]
    assert word_error_rate(rows) == 0.5
    assert word_error_rate(rows[1:]) is None
    chinese = [{"answered": "今天天气", "heard": "今天天汽"}]  # which English has no words for
    assert word_error_rate(chinese, "zh") == 0.25 and word_error_rate(chinese) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"recogniser": "base"}, "--recogniser reads what --sample_steps answers"),
        ({"sample_steps": -1}, "`--sample_steps` is -1"),
        ({"sample_steps": 1, "num_samples": 0}, "`--num_samples` is 0"),
        ({"sample_steps": 1, "eval_split": "nothing"}, "`split` is 'nothing'"),
    ],
)
def test_options_of_answering_are_checked_before_training(workspace, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        start(workspace, tmp_path / "run", **options)


# ---------------------------------------------------------------------- batches by tokens


def test_batches_hold_examples_of_like_length_up_to_the_budget():
    lengths = np.random.default_rng(0).integers(10, 400, 500)
    batches = bucket_by_length(lengths, 2000, seed=1)
    assert sorted(np.concatenate(batches).tolist()) == list(range(500))
    padded = [len(batch) * -(-lengths[batch].max() // 8) * 8 for batch in batches]
    assert max(padded) <= 2000
    assert lengths.sum() / sum(padded) > 0.95  # little of it is padding
    assert len(batches) < 1.1 * lengths.sum() / 2000 + 5
    same = bucket_by_length(lengths, 2000, seed=1)
    assert all(np.array_equal(first, second) for first, second in zip(batches, same, strict=True))
    assert bucket_by_length([], 100) == []


def test_a_run_trains_on_batches_of_at_most_so_many_tokens(workspace, tmp_path, monkeypatch):
    seen = []
    call = BatchCollator.__call__

    def watch(self, items):
        batch = call(self, items)
        if isinstance(items[0], list):
            seen.append(tuple(batch["input_ids"].shape))
        return batch

    monkeypatch.setattr(BatchCollator, "__call__", watch)
    options = {"tokens_per_batch": 480, "per_device_train_batch_size": 1, "eval_strategy": "epoch", "max_steps": -1}
    output = start(workspace, tmp_path / "run", num_train_epochs=2, **options)
    assert all(rows * length <= 480 for rows, length in seen) and max(rows for rows, _ in seen) > 2
    assert sum(rows for rows, _ in seen) == 2 * 24
    assert len([entry for entry in log_of(output) if "eval_loss" in entry]) == 2


def test_items_of_token_batches_are_examples(workspace):
    data = DatasetDict.load_from_disk(str(workspace / "data"))["train"]
    batches = TokenBatches(data, 480)
    rows = [row for index in range(len(batches)) for row in batches[index]]
    assert sorted(str(row["input_ids"]) for row in rows) == sorted(map(str, data["input_ids"]))


def test_a_resumed_run_of_token_batches_ends_with_the_same_weights(workspace, tmp_path):
    options = {"tokens_per_batch": 480, "per_device_train_batch_size": 1, "save_strategy": "steps", "save_steps": 3}
    whole = start(workspace, tmp_path / "whole", **options, max_steps=6)
    shutil.copytree(whole / "checkpoint-3", tmp_path / "resumed" / "checkpoint-3")
    resumed = start(workspace, tmp_path / "resumed", **options, max_steps=6)
    for name, value in load_file(whole / "model.safetensors").items():
        assert torch.equal(value, load_file(resumed / "model.safetensors")[name]), name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"tokens_per_batch": 100, "per_device_train_batch_size": 4},
            "takes the place of --per_device_train_batch_size",
        ),
        (
            {"tokens_per_batch": 40, "per_device_train_batch_size": 1},
            "--tokens_per_batch is 40, but the longest example",
        ),
        ({"tokens_per_batch": 100, "packing": True, "max_length": 64}, "--tokens_per_batch and --packing do not go"),
        ({"tokens_per_batch": 100, "streaming": True}, "--tokens_per_batch and --streaming do not go together"),
        ({"attn_implementation": "flex_attention"}, "flex_attention trains on GPUs only.*--attn_implementation sdpa"),
        ({"shard": True}, "--shard spreads a model over several processes, and there is one"),
    ],
)
def test_options_that_cannot_be_met_are_refused(workspace, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        start(workspace, tmp_path / "run", **options)


def test_examples_that_lose_their_end_are_counted_before_training(workspace, tmp_path):
    data = Dataset.from_dict({"length": [10, 64, 65, 100, 7]})
    said = describe_cutting(data, 64, "--dataset")
    assert said == (
        "2 of 5 examples of --dataset are longer than --max_length 64 and lose their end: 37 of 246 tokens."
    )
    assert describe_cutting(data.select([1, 2]), 64, "x").startswith("1 of 2 examples of x are longer")
    for nothing in ((data, 100, "x"), (data, None, "x"), (None, 8, "x"), (data.to_iterable_dataset(), 8, "x")):
        assert describe_cutting(*nothing) is None


def test_held_out_examples_that_are_too_long_are_refused_before_training(workspace, tmp_path):
    examples = load_from_disk(str(workspace / "data"))["eval"]
    row = examples[0]
    longer = {name: row[name] * 200 for name in ("input_ids", "labels")}
    longer |= {"length": len(longer["input_ids"]), "task": row["task"]}
    DatasetDict({"eval": Dataset.from_list([row, longer])}).save_to_disk(str(tmp_path / "long"))
    options = {"eval_dataset": [tmp_path / "long"], "eval_strategy": "steps", "eval_steps": 4}
    with pytest.raises(ValueError, match="An example of the evaluation split has .* tokens, but the model has"):
        start(workspace, tmp_path / "run", **options)


# ---------------------------------------------------------------------- one group or none


def test_processes_that_are_in_no_group_are_refused(monkeypatch):
    training = SimpleNamespace(world_size=1, device=torch.device("cpu"))
    for name in ("WORLD_SIZE", "MASTER_ADDR", "ACCELERATE_USE_CPU", "ACCELERATE_USE_FSDP"):
        monkeypatch.delenv(name, raising=False)
    check_group(training)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="2 processes were launched, but this one trains in a group of 1.*cpu.yaml"):
        check_group(training)
    training.world_size = 2
    check_group(training)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="accelerate shards over accelerators only.*--shard"):
        check_group(training)
    training.device = torch.device("cuda")
    check_group(training)


def test_a_launch_of_one_process_for_several_is_refused(monkeypatch):
    for name, value in (("MASTER_ADDR", "127.0.0.1"), ("ACCELERATE_USE_CPU", "True")):
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(ValueError, match="`accelerate launch --cpu` starts a single process"):
        check_group(SimpleNamespace(world_size=1, device=torch.device("cpu")))


def test_the_recogniser_of_samples_is_optional(tmp_path):
    assert ModelArguments(model=tmp_path, sample_steps=5).recogniser is None
    assert samples.latest_samples(tmp_path) == []
