"""The audio tokenizer beside a processor: its saving in a subfolder of the same repository, and its loading."""

from __future__ import annotations

import os
from typing import Any

from transformers.dynamic_module_utils import custom_object_save
from transformers.models.auto.modeling_auto import AutoModelForAudioTokenization

AUDIO_TOKENIZER_FOLDER = "audio_tokenizer"


def write_audio_tokenizer(audio_tokenizer: Any, save_directory: str) -> None:
    """Saves it in the subfolder `audio_tokenizer`, and its code, where it brings some, in `save_directory` itself."""
    audio_tokenizer.save_pretrained(os.path.join(save_directory, AUDIO_TOKENIZER_FOLDER))
    if audio_tokenizer._auto_class is not None:
        # Transformers looks for the code of a subfolder's model at the root of the repository.
        custom_object_save(audio_tokenizer, save_directory)
        custom_object_save(audio_tokenizer.config, save_directory)


def read_audio_tokenizer(name_or_path: str | os.PathLike, subfolder: str = "", **kwargs: Any) -> Any:
    """Loads the audio tokenizer of a folder or Hub repository, in eval mode.

    Args:
        subfolder: where in the repository the processor lies; the audio tokenizer lies in its `audio_tokenizer`.
        kwargs: passed to `from_pretrained`.

    Raises:
        OSError: the folder has none.
    """
    folder = f"{subfolder}/{AUDIO_TOKENIZER_FOLDER}".lstrip("/")
    if os.path.isdir(name_or_path) and not os.path.isfile(os.path.join(name_or_path, folder, "config.json")):
        raise OSError(
            f"{name_or_path} has no audio tokenizer in `{folder}/`. Pass `audio_tokenizer`, or "
            "`load_audio_tokenizer=False` where audio only comes as codes."
        )
    return AutoModelForAudioTokenization.from_pretrained(name_or_path, subfolder=folder, **kwargs).eval()
