"""What every test shares: one thread, no network, a fixed seed, and tiny random models of a 178-token vocabulary."""

import os
import tempfile

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Code that comes with models and scorers is imported from copies: each process of the tests keeps its own, in one
# folder, since Python looks for all of it where it found the first.
COPIED_MODULES = tempfile.TemporaryDirectory(prefix="ttt_test_modules_", ignore_cleanup_errors=True)
os.environ["HF_MODULES_CACHE"] = COPIED_MODULES.name

import contextlib  # noqa: E402
import gc  # noqa: E402
from collections.abc import Callable, Iterator  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import pytest  # noqa: E402
import torch  # noqa: E402

from modeling_ttt import TttConfig, TttForConditionalGeneration  # noqa: E402

FIXTURES = Path(__file__).parent / "fixtures"

# The vocabulary of the published goldens: 0-109 text, 110 `<|audio|>`, 111-174 codes, then mask and end tokens.
AUDIO_VOCABULARY = {
    "audio_token_id_start": 110,
    "audio_code_id_start": 111,
    "num_audio_codes": 64,
    "mask_token_id": 175,
    "begin_of_audio_token_id": 100,
    "end_of_prompt_audio_token_id": 101,
    "begin_of_last_audio_token_id": 102,
    "end_of_audio_token_id": 176,
    "end_of_last_audio_token_id": 177,
}
BACKBONE = {
    "vocab_size": 178,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 105,
    "eos_token_id": 104,
}
torch.set_num_threads(1)


def make_config(text_config: dict[str, Any] | None = None, **kwargs: Any) -> TttConfig:
    """A tiny config; `text_config` updates the backbone's settings, other arguments TttConfig's."""
    return TttConfig(text_config={**BACKBONE, **(text_config or {})}, **{**AUDIO_VOCABULARY, **kwargs})


def make_model(text_config: dict[str, Any] | None = None, **kwargs: Any) -> TttForConditionalGeneration:
    """A tiny random model in eval mode, always with the same weights for the same arguments."""
    torch.manual_seed(0)
    return TttForConditionalGeneration(make_config(text_config, **kwargs)).eval()


def no_compilation(implementation: str) -> contextlib.AbstractContextManager:
    """A context in which flex attention is not compiled, which takes long on a CPU."""
    return torch.compiler.set_stance("force_eager") if implementation == "flex_attention" else contextlib.nullcontext()


def pytest_collection_finish() -> None:
    """What the imports made is no garbage: the collections that every Trainer asks for need not look at it."""
    gc.freeze()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def undrawn_curves() -> Iterator[None]:
    """Training runs leave an empty picture of their curves: drawing it takes longer than their few steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("training_examples.training.trainer.plot_curves", lambda log_history, path: path.touch())
        yield


@pytest.fixture
def tiny_config() -> Callable[..., TttConfig]:
    return make_config


@pytest.fixture
def tiny_model() -> Callable[..., TttForConditionalGeneration]:
    return make_model


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    """Two right-padded rows: spoken question, answer with two spans; text question, answer whose span is cut off."""
    rows = [
        # prompt with user audio (bidirectional), then: text, span, text, last span, text
        ([1, 2, 100, 111, 112, 113, 101, 3], [10, 11, 100, 120, 121, 122, 123, 176, 12, 102, 130, 131, 177, 104]),
        ([1, 4, 5], [20, 21, 22, 102, 140, 141, 142, 143, 144]),
    ]
    length = max(len(prompt) + len(answer) for prompt, answer in rows)
    padded = {"input_ids": [], "labels": [], "attention_mask": []}
    for prompt, answer in rows:
        padding = length - len(prompt) - len(answer)
        padded["input_ids"].append(prompt + answer + [105] * padding)
        padded["labels"].append([-100] * len(prompt) + answer + [-100] * padding)
        padded["attention_mask"].append([1] * (length - padding) + [0] * padding)
    return {name: torch.tensor(values) for name, values in padded.items()}
