"""Fetches Transformers' own test mixins: the source archive of the installed version from the package index, checked,
and of it the few files that this suite builds on. `python tests/transformers_suite/fetch.py --help` says where to."""

import argparse
import hashlib
import importlib.metadata
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

CACHE_VARIABLE = "TTT_TRANSFORMERS_SUITE"
# SHA-256 of the source archive (`transformers-VERSION.tar.gz`) of each version that the suite was adapted to.
CHECKSUMS = {"5.23.0": "19d647a4d5d903a7c644ca5cde2d86efc3dde7d8c687ae7988806ff2205efa71"}
FILES = (
    "test_configuration_common",
    "test_fsdp_mixin",
    "test_modeling_common",
    "test_pipeline_mixin",
    "test_processing_common",
    "test_tensor_parallel_mixin",
    "test_training_mixin",
)
PACKAGE = "transformers_tests"  # the name under which the unpacked files are imported


def installed_version() -> str:
    """Version of the installed Transformers, without importing it."""
    return importlib.metadata.version("transformers")


def cache_folder() -> Path:
    """Where archive and unpacked files lie: $TTT_TRANSFORMERS_SUITE, or a folder of the user's cache."""
    chosen = os.environ.get(CACHE_VARIABLE)
    if chosen:
        return Path(chosen).expanduser()
    user_cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return user_cache / "text-to-talk-transformers" / "transformers_suite"


def unpacked_folder() -> Path:
    """The folder to import `transformers_tests` from: one per version of Transformers."""
    return cache_folder() / f"transformers-{installed_version()}"


def is_fetched() -> bool:
    """Whether every file is there. Files appear whole (renamed in place), so one that is there is complete."""
    return all((unpacked_folder() / PACKAGE / f"{name}.py").is_file() for name in FILES)


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def download(version: str, checksum: str, folder: Path) -> Path:
    """
    Return the checked archive in `folder`, downloaded by pip unless it is there.

    Raises:
        SystemExit: if pip fails.
    """
    archive = folder / f"transformers-{version}.tar.gz"
    if archive.is_file() and sha256(archive) == checksum:
        return archive
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        # pip compares the checksum before it runs anything of the archive, which it does for the metadata.
        requirement = Path(temporary, "requirement.txt")
        requirement.write_text(f"transformers=={version} --hash=sha256:{checksum}\n")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "transformers"]
        done = subprocess.run([*command, "--dest", temporary, "--requirement", requirement])
        if done.returncode != 0:
            raise SystemExit(f"fetch.py: pip could not download the source archive of transformers {version} (above).")
        os.replace(Path(temporary, archive.name), archive)
    return archive


def unpack(archive: Path, version: str, folder: Path) -> None:
    """
    Write FILES of the archive into `folder`. Members are read by their exact names and written under ours, so that no
    path in the archive is followed.

    Raises:
        SystemExit: if a file is missing in the archive.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive) as tar:
        for name in FILES:
            member = f"transformers-{version}/tests/{name}.py"
            try:
                source = tar.extractfile(member)
            except KeyError:
                source = None
            if source is None:
                raise SystemExit(f"fetch.py: {archive} has no file {member}.")
            partial = folder / f"{name}.partial"
            partial.write_bytes(source.read())
            os.replace(partial, folder / f"{name}.py")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=f"Files go to {cache_folder()}; the environment's {CACHE_VARIABLE} changes that."
    )
    parser.add_argument("--archive", type=Path, help="take this archive instead of asking the package index")
    archive = parser.parse_args().archive
    version = installed_version()
    if version not in CHECKSUMS:
        raise SystemExit(
            f"fetch.py: transformers {version} is installed, but the suite is adapted to {', '.join(CHECKSUMS)}: "
            'install that (pip install -c constraints.txt -e ".[test]"), or add the checksum of its archive here.'
        )
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    if archive is None:
        archive = download(version, CHECKSUMS[version], folder)
    elif not archive.is_file():
        raise SystemExit(f"fetch.py: there is no file {archive}.")
    elif sha256(archive) != CHECKSUMS[version]:
        raise SystemExit(f"fetch.py: {archive} is not the archive of transformers {version}: {sha256(archive)}.")
    unpack(archive, version, unpacked_folder() / PACKAGE)
    print(f"{len(FILES)} files of transformers {version} in {unpacked_folder()}: pytest tests/transformers_suite")


if __name__ == "__main__":
    main()
