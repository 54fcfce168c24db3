"""Every code block of README.md, CONTRIBUTING.md and docs/ runs, in order, as a reader would run it.

A page's ```python blocks share one namespace and one empty working folder. Of a ```bash block every line has to be a
`mechreward` command or a comment; of a ```console block the lines after `$ ` do. The first command of all is a process
that bash starts, and so is every line that asks bash for more than to start it; the others run in the test's own
process. A block that cannot run here says so on the line before it, `<!-- not run: reason -->`, and its reason is
asserted.
"""

from __future__ import annotations

import doctest
import importlib
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from mechreward.cli import main

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
LANGUAGES = ("python", "bash", "console")
SHOWN = ("", "text", "json", "yaml", "toml", "html")
"""Languages of blocks that only show something; "" is a fence without a language."""
FENCE = re.compile(
    r"^(?:<!--(?P<comment>.*?)-->\n+)?(?P<tick>`{3,})(?P<language>\w*)[^\n]*\n(?P<body>.*?)^(?P=tick)\s*$",
    re.MULTILINE | re.DOTALL,
)
NOT_RUN = re.compile(r"\s*not run:\s*(?P<reason>\S.*?)\s*", re.DOTALL)
TIMEOUT_SECONDS = 240
SHELL = re.compile(r"[|&;<>$`*?~]")
"""What a line asks bash for, beside its words."""


@dataclass(frozen=True)
class Block:
    """One fenced block; `line` is that of its first line of code, `reason` why it is not run, if so."""

    page: str
    line: int
    language: str
    body: str
    reason: str | None = None

    def __str__(self) -> str:
        return f"{self.page}:{self.line}:{self.language}"


def read_blocks(page: str, text: str) -> list[Block]:
    return [read_block(page, text, fence) for fence in FENCE.finditer(text)]


def read_block(page: str, text: str, fence: re.Match[str]) -> Block:
    reason = NOT_RUN.fullmatch(fence["comment"] or "")
    line = text.count("\n", 0, fence.start("body")) + 1
    return Block(page, line, fence["language"], fence["body"], reason["reason"] if reason else None)


def command_lines(block: Block) -> list[str]:
    """The commands of a shell block; a line that ends in a backslash goes on in the next."""
    lines = block.body.replace("\\\n", " ").splitlines()
    if block.language == "console":
        return [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
    return [line for line in lines if line.strip() and not line.lstrip().startswith("#")]


@dataclass
class Page:
    """Runs a page's blocks in order, each once; asking for one runs those before it that have not run."""

    blocks: list[Block]
    folder: Path
    namespace: dict[str, Any] = field(default_factory=lambda: {"__name__": "__docs__"})
    done: int = 0
    started: list[str] = field(default_factory=list)
    """Commands that were processes of their own, of all pages."""

    def run_up_to(self, block: Block) -> None:
        while block not in self.blocks[: self.done]:
            current = self.blocks[self.done]
            self.done += 1
            self.run(current)

    def run(self, block: Block) -> None:
        if block.language == "python":
            # Padded, so that a traceback names the page's own line.
            code = compile("\n" * (block.line - 1) + block.body, str(ROOT / block.page), "exec", dont_inherit=True)
            exec(code, self.namespace)
            return
        for line in command_lines(block):
            if self.started and not SHELL.search(line):
                run_here(line)
            else:
                start_command(line, self.folder)
                self.started.append(line)


def run_here(line: str) -> None:
    """What `mechreward` does with the line's arguments, in the folder that the test is in."""
    with pytest.raises(SystemExit) as end:
        main(shlex.split(line, comments=True)[1:])
    assert end.value.code == 0, line


def start_command(line: str, folder: Path) -> None:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    result = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", line],
        cwd=folder,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
    )
    assert result.returncode == 0, f"{line}\n{result.stdout[-2000:]}\n{result.stderr[-2000:]}"


BLOCKS = [
    block
    for page in PAGES
    for block in read_blocks(page.relative_to(ROOT).as_posix(), page.read_text(encoding="utf-8"))
]
RUNNABLE = [block for block in BLOCKS if block.language in LANGUAGES and block.reason is None]


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Page]:
    started: list[str] = []
    return {
        name: Page([b for b in RUNNABLE if b.page == name], tmp_path_factory.mktemp("page"), started=started)
        for name in {block.page for block in RUNNABLE}
    }


