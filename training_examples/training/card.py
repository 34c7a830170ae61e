"""Model cards of what the scripts write: what a model is, its data, recipe and figures, as far as a run knows them, and
the fields that only its maker can fill."""

from __future__ import annotations

import platform
import re
from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
import yaml
from datasets import Dataset
from huggingface_hub import ModelCard, ModelCardData
from transformers import Trainer
from transformers.trainer_pt_utils import LengthGroupedSampler

from training_examples.files import read_json, short_name, write_text
from training_examples.preparation.mixtures import parse_source
from training_examples.training.samples import latest_samples

if TYPE_CHECKING:
    from training_examples.training.arguments import ModelArguments, TttTrainingArguments

MARK = (
    "<!-- Written by the script, anew with every model it saves. Remove this line to keep the card as you edit it -->"
)
RECIPE = re.compile(r"^## Recipe\n.*?^```yaml\n(.*?)^```", re.DOTALL | re.MULTILINE)
UNKNOWN_LICENSE = "unknown"
FILL_IN = (
    "**Licence: fill in.** The field `license` at the top of this file says `unknown`: the data, the language model "
    "and the audio tokenizer each bring terms of their own. `--license` writes it."
)
# Options of the Trainer that a card's recipe names where a run sets them.
TRAINER_RECIPE = (
    *("max_steps", "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps", "learning_rate"),
    *("lr_scheduler_type", "warmup_steps", "weight_decay", "adam_beta1", "adam_beta2", "max_grad_norm", "optim"),
    *("bf16", "fp16", "activation_checkpointing", "seed"),
)
LEFT_OUT = (
    "processor",
    "threads",
    "license",
    "merge_to",
    "base_model_name",
    "sample_steps",
    "num_samples",
    "recogniser",
)
FIGURES = {
    "loss": "loss (nats a label)",
    "text_loss": "its text part",
    "audio_loss": "its audio part",
    "text_accuracy": "text accuracy",
    "audio_accuracy": "accuracy of masked codes",
}


def is_edited(folder: Path) -> bool:
    """Whether the folder has a card that somebody made their own."""
    card = folder / "README.md"
    return card.is_file() and MARK not in card.read_text(encoding="utf-8")


def write_card(folder: Path, card: str) -> None:
    """Write a folder's card, unless somebody has made it their own."""
    if not is_edited(folder):
        write_text(folder / "README.md", card)


def own_metadata(folder: Path) -> dict[str, Any]:
    """Return the metadata of a folder's own card, empty where it has none that can be read."""
    card = folder / "README.md"
    if not card.is_file():
        return {}
    try:
        return ModelCard.load(card, ignore_metadata_errors=True).data.to_dict()
    except (OSError, ValueError, yaml.YAMLError):
        return {}


def read_recipe(folder: Path) -> dict[str, Any] | None:
    """Return the options that a folder's own card says a run was told, `None` where it does not say."""
    card = folder / "README.md"
    found = RECIPE.search(card.read_text(encoding="utf-8")) if card.is_file() else None
    try:
        options = yaml.safe_load(found[1]) if found is not None else None
    except yaml.YAMLError:
        return None
    return options if isinstance(options, dict) else None


def compose(title: str, metadata: Mapping[str, Any], sections: list[str]) -> str:
    """Return a whole card: metadata as the Hub reads it, a title, the sections."""
    known = {name: value for name, value in metadata.items() if value is not None}
    data = ModelCardData(
        **{
            "license": UNKNOWN_LICENSE,
            "library_name": "transformers",
            "pipeline_tag": "audio-to-audio",
            "tags": ["text-to-talk", "speech", "masked-diffusion"],
            **known,
        }
    )
    licence = [FILL_IN] if data.license == UNKNOWN_LICENSE else []
    body = "\n\n".join([f"# {title}", *sections, *licence])
    return f"---\n{data.to_yaml()}\n---\n\n{MARK}\n\n{body}\n"


def talking(name: str) -> str:
    """Return how to talk to the model."""
    return f"""```python
from transformers import pipeline

pipe = pipeline("audio-to-audio", model="{name}", trust_remote_code=True)
answer = pipe("question.wav")  # answer["text"], answer["audio"], answer["sampling_rate"]
```"""


def initial_card(
    name: str, llm: str, audio_tokenizer: str, figures: Mapping[str, Any], license: str | None = None
) -> str:
    """
    Return the card of a first checkpoint.

    Args:
        name (`str`): of the folder.
        llm, audio_tokenizer (`str`): what it was made of.
        figures (`Mapping`): further lines, by name.
        license (`str`, *optional*): as the Hub calls it.
    """
    base = None if Path(llm).exists() else llm
    lines = "\n".join(f"- {key}: {value}" for key, value in figures.items())
    about = (
        f"A first Text-to-Talk (TtT) checkpoint, made of the language model `{short_name(llm)}` and the audio "
        f"tokenizer `{short_name(audio_tokenizer)}`. It is there to be trained: on text it answers as its "
        "language model does, and it has not learnt to hear or to speak."
    )
    return compose(name, {"base_model": base, "license": license}, [about, lines])


