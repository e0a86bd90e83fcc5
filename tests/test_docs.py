"""The documentation says what the code does: settings, checks, names and examples are compared with it or run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from textwrap import indent
from typing import TYPE_CHECKING, Any

import pytest

import anymail_retry.checks
import anymail_retry.signals
import anymail_retry.testing
from anymail_retry import RetryMixin, conf
from anymail_retry.backends import RetryableMandrillEmailBackend
from anymail_retry.conf import Unset
from anymail_retry.mailqueue.fallback import FallbackQueueMixin
from anymail_retry.mailqueue.states import State
from anymail_retry.testing import Fault, HandshakeFault, LocalEsp
from anymail_retry.testing.pytest import local_esp
from anymail_retry.verdict import Verdict
from tests.sites import Site, site

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["local_esp", "site"]  # fixtures

CHECKOUT = Path(__file__).parent.parent
README = (CHECKOUT / "README.rst").read_text(encoding="utf-8")
PAGES = {
    path.name: path.read_text(encoding="utf-8")
    for path in [CHECKOUT / "README.rst", *sorted((CHECKOUT / "docs").glob("*.rst"))]
}


def cells(page: str) -> list[list[str]]:
    """The rows of every list table of a page; cells as text on one line."""
    rows = re.findall(r"^   \* - (.*(?:\n     .*)*)", PAGES[page], re.MULTILINE)
    return [[" ".join(cell.split()) for cell in re.split(r"\n     - ", row)] for row in rows]


def code(text: str) -> set[str]:
    """What stands in double backticks."""
    return set(re.findall(r"``(.+?)``", text))


# --- Settings and checks ---


def written(default: Any) -> str:
    """A default as the documentation writes it."""
    if isinstance(default, Unset):
        return "unset"
    if isinstance(default, float):
        return f"``{default:g}``" if default < 1e5 else f"``{default:.0f}``"
    return f'``"{default}"``' if isinstance(default, str) else f"``{default}``"


def test_settings_page_has_each_setting_with_its_default() -> None:
    documented = {row[0].strip("`"): row[1] for row in cells("settings.rst") if len(row) == 3 and row[0] != "Setting"}
    assert documented == {setting.full_name: written(setting.default) for setting in conf.SETTINGS.values()}


def test_settings_table_of_the_readme_is_true() -> None:
    documented = dict(re.findall(r"^``(EMAIL_\w+)``  +(\S+)  ", README, re.MULTILINE))
    assert len(documented) > 5
    defaults = {setting.full_name: written(setting.default).strip("`") for setting in conf.SETTINGS.values()}
    assert documented == {name: defaults.get(name) for name in documented}


def test_settings_page_has_the_table_of_checks() -> None:
    _, heading, rows, *_ = (anymail_retry.checks.__doc__ or "").split("\n=======  =")
    assert heading in PAGES["settings.rst"]
    assert rows in PAGES["settings.rst"]


# --- Names ---


DOTTED = sorted(
    {
        (page, name)
        for page, text in PAGES.items()
        if page != "changelog.rst"
        for name in re.findall(r"(?<!``\")\banymail_retry(?:\.\w+)+", text)  # in quotes: a logger
    }
)


@pytest.mark.parametrize(("page", "name"), DOTTED)
def test_dotted_names_exist(page: str, name: str) -> None:
    module, _, rest = name, "", []
    while True:
        try:
            found: Any = import_module(module)
            break
        except ModuleNotFoundError:
            module, _, last = module.rpartition(".")
            rest.insert(0, last)
    for part in rest:
        found = getattr(found, part)


@pytest.mark.parametrize(
    ("page", "names"),
    [
        pytest.param("verdicts.rst", {verdict.value for verdict in Verdict}, id="verdicts"),
        pytest.param("queue.rst", {state.value for state in State}, id="states"),
        pytest.param(
            "queue.rst",
            {name for name, value in vars(anymail_retry.signals).items() if type(value).__name__ == "Signal"},
            id="signals",
        ),
    ],
)
def test_tables_have_a_row_for_each(page: str, names: set[str]) -> None:
    assert names <= {row[0].strip("`") for row in cells(page)}


def test_testing_page_has_each_fault() -> None:
    public = {name: getattr(anymail_retry.testing, name) for name in anymail_retry.testing.__all__}
    faults = {
        name
        for name, value in public.items()
        if isinstance(value, type) and issubclass(value, Fault) and value not in (Fault, HandshakeFault)
    }
    assert {row[0].strip("`").partition("(")[0] for row in cells("testing.rst")} - {"Fault"} == faults


# --- Examples ---


def python_blocks(page: str) -> list[str]:
    blocks = re.findall(r"^\.\. code-block:: python\n\n((?:   .*\n|\n)+)", PAGES[page], re.MULTILINE)
    return [re.sub(r"^   ", "", block, flags=re.MULTILINE) for block in blocks]


@pytest.mark.parametrize(
    ("page", "number"), [(page, number) for page in PAGES for number in range(len(python_blocks(page)))]
)
def test_examples_are_python(page: str, number: int) -> None:
    compile(python_blocks(page)[number], f"{page}, example {number + 1}", "exec")


@pytest.mark.django_db
def test_example_of_the_testing_page_passes(local_esp: Callable[..., LocalEsp], site: Site) -> None:
    """As it stands with MAILERS, and with the lines that the page has for other sites."""
    (example,) = (block for block in python_blocks("testing.rst") if "def test_" in block)
    if site.way == "legacy":
        (lines,) = (block for block in python_blocks("testing.rst") if block.startswith("settings.EMAIL_BACKEND"))
        with_mailers = re.compile(r"^    settings\.MAILERS = .*\n", re.MULTILINE)
        example, replaced = with_mailers.subn(indent(lines, "    "), example)
        assert replaced == 1
    names: dict[str, Any] = {}
    exec(compile(example, "testing.rst", "exec"), names)
    (test,) = (value for name, value in names.items() if name.startswith("test_"))
    test(local_esp, site.settings)


def test_settings_of_the_readme_are_those_of_a_back_end_of_ours(site: Site) -> None:
    """Each form as it stands, beside what a site has for Anymail."""
    setting = "MAILERS" if site.way == "mailers" else "EMAIL_BACKEND"
    (example,) = (block for block in python_blocks("README.rst") if f"{setting} = " in block)
    written: dict[str, Any] = {}
    exec(compile(example, "README.rst", "exec"), written)
    setattr(site.settings, setting, written[setting])
    site.settings.ANYMAIL = {"MANDRILL_API_KEY": "test-api-key"}
    assert type(site.connection()) is RetryableMandrillEmailBackend


def test_own_back_end_of_the_readme_retries_and_queues() -> None:
    (example,) = (block for block in python_blocks("README.rst") if "class " in block)
    names: dict[str, Any] = {}
    exec(compile(example, "README.rst", "exec"), names)
    assert issubclass(names["MyBackend"], RetryMixin)
    assert issubclass(names["MyBackend"], FallbackQueueMixin)


# --- The README ---


def test_readme_reaches_code_in_thirty_lines() -> None:
    before, _, _ = README.partition(".. code-block:: python")
    assert before.count("\n") < 30


def test_readme_is_read_without_warnings() -> None:
    """As a package index does it, which knows nothing of Sphinx."""
    docutils = pytest.importorskip("docutils.core", reason="docutils reads the README, and is not installed")
    warnings_are_errors = {"halt_level": 2, "report_level": 2}
    docutils.publish_doctree(README, settings_overrides=warnings_are_errors)


def test_demo_table_of_the_readme_is_the_demos(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(CHECKOUT / "examples"))
    from outage import report

    (head,) = (line for line in README.splitlines() if line.strip().startswith("phase  "))
    assert tuple(re.split(r"  +", head.strip())) == report.HEAD


# --- benchmarks ---

SCRIPTS = [path for path in sorted((CHECKOUT / "benchmarks").glob("*.py")) if "__main__" in path.read_text()]


@pytest.mark.parametrize("script", [pytest.param(path, id=path.name) for path in SCRIPTS])
def test_a_benchmark_finds_the_standard_librarys_queue(script: Path) -> None:
    """Python looks into a script's own folder first, and there is one of that name."""
    as_a_script = f"sys.path[0] = {str(script.parent)!r}; runpy.run_path({str(script)!r})"
    code = f"import runpy, sys; {as_a_script}; import queue; queue.SimpleQueue"
    path = os.pathsep.join(folder for folder in sys.path if folder)
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": path})
