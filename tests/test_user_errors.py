"""The scripts end with one line where their user has made a mistake."""

import runpy
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
def test_a_script_shows_the_traceback_on_request_alone(traceback, tmp_path, monkeypatch, capsys):
    script = SCRIPTS / "prepare_dataset.py"
    monkeypatch.setattr(sys, "argv", [str(script), "--model", "x", "--output_dir", str(tmp_path)])
    monkeypatch.setenv("TTT_TRACEBACK", traceback)
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(script), run_name="__main__")
    assert stop.value.code == "prepare_dataset.py: error: Give either `--source` or `--data_config`."
    said = capsys.readouterr().err
    assert "Traceback (most recent call last):" in said if traceback == "1" else said == ""
