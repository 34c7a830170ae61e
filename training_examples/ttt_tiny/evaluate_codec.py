"""Measure an audio tokenizer: what an independent recogniser understands after encoding and decoding held-out speech.

    python training_examples/ttt_tiny/evaluate_codec.py --model model_cards/ttt-tiny/audio_tokenizer

Needs the held-out lists of build_speech.py. Writes codec.json and codec.md into --output_dir and prints the table.
"""

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import AutoModelForAudioTokenization, EncodecFeatureExtractor

import modeling_ttt  # noqa: F401  (registers the audio tokenizer, so that no remote code is needed)
from modeling_ttt.ttt_codec.configuration_ttt_codec import VOCODERS
from training_examples.command_line import ScriptParser, check_least
from training_examples.evaluation.figures import Figure, markdown_table, normalized, write_figures
from training_examples.evaluation.recognisers import word_error_rate
from training_examples.threads import threads_field, use_threads
from training_examples.ttt_tiny.judge import domain_recognizer
from training_examples.ttt_tiny.speech import read_audio, read_list
from training_examples.user_errors import run_command

LISTS = {"codec_answers": "held-out answers", "tts": "random word sequences"}


@dataclass
class CodecEvaluationArguments:
    model: str = field(
        default="model_cards/ttt-tiny/audio_tokenizer", metadata={"help": "Folder of the audio tokenizer."}
    )
    data_dir: Path = field(default=Path("data/ttt_tiny/eval"), metadata={"help": "Folder of the held-out lists."})
    output_dir: Path = field(default=Path("runs/evaluate_codec"), metadata={"help": "Where the report goes."})
    vocoders: list[str] = field(
        default_factory=lambda: ["neural", "griffin_lim"],
        metadata={"help": "Ways from mel to waveform to compare.", "choices": [*VOCODERS]},
    )
    limit: int | None = field(default=None, metadata={"help": "Rows per list; all by default."})
    batch_size: int = field(default=16, metadata={"help": "Waveforms encoded and decoded at once."})
    device: str = field(default="cpu", metadata={"help": "Device of the audio tokenizer."})
    threads: int = threads_field()
    sphinx_voice: Literal["slt", "none"] = field(
        default="none", metadata={"help": "The voice that PocketSphinx is tuned to: slt is the first edition's."}
    )
    num_workers: int = field(default=2, metadata={"help": "Processes of the recogniser."})

    def __post_init__(self) -> None:
        check_least(self, limit=1, batch_size=1, num_workers=1)


@torch.no_grad()
def reconstruct(
    model, feature_extractor, waveforms: list[np.ndarray], vocoder: str, batch_size: int
) -> tuple[list[np.ndarray], dict[str, float], list[np.ndarray]]:
    """Return waveforms after encode and decode, the seconds each took, and the codes."""
    seconds = {"encode": 0.0, "decode": 0.0}
    decoded, all_codes = [], []
    for start in tqdm(range(0, len(waveforms), batch_size), desc=f"encode and decode ({vocoder})"):
        batch = waveforms[start : start + batch_size]
        features = feature_extractor(
            batch, sampling_rate=model.config.sampling_rate, padding=True, return_tensors="pt"
        ).to(model.device)
        begin = time.perf_counter()
        encoded = model.encode(**features)
        middle = time.perf_counter()
        values = model.decode(encoded.audio_codes, encoded.audio_codes_mask, vocoder=vocoder).audio_values
        seconds["encode"] += middle - begin
        seconds["decode"] += time.perf_counter() - middle
        for row, mask in enumerate(encoded.audio_codes_mask.bool()):
            decoded.append(values[row, 0, : len(batch[row])].float().cpu().numpy())
            all_codes.append(encoded.audio_codes[row, 0][mask].cpu().numpy())
    return decoded, seconds, all_codes


def main() -> None:
    (args,) = ScriptParser(CodecEvaluationArguments, __doc__).parse_args_into_dataclasses()
    use_threads(args.threads)
    model = AutoModelForAudioTokenization.from_pretrained(args.model).to(args.device).eval()
    rate = model.config.sampling_rate
    feature_extractor = EncodecFeatureExtractor(feature_size=1, sampling_rate=rate)
    report: dict[str, dict] = {}
    table = []
    with domain_recognizer(args.num_workers, args.sphinx_voice == "slt") as recognizer:
        for name, title in LISTS.items():
            rows = read_list(args.data_dir, name, args.limit)
            texts = [normalized(row["answer"]) for row in rows]
            originals = [read_audio(args.data_dir, row["answer_audio"], rate) for row in rows]
            duration = sum(map(len, originals)) / rate
            heard = recognizer.transcribe(originals, rate, progress=True)
            entry = {"originals": Figure(word_error_rate(texts, heard), len(rows))}
            table.append([title, "originals", entry["originals"], "", len(rows)])
            for vocoder in args.vocoders:
                decoded, seconds, codes = reconstruct(model, feature_extractor, originals, vocoder, args.batch_size)
                heard = recognizer.transcribe(decoded, rate, progress=True)
                entry[vocoder] = Figure(word_error_rate(texts, heard), len(rows))
                entry[f"{vocoder}_decode_time"] = Figure(seconds["decode"] / duration, len(rows), "of duration")
                entry["encode_time"] = Figure(seconds["encode"] / duration, len(rows), "of duration")
                entry["codes_used"] = Figure(len(np.unique(np.concatenate(codes))), len(rows), "codes")
                table.append([title, vocoder, entry[vocoder], f"{seconds['decode'] / duration:.4f}", len(rows)])
                missed = [{"said": a, "heard": b} for a, b in zip(texts, heard, strict=True) if a != b]
                write_figures(args.output_dir / f"{name}-{vocoder}-misheard.json", missed)
            report[name] = entry

    text = markdown_table(["speech", "decoded by", "recogniser WER", "decode time / duration", "sentences"], table)
    write_figures(args.output_dir / "codec.json", {"model": args.model, "results": report})
    (args.output_dir / "codec.md").write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    run_command(main)
