"""What the documentation names exists: links, files of the repository, commands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from support.commands import REPOSITORY
from tercet.cli.main import main
from tercet.storage.layout import PATTERNS

PAGES = [REPOSITORY / "README.md", REPOSITORY / "docker/README.md", *sorted((REPOSITORY / "docs").rglob("*.md"))]
LINK = re.compile(r"\]\(([^)\s#]+)[^)]*\)")
FILE = re.compile(
    r"(?<![\w/.-])(?:src|tests|benchmarks|docs|ray_jobs|docker)/[\w/-]+(?:\.(?:py|md|yaml|json))?(?![\w*<])"
)
COMMAND = re.compile(r"^(?:[$\w. /-]* )?tercet ([a-z]+)", re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    targets = [target for target in LINK.findall(page.read_text(encoding="utf-8")) if "://" not in target]
    assert [target for target in targets if not (page.parent / target).exists()] == []


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "log.md"], ids=lambda page: page.name)
def test_files_that_are_named_exist(page: Path) -> None:
    """The log is a history: what it names may be gone."""
    names = FILE.findall(page.read_text(encoding="utf-8"))
    assert [name for name in names if not (REPOSITORY / name).exists()] == []


def test_commands_exist(capsys: pytest.CaptureFixture[str]) -> None:
    blocks = [
        block
        for page in PAGES
        for block in re.findall(r"```(?:bash|crontab)\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    ]
    verbs = {verb for block in blocks for verb in COMMAND.findall(block)}
    assert {"shard", "plan", "train", "submit", "nightly"} <= verbs
    for verb in sorted(verbs):
        with pytest.raises(SystemExit) as ended:
            main([verb, "--help"])
        assert ended.value.code == 0, verb
    capsys.readouterr()


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z]+):", (REPOSITORY / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    named = set(
        re.findall(r"(?:^|`)make ([a-z]+)", (REPOSITORY / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    )
    assert {"demo", "test"} <= named <= targets


def test_the_page_about_storage_has_every_key_and_no_other() -> None:
    page = (REPOSITORY / "docs/storage.md").read_text(encoding="utf-8")
    described = re.findall(r"^\| `([^`]+)` \|", page, re.MULTILINE)
    assert sorted(described) == sorted(pattern for pattern, _ in PATTERNS)
