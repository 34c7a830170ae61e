"""Measure what an adapter has taught and what it has cost: held-out questions of the new skill and of the old domain,
answered with and without it.

    python training_examples/ttt_tiny/evaluate_skill.py --adapter runs/skill

Needs the lists of build_skill.py and, for the old domain, of `build_speech.py --evaluation_only`. Choices are made with
`--split development`. Each part is kept in --output_dir, so a killed run goes on where it stopped; skill.md there is
the table that is printed.
"""

from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

from training_examples.command_line import ScriptParser
from training_examples.evaluation.figures import Figure, markdown_table, remember
from training_examples.evaluation.recognisers import Recognizer
from training_examples.threads import threads_field, use_threads
from training_examples.ttt_tiny import domain
from training_examples.ttt_tiny.judge import VOICE_MEAN, VOICE_WARP
from training_examples.ttt_tiny.skill import new_words, skill_items, split_of
from training_examples.ttt_tiny.talker import HeldOutLists, Talker, figures_of_list, measure_list
from training_examples.user_errors import run_command

# Rows of the table: data, figure, title.
ROWS = [
    ("new", "exact", "new skill, spoken questions: exact text answers"),
    ("new", "spoken_wer", "the same: speech of the answers against the right text, recogniser WER"),
    ("old", "exact", "old domain, spoken questions: exact text answers"),
    ("old", "speech_wer", "the same: speech of the answers against their own text, recogniser WER"),
]


@dataclass
class SkillEvaluationArguments:
    adapter: str = field(metadata={"help": "Output folder of finetune_lora.py."})
    model: str = field(default="model_cards/ttt-tiny", metadata={"help": "Folder of the model it adapts."})
    skill_dir: Path = field(default=Path("data/skill/eval"), metadata={"help": "Lists of the new skill."})
    old_dir: Path = field(default=Path("data/ttt_tiny/eval"), metadata={"help": "Lists of the old domain."})
    split: Literal["evaluation", "development"] = field(
        default="evaluation", metadata={"help": "Which held-out lists: choose on development, report evaluation."}
    )
    output_dir: Path = field(default=Path("runs/evaluate_skill"), metadata={"help": "Where parts and table go."})
    limit: int | None = field(default=None, metadata={"help": "Rows per list; all by default."})
    listen: bool = field(default=True, metadata={"help": "Have the recogniser listen to the answers."})
    batch_size: int = field(default=32, metadata={"help": "Questions answered at once."})
    threads: int = threads_field()
    num_workers: int = field(default=2, metadata={"help": "Processes of the recogniser."})


def recognizer(num_workers: int) -> Recognizer:
    """Return the domain's recogniser with the words and the training sentences of the skill added."""
    sentences = [
        text for item in skill_items() if split_of(item.question) == "training" for text in (item.question, item.answer)
    ]
    return Recognizer(
        [*domain.vocabulary(), *new_words()],
        [*domain.lm_sentences(seed=0, n=20_000), *sentences * 10],
        num_workers=num_workers,
        frequency_warp=VOICE_WARP,
        cepstral_mean=VOICE_MEAN,
    )


def main() -> None:
    (args,) = ScriptParser(SkillEvaluationArguments, __doc__).parse_args_into_dataclasses()
    use_threads(args.threads)
    figures: dict[tuple[str, str, str], Figure] = {}
    with recognizer(args.num_workers) if args.listen else nullcontext() as listener:
        for data, folder in (("new", args.skill_dir), ("old", args.old_dir)):
            lists, name = HeldOutLists(folder, args.split), "spoken_qa_seen"
            before = Talker(args.model, lists)
            after = Talker(args.adapter, lists, before)
            for when, talker in (("before", before), ("after", after)):
                rows = remember(
                    args.output_dir / "parts" / f"{data}-{lists.name(name)}-{when}.json",
                    {
                        "model": talker.fingerprint,
                        "list": lists.fingerprint(name),
                        "limit": args.limit,
                        "listen": args.listen,
                    },
                    partial(measure_list, talker, name, args.limit, args.batch_size, listener, {}),
                )["rows"]
                figures |= {(data, key, when): figure for key, figure in figures_of_list(rows).items()}
    table = markdown_table(
        ["", "before", "after", "samples"],
        [
            [title, *(figures[data, key, when] for when in ("before", "after")), figures[data, key, "after"].count]
            for data, key, title in ROWS
            if (data, key, "after") in figures
        ],
    )
    (args.output_dir / "skill.md").write_text(table + "\n", encoding="utf-8")
    print(table)


if __name__ == "__main__":
    run_command(main)
