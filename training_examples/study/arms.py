"""What the study compares: the arms, how each is trained and how each is decoded. All else is the same for all."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Setting = Mapping[str, Any]

# The paper's probabilities, and what the published code does where it says nothing. Every option that shapes the
# objective is named, so that no arm takes one over from the model that it starts from.
PUBLISHED: Mapping[str, Any] = {
    "audio_objective": "diffusion",
    "text_objective": "autoregressive",
    "clean_batch_probability": 0.3,
    "prefix_preservation_probability": 0.3,
    "prefix_preservation_unit": "span",
    "span_truncation_probability": 0.5,
    "span_attention": "bidirectional",
    "block_masking_probability": 0.0,
    "block_lengths": (26,),
    "block_filling_weight": 0.2,
    "full_block_probability": 0.0,
    "noise_epsilon": 0.001,
    "stratified_noise": True,  # the published λ of each sample, spread evenly over a batch: less variance for all arms
}
# No code is masked, so that no strategy has a part.
AUTOREGRESSIVE: Mapping[str, Any] = {
    **PUBLISHED,
    "audio_objective": "autoregressive",
    "clean_batch_probability": 0.0,
    "prefix_preservation_probability": 0.0,
    "span_truncation_probability": 0.0,
}
# Blocks as sampling shows them: the prefix is clean and nothing follows, so that PPM and SST have no part. Three in ten
# batches stay clean, as published: only there is text scored that comes after the block.
BLOCK_ALIGNED: Mapping[str, Any] = {
    **PUBLISHED,
    "prefix_preservation_probability": 0.0,
    "span_truncation_probability": 0.0,
    "block_masking_probability": 1.0,
    "block_lengths": (8, 13, 26),
    "full_block_probability": 0.3,
    "noise_epsilon": 0.05,
}
# All blocks in one pass. Text always sees clean spans here, which is what clean batches are for.
BLOCK_CAUSAL: Mapping[str, Any] = {
    **BLOCK_ALIGNED,
    "clean_batch_probability": 0.0,
    "block_masking_probability": 0.0,
    "span_attention": "block_causal",
}


def in_blocks(*settings: tuple[int, int]) -> tuple[Setting, ...]:
    """Return settings of `generate` for codes a block and denoising steps a block."""
    return tuple({"audio_block_size": size, "audio_steps_per_block": steps} for size, steps in settings)


# Codes from left to right, in a step as many as are all right with this probability.
FROM_THE_LEFT: Setting = {"audio_block_size": 26, "audio_prefix_probability": 0.4}


def setting_name(setting: Setting) -> str:
    """
    Return what a setting is called in files and tables: `26:4` for blocks of 26 codes in 4 steps, `26:p0.4` for such
    with a prefix probability of 0.4.
    """
    if not setting:
        return "default"
    if probability := setting.get("audio_prefix_probability"):
        return f"{setting['audio_block_size']}:p{probability}"
    return f"{setting['audio_block_size']}:{setting['audio_steps_per_block']}"


@dataclass(frozen=True)
class Arm:
    """
    One way to train.

    Args:
        title (`str`): in tables.
        options (`Mapping`): options of train_ttt.py.
        settings (`tuple` of `Mapping`): options of `generate`. At the first, that of the paper, and the last, which
            writes one code a forward as the autoregressive arm does, every list is answered; at those between, texts
            are read aloud, and `FROM_THE_LEFT` spoken questions are answered aloud, too.
        distilled (`bool`): whether the second half of the steps goes over answers of the model of the first half.
    """

    title: str
    options: Mapping[str, Any]
    settings: tuple[Setting, ...] = (
        *in_blocks((26, 2), (26, 4), (26, 8), (8, 8)),
        FROM_THE_LEFT,
        *in_blocks((26, 26)),
    )
    distilled: bool = False

    @property
    def ends(self) -> tuple[str, str]:
        """The names of the first and of the last setting."""
        return setting_name(self.settings[0]), setting_name(self.settings[-1])


ARMS: dict[str, Arm] = {
    "ar": Arm("pure autoregressive", AUTOREGRESSIVE, ({},)),
    # Text has no objective of its own here, so that BANOM has no part, nor PPM where an answer is one turn; SST has.
    "nar": Arm(
        "pure diffusion, text too",
        {**PUBLISHED, "text_objective": "diffusion", "clean_batch_probability": 0.0},
        in_blocks((26, 2), (26, 8), (26, 26)),
    ),
    "ttt": Arm("TtT as published", PUBLISHED),
    "ttt_without_banom": Arm("TtT without BANOM", {**PUBLISHED, "clean_batch_probability": 0.0}),
    "ttt_without_ppm": Arm("TtT without PPM", {**PUBLISHED, "prefix_preservation_probability": 0.0}),
    "ttt_without_sst": Arm("TtT without SST", {**PUBLISHED, "span_truncation_probability": 0.0}),
    "block_aligned": Arm("TtT, block-aligned masking", BLOCK_ALIGNED),
    "block_causal": Arm("TtT, block-causal spans", BLOCK_CAUSAL),
    "distilled": Arm("TtT, block-causal, self-distilled", BLOCK_CAUSAL, distilled=True),
}
REFERENCE = "ttt"  # what the others' differences are from


def training_flags(options: Mapping[str, Any]) -> list[str]:
    """Return options of train_ttt.py as words of its command line."""
    words: list[str] = []
    for name, value in options.items():
        values = value if isinstance(value, tuple | list) else (value,)
        words += [f"--{name}", *map(str, values)]
    return words
