"""When the suite runs, and which of its tests are expected to fail."""

from pathlib import Path

import pytest

from .expected_failures import EXPECTED_FAILURES
from .fetch import is_fetched

NOT_ASKED_FOR = (
    "Transformers' own tests are run when asked for: "
    "python tests/transformers_suite/fetch.py && pytest tests/transformers_suite"
)
collect_ignore = ["stand_ins"]
TRANSFORMERS_MARKS = (
    "accelerate_tests",
    "flash_attn_test",
    "flash_attn_3_test",
    "flash_attn_4_test",
    "generate",
    "is_fsdp_test",
    "is_pipeline_test",
    "is_tensor_parallel_test",
    "is_training_test",
    "order",
    "torch_compile_test",
    "torch_export_test",
)


class NotAskedFor(pytest.Module):
    """A test file that is skipped unread."""

    def collect(self):
        pytest.skip(NOT_ASKED_FOR, allow_module_level=True)


def is_asked_for(config: pytest.Config) -> bool:
    """Whether the command names this folder or something in it."""
    return any(path.is_relative_to(Path(__file__).parent) for path in asked_paths(config))


def asked_paths(config: pytest.Config) -> list[Path]:
    return [(config.invocation_params.dir / argument.split("::")[0]).resolve() for argument in config.args]


def pytest_configure(config: pytest.Config) -> None:
    if is_asked_for(config) and not is_fetched():
        raise pytest.UsageError("Transformers' own tests are not here yet: python tests/transformers_suite/fetch.py")
    for mark in TRANSFORMERS_MARKS:
        config.addinivalue_line("markers", f"{mark}: a mark of Transformers' own tests")


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    return None if is_asked_for(parent.config) else NotAskedFor.from_parent(parent, path=module_path)


@pytest.hookimpl(tryfirst=True)  # before -k takes tests away
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark the expected failures; refuse a name among them that no test has."""
    here = Path(__file__).parent
    tests = {item.nodeid.split("::", 1)[1]: item for item in items if item.path.parent == here}
    for expected in EXPECTED_FAILURES:
        for name in expected.names():
            if name in tests:
                tests[name].add_marker(pytest.mark.xfail(strict=True, reason=expected.reason))
            elif here in asked_paths(config):
                raise pytest.UsageError(f"expected_failures.py names {name}, which is no test of the suite.")
