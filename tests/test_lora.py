"""LoRA on small models of every backbone: what is trained, and that all who load the adapter get the same model."""

import json
import logging
import random
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from builders import build_processor, run_without_packages, tone, write_wav
from datasets import Dataset, DatasetDict, load_from_disk
from peft import AutoPeftModelForCausalLM, get_peft_model
from safetensors.torch import load_file
from transformers import pipeline

from modeling_ttt import TttConfig, TttForConditionalGeneration
from pipelines import TttAudioToAudioPipeline, ttt_talk
from processing import TttProcessor
from training_examples import finetune_lora
from training_examples.evaluation.backends import Sample, TttBackend, Turn
from training_examples.finetune_lora import (
    TARGET_MODULES,
    LoraArguments,
    load_base,
    load_config,
    lora_config,
    save_merged,
    trainable_tokens,
)
from training_examples.training.arguments import TttTrainingArguments
from training_examples.ttt_tiny import build_skill, domain, evaluate_skill, skill
from training_examples.ttt_tiny.conversations import Mixture, MixtureArguments

pytestmark = pytest.mark.usefixtures("undrawn_curves")
BACKBONES = {"qwen2": True, "qwen3": False, "llama": True}  # by model type, whether the head is tied
GENERATION = {"max_new_tokens": 12, "max_audio_codes_per_span": 20}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """A folder with examples (`data`) and a random model for each backbone, under its name, with processor and code."""
    folder = tmp_path_factory.mktemp("lora")
    processor = build_processor(system_prompts={"spoken_chat": "answer", "spoken_qa": "answer", "text_chat": "answer"})
    ids = processor.token_ids
    for model_type, tied in BACKBONES.items():
        backbone = {"model_type": model_type, "vocab_size": len(processor.tokenizer), "tie_word_embeddings": tied}
        backbone |= {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        backbone |= {"num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 2048}
        backbone |= {"pad_token_id": processor.tokenizer.pad_token_id, "eos_token_id": processor.tokenizer.eos_token_id}
        names = set(TttConfig().to_dict()) & set(vars(ids))
        torch.manual_seed(0)
        config = TttConfig(text_config=backbone, **{name: getattr(ids, name) for name in names})
        model = TttForConditionalGeneration(config).eval()
        TttAudioToAudioPipeline(model=model, processor=processor).save_pretrained(folder / model_type)
    rng = random.Random(0)
    rows = []
    for _ in range(24):
        question = [rng.randrange(16) for _ in range(rng.randrange(2, 8))]
        rows.append(processor.build_example("hi", [3] * rng.randrange(12, 24), audio_codes=question) | {"task": "chat"})
    data = Dataset.from_list(rows)
    data = data.add_column("length", [len(ids) for ids in data["input_ids"]])
    DatasetDict({"train": data, "eval": data.select(range(4))}).save_to_disk(str(folder / "data"))
    return folder


def finetune(workspace, output, options="", model_type="qwen2"):
    command = (
        f"--model {workspace / model_type} --dataset {workspace / 'data'} --output_dir {output} --use_cpu --threads 1"
    )
    command += " --report_to none --disable_tqdm true --per_device_train_batch_size 8 --learning_rate 1e-2 --r 4"
    command += f" --max_steps 6 --logging_steps 3 {options}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["finetune_lora.py", *command.split()])
        finetune_lora.main()
    return output


@pytest.fixture(scope="module", params=BACKBONES)
def trained(request, workspace):
    """Backbone, adapter folder and merged folder of a model taught to answer "hi" and speech of code 3."""
    name = request.param
    output, merged = workspace / f"{name}-adapter", workspace / f"{name}-merged"
    options = f"--max_steps 80 --clean_batch_probability 0 --new_words hi --train_audio_tokens --merge_to {merged}"
    return name, finetune(workspace, output, options, name), merged


def logits(model):
    ids = torch.arange(60, 100)[None]
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


def test_an_adapter_gives_the_same_model_however_it_is_loaded(workspace, trained):
    name, adapter, merged = trained
    base = TttForConditionalGeneration.from_pretrained(workspace / name)
    before = logits(base)
    expected = logits(AutoPeftModelForCausalLM.from_pretrained(adapter))
    assert (expected - before).abs().max() > 0.1
    base.load_adapter(str(adapter))
    for model in (
        base,
        TttForConditionalGeneration.from_pretrained(adapter),
        TttForConditionalGeneration.from_pretrained(merged),
    ):
        torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    base.disable_adapters()
    torch.testing.assert_close(logits(base), before)


class Said(logging.Handler):
    """What Transformers logs while it is attached."""

    def __init__(self):
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record):
        self.lines.append(record.getMessage())


def test_an_adapter_is_measured_on_its_model_and_trained_on_once_merged(workspace, trained, tmp_path):
    name, adapter, merged = trained
    backends = [TttBackend(str(folder), generation=GENERATION) for folder in (adapter, merged, workspace / name)]
    asked = [Sample("0", (Turn(text="hello"),))]
    answers = [backend.answer(asked, "text_chat")[0].text for backend in backends]
    assert answers[0] == answers[1] != answers[2]
    assert len({backend.settings["model"] for backend in backends}) == 3
    with pytest.raises(ValueError, match="is an adapter, and a whole model is trained on: give the folder that"):
        finetune(workspace, tmp_path / "second", model_type=adapter.name)


def test_nothing_is_missing_from_an_adapter_of_a_tied_head(trained):
    _, adapter, _ = trained
    said = Said()
    logging.getLogger("transformers").addHandler(said)
    try:
        TttForConditionalGeneration.from_pretrained(adapter)
    finally:
        logging.getLogger("transformers").removeHandler(said)
    assert not [line for line in said.lines if "MISSING" in line]


@pytest.mark.skipif(torch.accelerator.is_available(), reason="looks at what a CPU needs")
def test_a_run_on_a_cpu_gives_no_false_alarm(workspace, tmp_path, recwarn):
    options = f"--max_steps 1 --new_words hi --base_model_name owner/talker --merge_to {tmp_path / 'merged'}"
    finetune(workspace, tmp_path / "run", options)
    said = [str(warning.message) for warning in recwarn]
    assert not [line for line in said if "gradient_checkpointing" in line or "Could not find a config file" in line]
    assert TttTrainingArguments(output_dir=str(tmp_path)).dataloader_pin_memory is False


def test_an_adapter_holds_its_own_weights_and_nothing_else(workspace, trained):
    name, adapter, _ = trained
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(workspace / name)
    assert set(config["target_modules"]) == set(TARGET_MODULES)
    weights = load_file(adapter / "adapter_model.safetensors")
    rows = {key: value for key, value in weights.items() if "lora_" not in key}
    assert len(weights) - len(rows) == 2 * 2 * len(TARGET_MODULES)  # A and B, two layers
    assert len(rows) == (1 if BACKBONES[name] else 2)  # embedding, and a head of its own
    assert {tuple(value.shape) for value in rows.values()} == {(3 + 16 + 7, 32)}  # letters, codes, structure of audio
    assert not (adapter / "config.json").exists() and not (adapter / "audio_tokenizer").exists()


def test_only_the_rows_asked_for_change_in_embedding_and_head(workspace, trained):
    name, _, merged = trained
    before = TttForConditionalGeneration.from_pretrained(workspace / name)
    after = TttForConditionalGeneration.from_pretrained(merged)
    processor = TttProcessor.from_pretrained(workspace / name)
    taught = set(processor.tokenizer("hi")["input_ids"]) | {before.config.mask_token_id}
    for part in ("get_input_embeddings", "get_output_embeddings"):
        changed = (getattr(after, part)().weight != getattr(before, part)().weight).any(-1).nonzero().flatten().tolist()
        assert set(changed) <= set(trainable_tokens(processor, ["hi"], audio=True))
        assert set(changed) & taught
    assert (after.get_input_embeddings().weight is after.get_output_embeddings().weight) == BACKBONES[name]


def test_tokens_of_words_and_of_audio():
    processor = build_processor(audio_tokenizer=None)
    ids = processor.token_ids
    spelled = {processor.tokenizer.convert_ids_to_tokens(token) for token in trainable_tokens(processor, ["hi", "ho"])}
    assert spelled == {"h", "i", "o", "Ġ"}
    audio = set(trainable_tokens(processor, audio=True))
    assert audio >= set(ids.codes_to_ids(range(ids.num_audio_codes))) | {ids.mask_token_id, ids.begin_of_audio_token_id}
    assert ids.end_of_turn_token_id not in audio and len(audio) == ids.num_audio_codes + 7


def test_new_words_are_given_one_by_one_or_in_a_file(tmp_path):
    (tmp_path / "new_words.txt").write_text("\n".join(skill.new_words()) + "\n")
    arguments = LoraArguments(model=tmp_path, new_words=["zebra", str(tmp_path / "new_words.txt")])
    assert arguments.new_words == ["zebra", *skill.new_words()] and "cucumber" in arguments.new_words


def test_a_stopped_run_goes_on_and_ends_with_the_same_adapter(workspace, tmp_path):
    whole = finetune(workspace, tmp_path / "whole", "--save_steps 3 --lr_scheduler_type constant")
    shutil.copytree(whole / "checkpoint-3", tmp_path / "stopped" / "checkpoint-3")
    resumed = finetune(workspace, tmp_path / "stopped", "--save_steps 3 --lr_scheduler_type constant")
    expected = load_file(whole / "adapter_model.safetensors")
    for name, value in load_file(resumed / "adapter_model.safetensors").items():
        torch.testing.assert_close(value, expected[name])


def test_a_merged_model_has_a_folder_of_its_own(workspace, tmp_path):
    for folder, option in ((tmp_path / "same", "--output_dir"), (workspace / "qwen2", "--model")):
        with pytest.raises(ValueError, match=f"--merge_to {folder} is the folder of {option}"):
            finetune(workspace, tmp_path / "same", f"--max_steps 1 --merge_to {folder}")
    assert not (tmp_path / "same").exists()


def test_an_adapter_is_turned_down_without_another_training(workspace, tmp_path):
    full = finetune(workspace, tmp_path / "adapter", "--save_steps 6 --lr_scheduler_type constant")
    weights = load_file(full / "adapter_model.safetensors")
    base, whole = (logits(TttForConditionalGeneration.from_pretrained(path)) for path in (workspace / "qwen2", full))
    options = "--save_steps 6 --lr_scheduler_type constant"
    options += f" --adapter_strength 0.01 --merge_to {tmp_path / 'merged'} --noise_epsilon 0.03"
    weak = finetune(workspace, tmp_path / "adapter", options)
    assert TttConfig.from_pretrained(tmp_path / "merged").noise_epsilon == 0.03  # what it was trained under
    config = json.loads((weak / "adapter_config.json").read_text())
    assert config["lora_alpha"] == pytest.approx(0.64)
    assert json.loads((weak / "checkpoint-6" / "adapter_config.json").read_text())["lora_alpha"] == 64
    for name, value in load_file(weak / "adapter_model.safetensors").items():
        assert torch.equal(value, weights[name])
    for folder in (weak, tmp_path / "merged"):
        change = logits(TttForConditionalGeneration.from_pretrained(folder)) - base
        assert 0.005 < change.norm() / (whole - base).norm() < 0.02


def test_training_lowers_the_bound_on_evaluation_data(workspace, tmp_path):
    options = "--max_steps 12 --eval_strategy steps --eval_steps 4 --train_audio_tokens --clean_batch_probability 0"
    output = finetune(workspace, tmp_path, options)
    log = json.loads((output / "checkpoint-12" / "trainer_state.json").read_text())["log_history"]
    losses = [entry["eval_loss"] for entry in log if "eval_loss" in entry]
    assert len(losses) == 3 and losses[2] < losses[1] < losses[0]
    lines = [json.loads(line) for line in (output / "log_history.jsonl").read_text().splitlines()]
    assert {"text_loss", "audio_accuracy"} <= set(lines[0]) and (output / "curves.png").is_file()


def test_a_strategy_that_has_no_part_in_the_models_spans_is_refused(workspace, tmp_path):
    shutil.copytree(workspace / "qwen2", tmp_path / "causal")
    file = tmp_path / "causal" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"span_attention": "block_causal"}))
    options = f"--dataset {workspace / 'data'} --max_steps 1 --block_masking_probability"
    with pytest.raises(ValueError, match="--block_masking_probability is 0.5, .* block_causal, as the model says"):
        finetune(tmp_path, tmp_path / "adapter", f"{options} 0.5", "causal")
    finetune(tmp_path, tmp_path / "adapter", f"{options} 0", "causal")


