"""Every command in the READMEs of the training examples has a script that takes its options."""

import importlib
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import HfArgumentParser

ROOT = Path(__file__).parent.parent
READMES = [ROOT / "training_examples" / "README.md", ROOT / "training_examples" / "ttt_tiny" / "README.md"]
# Commands are printed instead of run.
STUBS = """
python() { printf "%q " "$@"; echo; }
torchrun() { printf "%q " "$@"; echo; }
accelerate() { printf "%q " "$@"; echo; }
pip() { :; }
apt-get() { :; }
"""


def commands():
    """
    Words of every command that starts a script, as bash reads them. A restricted shell that finds no program can
    neither run nor write anything, whatever the README says.
    """
    text = "".join(path.read_text(encoding="utf-8") for path in READMES)
    for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL):
        shell = [shutil.which("bash") or "bash", "-r", "-euc", STUBS + block]
        done = subprocess.run(shell, env={"PATH": ""}, capture_output=True, text=True, check=True)
        yield from map(shlex.split, done.stdout.splitlines())


class ParsedError(Exception):
    """Raised when the command line has been read, so that nothing is run."""


@pytest.mark.parametrize("command", list(commands()), ids=" ".join)
def test_a_script_takes_the_options_of_its_command(command, monkeypatch):
    index = next(index for index, word in enumerate(command) if word.endswith(".py"))
    script = ROOT / command[index]
    assert script.is_file()
    if "--config_file" in command:
        assert (ROOT / command[command.index("--config_file") + 1]).is_file()
    parse = HfArgumentParser.parse_known_args

    def stop(self, args=None, namespace=None):
        _, unknown = parse(self, args, namespace)
        assert not unknown
        raise ParsedError

    monkeypatch.setattr(HfArgumentParser, "parse_known_args", stop)
    monkeypatch.setattr(sys, "argv", command[index:])
    with pytest.raises(ParsedError):
        importlib.import_module(".".join(Path(command[index]).with_suffix("").parts)).main()
