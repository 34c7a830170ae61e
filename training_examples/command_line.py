"""The command line of every script: flags, run files that hold the same options as YAML or JSON, and a help that fits
on a screen. What the options are is said by the scripts' dataclasses."""

import difflib
import json
import shutil
import sys
import textwrap
from argparse import Action
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser

RUN_FILES = (".yaml", ".yml", ".json")
# The Trainer has some 120 options; these are named in the short help.
TRAINER_OPTIONS = (
    *("output_dir", "max_steps", "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps"),
    *(
        "learning_rate",
        "lr_scheduler_type",
        "warmup_steps",
        "weight_decay",
        "bf16",
        "use_cpu",
        "gradient_checkpointing",
    ),
    *("activation_checkpointing", "eval_strategy", "eval_steps", "logging_steps", "save_steps", "save_total_limit"),
    *("report_to", "seed", "resume_from_checkpoint", "push_to_hub", "hub_model_id"),
)
NAME_WIDTH = 35


class ScriptParser(HfArgumentParser):
    """
    `HfArgumentParser` that also takes run files: `train_ttt.py run.yaml --max_steps 10`. A run file holds options by
    their names, without dashes; a flag, or a later file, replaces what it says. Paths in it are those of a flag:
    relative to the folder that the script is started in.

    `--help` has a line for every option of ours and names the Trainer's most used; `--help_all` has all of them whole.

    Args:
        dataclass_types (`type` or `Sequence[type]`): what the options are.
        description (`str`, *optional*): the script's docstring; its first line heads the short help.
    """

    def __init__(self, dataclass_types: Any, description: str | None = None, **kwargs: Any):
        usage = "%(prog)s [RUN.yaml] --OPTION VALUE ..."
        super().__init__(dataclass_types, description=description, usage=usage, **kwargs)
        self.add_argument("--help_all", action="store_true", help="Show every option, the Trainer's too, and exit.")

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        words = list(sys.argv[1:] if args is None else args)
        if "--help_all" in words:
            print(super().format_help())
            self.exit()
        from_files: list[str] = []
        while words and Path(words[0]).suffix in RUN_FILES and not words[0].startswith("-"):
            from_files += read_run_file(Path(words.pop(0)), self._names())
        self._check_words(words)
        namespace, unknown = super().parse_known_args(from_files + words, namespace)
        if unknown:
            raise ValueError(f"`{unknown[0]}` belongs to no option; run files come first, --help names the options.")
        if hasattr(namespace, "help_all"):
            del namespace.help_all
        return namespace, unknown

    def _check_words(self, words: Sequence[str]) -> None:
        """
        Raise a ValueError that names an option which there is not, and the closest that there is: argparse would ask
        for the required ones first, although one of them may be what was misspelled.
        """
        known = [string for string in self._option_string_actions if string.startswith("--")]
        for word in words:
            name = word.partition("=")[0]
            # As argparse reads them: what begins with two dashes is an option, which may be cut short.
            if not name.startswith("--") or name == "--" or " " in name:
                continue
            if not any(string.startswith(name) for string in known):
                raise ValueError(f"There is no option {name}{_meant(name, known)}")

    def _names(self) -> list[str]:
        return [action.dest for action in self._actions if action.dest not in ("help", "help_all")]

    def format_help(self) -> str:
        """Return the short help: a line for each option of ours."""
        width = max(80, shutil.get_terminal_size((120, 24)).columns)
        lines = [f"usage: {self.prog} [RUN.yaml] --OPTION VALUE ...", ""]
        lines += [*textwrap.wrap((self.description or "").strip().split("\n\n")[0], width), ""]
        trainers: list[str] = []
        for kind in self.dataclass_types:
            # By name, since importing it loads PyTorch and more, and takes seconds.
            if any(base.__name__ == "TrainingArguments" for base in kind.__mro__):  # type: ignore[union-attr]
                trainers = [name for name in TRAINER_OPTIONS if name in kind.__dataclass_fields__]
                continue
            for name in kind.__dataclass_fields__:  # type: ignore[union-attr]
                action = next((action for action in self._actions if action.dest == name), None)
                if action is not None:
                    lines.append(_short_line(action, width))
        if trainers:
            lines += ["", "The Trainer's, most used first:"]
            names = " ".join(f"--{name}" for name in trainers)
            lines += textwrap.wrap(names, width, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False)
        lines += ["", "RUN.yaml, or RUN.json, holds options by name; flags replace what it says."]
        lines += ["--help_all says all of every option" + (", the Trainer's too." if trainers else ".")]
        return "\n".join(lines) + "\n"


def check_least(options: Any, **least: float) -> None:
    """
    Refuse options below a limit; those that are None have none.

    Args:
        options (a dataclass): whose values are checked.
        least (`float`): the lowest value, by the option's name.

    Raises:
        ValueError: If a value is below, which is named.
    """
    for name, lowest in least.items():
        value = getattr(options, name)
        if value is not None and not value >= lowest:
            raise ValueError(f"`--{name}` is {value}; it must be at least {lowest}.")


def _short_line(action: Action, width: int) -> str:
    text = (action.help or "").split(". ")[0].split("; ")[0].rstrip(".")
    if action.required:
        text += " (required)"
    elif action.default is not None and not isinstance(action.default, (bool, list)) and action.default != "":
        text += f" ({action.default})"
    name = f"  --{action.dest}".ljust(NAME_WIDTH)
    return name + " " + textwrap.shorten(text, width - len(name) - 1, placeholder=" ...")


def read_run_file(path: Path, names: Iterable[str]) -> list[str]:
    """
    Return a run file as words of a command line.

    Args:
        path (`Path`): a YAML or JSON file with one mapping of options to values; `null` leaves an option alone.
        names (`Iterable[str]`): the options there are.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no mapping, or names an option that there is not.
    """
    if not path.is_file():
        raise FileNotFoundError(f"There is no run file {path}.")
    text = path.read_text(encoding="utf-8")
    try:
        options = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (yaml.YAMLError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} cannot be read as {path.suffix[1:]}: {error}") from None
    if not isinstance(options, dict):
        raise ValueError(f"{path} must hold options by name, such as `max_steps: 1000`.")
    known, words = list(names), []
    for name, value in options.items():
        if name not in known:
            raise ValueError(f"{path}: there is no option `{name}`{_meant(str(name), known, '`')}")
        if isinstance(value, list):
            if not value:
                raise ValueError(f"{path}: `{name}` is an empty list; leave it out.")
            words += [f"--{name}", *map(_as_word, value)]
        elif value is not None:
            words.append(f"--{name}={_as_word(value)}")
    return words


def _meant(name: str, known: Sequence[str], quote: str = "") -> str:
    """Return the end of a sentence that says that there is no such option."""
    close = difflib.get_close_matches(name, known, 1)
    return f"; did you mean {quote}{close[0]}{quote}?" if close else "; --help_all lists all."


def _as_word(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return json.dumps(value) if isinstance(value, dict) else str(value)