def test_an_adapter_is_trained_under_its_models_settings_unless_told_otherwise(workspace, tmp_path):
    """A twin stays a twin, whose spans are not truncated; probabilities and the least noise stay the model's own."""
    base = shutil.copytree(workspace / "qwen2", tmp_path / "twin")
    settings = {"audio_objective": "autoregressive", "noise_epsilon": 0.05, "clean_batch_probability": 0.1}
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | settings))
    arguments = LoraArguments(model=base, clean_batch_probability=0.0)
    config = load_config(arguments)
    assert (config.audio_objective, config.noise_epsilon, config.clean_batch_probability) == ("autoregressive", 0.05, 0)
    log = finetune(tmp_path, tmp_path / "adapter", f"--dataset {workspace / 'data'}", "twin") / "log_history.jsonl"
    assert not any("audio_accuracy_" in line for line in log.read_text().splitlines())  # no noise, no noise levels


@pytest.mark.parametrize(
    "options", ["--activation_checkpointing true", "--packing true --max_length 96", "--target_modules all-linear"]
)
def test_options_that_lora_users_reach_for(workspace, tmp_path, options):
    output = finetune(workspace, tmp_path, f"--max_steps 2 {options} --base_model_name owner/model")
    weights = load_file(output / "adapter_model.safetensors")
    assert all(value.abs().max() > 0 for key, value in weights.items() if "lora_B" in key)
    config = json.loads((output / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "owner/model"
    assert "lm_head" not in config["target_modules"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--quantize", "--quantize .* bitsandbytes, which is not installed"),
        ("--r 0", "`--r` is 0; it must be at least 1"),
        ("--adapter_strength 0", "--adapter_strength is 0.0; it must be above 0"),
        ("--new_words data/words.txt", "--new_words data/words.txt: there is no such file"),
        ("--label_smoothing_factor 0.1", "--label_smoothing_factor is 0.1"),
        ("--dataset nowhere", "nowhere is no folder of examples"),
        ("--target_modules c_attn", "c_attn"),
        ("--audio_objective autoregressive", "--audio_objective is autoregressive, but .* was trained with diffusion"),
        ("--span_attention block_causal", "--span_attention is block_causal, but .* was trained with bidirectional"),
    ],
)
def test_bad_arguments_are_named_before_training(workspace, tmp_path, options, message):
    if options == "--quantize" and find_spec("bitsandbytes"):
        pytest.skip("bitsandbytes is installed")
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        finetune(workspace, tmp_path, options)


def test_the_merged_model_has_the_processor_that_it_was_trained_with(workspace, tmp_path):
    processor = TttProcessor.from_pretrained(workspace / "qwen2")
    processor.system_prompts["spoken_chat"] = "answer in verse"
    processor.save_pretrained(tmp_path / "other")
    options = f"--processor {tmp_path / 'other'} --merge_to {tmp_path / 'merged'} --max_steps 1"
    finetune(workspace, tmp_path / "run", options)
    merged = TttProcessor.from_pretrained(tmp_path / "merged")
    assert merged.get_task("spoken_chat").system_prompt == "answer in verse"


def test_a_processor_with_more_tokens_than_the_model_is_refused(workspace, tmp_path):
    processor = TttProcessor.from_pretrained(workspace / "qwen2")
    processor.tokenizer.add_tokens(["zebra"])
    processor.save_pretrained(tmp_path / "grown")
    with pytest.raises(ValueError, match="`vocab_size` is .*, the tokenizer has .* tokens"):
        finetune(workspace, tmp_path / "run", f"--processor {tmp_path / 'grown'}")


@pytest.mark.skipif(not find_spec("bitsandbytes"), reason="bitsandbytes is not installed")
def test_a_quantised_model_is_trained_on_a_cpu(workspace, tmp_path):
    adapter = finetune(workspace, tmp_path / "adapter", "--quantize --max_steps 3 --logging_steps 1")
    losses = [json.loads(line) for line in (adapter / "log_history.jsonl").read_text().splitlines()]
    assert len([entry for entry in losses if "loss" in entry]) == 3
    assert AutoPeftModelForCausalLM.from_pretrained(adapter).peft_config["default"].r == 4


def test_an_adapter_of_a_quantised_model_is_merged_into_the_whole_one(workspace, tmp_path):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    arguments = LoraArguments(model=workspace / "qwen2", quantize=True, target_modules=["all-linear"], r=4)
    base = load_base(arguments, load_config(arguments))
    model = get_peft_model(base, lora_config(arguments, base.config, [70]))
    adapted = [module for module in model.modules() if isinstance(module, bitsandbytes.nn.Linear4bit)]
    assert len(adapted) == 2 * len(TARGET_MODULES)
    data = load_from_disk(str(workspace / "data"))["train"]
    batch = {name: torch.tensor([data[0][name]]) for name in ("input_ids", "labels")}
    model.train()(**batch).loss.backward()
    assert all(value.grad is not None for value in model.parameters() if value.requires_grad)
    model.save_pretrained(tmp_path / "adapter")
    save_merged(arguments, str(tmp_path / "adapter"), tmp_path / "merged")
    expected = logits(TttForConditionalGeneration.from_pretrained(workspace / "qwen2"))
    torch.testing.assert_close(logits(TttForConditionalGeneration.from_pretrained(tmp_path / "merged")), expected)


# ---------------------------------------------------------------------- talking with an adapter


def same_answer(answer, expected):
    return answer["text"] == expected["text"] and np.allclose(answer["audio"], expected["audio"], atol=1e-4)


def test_the_pipeline_takes_an_adapter_as_a_model(trained):
    _, adapter, merged = trained
    expected = pipeline("audio-to-audio", model=str(merged), trust_remote_code=True)(
        tone(0.4), generate_kwargs=GENERATION
    )
    assert set(expected["text"]) <= set("hi") and expected["text"] and len(expected["audio"]) > 0
    pipe = pipeline("audio-to-audio", model=str(adapter), trust_remote_code=True)
    assert same_answer(pipe(tone(0.4), generate_kwargs=GENERATION), expected)
    model = AutoPeftModelForCausalLM.from_pretrained(adapter)
    pipe = TttAudioToAudioPipeline(model=model, processor=pipe.processor, device="cpu")
    assert same_answer(pipe(tone(0.4), generate_kwargs=GENERATION), expected)


ALONE = """
import numpy as np
from peft import AutoPeftModelForCausalLM
from transformers import pipeline

for folder in sys.argv[1:]:
    pipe = pipeline("audio-to-audio", model=folder, trust_remote_code=True, device="cpu")
    answer = pipe(np.zeros(8000, dtype=np.float32), generate_kwargs={"max_new_tokens": 12})
    model = AutoPeftModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    print(type(pipe).__name__, type(answer["text"]).__name__, type(model).__name__)
"""


def test_an_adapter_and_its_checkpoints_work_where_this_package_is_absent(workspace, tmp_path):
    adapter = finetune(workspace, tmp_path / "adapter", "--max_steps 1 --save_steps 1 --new_words hi")
    said = run_without_packages(ALONE, adapter, adapter / "checkpoint-1", cwd=tmp_path)
    assert said == ["TttAudioToAudioPipeline str PeftModelForCausalLM"] * 2


def test_the_command_takes_an_adapter_as_a_model(trained, tmp_path, capsys):
    _, adapter, merged = trained
    question = str(write_wav(tmp_path / "question.wav", tone(0.4)))
    said = []
    for model in (adapter, merged):
        options = ["--model", str(model), "--device", "cpu", "--quiet", "--max_new_tokens", "12"]
        status = ttt_talk.main([question, str(tmp_path / f"{model.name}.wav"), *options])
        said.append((status, capsys.readouterr().out))
    assert said[0] == said[1] and said[0][0] == 0 and set(said[0][1]) <= set("hi\n")


def test_an_adapter_whose_model_is_gone_says_so(trained, tmp_path, capsys):
    _, adapter, _ = trained
    lost = shutil.copytree(adapter, tmp_path / "lost", ignore=shutil.ignore_patterns("checkpoint-*"))
    config = json.loads((lost / "adapter_config.json").read_text())
    (lost / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(tmp_path / "gone")}))
    assert ttt_talk.main(["--text", "hi", str(tmp_path / "a.wav"), "--model", str(lost)]) == 1
    assert f"adapts the model in {tmp_path / 'gone'}, which is not there" in capsys.readouterr().err


