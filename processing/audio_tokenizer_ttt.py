"""The audio tokenizer beside a processor: whether the two fit, and its place in a subfolder of the same repository."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any

from transformers import EncodecFeatureExtractor
from transformers.dynamic_module_utils import custom_object_save
from transformers.modeling_utils import PreTrainedModel
from transformers.models.auto.configuration_auto import AutoConfig
from transformers.models.auto.feature_extraction_auto import AutoFeatureExtractor
from transformers.models.auto.modeling_auto import AutoModel, AutoModelForAudioTokenization
from transformers.processing_utils import AUDIO_TOKENIZER_KWARGS

from .codebooks_ttt import TttAudioFormat

AUDIO_TOKENIZER_FOLDER = "audio_tokenizer"


def check_audio_tokenizer(audio_tokenizer: Any, sampling_rate: int, num_audio_codes: int) -> TttAudioFormat:
    """
    Check that an audio tokenizer fits, and return what its codes are.

    Args:
        audio_tokenizer (`PreTrainedModel`): a Transformers audio codec.
        sampling_rate (`int`): of the waveforms the processor gives it, Hz.
        num_audio_codes (`int`): number of the tokenizer's tokens `<|audio_N|>`.

    Raises:
        TypeError: if it is no Transformers model with `encode` and `decode`.
        ValueError: if it takes another sampling rate or has more codes than there are tokens, or several codebooks
            whose codes are not as many.
    """
    name = type(audio_tokenizer).__name__
    has_methods = hasattr(audio_tokenizer, "encode") and hasattr(audio_tokenizer, "decode")
    if not (isinstance(audio_tokenizer, PreTrainedModel) and has_methods):
        raise TypeError(
            f"`audio_tokenizer` must be a Transformers audio codec, a model with `encode` and `decode`, got {name}."
        )
    audio_format = TttAudioFormat.from_config(audio_tokenizer.config)
    if audio_format.sampling_rate not in (None, sampling_rate):
        raise ValueError(
            f"The feature extractor prepares {sampling_rate} Hz, but {name} takes {audio_format.sampling_rate} Hz. "
            "Use the feature extractor that belongs to it."
        )
    books, num_codes = audio_format.num_codebooks, audio_format.num_codes
    if num_codes > num_audio_codes or (books > 1 and num_codes != num_audio_codes):
        described = f"{num_codes} codes" if books == 1 else f"{num_codes} codes in {books} codebooks"
        raise ValueError(
            f"The audio tokenizer has {described}, but the tokenizer has `<|audio_N|>` tokens for "
            f"{'only ' if num_codes > num_audio_codes else ''}{num_audio_codes}. Use the two that belong together."
        )
    return audio_format


def make_importable(cls: type) -> None:
    """
    Let pickling by dill find a class from a model folder, as the fingerprints of `datasets.Dataset.map` need it.

    Transformers puts the module of such a class into `sys.modules`, but not into its package, so that dill takes the
    class for one that cannot be imported and pickles its code instead, which takes seconds or fails.

    Args:
        cls (`type`): a class of any module.
    """
    package, _, name = cls.__module__.rpartition(".")
    if package in sys.modules and not hasattr(sys.modules[package], name):
        setattr(sys.modules[package], name, sys.modules[cls.__module__])


def write_audio_tokenizer(audio_tokenizer: Any, save_directory: str) -> None:
    """Save it in the subfolder `audio_tokenizer`, and its code, where it brings some, in `save_directory` itself."""
    audio_tokenizer.save_pretrained(os.path.join(save_directory, AUDIO_TOKENIZER_FOLDER))
    if audio_tokenizer._auto_class is not None:
        # Transformers looks for the code of a subfolder's model at the root of the repository.
        custom_object_save(audio_tokenizer, save_directory)
        custom_object_save(audio_tokenizer.config, save_directory)


def read_audio_tokenizer(name_or_path: str | os.PathLike, subfolder: str = "", **kwargs: Any) -> Any:
    """
    Load the audio tokenizer that lies beside a processor, in a folder or Hub repository.

    Args:
        name_or_path (`str` or `os.PathLike`): the folder or Hub name.
        subfolder (`str`, *optional*, defaults to `""`):
            Where in the repository the processor lies; the audio tokenizer lies in its `audio_tokenizer`.
        kwargs (`dict`, *optional*): passed to `load_audio_codec`.

    Raises:
        OSError: if the folder has none.
    """
    folder = f"{subfolder}/{AUDIO_TOKENIZER_FOLDER}".lstrip("/")
    if os.path.isdir(name_or_path) and not os.path.isfile(os.path.join(name_or_path, folder, "config.json")):
        raise OSError(
            f"{name_or_path} has no audio tokenizer in `{folder}/`. Pass `audio_tokenizer`, or "
            "`load_audio_tokenizer=False` where audio only comes as codes."
        )
    return load_audio_codec(name_or_path, subfolder=folder, **kwargs)


def load_audio_codec(name_or_path: str | os.PathLike, subfolder: str = "", **kwargs: Any) -> Any:
    """
    Load any audio codec of Transformers, in eval mode: also those that it lists as plain models only (Mimi).

    Args:
        name_or_path (`str` or `os.PathLike`): the folder or Hub name.
        subfolder (`str`, *optional*, defaults to `""`): where in it the codec lies.
        kwargs (`dict`, *optional*):
            Passed to `from_pretrained`, settings of the configuration among them: `num_quantizers=8` loads Mimi or
            EnCodec with its first eight codebooks.
    """
    located = {key: kwargs[key] for key in kwargs if key in ("revision", "trust_remote_code", *AUDIO_TOKENIZER_KWARGS)}
    for name in ("dtype", "device_map"):
        located.pop(name, None)
    config = AutoConfig.from_pretrained(name_or_path, subfolder=subfolder, **located)
    if config.model_type == "encodec" and "num_quantizers" in kwargs:  # which EnCodec counts in kbit/s
        bits_per_second = config.codebook_nbits * config.frame_rate
        kwargs["target_bandwidths"] = [kwargs.pop("num_quantizers") * bits_per_second / 1000]
    is_listed = type(config) in AutoModelForAudioTokenization._model_mapping
    is_listed = is_listed or "AutoModelForAudioTokenization" in getattr(config, "auto_map", {})
    auto_class = AutoModelForAudioTokenization if is_listed else AutoModel
    return auto_class.from_pretrained(name_or_path, subfolder=subfolder, **kwargs).eval()


def load_feature_extractor(audio_tokenizer: Any, places: Sequence[tuple[str | os.PathLike, str]]) -> Any:
    """
    Load what prepares waveforms for an audio tokenizer: the first feature extractor found, or, for one that takes plain
    waveforms, one that only pads them.

    Args:
        audio_tokenizer (`PreTrainedModel`): a Transformers audio codec.
        places (`Sequence[tuple]`): where to look, in this order: a folder or Hub name and a subfolder, which may be "".

    Raises:
        ValueError: if none is found, and the audio tokenizer takes more than plain waveforms.
    """
    for name, subfolder in places:
        try:
            return AutoFeatureExtractor.from_pretrained(name, subfolder=subfolder)
        except (OSError, ValueError):
            continue
    sampling_rate = TttAudioFormat.from_config(audio_tokenizer.config).sampling_rate
    if sampling_rate is None or audio_tokenizer.main_input_name != "input_values":
        looked = " or ".join(os.path.join(name, subfolder) for name, subfolder in places)
        raise ValueError(
            f"There is no feature extractor for {type(audio_tokenizer).__name__} in {looked}; put its "
            "preprocessor_config.json there."
        )
    return EncodecFeatureExtractor(feature_size=1, sampling_rate=sampling_rate)
