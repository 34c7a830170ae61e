"""Every command in the READMEs of the training examples has a script that takes its options."""

import importlib
import json
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import soundfile
from builders import tone, write_wav
from test_init_from_llm import save_llm
from test_other_audio_tokenizers import build as build_codec_of
from transformers import HfArgumentParser, Qwen2Config

from pipelines import ttt_talk
from processing import TttProcessor

ROOT = Path(__file__).parent.parent
README = ROOT / "training_examples" / "README.md"
PAGES = sorted(README.parent.rglob("*.md"))
# Commands are printed instead of run.
STUBS = """
python() { printf "%q " "$@"; echo; }
torchrun() { printf "%q " "$@"; echo; }
accelerate() { printf "%q " "$@"; echo; }
pip() { :; }
ttt-talk() { :; }
apt-get() { :; }
git() { :; }
"""


def commands():
    """
    Words of every command that starts a script, as bash reads them. A restricted shell that finds no program can
    neither run nor write anything, whatever the README says.
    """
    text = "".join(path.read_text(encoding="utf-8") for path in PAGES)
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


def test_the_four_commands_end_in_talking(tmp_path, monkeypatch, capsys):
    """The README's own, one after the other, on a language model, an audio tokenizer and recordings that are small."""
    save_llm(tmp_path / "Qwen" / "Qwen2.5-1.5B", Qwen2Config, max_position_embeddings=2048)
    build_codec_of("mimi").save_pretrained(tmp_path / "kyutai" / "mimi")
    for name, seconds in (("question", 0.6), ("a", 0.5), ("b", 0.7)):
        write_wav(tmp_path / f"{name}.wav", tone(seconds))
    records = [{"question": f"{name}.wav", "answer": "hi", "answer_audio": f"{name}.wav"} for name in "ab"]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    monkeypatch.chdir(tmp_path)

    block = re.search(r"```bash\n(# 1\..*?)```", README.read_text(encoding="utf-8"), re.DOTALL).group(1)
    lines = [line for line in block.replace("\\\n", "").splitlines() if line and not line.startswith("#")]
    assert len(lines) == 4
    for line in lines[:3]:
        _, script, *options = shlex.split(line)
        if script.endswith("train_ttt.py"):
            options += "--max_steps 80 --learning_rate 1e-2 --warmup_steps 5 --per_device_train_batch_size 2".split()
            options += "--clean_batch_probability 0 --save_steps 60 --use_cpu --report_to none".split()
        monkeypatch.setattr(sys, "argv", [script, *options])
        importlib.import_module(script.removesuffix(".py").replace("/", ".")).main()
    (snippet,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8").split("## 4.")[0], re.DOTALL)
    small = textwrap.dedent(snippet).replace("max_steps=1000", "max_steps=1, use_cpu=True, report_to='none'")
    exec(compile(small, "README.md", "exec"), {})
    _, *options = shlex.split(lines[3])
    capsys.readouterr()
    assert TttProcessor.from_pretrained("runs/own/checkpoint-1").audio_tokenizer is not None
    for model in ("runs/ttt", "runs/ttt/checkpoint-60"):
        options[-1] = model
        assert ttt_talk.main([*options, "--device", "cpu", "--max_new_tokens", "40"]) == 0
        assert capsys.readouterr().out.strip() == "hi"
        assert soundfile.info(tmp_path / "reply.wav").duration > 0.1
        (tmp_path / "reply.wav").unlink()
