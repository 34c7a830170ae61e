"""Every command in the README of the training examples has a script that takes its options."""

import importlib
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import HfArgumentParser

README = Path(__file__).parent.parent / "training_examples" / "README.md"
# Commands are printed instead of run; a command whose output is needed answers with a word.
STUBS = """
python() { if [ "$1" = -c ]; then echo word; else printf "%q " "$@"; echo; fi; }
torchrun() { printf "%q " "$@"; echo; }
accelerate() { printf "%q " "$@"; echo; }
pip() { :; }
apt-get() { :; }
sed() { :; }
"""


def commands():
    """
    Words of every command that starts a script, as bash reads them. A restricted shell that finds no program can
    neither run nor write anything, whatever the README says.
    """
    for block in re.findall(r"```bash\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL):
        shell = [shutil.which("bash") or "bash", "-r", "-euc", STUBS + block]
        done = subprocess.run(shell, env={"PATH": ""}, capture_output=True, text=True, check=True)
        yield from map(shlex.split, done.stdout.splitlines())


class ParsedError(Exception):
    """Raised when the command line has been read, so that nothing is run."""


@pytest.mark.parametrize("command", list(commands()), ids=" ".join)
def test_a_script_takes_the_options_of_its_command(command, monkeypatch):
    index = next(index for index, word in enumerate(command) if word.endswith(".py"))
    script = README.parent.parent / command[index]
    assert script.is_file()
    if "--config_file" in command:
        assert (README.parent.parent / command[command.index("--config_file") + 1]).is_file()
    parse = HfArgumentParser.parse_known_args

    def stop(self, args=None, namespace=None):
        _, unknown = parse(self, args, namespace)
        assert not unknown
        raise ParsedError

    monkeypatch.setattr(HfArgumentParser, "parse_known_args", stop)
    monkeypatch.setattr(sys, "argv", command[index:])
    with pytest.raises(ParsedError):
        importlib.import_module(".".join(Path(command[index]).with_suffix("").parts)).main()