# ---------------------------------------------------------------------- the skill that is shown


def test_the_skill_is_new_and_its_held_out_questions_are_never_trained_on():
    items = skill.skill_items()
    answers = {item.question: item.answer for item in items}
    assert len(answers) == len(items)
    assert not set(answers) & {item.question for item in domain.fixed_items()}
    assert "cucumber" in skill.new_words() and "color" not in skill.new_words()
    splits = {
        split: {q for q in answers if skill.split_of(q) == split} for split in ("evaluation", "development", "training")
    }
    assert all(domain.is_held_out(question) for question in splits["evaluation"])
    assert len(splits["evaluation"]) >= 10 and len(splits["development"]) >= 10
    assert {answers[question] for question in splits["training"]} == set(answers.values())

    draws = build_skill.draw_questions(random.Random(0), replay=0.5)
    items = [next(draws) for _ in range(4 * len(splits["training"]))]
    drawn = [item.question for item in items]
    assert not set(drawn) & (splits["evaluation"] | splits["development"])
    old = [question for question in drawn if question not in splits["training"]]
    assert set(drawn) >= splits["training"] and 0.4 < len(old) / len(drawn) < 0.6
    assert not any(domain.is_held_out(question) for question in old)
    replayed = {item.kind for item in items if item.question not in splits["training"]}
    assert replayed == set(domain.KIND_WEIGHTS)  # every old skill, repeating words among them

    plan = build_skill.plan_held_out(build_skill.SkillArguments(eval_items=50))
    assert {row["question"] for row in plan["spoken_qa_seen"]} <= splits["evaluation"]
    assert {row["question"] for row in plan["development_spoken_qa_seen"]} <= splits["development"]


