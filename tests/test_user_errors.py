"""The scripts end with one line where their user has made a mistake."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from datasets.exceptions import DatasetGenerationError

from training_examples import user_errors
from training_examples.user_errors import run_command

SCRIPTS = Path(user_errors.__file__).parent


def raise_(error):
    raise error


def test_a_mistake_of_the_user_ends_in_one_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["/some/where/script.py"])
    generation = DatasetGenerationError("An error occurred while generating the dataset")
    generation.__cause__ = ValueError("line 3 is no JSON")
    for error, line in (
        (ValueError("`--x` is 0;\nit must be above 0."), "`--x` is 0; it must be above 0."),
        (FileNotFoundError(2, "No such file or directory", "a.wav"), "[Errno 2] No such file or directory: 'a.wav'"),
        (generation, "An error occurred while generating the dataset (line 3 is no JSON)"),
        (ImportError(""), "ImportError"),
    ):
        with pytest.raises(SystemExit) as stop:
            run_command(lambda error=error: raise_(error))
        assert stop.value.code == f"script.py: error: {line}"
    with pytest.raises(SystemExit) as stop:
        run_command(lambda: raise_(KeyboardInterrupt()))
    assert stop.value.code == 130 and capsys.readouterr().err == "script.py: interrupted\n"
    run_command(lambda: None)


def test_a_fault_of_the_code_keeps_its_traceback():
    with pytest.raises(KeyError):
        run_command(lambda: raise_(KeyError("x")))


@pytest.mark.parametrize("traceback", ["0", "1"])
def test_a_script_shows_the_traceback_on_request_alone(traceback, tmp_path):
    done = subprocess.run(
        [sys.executable, str(SCRIPTS / "prepare_dataset.py"), "--model", "x", "--output_dir", str(tmp_path)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "TTT_TRACEBACK": traceback},
    )
    lines = done.stderr.splitlines()
    assert done.returncode == 1
    assert lines[-1] == "prepare_dataset.py: error: Give either `--source` or `--data_config`."
    assert (len(lines) > 1) == ("Traceback (most recent call last):" in lines) == (traceback == "1")
