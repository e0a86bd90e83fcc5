"""Every check of the project. ``nox -l`` lists them; ``nox -s tests`` needs nothing but the Python at hand.

The sessions tagged ``ci`` are what the integration machine runs: each supported Django and both ways of mail
settings, the oldest supported versions, the database servers, the built wheel, types, lint and docs. A Python
that a machine lacks is skipped, and an error where ``CI`` is set.
"""

from __future__ import annotations

import shutil
import zipfile
from pathlib import Path

import nox

nox.needs_version = ">=2025.5.1"
nox.options.default_venv_backend = "uv|virtualenv"
nox.options.sessions = ["lint", "types", "tests"]

PYPROJECT = nox.project.load_toml("pyproject.toml")
PYTHONS = nox.project.python_versions(PYPROJECT)
DJANGOS = [
    classifier.rpartition(" ")[2]
    for classifier in PYPROJECT["project"]["classifiers"]
    if classifier.startswith("Framework :: Django :: ")
]
PYTEST = ("pytest", "-n", "auto", "--dist", "worksteal")
MAIN_PYTHON = "3.13"  # of the sessions that need one Python only

# What CI runs of the matrix: each Django and each way of mail settings once. 5.2 is in "tests" and "minimum", the
# newest with MAILERS in "package".
IN_CI = {("3.12", "6.0", "legacy"), ("3.13", "6.1", "legacy")}


def group(name: str) -> tuple[str, ...]:
    return nox.project.dependency_groups(PYPROJECT, name)


def combinations() -> list[object]:
    """Python x Django x mail settings, as far as they exist together."""
    found = []
    for python in PYTHONS:
        for django in DJANGOS:
            if django >= "6.0" and python in {"3.10", "3.11"}:
                continue  # Django 6 needs Python 3.12
            for mail in ("legacy", "mailers") if django >= "6.1" else ("legacy",):
                tags = ["ci"] if (python, django, mail) in IN_CI else []
                found.append(nox.param(python, django, mail, id=f"{python}-{django}-{mail}", tags=tags))
    return found


@nox.session
def tests(session: nox.Session) -> None:
    """The whole suite on the Python at hand and the newest Django for it, with SQLite."""
    session.install("-e", ".", *group("tests"))
    session.run(*PYTEST, *session.posargs)


@nox.session
@nox.parametrize(["python", "django", "mail"], combinations())
def matrix(session: nox.Session, django: str, mail: str) -> None:
    """The suite on one combination of what the classifiers promise; without what ESPs answer (tests/matrix), which is
    no matter of Django's and in ``tests``, ``minimum`` and ``package``."""
    session.install("-e", ".", f"Django=={django}.*", *group("tests"))
    session.run(*PYTEST, "--ignore=tests/matrix", *session.posargs, env={"TEST_MAIL_SETTINGS": mail})


@nox.session(python=PYTHONS[0], tags=["ci"])
def minimum(session: nox.Session) -> None:
    """The whole suite on the oldest versions that pyproject.toml admits."""
    project = PYPROJECT["project"]
    requirements = [*project["dependencies"], *project["optional-dependencies"]["encryption"]]
    oldest = [requirement.replace(">=", "==") for requirement in requirements]
    session.install("-e", ".", *oldest, *group("tests"))
    session.run(*PYTEST, *session.posargs)


@nox.session(python=MAIN_PYTHON, tags=["ci"])
@nox.parametrize("database", ["postgresql", "mariadb"])
def databases(session: nox.Session, database: str) -> None:
    """What touches the database, on each server; skipped with the reason where none answers."""
    session.install("-e", ".", *group("tests"), *group("databases"))
    session.run(*PYTEST, "-m", "database", *session.posargs, env={"TEST_DATABASE": database})


@nox.session(python=MAIN_PYTHON, tags=["ci"])
def package(session: nox.Session) -> None:
    """The whole suite against the built wheel, from an unpacked sdist that has lost its own package."""
    folder = Path(session.create_tmp()).resolve()
    shutil.rmtree(folder)  # of an earlier run
    session.install("build")
    session.run("python", "-m", "build", "--outdir", str(folder), silent=True)
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")

    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
    source = {path.as_posix() for path in Path("anymail_retry").rglob("*") if path.is_file()}
    source = {path for path in source if "__pycache__" not in path}
    if packed != source or "anymail_retry/py.typed" not in packed:
        session.error(f"the wheel holds not exactly the package: {sorted(packed ^ source)}")

    shutil.unpack_archive(sdist, folder)
    session.chdir(folder / sdist.name.removesuffix(".tar.gz"))
    shutil.rmtree("anymail_retry")
    session.install(str(wheel), *group("tests"))
    session.run(*PYTEST, *session.posargs)


@nox.session(python=MAIN_PYTHON, tags=["ci"])
def types(session: nox.Session) -> None:
    """mypy, strict."""
    session.install("-e", ".", *group("types"))
    session.run("mypy")


@nox.session(python=MAIN_PYTHON, tags=["ci"])
def lint(session: nox.Session) -> None:
    """ruff: rules and format. ``nox -s lint -- --fix`` mends what can be mended."""
    session.install(*group("lint"))
    session.run("ruff", "check", *session.posargs)
    session.run("ruff", "format", *([] if "--fix" in session.posargs else ["--check"]))


@nox.session(python=MAIN_PYTHON, tags=["ci"])
def docs(session: nox.Session) -> None:
    """The documentation, any warning an error."""
    session.install("-e", ".", *group("docs"))
    session.run("sphinx-build", "-W", "-q", "docs", "docs/_build")


@nox.session(python=MAIN_PYTHON)
def anymail(session: nox.Session) -> None:
    """Anymail's own tests with our back ends in the place of its own. From its repository, so it needs the network,
    or ``nox -s anymail -- CHECKOUT``."""
    session.install("-e", ".", *group("tests"), "django-anymail[postmark,resend,sendgrid]", "mock")
    if session.posargs:
        checkout = session.posargs[0]
    else:
        command = "import anymail; print(anymail.__version__)"
        version = str(session.run("python", "-c", command, silent=True)).strip()
        checkout = str(Path(session.create_tmp()) / version)
        if not Path(checkout).exists():
            repository = "https://github.com/anymail/django-anymail"
            session.run("git", "clone", "-q", "--depth=1", f"--branch=v{version}", repository, checkout, external=True)
    session.run("python", "tests/anymail_suite.py", checkout, *session.posargs[1:])
