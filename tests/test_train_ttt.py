"""The training script on a model that learns in seconds: logs, evaluation, resuming after a kill, early errors."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
import torch
from builders import build_processor, run_without_packages
from datasets import Dataset, DatasetDict
from PIL import Image
from safetensors.torch import load_file
from transformers import EvalPrediction, Trainer, TrainingArguments

from modeling_ttt import TttConfig, TttForConditionalGeneration
from processing import TttDataCollator, TttProcessor, interleave
from training_examples import train_ttt
from training_examples.training.metrics import EvaluationMetrics, accuracies, plot_curves
from training_examples.training.resuming import last_complete_checkpoint

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.usefixtures("undrawn_curves")
BINS = ["0.00-0.25", "0.25-0.50", "0.50-0.75", "0.75-1.00"]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """A folder with an untrained model (`model`), and 24 + 6 examples of 30 to 70 tokens, saved (`data`) and as the
    shards of prepare_dataset.py (`prepared`)."""
    folder = tmp_path_factory.mktemp("train")
    processor = build_processor(system_prompts={"spoken_chat": "answer"})
    ids = processor.token_ids
    backbone = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    backbone |= {"num_key_value_heads": 2, "tie_word_embeddings": True, "max_position_embeddings": 128}
    torch.manual_seed(0)
    config = TttConfig(
        text_config=backbone | {"vocab_size": len(processor.tokenizer)},
        **{name: getattr(ids, name) for name in TttConfig().to_dict() if hasattr(ids, name)},
    )
    TttForConditionalGeneration(config).save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    rng = random.Random(0)

    def examples(number):
        rows: dict[str, list] = {"input_ids": [], "labels": [], "length": [], "task": []}
        for _ in range(number):
            codes = [rng.randrange(4) for _ in range(rng.randrange(12, 50))]
            answer = interleave([72, 73], codes, ids, end_of_turn=True)
            prompt = [rng.randrange(60, 90) for _ in range(8)]
            rows["input_ids"].append(prompt + answer)
            rows["labels"].append([-100] * len(prompt) + answer)
            rows["length"].append(len(prompt) + len(answer))
            rows["task"].append("tts")
        return Dataset.from_dict(rows)

    data = DatasetDict({"train": examples(24), "eval": examples(6)})
    data.save_to_disk(str(folder / "data"))
    for split, dataset in data.items():
        for shard in range(3):
            dataset.shard(3, shard).to_parquet(folder / "prepared" / "data" / f"{split}-0000-{shard:06d}.parquet")
    return folder


def arguments(workspace, output, **options):
    """The command line, as a list, of a run of 12 steps, 6 an epoch."""
    if options.get("dataset") == "prepared":
        options["dataset"] = workspace / "prepared"
    options = {
        "model": workspace / "model",
        "dataset": workspace / "data",
        "output_dir": output,
        "max_steps": 12,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 3,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "threads": 1,
        **options,
    }
    line = []
    for name, value in options.items():
        line += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return line


def train(workspace, output, **options):
    sys.argv = ["train_ttt.py", *arguments(workspace, output, **options)]
    train_ttt.main()
    return [json.loads(line) for line in (output / "log_history.jsonl").read_text().splitlines()]


@pytest.fixture(autouse=True)
def _script(monkeypatch):
    """The command line is put back; streams end without the five seconds that datasets waits for its threads."""
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setattr("datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)


def weights(folder):
    return load_file(folder / "model.safetensors")


def assert_same_weights(first, second):
    ours, theirs = weights(first), weights(second)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


def test_log_has_losses_accuracies_and_speed_of_training_and_evaluation(workspace, tmp_path, monkeypatch):
    monkeypatch.setattr("training_examples.training.trainer.plot_curves", plot_curves)
    log = train(
        workspace, tmp_path, max_steps=24, eval_strategy="steps", eval_steps=12, report_to="tensorboard",
 clean_batch_probability=0.0, gradient_accumulation_steps=2,
        per_device_train_batch_size=2, per_device_eval_batch_size=4,
    )  # fmt: skip
    training = [entry for entry in log if "loss" in entry]
    evaluation = [entry for entry in log if "eval_loss" in entry]
    assert [entry["step"] for entry in training] == list(range(3, 25, 3))
    assert [entry["step"] for entry in evaluation] == [12, 24]
    for entries, prefix in ((training, ""), (evaluation, "eval_")):
        for entry in entries:
            parts = entry[f"{prefix}text_loss"] + entry[f"{prefix}audio_loss"]
            assert parts == pytest.approx(entry[f"{prefix}loss"], rel=1e-5)
            assert 0 <= entry[f"{prefix}text_accuracy"] <= 1
        seen = {name for entry in entries for name in entry}
        assert {f"{prefix}audio_accuracy_{edges}" for edges in BINS} | {f"{prefix}audio_accuracy"} <= seen
        assert entries[-1][f"{prefix}text_loss"] < 0.8 * entries[0][f"{prefix}text_loss"]
        assert entries[-1][f"{prefix}text_accuracy"] > entries[0][f"{prefix}text_accuracy"]
    assert all(entry["train_tokens_per_second"] > 0 for entry in training)
    with Image.open(tmp_path / "curves.png") as picture:
        assert picture.size == (1320, 840) and len(picture.convert("L").getcolors()) > 50

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = {}
    for file in tmp_path.rglob("events.out*"):
        board = EventAccumulator(str(file)).Reload()
        events |= {tag: [event.value for event in board.Scalars(tag)] for tag in board.Tags()["scalars"]}
    assert events["train/text_loss"] == pytest.approx([entry["text_loss"] for entry in training], rel=1e-5)
    assert events["eval/audio_accuracy"] == pytest.approx([entry["eval_audio_accuracy"] for entry in evaluation])


def test_evaluation_is_the_deterministic_bound_on_whole_examples(workspace, tmp_path):
    """Truncation and packing are for training; the loss is that of the model in eval mode, to the last digit twice."""
    options = {"learning_rate": 0.0, "eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 6}
    options |= {"span_truncation_probability": 1.0, "packing": True, "max_length": 128}
    log = train(workspace, tmp_path, max_steps=2, **options)
    first, second = (entry["eval_loss"] for entry in log if "eval_loss" in entry)
    assert first == second
    data = DatasetDict.load_from_disk(str(workspace / "data"))["eval"]
    longest = max(data["length"])
    batch = {
        name: torch.tensor([row + [filling] * (longest - len(row)) for row in data[name]])
        for name, filling in (("input_ids", 0), ("labels", -100))
    }
    batch["attention_mask"] = torch.arange(longest) < torch.tensor(data["length"])[:, None]
    model = TttForConditionalGeneration.from_pretrained(workspace / "model").eval()
    with torch.no_grad():
        loss = model(**batch, num_items_in_batch=(batch["labels"] != -100).sum()).loss
    assert first == pytest.approx(loss.item(), rel=1e-5)


TALK = """
import numpy as np
from transformers import pipeline

