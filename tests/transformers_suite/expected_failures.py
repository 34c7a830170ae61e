"""Tests that cannot pass, by name and with the reason. They must fail: one that passes, or is gone, is reported. A test
whose subtests fail counts as passed to pytest, so such a one is overridden where it stands, not listed here."""

from dataclasses import dataclass

CODECS = ("TttCodecTest", "Glm4VoiceTest")


@dataclass
class ExpectedFailures:
    """Tests that fail in each of some classes, for one reason."""

    reason: str
    classes: tuple[str, ...]
    tests: tuple[str, ...]

    def names(self) -> list[str]:
        """As pytest names them, without the file."""
        return [f"{name}::{test}" for name in self.classes for test in self.tests]


EXPECTED_FAILURES = (
    ExpectedFailures(
        "A codec has no hidden states to return, as DAC and Mimi have none.",
        CODECS,
        ("test_hidden_states_output", "test_retain_grad_hidden_states_attentions"),
    ),
    ExpectedFailures(
        "A codec has no token embeddings.",
        CODECS,
        ("test_model_get_set_embeddings",),
    ),
    ExpectedFailures(
        "Tied weights under FSDP2 deviate by a thousandth on CPUs, those of Transformers' own Qwen3 too.",
        ("TwinTest",),
        ("test_fsdp2_plan_vs_ddp_1_tied",),
    ),
)
