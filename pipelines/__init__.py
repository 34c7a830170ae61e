"""The pipeline and the command line. Importing this package registers the task "audio-to-audio" with Transformers."""

import sys
from pathlib import Path
from typing import Any

__all__ = ["TttAudioToAudioPipeline", "save_repository"]


def _register() -> None:
    from transformers import AutoModel
    from transformers.pipelines import PIPELINE_REGISTRY

    import modeling_ttt  # noqa: F401  (registers the auto classes)
    import processing  # noqa: F401

    from .pipeline_ttt import TttAudioToAudioPipeline

    if "audio-to-audio" not in PIPELINE_REGISTRY.supported_tasks:
        PIPELINE_REGISTRY.register_pipeline(
            "audio-to-audio", pipeline_class=TttAudioToAudioPipeline, pt_model=AutoModel, type="multimodal"
        )


def __getattr__(name: str) -> Any:
    if name in __all__:
        from . import pipeline_ttt

        return getattr(pipeline_ttt, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


# The commands read their arguments first, so that --help does not wait for PyTorch; they need no registration.
if Path(sys.argv[0]).stem not in ("ttt-talk", "ttt-serve"):
    _register()
