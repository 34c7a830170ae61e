"""What init_from_llm.py may be told, which is read before PyTorch is loaded, for that takes seconds. What is done with
it lives in first_checkpoint.py."""

from dataclasses import dataclass, field
from pathlib import Path

from training_examples.command_line import check_least
from training_examples.threads import threads_field

# Close to the mean, new tokens take the least from the probabilities of the old ones (Hewitt, 2021).
ROW_SPREAD = 1e-9**0.5


@dataclass
class InitArguments:
    llm: str = field(metadata={"help": "Text language model: folder, Hub name, or a GGUF file."})
    audio_tokenizer: str = field(
        metadata={"help": "Any Transformers audio codec: folder or Hub name; or a TtT checkpoint that has one."}
    )
    output_dir: Path = field(metadata={"help": "Folder to write."})
    audio_tokenizer_subfolder: str = field(
        default="", metadata={"help": "Where in its repository the audio tokenizer lies."}
    )
    num_quantizers: int | None = field(
        default=None, metadata={"help": "Use only the first so many codebooks, of an audio tokenizer that allows it."}
    )
    feature_extractor: str | None = field(
        default=None, metadata={"help": "Folder or Hub name of its feature extractor, if it lies elsewhere."}
    )
    dtype: str = field(default="auto", metadata={"help": "Precision to store: auto (the LLM's), bfloat16, float32."})
    row_spread: float = field(
        default=ROW_SPREAD,
        metadata={
            "help": "Standard deviation of the new rows around the mean, as a multiple of the old rows' own. The "
            "default is that of Transformers' `mean_resizing`."
        },
    )
    text_chunk_size: int = field(default=13, metadata={"help": "Text tokens between two audio spans of an answer."})
    audio_chunk_size: int | None = field(
        default=None,
        metadata={"help": "Codes of an audio span between text; by default as long as the published ones."},
    )
    system_prompts: Path | None = field(
        default=None, metadata={"help": "JSON file of system prompts by task, in place of the published ones."}
    )
    keep_chat_template: bool = field(
        default=False,
        metadata={
            "help": "Write all prompts by the LLM's own chat template, and ask spoken chat, too, with its own system "
            "prompt. Without it text_chat alone is asked as the LLM asks."
        },
    )
    license: str | None = field(default=None, metadata={"help": "Licence that the card names, such as apache-2.0."})
    seed: int = field(default=0, metadata={"help": "Seed of the new rows."})
    threads: int = threads_field()
    trust_remote_code: bool = field(default=False, metadata={"help": "Allow code in the audio tokenizer's repository."})

    def __post_init__(self) -> None:
        check_least(self, row_spread=0)
