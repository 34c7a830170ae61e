"""Speed of GLM-4-Voice's audio tokenizer at the published size with random weights: seconds of work per second of
speech, and how long a stream takes to its first piece of waveform.

    python tests/benchmarks/bench_glm4_voice.py                      # float32 on two CPU threads; bfloat16 on a GPU
    python tests/benchmarks/bench_glm4_voice.py --seconds 30 --device cpu --profile encode

A real-time factor below 1 is faster than speech. Each is the best of `--repeats` runs, of which the first warms up.
"""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import HfArgumentParser

sys.path.insert(0, str(Path(__file__).parents[2]))

from modeling_ttt.glm4_voice import Glm4VoiceConfig, Glm4VoiceModel  # noqa: E402


@dataclass
class Arguments:
    """What to measure."""

    seconds: float = field(default=10.0, metadata={"help": "Length of the speech, at least 2."})
    batch_size: int = field(default=1, metadata={"help": "Rows encoded and decoded at once."})
    device: str | None = field(default=None, metadata={"help": "cpu or cuda; a GPU if there is one."})
    dtype: str | None = field(default=None, metadata={"help": "float32 or bfloat16; bfloat16 on a GPU."})
    threads: int = field(default=2, metadata={"help": "CPU threads."})
    repeats: int = field(default=3, metadata={"help": "Runs of each measurement."})
    profile: str | None = field(default=None, metadata={"help": "Show where the time goes: encode, mel or vocoder."})


def build_model(device: str, dtype: torch.dtype) -> Glm4VoiceModel:
    """The published size with random weights; what loading keeps in float32 stays so."""
    model = Glm4VoiceModel(Glm4VoiceConfig())
    if dtype != torch.float32:
        weights: dict[str, Any] = model.state_dict()
        model = Glm4VoiceModel.from_pretrained(None, config=model.config, state_dict=weights, dtype=dtype)
    return model.eval().to(device)


def best_time(function: Callable[[], Any], device: str, repeats: int) -> float:
    """Seconds of the fastest run."""
    times = []
    for _ in range(repeats):
        _synchronize(device)
        start = time.perf_counter()
        function()
        _synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times)


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


@torch.no_grad()
def main() -> None:
    (arguments,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, arguments.dtype or ("bfloat16" if device == "cuda" else "float32"))
    model = build_model(device, dtype)
    batch, seconds, rate = arguments.batch_size, arguments.seconds, model.config.frame_rate
    waveform = 0.1 * torch.randn(batch, int(seconds * model.config.sampling_rate), device=device)
    codes = torch.randint(model.config.codebook_size, (batch, int(seconds * rate)), device=device)
    mel, num_frames = model.decode_mel(codes, num_steps=1)
    phase, noise = model.draw_source_noise(num_frames, model.make_generators(None, batch))

    def first_piece(block_size: int) -> None:
        # One code more than a block, with which it is known not to be the last.
        assert len(model.streaming_decoder(block_sizes=[block_size]).push(codes[0, : block_size + 1]))

    stages: dict[str, Callable[[], Any]] = {
        "encode": lambda: model.encode(waveform),
        "mel": lambda: model.decode_mel(codes),
        "vocoder": lambda: model.vocoder(mel, num_frames, phase, noise),
    }
    if arguments.profile is not None:
        with torch.profiler.profile() as profiler:
            stages[arguments.profile]()
        print(profiler.key_averages().table(sort_by=f"self_{device}_time_total", row_limit=12))
        return
    measured = {
        "encode": stages["encode"],
        "decode, 10 steps, guidance 0.7": lambda: model.decode(codes),
        "  of which log-mel frames": stages["mel"],
        "  of which vocoder": stages["vocoder"],
        "decode, 10 steps, no guidance": lambda: model.decode(codes, guidance_scale=0.0),
        "decode, 5 steps, guidance 0.7": lambda: model.decode(codes, num_steps=5),
    }
    where = torch.cuda.get_device_name() if device == "cuda" else f"{arguments.threads} CPU threads"
    print(f"{model.num_parameters():,} parameters, {str(dtype)[6:]}, {where}, {batch} x {seconds:g} s of speech")
    print(f"{'':34}{'seconds':>10}{'real-time factor':>18}")
    for name, function in measured.items():
        elapsed = best_time(function, device, arguments.repeats)
        print(f"{name:34}{elapsed:10.3f}{elapsed / (batch * seconds):18.3f}", flush=True)
    print("\nStream: from the codes of its first block to its first piece of waveform")
    for block_size in (10, 25):
        elapsed = best_time(lambda size=block_size: first_piece(size), device, arguments.repeats)
        print(f"{f'block of {block_size} codes ({block_size / rate:g} s)':34}{elapsed:10.3f}", flush=True)


if __name__ == "__main__":
    main()
