"""Measure what an adapter has taught and what it has cost: held-out questions of the new skill and of the old domain,
spoken and typed, answered with and without it.

    python training_examples/ttt_tiny/evaluate_skill.py --adapter runs/skill

Needs the lists of build_skill.py and, for the old domain, of `build_speech.py --evaluation_only`. Choices are made with
`--split development`. Each part is kept in --output_dir, so a killed run goes on where it stopped; skill.md there is
the table that is printed.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from training_examples.command_line import ScriptParser, check_least
from training_examples.evaluation.backends import Sample, TttBackend, Turn
from training_examples.evaluation.figures import markdown_table, normalized
from training_examples.evaluation.measuring import Measured, of_scorer, share_of
from training_examples.evaluation.recognisers import Recognizer
from training_examples.evaluation.rows import Listener, Run, name_unusable
from training_examples.threads import threads_field, use_threads
from training_examples.ttt_tiny.held_out import HeldOutLists
from training_examples.ttt_tiny.judge import domain_recognizer
from training_examples.ttt_tiny.skill import new_words, skill_items, split_of
from training_examples.user_errors import run_command

# Rows of the table: data, how it is asked, figure, title.
ROWS = [
    ("new", "spoken", "exact", "new skill, spoken questions: exact text answers"),
    ("new", "spoken", "spoken_wer", "the same: speech of the answers against the right text, recogniser WER"),
    ("new", "typed", "exact", "the same questions typed: exact text answers"),
    ("old", "spoken", "exact", "old domain, spoken questions: exact text answers"),
    ("old", "spoken", "speech_wer", "the same: speech of the answers against their own text, recogniser WER"),
    ("old", "typed", "exact", "the same questions typed: exact text answers"),
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
    sphinx_voice: Literal["slt", "none"] = field(
        default="none", metadata={"help": "The voice that PocketSphinx is tuned to: slt is the first edition's."}
    )
    batch_size: int = field(default=32, metadata={"help": "Questions answered at once."})
    threads: int = threads_field()

    def __post_init__(self) -> None:
        check_least(self, limit=1, batch_size=1)


def recognizer(of_slt: bool) -> Recognizer:
    """Return the domain's recogniser with the words and the training sentences of the skill added."""
    sentences = [
        text for item in skill_items() if split_of(item.question) == "training" for text in (item.question, item.answer)
    ]
    return domain_recognizer(2, of_slt, new_words(), sentences * 10)


def figures_of(run: Run, listener: Listener | None) -> dict[str, Measured]:
    """Return exact answers and, where they are listened to, the word errors of the speech against its own text and
    against the right one."""
    rows = run.usable
    ids, own = [row["id"] for row in rows], [normalized(row["text"]) for row in rows]
    right = [row["references"][0] for row in rows]
    exact = [(name, text == reference) for name, text, reference in zip(ids, own, right, strict=True)]
    found = {"exact": share_of("exact", "exact text answers", exact)}
    if listener is not None:
        by_id = run.listen(listener)
        heard = [by_id[name] for name in ids]
        for key, said in (("speech_wer", own), ("spoken_wer", right)):
            if any(said):
                options = {"normalizer": "none"}
                found[key] = of_scorer(key, "recogniser WER", "error_rate", ids, heard, said, options)
    return found


def typed(sample: Sample) -> Sample:
    """Return a spoken question as one that is typed."""
    return replace(sample, turns=(Turn(text=sample.details["asked"]),))


def main() -> None:
    (args,) = ScriptParser(SkillEvaluationArguments, __doc__).parse_args_into_dataclasses()
    use_threads(args.threads)
    figures: dict[tuple[str, str, str, str], Measured] = {}
    notes: dict[tuple[str, str], str] = {}
    voice = args.sphinx_voice
    about = {"domain": "ttt-tiny with the skill", "voice": voice}
    listener = Listener("pocketsphinx", lambda: recognizer(voice == "slt"), about) if args.listen else None
    before = TttBackend(args.model)
    after = TttBackend(args.adapter, processor_of=before)
    for data, folder in (("new", args.skill_dir), ("old", args.old_dir)):
        lists, name = HeldOutLists(folder, args.split), "spoken_qa_seen"
        for when, backend in (("before", before), ("after", after)):
            settings = {**backend.settings, "list": lists.fingerprint(name)}
            spoken = lists.samples(name, args.limit)
            for asked, task, samples in (
                ("spoken", lists.task(name), spoken),
                ("typed", "text_chat", [typed(sample) for sample in spoken]),
            ):
                run = Run(args.output_dir / f"{data}-{when}-{asked}", lists.name(name), task, samples, settings)
                hears = listener if asked == "spoken" else None  # what is typed is of interest for its text
                run.answer(backend, args.batch_size, keep_audio=hears is not None)
                if unusable := run.unusable:
                    notes[asked, data] = f"{data}, {asked}: {name_unusable(unusable, len(samples))}"
                figures |= {(data, asked, key, when): found for key, found in figures_of(run, hears).items()}
    table = markdown_table(
        ["", "before", "after", "samples"],
        [
            [
                title,
                *(m.figure if (m := figures.get((data, asked, key, when))) else "" for when in ("before", "after")),
                figures[data, asked, key, "after"].figure.count,
            ]
            for data, asked, key, title in ROWS
            if (data, asked, key, "after") in figures
        ],
    )
    text = "\n\n".join([table, *notes.values()])
    (args.output_dir / "skill.md").write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    run_command(main)
