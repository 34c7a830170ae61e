"""Make the listening samples of a model's card: its answers to a few questions as FLAC files, and a picture of one.

    python training_examples/ttt_tiny/make_samples.py --model model_cards/ttt-tiny

A question is a recording or a text. Files are called after what is asked, so that a card's links outlive the weights,
and the rows of the card's table are printed. The model's own settings hold unless `--generation` says otherwise.
"""

from dataclasses import dataclass, field
from pathlib import Path

import librosa
import numpy as np
import soundfile

from training_examples.command_line import ScriptParser
from training_examples.evaluation.backends import Sample, TttBackend, Turn
from training_examples.evaluation.figures import markdown_table
from training_examples.evaluation.options import read_pairs
from training_examples.threads import threads_field, use_threads
from training_examples.user_errors import run_command

RECORDINGS = (".wav", ".flac", ".mp3", ".ogg", ".opus", ".m4a")
FLOOR = -80.0  # dB under the loudest, the darkest of the picture


@dataclass
class SampleArguments:
    model: str = field(default="model_cards/ttt-tiny", metadata={"help": "Folder or Hub name of the model."})
    output_dir: Path = field(default=Path("model_cards/ttt-tiny/samples"), metadata={"help": "Where the files go."})
    questions: list[str] = field(
        default_factory=lambda: ["tests/fixtures/question.wav", "name the capital of austria"],
        metadata={"help": "Questions to answer: recordings or texts, or '' for none; the first answer is drawn."},
    )
    read_aloud: list[str] = field(
        default_factory=lambda: ["seven golden monkey river saturday morning"],
        metadata={"help": "Texts to read aloud, or '' for none."},
    )
    generation: list[str] = field(
        default_factory=list, metadata={"help": "OPTION=VALUE of `generate`, such as audio_steps_per_block=8."}
    )
    threads: int = threads_field()
    trust_remote_code: bool = field(default=False, metadata={"help": "Allow code in the checkpoint to run."})

    def __post_init__(self) -> None:
        self.questions, self.read_aloud = ([word for word in x if word] for x in (self.questions, self.read_aloud))
        for text in [*self.questions, *self.read_aloud]:
            if not file_name(text):
                raise ValueError(f"{text!r} has no letter or digit to call its file by; ask something else.")
        if not self.questions and not self.read_aloud:
            raise ValueError("`--questions` and `--read_aloud` are empty; give one of them something to say.")
        for question in self.questions:
            if Path(question).suffix.lower() in RECORDINGS and not Path(question).is_file():
                raise FileNotFoundError(f"`--questions` {question}: there is no such recording.")

    def requests(self) -> list[tuple[Sample, str]]:
        """Return what is asked and the task of each; a sample's id is the name of its files."""
        found = []
        for question in self.questions:
            spoken = Path(question).is_file()
            turn = Turn(audio=question) if spoken else Turn(text=question)
            name = Path(question).stem if spoken else question
            found.append((Sample(file_name(name), (turn,)), "spoken_chat" if spoken else "text_chat"))
        found += [(Sample(f"read_{file_name(text)}", (Turn(text=text),)), "tts") for text in self.read_aloud]
        names = [sample.id for sample, _ in found]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"two of what is asked would be written to {twice}.flac; leave one of them out")
        return found


def file_name(text: str) -> str:
    """Return a text as a name of a file: its letters and digits, the first 60 of them."""
    return "_".join("".join(c if c.isalnum() else " " for c in text.lower()).split())[:60]


