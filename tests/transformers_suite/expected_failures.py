"""Tests of the suite that cannot pass, by name and with the reason. They must fail: one that passes is reported."""

from dataclasses import dataclass


@dataclass
class Expected:
    """Tests that fail in each of some classes, for one reason."""

    reason: str
    classes: tuple[str, ...]
    tests: tuple[str, ...]

    def names(self) -> list[str]:
        """As pytest names them, without the file."""
        return [f"{name}::{test}" for name in self.classes for test in self.tests]


EXPECTED_FAILURES: tuple[Expected, ...] = ()