for folder in sys.argv[1:]:
    pipe = pipeline("audio-to-audio", model=folder, trust_remote_code=True, device="cpu")
    answer = pipe(np.zeros(8000, dtype=np.float32), generate_kwargs={"max_new_tokens": 12})
    print(type(pipe).__name__, sorted(answer))
"""


def test_checkpoints_and_the_trained_model_talk_where_this_package_is_absent(workspace, tmp_path):
    train(workspace, tmp_path / "run", max_steps=2, save_strategy="steps", save_steps=1)
    said = run_without_packages(TALK, tmp_path / "run" / "checkpoint-1", tmp_path / "run", cwd=tmp_path)
    assert said == ["TttAudioToAudioPipeline ['audio', 'sampling_rate', 'text']"] * 2


def test_any_trainer_evaluates_whole_examples_whatever_its_batch_size(workspace, tmp_path):
    """With the Trainer's own defaults, which drop columns that the model does not take."""
    processor = TttProcessor.from_pretrained(workspace / "model")
    data = DatasetDict.load_from_disk(str(workspace / "data"))["eval"]
    model = TttForConditionalGeneration.from_pretrained(workspace / "model", span_truncation_probability=1.0)
    losses = []
    for size in (1, 2, 6):
        options = {"per_device_eval_batch_size": size, "use_cpu": True, "report_to": "none", "disable_tqdm": True}
        trainer = Trainer(
            model,
            TrainingArguments(output_dir=str(tmp_path), **options),
            eval_dataset=data,
            data_collator=TttDataCollator(processor),
            processing_class=processor,
        )
        losses.append(trainer.evaluate()["eval_loss"])
    rows = [{name: torch.tensor([row[name]]) for name in ("input_ids", "labels")} for row in data]
    with torch.no_grad():
        expected = sum(model(**row).loss.item() for row in rows) / len(rows)
    assert losses == pytest.approx([expected] * 3, rel=1e-5)