@dataclass
class RunCard:
    """
    The card of a training run's models.

    Args:
        arguments (`ModelArguments`), training (`TttTrainingArguments`): what the run was told.
        base_model (`str`, *optional*): Hub name of the model it started from, if it has one.
        adapter (`bool`, *optional*, defaults to `False`): whether the run writes an adapter alone.
        metadata (`dict`, *optional*): of the card, over what the run knows.
    """

    arguments: ModelArguments
    training: TttTrainingArguments
    base_model: str | None = None
    adapter: bool = False
    metadata: dict[str, Any] = field(default_factory=dict)

    def text(self, trainer: Trainer, folder: Path) -> str:
        """Return the card as the run stands, for a model in `folder`."""
        inherited = own_metadata(self.arguments.model)
        start = short_name(self.arguments.model)
        base = self.base_model or inherited.get("base_model")
        license_ = self.arguments.license or inherited.get("license")
        metadata: dict[str, Any] = {
            "license": license_,
            "language": inherited.get("language"),
            "base_model": base,
            "library_name": "peft" if self.adapter else "transformers",
            **({"tags": ["text-to-talk", "speech", "masked-diffusion", "lora"]} if self.adapter else {}),
            **self.metadata,
        }
        title = metadata.pop("model_name", None) or self._name()
        kind = "A LoRA adapter of the Text-to-Talk (TtT) model" if self.adapter else "A Text-to-Talk (TtT) model, from"
        about = (
            f"{kind} `{base or start}`, trained for {trainer.state.global_step:,} steps. It takes speech or text and "
            "answers with both: text token by token, speech by block diffusion."
        )
        sections = [about, talking(self.training.hub_model_id or self._name()), self._data(), self._recipe(trainer)]
        sections.append(self._figures(trainer, folder))
        samples = self._samples()
        return compose(title, metadata, [*sections, *([samples] if samples else [])])

    def _name(self) -> str:
        return (self.training.hub_model_id or Path(self.training.output_dir).resolve().name).split("/")[-1]

    def _data(self) -> str:
        lines = [
            "## Data",
            "",
            "| data | weight | examples | hours of audio | tasks |",
            "|---|---:|---:|---:|---|",
        ]
        for source in self.arguments.dataset:
            path, weight = parse_source(source)
            file = path / "summary-train.json"
            summary = read_json(file) if file.is_file() else {}
            tasks = ", ".join(summary.get("tasks", {}))
            cells = (summary.get("examples", ""), summary.get("audio_hours", ""), tasks)
            lines.append(f"| {short_name(path)} | {'' if weight is None else weight} | {' | '.join(map(str, cells))} |")
        return "\n".join([*lines, "", "What the recordings and texts are, and whose: fill in."])

    def options(self) -> dict[str, Any]:
        """Return what was set of the options that decide what a run makes, as its recipe has them."""
        options: dict[str, Any] = {}
        for settings in (self.arguments, self.training):
            for item in fields(settings):
                value = getattr(settings, item.name)
                if settings is self.training:
                    replaced = {"num_train_epochs": self.training.max_steps > 0}
                    replaced["per_device_train_batch_size"] = self.arguments.tokens_per_batch is not None
                    if item.name not in TRAINER_RECIPE or value in (None, False, -1) or replaced.get(item.name):
                        continue
                elif item.name in LEFT_OUT or value in (None, [], _default(item)):
                    continue
                if isinstance(value, (list, tuple)):
                    value = [short_name(v) if isinstance(v, (str, Path)) else v for v in value]
                elif isinstance(value, Path):
                    value = short_name(value)
                options[item.name] = getattr(value, "value", value)
        return options

    def _recipe(self, trainer: Trainer) -> str:
        # DeepSpeed keeps the whole size of a weight, of which each process has a share, beside it.
        sizes = [
            (getattr(value, "ds_numel", value.numel()), value.requires_grad) for value in trainer.model.parameters()
        ]
        trained, total = sum(size for size, learns in sizes if learns), sum(size for size, _ in sizes)
        facts = (
            f"{trained / 1e6:.2f} M of {total / 1e6:.2f} M parameters were trained, in {self.training.world_size} "
            f"process{'es' if self.training.world_size > 1 else ''} on {self.training.device.type}; "
            f"{trainer.state.num_input_tokens_seen:,} tokens were seen. Python {platform.python_version()}, torch "
            f"{torch.__version__.split('+')[0]}, transformers {transformers.__version__}."
        )
        recipe = yaml.safe_dump(self.options(), sort_keys=False, allow_unicode=True).strip()
        return f"## Recipe\n\nWhat was set, as a run file of the script:\n\n```yaml\n{recipe}\n```\n\n{facts}"

    def _figures(self, trainer: Trainer, folder: Path) -> str:
        history = trainer.state.log_history
        seen = [entry for entry in history if "loss" in entry]
        held_out = [entry for entry in history if "eval_loss" in entry]
        lines = ["## Figures", ""]
        if not seen and not held_out:
            return "\n".join([*lines, "Nothing was logged yet."])
        columns = [("training, noisy", seen[-1:], ""), ("held out", held_out[-1:], "eval_")]
        columns = [column for column in columns if column[1]]
        lines.append("| | " + " | ".join(f"{name}, step {rows[0]['step']:,}" for name, rows, _ in columns) + " |")
        lines.append("|---|" + "---:|" * len(columns))
        for key, label in FIGURES.items():
            values = [rows[0].get(prefix + key) for _, rows, prefix in columns]
            if any(value is not None for value in values):
                lines.append(f"| {label} | " + " | ".join("" if v is None else f"{v:.4g}" for v in values) + " |")
        if (folder / "curves.png").is_file():
            lines += ["", "![losses and accuracies over the steps](curves.png)"]
        lines += ["", "The held-out loss is the deterministic bound. No other figure was measured by this run."]
        return "\n".join(lines)

    def _samples(self) -> str | None:
        rows = latest_samples(Path(self.training.output_dir))
        if not rows:
            return None
        heard = any("heard" in row for row in rows)
        names = ["expected", "answered", *(["heard"] if heard else [])]
        title = f"## Held-out examples, step {rows[0]['step']:,}"
        head = [title, "", "| " + " | ".join(names) + " |", "|---|" + "---|" * (len(names) - 1)]
        cells = (
            " | ".join(str(row.get(name, "")).replace("|", "\\|").replace("\n", " ") for name in names) for row in rows
        )
        return "\n".join([*head, *(f"| {line} |" for line in cells)])


