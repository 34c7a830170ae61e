"""Measure a TtT model, or any model behind an OpenAI-compatible address, and compare reports.

    python training_examples/evaluate_model.py --model DIR --task aishell1 --limit 100
    python training_examples/evaluate_model.py --model DIR --data my_corpus/ --columns text=transcript \
        --scorer error_rate --output_dir runs/mine
    python training_examples/evaluate_model.py --address http://127.0.0.1:8000/v1 --model NAME --task llama_questions
    python training_examples/evaluate_model.py --task_set training_examples/ttt_tiny/task_set.py --model DIR
    python training_examples/evaluate_model.py --compare runs/mine runs/theirs

Answers are written as they come, so that a run that was killed goes on where it stopped; then they are listened to,
scored, and reported in report.md and report.json. `--task_set` names a module with `Arguments` (a dataclass that
extends `EvaluationArguments`) and `run(arguments)`, which returns the report; its options stand beside the shared ones.
"""

import argparse
import importlib
import importlib.util
import sys
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path
from types import ModuleType

import yaml

from training_examples.command_line import RUN_FILES, ScriptParser
from training_examples.evaluation.reports import Report, compare
from training_examples.files import write_text
from training_examples.threads import use_threads
from training_examples.user_errors import run_command

BENCHMARKS = "training_examples.evaluation.benchmarks"


def load_task_set(name: str) -> ModuleType:
    """
    Return the module of a task set, by dotted name or by the path of its file.

    Raises:
        ValueError: If there is no such module, or it is no task set.
    """
    path = Path(name)
    if path.suffix == ".py":
        if not path.exists():
            raise ValueError(f"`--task_set` {name}: there is no such file.")
        package = Path(__file__).parent.parent
        if path.resolve().is_relative_to(package):  # under its own name, so that it is imported once
            name = ".".join(path.resolve().relative_to(package).with_suffix("").parts)
    if name.endswith(".py"):
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[path.stem] = module  # dataclasses look their module up
        spec.loader.exec_module(module)
    else:
        try:
            module = importlib.import_module(name)
        except ModuleNotFoundError as error:
            raise ValueError(f"`--task_set` {name}: there is no such module ({error}).") from error
    if not (hasattr(module, "Arguments") and hasattr(module, "run")):
        raise ValueError(f"`--task_set` {name}: a task set has `Arguments` and `run(arguments)`.")
    return module


def chosen_task_set(words: Sequence[str]) -> str:
    """Return the task set that a command line, or a run file at its start, names."""
    flag = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    flag.add_argument("--task_set")
    named = flag.parse_known_args(list(words))[0].task_set
    for word in takewhile(lambda word: Path(word).suffix in RUN_FILES, words):
        content = yaml.safe_load(Path(word).read_text(encoding="utf-8")) if Path(word).is_file() else None
        named = named or (content.get("task_set") if isinstance(content, dict) else None)
    return named or BENCHMARKS


def main() -> None:
    module = load_task_set(chosen_task_set(sys.argv[1:]))
    (args,) = ScriptParser(module.Arguments, __doc__).parse_args_into_dataclasses()
    if args.compare:
        text = compare([Report.read(path) for path in args.compare])
        write_text(args.output_dir / "comparison.md", text + "\n")
    else:
        use_threads(args.threads)
        text = module.run(args)
    print(text)


if __name__ == "__main__":
    run_command(main)
