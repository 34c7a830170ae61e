"""Tiny random parts for the tests of processor, pipeline and command: a byte-level tokenizer, a processor with a random
audio tokenizer, and a whole model folder."""

import atexit
import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import EncodecFeatureExtractor, PreTrainedTokenizerFast

from modeling_ttt import TttConfig, TttForConditionalGeneration
from modeling_ttt.ttt_codec import TttCodecConfig, TttCodecModel
from processing import TttProcessor
from processing.vocabulary_ttt import END_OF_TURN, added_tokens

NUM_CODES = 16

# Hides this repository's packages from the process that runs it first.
WITHOUT_PACKAGES = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("modeling_ttt", "processing", "pipelines"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Absent())
"""

# A process that forks for each script that it is handed, with the imports done that every one of them would begin with.
FORKING = (
    WITHOUT_PACKAGES
    + """
import json, os
import transformers.models.qwen2.modeling_qwen2
from transformers import AutoModel, AutoProcessor, pipeline

for line in sys.stdin:
    request = json.loads(line)
    child = os.fork()
    if child == 0:
        break
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
else:
    sys.exit()

os.chdir(request["cwd"])
for stream, path in enumerate((os.devnull, request["printed"], request["errors"])):
    os.dup2(os.open(path, os.O_RDWR | os.O_CREAT), stream)
sys.argv = ["-c", *request["arguments"]]
exec(request["script"])
"""
)


def build_tokenizer(num_codes: int = NUM_CODES) -> PreTrainedTokenizerFast:
    """One token per byte, then the TtT tokens in the published order."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={symbol: index for index, symbol in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False)
    tokenizer.add_special_tokens({"pad_token": "<|endoftext|>", "eos_token": END_OF_TURN})
    tokenizer.add_tokens(added_tokens(num_codes), special_tokens=True)
    return tokenizer


def build_codec() -> TttCodecModel:
    """An untrained audio tokenizer with 16 codes."""
    torch.manual_seed(0)
    config = TttCodecConfig(
        fsq_levels=[4, 4],
        hidden_size=16,
        num_encoder_blocks=1,
        num_code_blocks=1,
        num_mel_blocks=1,
        vocoder_hidden_size=16,
        num_vocoder_blocks=1,
    )
    return TttCodecModel(config).eval()


def build_processor(**options) -> TttProcessor:
    feature_extractor = EncodecFeatureExtractor(feature_size=1, sampling_rate=16_000)
    audio_tokenizer = options.pop("audio_tokenizer", build_codec())
    return TttProcessor(feature_extractor, build_tokenizer(), audio_tokenizer, **options)


def build_model(processor: TttProcessor, **options) -> TttForConditionalGeneration:
    """A model that answers every prompt with the text "hi" and one span of code 3, cut at 40 codes.

    Its layers add nothing to the residual stream, so the next token depends on the current one alone: each state has a
    dimension of its own in the embedding, which the head maps to the token that follows.
    """
    torch.manual_seed(0)
    ids = processor.token_ids
    backbone = {
        "vocab_size": len(processor.tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
        "pad_token_id": processor.tokenizer.pad_token_id,
        "eos_token_id": processor.tokenizer.eos_token_id,
        **options,
    }
    model = TttForConditionalGeneration(TttConfig(text_config=backbone, **ids.config_arguments())).eval()

    line_break, h, i = processor.tokenizer("\nhi")["input_ids"]
    follows = [
        (line_break, h),
        (h, i),
        (i, ids.begin_of_last_audio_token_id),
        (ids.mask_token_id, ids.audio_code_id_start + 3),
        (ids.end_of_last_audio_token_id, ids.end_of_turn_token_id),
    ]
    with torch.no_grad():
        embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
        embedding.zero_()
        head.zero_()
        for name, weight in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                weight.zero_()
        for state, (current, following) in enumerate(follows):
            embedding[current, state] = 1.0
            head[following, state] = 10.0
    model.generation_config.max_audio_codes_per_span = 40
    return model


def tone(seconds: float, sampling_rate: int = 16_000, frequency: float = 330.0) -> np.ndarray:
    """(samples,) float32."""
    time = np.arange(int(seconds * sampling_rate)) / sampling_rate
    return (0.3 * np.sin(2 * np.pi * frequency * time)).astype(np.float32)


def write_wav(path: Path, samples: np.ndarray, sampling_rate: int = 16_000) -> Path:
    import soundfile

    soundfile.write(path, samples, sampling_rate)
    return path


@functools.cache
def _forking_process() -> subprocess.Popen[str]:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    # A path relative to where a script runs, so that each has modules of its own.
    environment |= {"HF_MODULES_CACHE": "modules", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", FORKING],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
        cwd=Path(__file__).parent / "fixtures",
        text=True,
    )
    atexit.register(process.communicate)  # its input ends, and so does it
    return process


def run_without_packages(script: str, *arguments: object, cwd: Path) -> list[str]:
    """The lines that a Python script prints in a process that has no part of this repository and no network."""
    process = _forking_process()
    with tempfile.TemporaryDirectory() as folder:
        printed, errors = Path(folder, "printed"), Path(folder, "errors")
        request = {"script": script, "arguments": list(map(str, arguments)), "cwd": str(cwd)}
        process.stdin.write(json.dumps(request | {"printed": str(printed), "errors": str(errors)}) + "\n")
        process.stdin.flush()
        status = process.stdout.readline().strip()
        assert status == "0", f"exit status {status}\n{errors.read_text() if errors.exists() else ''}"
        return printed.read_text().splitlines()
