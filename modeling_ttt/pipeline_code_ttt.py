"""The pipeline that a TtT model's config.json names: its code goes along with the model's, and it takes models that are
loaded already. Nothing else in the models knows of it; what it does lives in pipeline_ttt.py."""

import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

from transformers import AutoModel, PreTrainedConfig
from transformers.dynamic_module_utils import get_class_from_dynamic_module, get_relative_imports
from transformers.pipelines import PIPELINE_REGISTRY
from transformers.utils import cached_file, logging

logger = logging.get_logger(__name__)

TASK, MODULE, CLASS = "audio-to-audio", "pipeline_ttt", "TttAudioToAudioPipeline"
# Code of the Hub runs from a folder that is called as its commit; None for other code.
REVISION = next(iter(re.findall(r"\.([0-9a-f]{40})$", __package__ or "")), None)
BESIDE = Path(__file__).resolve().parents[1] / "pipelines"  # in this package; code that came with a model has no such


def save_pipeline_code(config: PreTrainedConfig, folder: str | os.PathLike) -> None:
    """
    Write the code of the pipelines that `config.custom_pipelines` names, and of ours, which is named where it does not
    name another for our task.

    A pipeline whose code is nowhere to be found is named no longer: a config.json that names it could not be used.

    Args:
        config (`PreTrainedConfig`): configuration that is about to be saved.
        folder (`str` or `os.PathLike`): where it is saved; made if missing.
    """
    ours = {TASK: {"impl": f"{MODULE}.{CLASS}", "pt": ["AutoModel"], "type": "multimodal"}}
    os.makedirs(folder, exist_ok=True)
    kept = {}
    for task, info in (ours | (getattr(config, "custom_pipelines", None) or {})).items():
        is_elsewhere = "--" in info["impl"]  # "owner/repository--module.Class"
        if is_elsewhere or _copy_module(info["impl"].split(".")[0], config, Path(folder)):
            kept[task] = info
        else:
            logger.warning(
                f"The code of the pipeline {info['impl']} is not where the model is from ({config.name_or_path}), so "
                f"{folder} is saved without it: `pipeline({task!r}, model=...)` will not load it."
            )
    config.custom_pipelines = kept


def _copy_module(module: str, config: PreTrainedConfig, folder: Path) -> bool:
    """Copy a module and what it imports from its own folder; return whether all of it is in `folder` now."""
    source, target = _find(module, config), folder / f"{module}.py"
    if source is None:
        return target.exists()
    if not (target.exists() and target.samefile(source)):
        shutil.copyfile(source, target)
    return all(_copy_module(needed, config, folder) for needed in get_relative_imports(source))


def _find(module: str, config: PreTrainedConfig) -> str | None:
    """Path of a module's file: this package's, that of the folder or repository the model is from, or a loaded one."""
    if (BESIDE / f"{module}.py").is_file():
        return str(BESIDE / f"{module}.py")
    try:
        path = cached_file(
            config.name_or_path, f"{module}.py", revision=REVISION, _raise_exceptions_for_missing_entries=False
        )
    except OSError:  # a folder that is gone, a repository that cannot be reached
        path = None
    loaded = (found.__file__ for name, found in list(sys.modules.items()) if name.endswith(f".{module}"))
    return path or next(loaded, None)


def register_pipeline(config: PreTrainedConfig) -> None:
    """
    Let `pipeline("audio-to-audio", model=model, processor=processor)` know the task: for a model of this package by the
    package's pipeline, for one that brought its own code, which was allowed to run, by the one it brought.

    Args:
        config (`PreTrainedConfig`): the model's configuration.
    """
    if TASK in PIPELINE_REGISTRY.supported_tasks:
        return
    implementation: Any = f"{BESIDE.name}.{MODULE}.{CLASS}"  # resolved when it is used
    if not BESIDE.is_dir():
        named = getattr(config, "custom_pipelines", None) or {}
        try:
            implementation = get_class_from_dynamic_module(named[TASK]["impl"], config.name_or_path, revision=REVISION)
        except (KeyError, OSError, ImportError):  # a folder without pipeline holds a model all the same
            return
    PIPELINE_REGISTRY.supported_tasks[TASK] = {"impl": implementation, "pt": (AutoModel,), "type": "multimodal"}


__all__ = ["register_pipeline", "save_pipeline_code"]