@pytest.fixture
def page(request: pytest.FixtureRequest, pages: dict[str, Page], monkeypatch: pytest.MonkeyPatch) -> Iterator[Page]:
    found = pages[request.node.callspec.params["block"].page]
    monkeypatch.chdir(found.folder)
    yield found


@pytest.mark.parametrize("block", RUNNABLE, ids=str)
def test_block_runs(block: Block, page: Page) -> None:
    page.run_up_to(block)


@pytest.mark.parametrize("block", [block for block in RUNNABLE if block.language != "python"], ids=str)
def test_shell_block_holds_only_what_is_run(block: Block) -> None:
    commands = command_lines(block)
    assert commands, f"{block} has no command; write `<!-- not run: reason -->` before it"
    assert [line for line in commands if not line.startswith("mechreward ")] == []


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_block_is_of_a_known_language(block: Block) -> None:
    assert block.language in LANGUAGES + SHOWN


def test_readme_has_code_that_runs() -> None:
    assert [block for block in RUNNABLE if block.page == "README.md" and block.language == "python"]


def test_skipped_blocks_have_a_reason() -> None:
    skipped = [block for block in BLOCKS if block.reason is not None]
    assert all(len(block.reason.split()) >= 3 for block in skipped)
    comments = [text for page in PAGES for text in re.findall(r"^<!--(.*?)-->", page.read_text(), re.DOTALL | re.M)]
    # A comment that means to skip and is misspelt, or stands where no block follows, skips nothing.
    assert sum("not run" in comment.lower() for comment in comments) == len(skipped)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\((?!https?:|#|mailto:)([^)#\s]+)", page.read_text())
    assert [target for target in targets if not (page.parent / target).exists()] == []


def test_paper_index_names_what_exists() -> None:
    table = (ROOT / "paper_index.md").read_text()
    names = re.findall(r"`([a-z_]+/[\w/]+(?:\.py)?)(?:: \w+)?`", table)
    assert len(names) >= 20
    assert [name for name in names if not any((top / name).exists() for top in (ROOT, ROOT / "src/mechreward"))] == []


MODULES_WITH_EXAMPLES = sorted(
    ".".join(path.relative_to(ROOT / "src").with_suffix("").parts).removesuffix(".__init__")
    for path in (ROOT / "src").rglob("*.py")
    if re.search(r">>> (?!.*doctest: \+SKIP)", path.read_text())
)


@pytest.mark.parametrize("name", MODULES_WITH_EXAMPLES)
def test_docstring_examples_run(name: str) -> None:
    result = doctest.testmod(importlib.import_module(name))
    assert result.attempted > 0
    assert result.failed == 0


SAMPLE = """# Title
```python
a = 1
```
<!-- not run: needs a GPU -->
```bash
nvidia-smi
```
```console
$ mechreward info \\
    --json
{"a": 1}
```
````text
```python
inner
```
````
"""


def test_reader_finds_every_block() -> None:
    blocks = read_blocks("page.md", SAMPLE)
    assert [(block.language, block.line, block.reason) for block in blocks] == [
        ("python", 3, None),
        ("bash", 7, "needs a GPU"),
        ("console", 10, None),
        ("text", 15, None),
    ]
    assert blocks[0].body == "a = 1\n"
    assert command_lines(blocks[2]) == ["mechreward info      --json"]


def test_runner_shares_a_namespace_and_runs_each_block_once(tmp_path: Path) -> None:
    bodies = ["runs = []", "runs.append(1)", "runs.append(2)"]
    blocks = [Block("page.md", i + 1, "python", body) for i, body in enumerate(bodies)]
    page = Page(blocks, tmp_path)
    page.run_up_to(blocks[2])
    page.run_up_to(blocks[1])
    assert page.namespace["runs"] == [1, 2]


@pytest.mark.parametrize("started", [[], ["mechreward --version"]])
def test_runner_reports_a_failing_command(tmp_path: Path, started: list[str]) -> None:
    with pytest.raises(AssertionError, match="no-such-verb"):
        Page([], tmp_path, started=started).run(Block("page.md", 1, "bash", "mechreward no-such-verb\n"))


def test_runner_leaves_to_bash_what_is_bash_s(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = Page([], tmp_path)
    page.run(Block("page.md", 1, "bash", "mechreward --version > first.txt\n"))
    page.run(
        Block("page.md", 1, "console", "$ mechreward --version  # said here\n$ mechreward --help | wc -l > rest\n")
    )
    assert capsys.readouterr().out == (tmp_path / "first.txt").read_text()
    assert int((tmp_path / "rest").read_text()) > 5