def test_the_commands_of_the_skill_type_every_question():
    """Rows of new words that are trained from speech alone leave typed questions unanswered."""
    readme = (Path(evaluate_skill.__file__).parent / "README.md").read_text(encoding="utf-8")
    command = readme.partition("build_examples.py --model model_cards/ttt-tiny --data_dir data/skill")[2]
    assert "--text_share 1\n" in command.partition("torchrun")[0]
    rows = {
        "assistant": [{"text": "a radish is red", "codes": [1]}],
        "questions": [
            {"text": f"what color is a radish {i}", "answer": "a radish is red", "kind": "produce"}
            | {"codes": [2], "other_codes": [[3]]}
            for i in range(20)
        ],
    }
    found = Mixture(rows, MixtureArguments(text_share=1.0), random.Random(0)).single_turns()
    typed = {messages[0]["content"][0]["text"] for task, messages in found if task == "text_chat"}
    assert typed == {row["text"] for row in rows["questions"]}


def test_training_speech_stays_below_its_limit(monkeypatch):
    monkeypatch.setattr(build_skill, "speak", lambda text, delivery: tone(0.15 * len(text.split())))
    spoken = build_skill.speak_training(build_skill.SkillArguments(minutes=1.0))
    seconds = sum(len(wave) for rows in spoken.values() for _, wave in rows) / build_skill.SAMPLING_RATE
    assert 55 < seconds <= 60
    answers = {row["text"] for row, _ in spoken["assistant"]}
    assert {row["answer"] for row, _ in spoken["questions"]} <= answers


