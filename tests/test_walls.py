"""The walls between the parts of the package, read from its source and from a fresh interpreter."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest

import anymail_retry

if TYPE_CHECKING:
    from collections.abc import Iterator

PACKAGE = "anymail_retry"
ROOT = Path(anymail_retry.__file__).parent  # the installed package, which need not be this checkout


class Wall(NamedTuple):
    """``inside`` must not import ``outside``; names of modules or packages, with all that is in them."""

    inside: str
    outside: str
    why: str


WALLS = [
    Wall("anymail_retry.transport", "anymail_retry.mailqueue", "retries are useful without the queue"),
    Wall("anymail_retry.mailqueue", "anymail_retry.transport", "the queue serves any Django back end"),
    Wall("anymail_retry.transport", "anymail_retry.models", "transport knows no Django model"),
    Wall("anymail_retry.transport", "django.db", "transport knows no Django model"),
    Wall("anymail_retry.verdict", "anymail_retry.models", "verdicts are pure"),
    Wall("anymail_retry.verdict", "django.db", "verdicts are pure"),
    Wall("anymail_retry", "anymail_retry.integrations", "an integration is imported by its user alone"),
    Wall("anymail_retry", "anymail_retry.testing", "tests are no part of a running site"),
]


def within(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def modules_of(root: Path) -> Iterator[tuple[str, Path]]:
    for path in sorted(root.rglob("*.py")):
        parts = (root.name, *path.relative_to(root).with_suffix("").parts)
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def imports_of(module: str, path: Path) -> Iterator[tuple[str, int]]:
    """Every name that a module imports, at any depth, with its line.

    Of ``from a.b import c`` both ``a.b`` and ``a.b.c``, since ``c`` may be a module. A text given to
    ``import_module`` and its like counts too.
    """
    parts = module.split(".")
    package = parts if path.name == "__init__.py" else parts[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            source = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*source, *([node.module] if node.module else [])])
            yield base, node.lineno
            yield from ((f"{base}.{alias.name}", node.lineno) for alias in node.names)
        elif isinstance(node, ast.Call):
            yield from _imports_by_name(node, ".".join(package))


def _imports_by_name(call: ast.Call, package: str) -> Iterator[tuple[str, int]]:
    function = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    if function not in {"__import__", "import_module", "import_string"} or not call.args:
        return
    target = call.args[0]
    if isinstance(target, ast.Constant) and isinstance(target.value, str):
        yield (package + target.value if target.value.startswith(".") else target.value), call.lineno


def breaches(root: Path, walls: list[Wall]) -> list[str]:
    """Each forbidden import as ``module:line imports name (why)``; a part may import itself."""
    found = []
    for module, path in modules_of(root):
        for name, line in imports_of(module, path):
            found += [
                f"{module}:{line} imports {name} ({wall.why})"
                for wall in walls
                if within(module, wall.inside) and within(name, wall.outside) and not within(module, wall.outside)
            ]
    return sorted(set(found))


def test_walls_stand() -> None:
    assert breaches(ROOT, WALLS) == []


@pytest.mark.parametrize(
    ("path", "source", "imported"),
    [
        pytest.param("transport/a.py", "import anymail_retry.mailqueue.claim", "mailqueue.claim", id="plain"),
        pytest.param("transport/a.py", "from anymail_retry.mailqueue import x", "mailqueue", id="from a module"),
        pytest.param("transport/a.py", "from anymail_retry import mailqueue", "mailqueue", id="from the package"),
        pytest.param("transport/a.py", "from ..mailqueue import x", "mailqueue", id="relative in a module"),
        pytest.param("transport/__init__.py", "from .. import mailqueue", "mailqueue", id="relative in a package"),
        pytest.param("transport/a.py", "def f():\n    import django.db.models", "models", id="in a function"),
        pytest.param("mailqueue/b/a.py", "import anymail_retry.transport", "transport", id="in a sub-package"),
        pytest.param("models.py", "import_module('anymail_retry.testing.esp')", "testing.esp", id="by name"),
        pytest.param("models.py", "loading.import_string('anymail_retry.testing.f')", "f", id="by dotted path"),
    ],
)
def test_a_breach_is_found(tmp_path: Path, path: str, source: str, imported: str) -> None:
    file = tmp_path / PACKAGE / path
    file.parent.mkdir(parents=True)
    file.write_text(source)
    assert any(f"{imported} (" in breach for breach in breaches(tmp_path / PACKAGE, WALLS))


def test_a_part_may_import_itself_and_its_namesakes(tmp_path: Path) -> None:
    folder = tmp_path / PACKAGE / "testing"
    folder.mkdir(parents=True)
    (folder / "a.py").write_text("from . import b\nimport anymail_retry.testing.b\nimport testing\n")
    (folder.parent / "b.py").write_text("import django.test.testcases\nimport anymail_retry.testing_notes\n")
    assert breaches(tmp_path / PACKAGE, WALLS) == []


def test_parts_named_in_walls_exist() -> None:
    """A wall around a part that was renamed would stand for nothing."""
    modules = {module for module, _ in modules_of(ROOT)}
    named = {name for wall in WALLS for name in (wall.inside, wall.outside) if within(name, PACKAGE)}
    named.discard("anymail_retry.integrations")  # reserved: empty so far
    assert named - {name for name in named if any(within(module, name) for module in modules)} == set()


def test_no_module_is_a_drawer_for_everything() -> None:
    drawers = {"util", "utils", "helper", "helpers", "misc", "common"}
    assert [module for module, _ in modules_of(ROOT) if drawers & set(module.split("."))] == []


# --- What an import loads ---


def loaded_after(statements: str) -> set[str]:
    """The modules loaded in a fresh interpreter without settings, after these statements."""
    env = {name: value for name, value in os.environ.items() if name != "DJANGO_SETTINGS_MODULE"}
    code = f"{statements}\nimport sys\nprint(*sorted(sys.modules), sep='\\n')"
    process = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env=env,
        cwd=ROOT.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    return set(process.stdout.split())


CONFIGURE = "from django.conf import settings; settings.configure(); import django; django.setup()"


def test_importing_the_package_loads_no_models_and_reads_no_settings() -> None:
    loaded = loaded_after("import anymail_retry; from django.conf import settings; assert not settings.configured")
    assert "anymail_retry" in loaded
    assert {"django.db.models", "anymail_retry.models", "anymail_retry.mailqueue"} & loaded == set()


def test_importing_the_back_ends_loads_no_boto3() -> None:
    loaded = loaded_after(f"{CONFIGURE}\nimport anymail_retry.backends")
    assert "anymail_retry.backends" in loaded
    assert {"boto3", "botocore"} & loaded == set()


def test_importing_the_transport_loads_no_models_and_no_queue() -> None:
    """Nor by a detour: the imports of what it imports count here."""
    transport = [module for module, _ in modules_of(ROOT) if within(module, "anymail_retry.transport")]
    loaded = loaded_after(f"{CONFIGURE}\nimport {', '.join(transport)}")
    assert set(transport) <= loaded
    assert {"anymail_retry.models", "anymail_retry.mailqueue"} & loaded == set()


def test_loaded_modules_are_seen() -> None:
    """The three tests above would pass for ever if nothing were seen."""
    assert "django.db.models" in loaded_after(f"{CONFIGURE}\nimport django.db.models")
