"""What the study compares: the arms, how each is trained and how each is decoded. All else is the same for all."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

# The paper's probabilities, and what the published code does where it says nothing.
PUBLISHED: Mapping[str, Any] = {
    "audio_objective": "diffusion",
    "text_objective": "autoregressive",
    "clean_batch_probability": 0.3,
    "prefix_preservation_probability": 0.3,
    "prefix_preservation_unit": "span",
    "span_truncation_probability": 0.5,
    "noise_epsilon": 0.001,
}
# Blocks as sampling shows them. Their prefix is clean and nothing follows them, so that neither PPM nor SST has a part.
BLOCKS: Mapping[str, Any] = {
    **PUBLISHED,
    "clean_batch_probability": 0.0,
    "prefix_preservation_probability": 0.0,
    "span_truncation_probability": 0.0,
    "noise_epsilon": 0.05,
    "block_masking_probability": 1.0,
    "block_lengths": (8, 13, 26),
}
BLOCK_CAUSAL: Mapping[str, Any] = {
    **BLOCKS,
    "block_masking_probability": 0.0,
    "span_attention": "block_causal",
    "full_block_probability": 0.3,
}
# Codes a block and denoising steps a block; the published setting first.
DIFFUSION_SETTINGS: tuple[Mapping[str, Any], ...] = tuple(
    {"audio_block_size": size, "audio_steps_per_block": steps}
    for size, steps in ((26, 2), (26, 4), (26, 8), (26, 26), (13, 4), (4, 4))
)


@dataclass(frozen=True)
class Arm:
    """
    One way to train.

    Args:
        title (`str`): in tables.
        options (`Mapping`): options of train_ttt.py.
        settings (`tuple` of `Mapping`): options of `generate`, each measured; the arm's figure is that of the first.
        distilled (`bool`): whether the second half of the steps goes over answers of the model of the first half.
    """

    title: str
    options: Mapping[str, Any]
    settings: tuple[Mapping[str, Any], ...] = field(default=DIFFUSION_SETTINGS)
    distilled: bool = False


ARMS: dict[str, Arm] = {
    "ar": Arm("pure autoregressive", {"audio_objective": "autoregressive"}, ({},)),
    "nar": Arm(
        "pure diffusion, text too",
        {**PUBLISHED, "text_objective": "diffusion"},
        tuple(
            {"audio_block_size": size, "audio_steps_per_block": steps} for size, steps in ((26, 2), (26, 8), (26, 26))
        ),
    ),
    "ttt": Arm("TtT as published", PUBLISHED),
    "ttt_without_banom": Arm("TtT without BANOM", {**PUBLISHED, "clean_batch_probability": 0.0}),
    "ttt_without_ppm": Arm("TtT without PPM", {**PUBLISHED, "prefix_preservation_probability": 0.0}),
    "ttt_without_sst": Arm("TtT without SST", {**PUBLISHED, "span_truncation_probability": 0.0}),
    "block_aligned": Arm("TtT, block-aligned masking", BLOCKS),
    "block_causal": Arm("TtT, block-causal spans", BLOCK_CAUSAL),
    "distilled": Arm("TtT, block-causal spans and self-distillation", BLOCK_CAUSAL, distilled=True),
}


def training_flags(options: Mapping[str, Any]) -> list[str]:
    """Return options of train_ttt.py as words of its command line."""
    words: list[str] = []
    for name, value in options.items():
        values = value if isinstance(value, tuple | list) else (value,)
        words += [f"--{name}", *map(str, values)]
    return words