RESUMED = {
    "shuffled": {},
    "by_length": {"train_sampling_strategy": "group_by_length"},
    "packed": {"packing": True, "max_length": 128, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 1},
    "streamed": {"streaming": True, "shuffle_buffer_size": 8, "dataset": "prepared"},
    "streamed and packed": {"streaming": True, "packing": True, "max_length": 128, "dataset": "prepared"},
}


@pytest.fixture(scope="module")
def whole_run(workspace, tmp_path_factory):
    """Trains to the end once for each way: (options, output folder, log)."""
    runs = {}

    def run(way):
        if way not in runs:
            options = RESUMED[way] | {"save_strategy": "steps", "save_steps": 3, "eval_strategy": "steps"}
            options["eval_steps"] = 4
            output = tmp_path_factory.mktemp(way)
            runs[way] = options, output, train(workspace, output, **options)
        return runs[way]

    return run


@pytest.mark.parametrize(
    ("way", "length"), [("shuffled", {}), ("by_length", {"max_steps": -1, "num_train_epochs": 0.5})]
)
def test_a_finished_run_is_not_trained_further(workspace, tmp_path, capsys, way, length):
    """However often its command is given, and whatever is missing of what stands beside its last checkpoint."""
    options = RESUMED[way] | {"save_strategy": "steps", "save_steps": 3, "lr_scheduler_type": "constant"} | length
    options |= {"eval_strategy": "steps", "eval_steps": 2}
    first = train(workspace, tmp_path, **options)
    names = sorted(path.name for path in tmp_path.iterdir())
    before = weights(tmp_path)
    for left_to_do in ([], ["model.safetensors", "trainer_state.json"]):
        for name in left_to_do:
            (tmp_path / name).unlink()
        capsys.readouterr()
        again = train(workspace, tmp_path, **options)
        assert "The run is finished, and nothing is trained" in capsys.readouterr().out
        after = weights(tmp_path)
        assert all(torch.equal(value, after[name]) for name, value in before.items())
        assert sorted(path.name for path in tmp_path.iterdir()) == names
        losses = [[entry["loss"] for entry in log if "loss" in entry] for log in (first, again)]
        assert losses[0] == losses[1]
        if not left_to_do:
            assert again == first
    assert len(train(workspace, tmp_path, **options | {"max_steps": 14})) > len(first)  # it may go on


# Streams take twice as long: they begin again and pass over what was seen.
SLOW = [way for way in RESUMED if way.startswith("streamed and")]


