"""The rules of the house, read off the source with `ast`, and what a built wheel holds.

Every rule is a small function from a source file to its findings. `test_rule_catches` hands each rule code that breaks
it, and code that does not, so that a rule that has gone blind fails too.
"""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "mechreward"
ROOMS = (
    "models tasks verifiers rollout chains sae probes features reward gates hacking steering training integrations "
    "report config inputs comparison stages repairs views pipeline studies cli __main__"
).split()
FOR_ALL = ("errors", "files", "settings", "recipe", "rundir", "tiny", "catalogs")
"""Modules that every room may import. They are no rooms and import none."""
BUNDLED = ("tiny", "tiny.world", "tiny.language")
"""What of `tiny` is for all. Its other modules are the script that makes it: they use every room, none uses them."""
MAX_FUNCTION_LINES, MAX_MODULE_LINES, MIN_PACKAGE_DOCSTRING_LINES = 80, 350, 3
UNSAFE_MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
MAX_WHEEL_BYTES = 12 * 2**20


@dataclass(frozen=True)
class Source:
    """One parsed module; `name` is dotted and without the leading `mechreward.`."""

    name: str
    text: str
    is_package: bool = False

    @property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    def nodes(self, *kinds: type[ast.AST]) -> Iterator[ast.AST]:
        return (node for node in ast.walk(self.tree) if isinstance(node, kinds))


Rule = Callable[[Source], list[str]]


def read_sources() -> list[Source]:
    return [read_source(path) for path in sorted(SOURCE.rglob("*.py"))]


def read_source(path: Path) -> Source:
    parts = path.relative_to(SOURCE).with_suffix("").parts
    is_package = parts[-1] == "__init__"
    return Source(".".join(parts[:-1] if is_package else parts), path.read_text(), is_package)


def imported_names(source: Source) -> list[str]:
    """Dotted names below `mechreward` that a module imports, wherever in it the import stands."""
    names = []
    for node in source.nodes(ast.Import, ast.ImportFrom):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif node.level:
            names.append("mechreward." + node.module if node.module else "mechreward.relative")
        elif node.module == "mechreward":
            names += [f"mechreward.{alias.name}" for alias in node.names]
        else:
            names.append(node.module or "")
    return [name.removeprefix("mechreward.") for name in names if name.startswith("mechreward.")]


def imports_point_up(source: Source) -> list[str]:
    return [f"imports {name}" for name in imported_names(source) if not may_import(source.name, name)]


def may_import(importer: str, name: str) -> bool:
    home, room = importer.split(".")[0], name.split(".")[0]
    if is_maker(importer) or name == "__version__":
        return True
    if is_maker(name):
        return False
    if room == home or room in FOR_ALL:
        return True
    return home in ROOMS and room in ROOMS and ROOMS.index(room) < ROOMS.index(home)


def is_maker(name: str) -> bool:
    return name.startswith("tiny.") and name not in BUNDLED


def functions_are_short(source: Source) -> list[str]:
    functions = source.nodes(ast.FunctionDef, ast.AsyncFunctionDef)
    lengths = [(node.name, node.end_lineno - node.lineno + 1) for node in functions]
    return [f"{name} has {lines} lines" for name, lines in lengths if lines > MAX_FUNCTION_LINES]


def modules_are_short(source: Source) -> list[str]:
    lines = len(source.text.splitlines())
    return [f"{lines} lines"] if lines > MAX_MODULE_LINES else []


def exceptions_are_named(source: Source) -> list[str]:
    findings = []
    for handler in source.nodes(ast.ExceptHandler):
        kinds = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
        broad = [kind for kind in kinds if kind is None or ast.unparse(kind) in ("Exception", "BaseException")]
        findings += [f"broad except in line {handler.lineno}"] * len(broad)
    return findings


def calls(source: Source, *functions: str) -> Iterator[ast.Call]:
    return (node for node in source.nodes(ast.Call) if ast.unparse(node.func) in functions)


def keyword(call: ast.Call, name: str) -> object:
    return next((ast.unparse(given.value) for given in call.keywords if given.arg == name), None)