def test_a_change_of_speed_changes_length_and_pitch():
    wave = (tone(1.0, frequency=400.0) * 32767).astype(np.int16)
    faster = build_skill.change_speed(wave, 1.25)
    assert faster.dtype == np.int16 and len(faster) == len(wave) / 1.25
    assert abs(np.argmax(np.abs(np.fft.rfft(faster))) * 16_000 / len(faster) - 500) < 2


def test_the_skill_is_measured_with_and_without_the_adapter(workspace, tmp_path, monkeypatch, capsys):
    for name in ("new", "old"):
        (tmp_path / name).mkdir()
        soundfile.write(tmp_path / name / "0.flac", tone(0.3), 16_000)
        row = {"id": "0", "kind": "produce", "task": "spoken_qa", "question": "x", "answer": "hi", "audio": "0.flac"}
        (tmp_path / name / "spoken_qa_seen.jsonl").write_text(json.dumps(row) + "\n")
    adapter = finetune(workspace, tmp_path / "adapter", "--max_steps 1")
    command = f"--adapter {adapter} --model {workspace / 'qwen2'} --skill_dir {tmp_path / 'new'} --listen false"
    command += f" --old_dir {tmp_path / 'old'} --output_dir {tmp_path / 'report'} --threads 1"
    monkeypatch.setattr(sys, "argv", ["evaluate_skill.py", *command.split()])
    evaluate_skill.main()
    table = (tmp_path / "report" / "skill.md").read_text()
    assert table.count("exact text answers | 0.0 % | 0.0 % | 1 |") == 4
    assert table.count("the same questions typed: exact text answers") == 2
    assert table in capsys.readouterr().out + "\n"