@pytest.mark.parametrize(
    ("way", "step"),
    [pytest.param(way, 9, marks=[pytest.mark.slow] * (way in SLOW)) for way in RESUMED] + [("by_length", 6)],
)
def test_a_resumed_run_ends_with_the_weights_of_one_that_was_not_stopped(workspace, tmp_path, whole_run, way, step):
    """Step 6 is the border of the two epochs, step 9 the middle of the second."""
    options, whole, log = whole_run(way)
    shutil.copytree(whole / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    resumed = train(workspace, tmp_path, **options)
    assert_same_weights(tmp_path, whole)
    losses = [[entry["loss"] for entry in entries if "loss" in entry] for entries in (log, resumed)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6) and len(losses[0]) == 4


@pytest.mark.slow
def test_a_killed_run_ends_with_the_weights_of_one_that_was_not(workspace, tmp_path):
    options = {"max_steps": 40, "save_strategy": "steps", "save_steps": 5, "save_total_limit": 2, "logging_steps": 20}
    train(workspace, tmp_path / "whole", **options)
    output = tmp_path / "killed"
    command = [
        sys.executable,
        str(ROOT / "training_examples" / "train_ttt.py"),
        *arguments(workspace, output, **options),
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    while process.poll() is None and not (output / "checkpoint-10").exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    _, errors = process.communicate()
    assert process.returncode == -signal.SIGKILL, errors.decode()
    assert not (output / "model.safetensors").exists()
    train(workspace, output, **options)
    assert_same_weights(output, tmp_path / "whole")


def test_a_checkpoint_that_was_cut_short_is_passed_over(tmp_path):
    assert last_complete_checkpoint(tmp_path / "nothing") is None
    for step, state in ((90, "{}"), (100, "{}"), (110, '{"epo'), (120, None)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        if state is not None:
            (folder / "trainer_state.json").write_text(state)
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-100")


@pytest.mark.parametrize(
    "objectives", [("diffusion", "autoregressive"), ("autoregressive", "autoregressive"), ("diffusion", "diffusion")]
)
def test_each_model_of_the_papers_comparison_learns(workspace, tmp_path, objectives):
    audio, text = objectives
    options = {"audio_objective": audio, "text_objective": text, "clean_batch_probability": 0.0}
    log = train(workspace, tmp_path, max_steps=24, eval_strategy="steps", eval_steps=8, **options)
    evaluation = [entry for entry in log if "eval_loss" in entry]
    for part in ("eval_text_loss", "eval_audio_loss"):
        assert evaluation[-1][part] < evaluation[0][part]
    config = TttConfig.from_pretrained(tmp_path)
    assert (config.audio_objective, config.text_objective) == objectives
    assert ("eval_audio_accuracy_0.00-0.25" in evaluation[0]) == (audio == "diffusion")


def test_a_run_keeps_the_settings_of_its_model_where_it_sets_none(workspace, tmp_path):
    """A twin goes on as a twin; what a run sets is written into the model it saves."""
    options = {"block_lengths": [4, 8], "stratified_noise": True}
    train(workspace, tmp_path / "first", max_steps=1, audio_objective="autoregressive", noise_epsilon=0.05, **options)
    train(workspace, tmp_path / "second", max_steps=1, model=tmp_path / "first", block_filling_weight=0.1)
    config = TttConfig.from_pretrained(tmp_path / "second")
    assert (config.audio_objective, config.noise_epsilon) == ("autoregressive", 0.05)
    assert (config.block_filling_weight, config.span_truncation_probability) == (0.1, 0.5)
    assert (config.block_lengths, config.stratified_noise) == ([4, 8], True)
    train(workspace, tmp_path / "new", max_steps=1)
    assert TttConfig.from_pretrained(tmp_path / "new").stratified_noise is False
    train(workspace, tmp_path / "off", max_steps=1, model=tmp_path / "first", stratified_noise=False)
    assert TttConfig.from_pretrained(tmp_path / "off").stratified_noise is False


@pytest.mark.parametrize("options", [{"block_masking_probability": 1.0}, {"span_attention": "block_causal"}])
def test_blocks_are_learned_when_asked_for(workspace, tmp_path, options):
    options |= {"block_lengths": [4, 8], "packing": True, "max_length": 128, "clean_batch_probability": 0.0}
    log = train(workspace, tmp_path, max_steps=24, per_device_train_batch_size=2, **options)
    losses = [entry["loss"] for entry in log if "loss" in entry]
    assert losses[-1] < 0.8 * losses[0]


def test_mixtures_with_weights_and_an_evaluation_set_elsewhere(workspace, tmp_path):
    other = tmp_path / "other"
    data = DatasetDict.load_from_disk(str(workspace / "data"))
    DatasetDict({"train": data["train"], "held_out": data["eval"]}).save_to_disk(str(other))
    options = {"dataset": [f"{workspace / 'data'}:3", f"{other}:1"], "eval_dataset": [other], "eval_split": "held_out"}
    log = train(workspace, tmp_path / "run", eval_strategy="steps", eval_steps=12, max_steps=12, **options)
    assert log[-1]["step"] == 12 and any("eval_loss" in entry for entry in log)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dataset": "nowhere"}, "nowhere is no folder of examples"),
        ({"model": "nowhere"}, "--model nowhere is no folder"),
        ({"eval_strategy": "epoch", "eval_split": "test"}, "`split` is 'test'"),
        ({"clean_batch_probability": 1.5}, "--clean_batch_probability is 1.5; a probability lies between 0 and 1"),
        ({"span_truncation_probability": -1}, "--span_truncation_probability is -1"),
        ({"noise_epsilon": 0}, "--noise_epsilon is 0"),
        ({"block_lengths": 0}, "`block_lengths` is"),
        ({"packing": True}, "--packing needs --max_length"),
        ({"max_length": 4096}, "--max_length is 4096, but the model has 128 positions"),
        ({"streaming": True, "max_steps": -1}, "--streaming needs --max_steps"),
        (
            {"label_smoothing_factor": 0.1},
            "--label_smoothing_factor is 0.1, but the Trainer then computes a loss of its own",
        ),
        ({"text_objective": "diffusion", "audio_objective": "autoregressive"}, "--text_objective diffusion needs"),
        (
            {"resume_from_checkpoint": "runs/checkpoint-7"},
            "--resume_from_checkpoint runs/checkpoint-7 is no checkpoint",
        ),
        ({"resume_from_checkpoint": "true"}, "--resume_from_checkpoint true is no checkpoint.* Leave the option out"),
        *(
            ({"span_attention": "block_causal", name: 0.5}, f"--{name} is 0.5, but has no effect where --span_att")
            for name in (
                "clean_batch_probability",
                "prefix_preservation_probability",
                "block_masking_probability",
            )
        ),
        *(
            (
                {"audio_objective": "autoregressive", f"{name}_probability": 0.5},
                f"--{name}_probability is 0.5, but has no effect where --audio_objective is autoregressive",
            )
            for name in ("clean_batch", "prefix_preservation", "block_masking", "span_truncation")
        ),
        (
            {"text_objective": "diffusion", "clean_batch_probability": 0.5},
            "--clean_batch_probability is 0.5, but has no effect where --text_objective is diffusion",
        ),
        *(
            (
                {"train_sampling_strategy": strategy, **option},
                f"--train_sampling_strategy {strategy} has no effect with --{next(iter(option))}",
            )
            for strategy in ("group_by_length", "batch_rebalance")
            for option in (
                {"packing": True, "max_length": 128},
                {"streaming": True},
                {"tokens_per_batch": 512, "per_device_train_batch_size": 1},
            )
        ),
        ({"eval_steps": 2}, "--eval_steps has no effect without --eval_strategy steps"),
        ({"eval_dataset": ["elsewhere"]}, "--eval_dataset has no effect without --eval_strategy or --sample_steps"),
        ({"eval_split": "test"}, "--eval_split has no effect without --eval_strategy or --sample_steps"),
        ({"num_samples": 2}, "--num_samples has no effect without --sample_steps"),
        ({"shuffle_buffer_size": 8}, "--shuffle_buffer_size has no effect without --streaming"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_trained(workspace, tmp_path, options, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        train(workspace, tmp_path, **options)
    assert not list(tmp_path.iterdir())


def test_a_processor_of_another_model_is_refused(workspace, tmp_path):
    processor = build_processor()
    processor.tokenizer.add_tokens(["new"])
    processor.save_pretrained(tmp_path / "larger")
    with pytest.raises(ValueError, match="--processor does not fit --model.*`vocab_size`"):
        train(workspace, tmp_path / "run", processor=tmp_path / "larger")
    config = json.loads((workspace / "model" / "config.json").read_text())
    shutil.copytree(workspace / "model", tmp_path / "model")
    config["end_of_audio_token_id"], config["mask_token_id"] = config["mask_token_id"], config["end_of_audio_token_id"]
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="--processor does not fit --model.*`mask_token_id` is"):
        train(workspace, tmp_path / "run", model=tmp_path / "model")


@pytest.mark.parametrize("streaming", [False, True])
def test_examples_of_another_tokenizer_are_refused(workspace, tmp_path, streaming):
    """Larger ids would end in a crash of the embedding; smaller ones would train audio as text, in silence."""
    size = len(TttProcessor.from_pretrained(workspace / "model").tokenizer)
    too_large = f"the token {size}, but the tokenizer has {size}"
    no_codes = "No example of --dataset that was looked at has an audio code"
    for name, token, message in (("larger", size, too_large), ("smaller", 70, no_codes)):
        row = {"input_ids": [70, token, 71], "labels": [70, token, 71], "length": 3, "task": "tts"}
        Dataset.from_list([row] * 8).to_parquet(tmp_path / name / "data" / "train-0000-000000.parquet")
        if name == "smaller" and streaming:
            continue  # whose examples are not known before they come
        with pytest.raises(ValueError, match=f"{message}.*prepare it with that of --model"):
            train(workspace, tmp_path / "run", dataset=tmp_path / name, streaming=streaming, max_steps=2)


@pytest.mark.parametrize("streaming", [False, True])
def test_an_example_longer_than_the_model_is_refused_unless_it_is_cut(workspace, tmp_path, streaming):
    long = {"input_ids": [70] * 200, "labels": [70] * 200, "length": 200, "task": "text_chat"}
    Dataset.from_list([long] * 8).to_parquet(tmp_path / "data" / "data" / "train-0000-000000.parquet")
    options = {"dataset": tmp_path / "data", "streaming": streaming, "max_steps": 2}
    with pytest.raises(ValueError, match="200 tokens, but the model has 128 positions: set --max_length 128"):
        train(workspace, tmp_path / "run", **options)
    assert train(workspace, tmp_path / "run", **options, max_length=128)[-1]["step"] == 2


def test_accuracies_leave_out_what_was_not_scored():
    counts = torch.tensor([[3, 4], [0, 0], [1, 2], [0, 0], [1, 4]]).numpy()
    expected = {"text_accuracy": 0.75, "audio_accuracy": 2 / 6}
    assert accuracies(counts) == expected | {"audio_accuracy_0.25-0.50": 0.5, "audio_accuracy_0.75-1.00": 0.25}
    assert accuracies(counts[:2]) == {"text_accuracy": 0.75}


def test_evaluation_metrics_take_batches_or_all_at_once():
    table = torch.rand(5, 5, 3)
    whole, pieces = EvaluationMetrics(), EvaluationMetrics()
    expected = whole(EvalPrediction(table.numpy(), None))
    assert expected["loss"] == pytest.approx(table[..., 0].sum(1).mean().item())
    assert expected["text_loss"] == pytest.approx(table[:, 0, 0].mean().item())
    assert expected["text_loss"] + expected["audio_loss"] == pytest.approx(expected["loss"])
    assert pieces(EvalPrediction(table[:2], None), compute_result=False) == {}
    assert pieces(EvalPrediction(table[2:], None), compute_result=True) == pytest.approx(expected)
    assert whole(EvalPrediction([table[:2], table[2:]], None)) == pytest.approx(expected)


def test_the_held_out_loss_is_the_mean_over_examples_whatever_the_trainer_averages(workspace, tmp_path, monkeypatch):
    """The Trainer's own mean counts what fills up the last batch of several processes, and is what best models are
    chosen by unless the metrics say otherwise."""
    evaluate = Trainer.prediction_step

    def scaled(self, model, inputs, *args, **options):
        loss, *others = evaluate(self, model, inputs, *args, **options)
        return loss * len(inputs["input_ids"]), *others

    options = {"eval_strategy": "steps", "save_strategy": "steps", "metric_for_best_model": "loss", "max_steps": 1}
    options |= {"per_device_eval_batch_size": 4, "eval_steps": 1, "save_steps": 1}
    (plain,) = (entry for entry in train(workspace, tmp_path / "plain", **options) if "eval_loss" in entry)
    monkeypatch.setattr(Trainer, "prediction_step", scaled)
    (other,) = (entry for entry in train(workspace, tmp_path / "scaled", **options) if "eval_loss" in entry)
    assert other["eval_loss"] == plain["eval_loss"]
    state = json.loads((tmp_path / "scaled" / "trainer_state.json").read_text())
    assert state["best_metric"] == plain["eval_loss"]


@pytest.mark.parametrize(
    ("entries", "titles"),
    [
        ([], ["loss (nats)"]),
        ([{"step": 1, "loss": 2.0, "text_loss": 2.0}], ["loss (nats)"]),
        ([{"step": 1, "loss": 2.0}, {"step": 2, "eval_text_accuracy": 0.5}], ["loss (nats)", "accuracy"]),
        (
            [{"step": 1, "loss": 2.0, "audio_accuracy": 0.5, "train_tokens_per_second": 9.0}],
            ["loss (nats)", "accuracy", "tokens per second"],
        ),
        (
            [{"step": 1, "loss": 2.0, "audio_accuracy": 0.5, "audio_accuracy_0.00-0.50": 0.5}]
            + [{"step": 2, "train_tokens_per_second": 9.0}],
            ["loss (nats)", "accuracy", "accuracy of masked audio, by noise level", "tokens per second"],
        ),
    ],
)
def test_curves_show_what_was_logged(tmp_path, monkeypatch, entries, titles):
    drawn, close = [], plt.close

    def note_and_close(figure):
        drawn.extend(axis.get_title() for axis in figure.axes)
        close(figure)

    monkeypatch.setattr(plt, "close", note_and_close)
    plot_curves(entries, tmp_path / "curves.png")
    assert drawn == titles and (tmp_path / "curves.png").stat().st_size > 1000