def draw_speech(waveform: np.ndarray, sampling_rate: int, title: str, subtitle: str, path: Path) -> None:
    """
    Draw speech over seconds: its waveform and, below, its log-mel spectrogram.

    Args:
        waveform (`np.ndarray` of shape `(samples,)`): the speech, in [-1, 1].
        sampling_rate (`int`): its rate, Hz.
        title, subtitle (`str`): what was said, and how.
        path (`Path`): the PNG to write.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    hop, window, bins = sampling_rate // 200, 2 * (sampling_rate // 50), 128  # 5 and 40 ms
    mel = librosa.feature.melspectrogram(y=waveform, sr=sampling_rate, n_fft=window, hop_length=hop, n_mels=bins)
    level = librosa.power_to_db(mel, ref=np.max, top_db=-FLOOR)
    seconds = len(waveform) / sampling_rate
    edges = librosa.mel_frequencies(bins + 1, fmin=0.0, fmax=sampling_rate / 2)

    figure, (above, below) = plt.subplots(
        2, 1, figsize=(10, 5), layout="constrained", sharex=True, height_ratios=(1, 2.2)
    )
    figure.suptitle(f"“{title}”", fontsize=15, fontweight="bold")
    above.set_title(subtitle, fontsize=9.5, color="0.35")
    above.plot(np.arange(len(waveform)) / sampling_rate, waveform, lw=0.5, color="#3b528b")
    bound = 1.1 * max(float(np.abs(waveform).max()), 1e-3)
    above.set(ylabel="amplitude", ylim=(-bound, bound))
    above.spines[["top", "right"]].set_visible(False)
    times = np.clip((np.arange(level.shape[1] + 1) - 0.5) * hop / sampling_rate, 0, seconds)
    image = below.pcolormesh(times, edges, level, cmap="magma", vmin=FLOOR, vmax=0, rasterized=True)
    below.set_yscale("function", functions=(librosa.hz_to_mel, librosa.mel_to_hz))
    top = sampling_rate / 2
    ticks = [hz for hz in (0, 500, 1000, 2000, 4000, 8000, 16000) if hz < 0.9 * top] + [top]
    below.yaxis.set_major_locator(FixedLocator(ticks))
    below.yaxis.set_minor_locator(NullLocator())
    below.yaxis.set_major_formatter(FuncFormatter(lambda hz, _: f"{hz / 1000:g}"))
    below.set(xlabel="seconds", ylabel="frequency, kHz (mel scale)", xlim=(0, seconds), ylim=(0, top))
    figure.colorbar(image, ax=below, label="dB, the loudest is 0", pad=0.01)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main() -> None:
    (args,) = ScriptParser(SampleArguments, __doc__).parse_args_into_dataclasses()
    requests = args.requests()
    use_threads(args.threads)
    options = read_pairs("generation", args.generation)
    backend = TttBackend(args.model, generation=options, trust_remote_code=args.trust_remote_code)
    answers = [backend.answer([sample], task)[0] for sample, task in requests]
    for (sample, _), answer in zip(requests, answers, strict=True):
        if not len(answer.audio):
            raise ValueError(
                f"{args.model} says nothing to {sample.id} (it writes {answer.text!r}); ask something else"
            )
    args.output_dir.mkdir(parents=True, exist_ok=True)
    rows: list[list[object]] = []
    for (sample, task), answer in zip(requests, answers, strict=True):
        path = args.output_dir / f"{sample.id}.flac"
        soundfile.write(path, np.clip(answer.audio, -1, 1), answer.sampling_rate, subtype="PCM_16")
        (turn,) = sample.turns
        asked = f"{'read aloud' if task == 'tts' else 'typed'}: {turn.text}" if turn.text else f"spoken: {sample.id}"
        link = f"[{path.name}]({args.output_dir.name}/{path.name})"
        rows.append([asked, answer.text, link, f"{len(answer.audio) / answer.sampling_rate:.1f} s"])
    picture = args.output_dir / f"{requests[0][0].id}.png"
    first = answers[0]
    length = len(first.audio) / first.sampling_rate
    subtitle = f"{Path(args.model).name}: {first.codes} codes, {length:.1f} s at {first.sampling_rate / 1000:g} kHz"
    draw_speech(first.audio, first.sampling_rate, first.text, subtitle, picture)
    print(markdown_table(["asked", "answered", "sample", "length"], rows))
    print(f"\n![Waveform and log-mel spectrogram of “{first.text}”]({args.output_dir.name}/{picture.name})")


if __name__ == "__main__":
    run_command(main)