def nothing_is_unpickled(source: Source) -> list[str]:
    findings = [
        f"torch.load without weights_only=True in line {call.lineno}"
        for call in calls(source, "torch.load")
        if keyword(call, "weights_only") != "True"
    ]
    findings += [
        f"allow_pickle in line {call.lineno}"
        for call in source.nodes(ast.Call)
        if keyword(call, "allow_pickle") not in (None, "False")
    ]
    for node in source.nodes(ast.Import, ast.ImportFrom):
        modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
        findings += [f"imports {module}" for module in modules if module.split(".")[0] in UNSAFE_MODULES]
    return findings


def no_text_is_run(source: Source) -> list[str]:
    findings = [
        f"{ast.unparse(call.func)} in line {call.lineno}" for call in calls(source, "eval", "exec", "os.system")
    ]
    findings += [
        f"{name}=True in line {call.lineno}"
        for call in source.nodes(ast.Call)
        for name in ("shell", "trust_remote_code")
        if keyword(call, name) == "True"
    ]
    return findings + [f"yaml.load in line {call.lineno}" for call in calls(source, "yaml.load", "yaml.unsafe_load")]


def only_the_cli_prints(source: Source) -> list[str]:
    if source.name.split(".")[0] == "cli":
        return []
    return [f"print in line {call.lineno}" for call in calls(source, "print")]


def attributes_are_known(source: Source) -> list[str]:
    found = [call for call in calls(source, "hasattr", "getattr") if len(call.args) == 3 or call.func.id == "hasattr"]
    return [f"{ast.unparse(call)} in line {call.lineno}" for call in found]


def docstrings_are_there(source: Source) -> list[str]:
    docstring = ast.get_docstring(source.tree)
    if not docstring:
        return ["no module docstring"]
    lines = len(docstring.splitlines())
    if source.is_package and lines < MIN_PACKAGE_DOCSTRING_LINES:
        return [f"package docstring of {lines} lines, at least {MIN_PACKAGE_DOCSTRING_LINES} say what lives there"]
    return []


def annotations_are_postponed(source: Source) -> list[str]:
    imports = [node for node in source.nodes(ast.ImportFrom) if node.module == "__future__"]
    has_functions = any(source.nodes(ast.FunctionDef, ast.ClassDef))
    return ["no `from __future__ import annotations`"] if has_functions and not imports else []


RULES: tuple[Rule, ...] = (
    imports_point_up,
    functions_are_short,
    modules_are_short,
    exceptions_are_named,
    nothing_is_unpickled,
    no_text_is_run,
    only_the_cli_prints,
    attributes_are_known,
    docstrings_are_there,
    annotations_are_postponed,
)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_rule_holds(rule: Rule) -> None:
    sources = read_sources()
    assert len(sources) >= 4
    assert [f"{source.name}: {finding}" for source in sources for finding in rule(source)] == []