def _default(item: Field) -> Any:
    return item.default if item.default_factory is MISSING else item.default_factory()


def _with_lengths(sampler: Any) -> Any:
    """Return a sampler that has its lengths in memory: it looks up one by one, which is slow in a dataset."""
    if isinstance(sampler, LengthGroupedSampler):
        sampler.lengths = sampler.lengths[:]
    return sampler


class CardTrainer(Trainer):
    """
    The plain Trainer, but for the card beside every model that it saves or pushes, for runs that are finished, and for
    lengths, which it reads at once. A card that somebody has made their own (its first comment is gone) stays as it is.

    Args:
        card (`RunCard`): writes it.
        options: the Trainer's own.
    """

    def __init__(self, *args: Any, card: RunCard, **options: Any):
        self.card = card
        self.is_finished = False  # then `train` loads the checkpoint, and trains no step more, as the Trainer would
        super().__init__(*args, **options)

    def planned_steps(self) -> int:
        """Return the number of steps after which the run ends."""
        if self.args.max_steps > 0:
            return self.args.max_steps
        return self.set_initial_training_values(self.args, self.get_train_dataloader())[-1]

    def set_initial_training_values(self, args: Any, dataloader: Any) -> Any:
        epochs, *others = super().set_initial_training_values(args, dataloader)
        return (0 if self.is_finished else epochs, *others)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if isinstance(dataset, Dataset):
            dataset = dataset.with_format(None)  # a sampler looks at lengths alone, which no transform changes
        return _with_lengths(super()._get_train_sampler(dataset))

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        return _with_lengths(super()._get_eval_sampler(eval_dataset))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        folder = Path(output_dir or self.args.output_dir)
        readme = folder / "README.md"
        kept = readme.read_text(encoding="utf-8") if is_edited(folder) else None
        super().save_model(output_dir, _internal_call)
        if self.args.should_save:
            # PEFT writes metadata into whatever card there is.
            readme.write_text(self.card.text(self, folder) if kept is None else kept, encoding="utf-8")

    def create_model_card(self, **metadata: Any) -> None:  # type: ignore[override]
        """
        Write the card of the run's folder, with metadata over what the run knows: `language`, `license`, `tags`,
        `model_name`, `finetuned_from` and `dataset`, as the Trainer takes them.

        Raises:
            ValueError: for metadata that this card has no place for.
        """
        places = {"finetuned_from": "base_model", "dataset": "datasets"}
        for name, value in metadata.items():
            if name not in ("language", "license", "tags", "model_name", *places) and value is not None:
                raise ValueError(f"`{name}` has no place in this card; write it into README.md and remove its comment.")
            if value is not None:
                self.card.metadata[places.get(name, name)] = value
        folder = Path(self.args.output_dir)
        if self.is_world_process_zero():
            write_card(folder, self.card.text(self, folder))
