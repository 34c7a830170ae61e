"""What surrounds Transformers' own tests: the script that fetches them, and that they run when asked for."""

import hashlib
import io
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from transformers_suite import fetch

VERSION = fetch.installed_version()


def write_archive(path: Path, names: list[str]) -> str:
    """A source archive that holds files of these names. Returns its checksum."""
    with tarfile.open(path, "w:gz") as tar:
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = len(name)
            tar.addfile(member, io.BytesIO(name.encode()))
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs the script on an archive that is at hand, with a cache folder of its own."""
    monkeypatch.setenv(fetch.CACHE_VARIABLE, str(tmp_path / "cache"))

    def run(archive: Path, checksum: str) -> Path:
        monkeypatch.setattr(fetch, "CHECKSUMS", {VERSION: checksum})
        monkeypatch.setattr(sys, "argv", ["fetch.py", "--archive", str(archive)])
        fetch.main()
        return fetch.unpacked_folder() / fetch.PACKAGE

    return run


def test_the_files_asked_for_are_unpacked_and_no_others(run, tmp_path):
    wanted = [f"transformers-{VERSION}/tests/{name}.py" for name in fetch.FILES]
    others = ["../outside.py", "/tmp/outside.py", f"transformers-{VERSION}/tests/../../outside.py"]
    checksum = write_archive(tmp_path / "a.tar.gz", [*others, *wanted, f"transformers-{VERSION}/setup.py"])
    folder = run(tmp_path / "a.tar.gz", checksum)
    assert fetch.is_fetched()
    assert {path.name for path in folder.iterdir()} == {f"{name}.py" for name in fetch.FILES}
    assert not list(tmp_path.rglob("outside.py"))


def test_an_archive_that_is_another_is_refused(run, tmp_path):
    write_archive(tmp_path / "a.tar.gz", ["a"])
    with pytest.raises(SystemExit, match=f"is not the archive of transformers {VERSION}"):
        run(tmp_path / "a.tar.gz", "0" * 64)
    assert not fetch.is_fetched()


def test_an_archive_without_a_file_is_named(run, tmp_path):
    checksum = write_archive(tmp_path / "a.tar.gz", ["a"])
    with pytest.raises(SystemExit, match=f"has no file transformers-{VERSION}/tests/{fetch.FILES[0]}.py"):
        run(tmp_path / "a.tar.gz", checksum)


def test_a_version_that_the_suite_does_not_know_is_refused(monkeypatch):
    monkeypatch.setattr(fetch, "installed_version", lambda: "4.0")
    monkeypatch.setattr(sys, "argv", ["fetch.py"])
    with pytest.raises(SystemExit, match="transformers 4.0 is installed, but the suite is adapted to 5"):
        fetch.main()


def test_the_installed_version_is_known():
    assert VERSION in fetch.CHECKSUMS


def test_an_archive_that_is_there_is_not_downloaded_again(tmp_path, monkeypatch):
    archive = tmp_path / f"transformers-{VERSION}.tar.gz"
    checksum = write_archive(archive, ["a"])
    monkeypatch.setattr(subprocess, "run", None)
    assert fetch.download(VERSION, checksum, tmp_path) == archive


def test_pytest_alone_leaves_the_suite_out_with_one_line():
    command = [sys.executable, "-m", "pytest", "tests", "--ignore-glob=tests/test_*.py", "-p", "no:cacheprovider"]
    command.append("--confcutdir=tests/transformers_suite")  # the other tests' conftest.py imports torch
    done = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if "fetch.py" in line]
    assert len(lines) == 1 and lines[0].endswith(
        "python tests/transformers_suite/fetch.py && pytest tests/transformers_suite"
    )