def test_every_module_has_its_place() -> None:
    top = {path.stem for path in SOURCE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert top - {"__init__"} <= {*ROOMS, *FOR_ALL}


GOOD = '"""One."""\nfrom __future__ import annotations\n'
CASES: list[tuple[Rule, str, str, int]] = [
    (imports_point_up, "reward.credit", "from mechreward.gates import gate1", 1),
    (imports_point_up, "reward.credit", "def f():\n    import mechreward.training.trainer", 1),
    (imports_point_up, "reward.credit", "from mechreward import steering, sae", 1),
    (imports_point_up, "reward.credit", "from . import gates", 1),
    (imports_point_up, "reward.credit", "from mechreward.nowhere import x", 1),
    (imports_point_up, "reward.credit", "from mechreward.tiny.build import main", 1),
    (imports_point_up, "errors", "from mechreward.models import load_model", 1),
    (imports_point_up, "tiny.world", "from mechreward.models import LoadedModel", 1),
    (imports_point_up, "tiny", "from mechreward.tiny.build import main", 1),
    (imports_point_up, "tiny.language", "from mechreward.tiny.world import NAMES", 0),
    (
        imports_point_up,
        "tiny.build",
        "from mechreward.training import trainer\nfrom mechreward.tiny.measure import m",
        0,
    ),
    (imports_point_up, "tasks.generated", "def f():\n    from mechreward.tiny.world import SETTINGS", 0),
    (imports_point_up, "reward.credit", "from mechreward.sae import SAE\nfrom mechreward.errors import InputError", 0),
    (imports_point_up, "cli", "from mechreward.pipeline import improve\nfrom mechreward import __version__", 0),
    (functions_are_short, "a", "def f():\n" + "    x = 1\n" * MAX_FUNCTION_LINES, 1),
    (functions_are_short, "a", "def f():\n" + "    x = 1\n" * (MAX_FUNCTION_LINES - 1), 0),
    (functions_are_short, "a", "class C:\n    async def f():\n" + "        x = 1\n" * MAX_FUNCTION_LINES, 1),
    (modules_are_short, "a", "x = 1\n" * (MAX_MODULE_LINES + 1), 1),
    (modules_are_short, "a", "x = 1\n" * MAX_MODULE_LINES, 0),
    (exceptions_are_named, "a", "try:\n    f()\nexcept:\n    g()", 1),
    (exceptions_are_named, "a", "try:\n    f()\nexcept (OSError, Exception) as error:\n    g()", 1),
    (exceptions_are_named, "a", "try:\n    f()\nexcept BaseException:\n    raise", 1),
    (exceptions_are_named, "a", "try:\n    f()\nexcept (OSError, ValueError):\n    g()", 0),
    (nothing_is_unpickled, "a", "torch.load(path)", 1),
    (nothing_is_unpickled, "a", "torch.load(path, weights_only=False)", 1),
    (nothing_is_unpickled, "a", "torch.load(path, weights_only=True)", 0),
    (nothing_is_unpickled, "a", "import pickle\nfrom joblib import load", 2),
    (nothing_is_unpickled, "a", "np.load(path, allow_pickle=True)", 1),
    (nothing_is_unpickled, "a", "np.load(path, allow_pickle=False)", 0),
    (no_text_is_run, "a", "eval(text)\nos.system(text)\nsubprocess.run(text, shell=True)", 3),
    (no_text_is_run, "a", "AutoModel.from_pretrained(name, trust_remote_code=True)\nyaml.load(text)", 2),
    (no_text_is_run, "a", "model.eval()\nyaml.safe_load(text)", 0),
    (only_the_cli_prints, "reward.credit", "print(1)", 1),
    (only_the_cli_prints, "cli.show", "print(1)", 0),
    (attributes_are_known, "a", "hasattr(model, 'h')\ngetattr(model, 'h', None)", 2),
    (attributes_are_known, "a", "getattr(module, name)", 0),
    (docstrings_are_there, "a", "x = 1", 1),
    (docstrings_are_there, "a", '"""One line."""', 0),
    (annotations_are_postponed, "a", "def f() -> int:\n    return 1", 1),
    (annotations_are_postponed, "a", GOOD + "def f() -> int:\n    return 1", 0),
]


@pytest.mark.parametrize(("rule", "name", "text", "expected"), CASES)
def test_rule_catches(rule: Rule, name: str, text: str, expected: int) -> None:
    assert len(rule(Source(name, text))) == expected


def test_package_docstring_needs_three_lines() -> None:
    two = Source("reward", '"""One.\nTwo.\n\n"""', is_package=True)
    three = Source("reward", '"""One.\n\nThree."""', is_package=True)
    assert len(docstrings_are_there(two)) == 1
    assert docstrings_are_there(three) == []


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # Built from a copy: a build in place leaves folders behind that a later build would pack again.
    folder = tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT / "src", folder / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    command = "-m pip wheel . --quiet --no-deps --no-build-isolation --wheel-dir out".split()
    subprocess.run([sys.executable, *command], cwd=folder, check=True, capture_output=True, text=True)
    (path,) = (folder / "out").glob("mechreward-*.whl")
    return path


@pytest.mark.slow
def test_wheel_holds_every_file_of_the_package(wheel: Path) -> None:
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    files = (path for path in SOURCE.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    assert held == {path.relative_to(SOURCE.parent).as_posix() for path in files}
    assert {"mechreward/py.typed", "mechreward/__init__.py"} <= held


@pytest.mark.slow
def test_wheel_holds_data_of_each_kind(wheel: Path) -> None:
    held = zipfile.ZipFile(wheel).namelist()
    assert any(name.startswith("mechreward/tiny/assets/") and name.endswith(".safetensors") for name in held)
    assert any(name.startswith("mechreward/report/templates/") for name in held)
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in held)


@pytest.mark.slow
def test_wheel_is_small(wheel: Path) -> None:
    assert 10_000 < wheel.stat().st_size < MAX_WHEEL_BYTES
