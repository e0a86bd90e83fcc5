#!/usr/bin/env python3
"""Three hundred messages through an outage of the ESP, on your own machine; nothing leaves it.

    python3 examples/demo.py

Makes its own environment in ``examples/.venv`` when it is first run, with the Python that runs it. Needs nothing else.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path

HERE = Path(__file__).resolve().parent
CHECKOUT = HERE.parent
ENVIRONMENT = HERE / ".venv"


def main() -> int:
    if sys.version_info < (3, 10):  # noqa: UP036  # what a newcomer's python3 is, nobody knows
        print(f"This needs Python 3.10 or newer, and this is {sys.version.split()[0]}.", file=sys.stderr)
        return 2

    from outage.options import parser  # here, because an older Python could not even read it

    options = parser().parse_args()
    try:
        python = sys.executable if options.no_venv else environment()
        return subprocess.call([python, "-m", "outage", *sys.argv[1:]], cwd=HERE)
    except KeyboardInterrupt:
        return 130


def environment() -> str:
    """The Python of an environment that has this checkout and what it needs; made if it is missing or outdated."""
    python = ENVIRONMENT / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    made_of = "\n".join(
        [sys.version, str(ENVIRONMENT), hashlib.sha256((CHECKOUT / "pyproject.toml").read_bytes()).hexdigest()]
    )
    stamp = ENVIRONMENT / "made-of.txt"
    if stamp.exists() and stamp.read_text(encoding="utf-8") == made_of:
        return str(python)

    began = time.monotonic()
    print(f"Making an environment in {ENVIRONMENT} (this once) ", end="", flush=True)
    try:
        venv.create(ENVIRONMENT, clear=True, with_pip=True, symlinks=sys.platform != "win32")
    except subprocess.CalledProcessError:
        print()
        sys.exit("This Python cannot make an environment with pip. On Debian and Ubuntu: apt install python3-venv")
    with tempfile.TemporaryFile() as output:
        pip = subprocess.Popen(
            # Compiling all of Django takes longer than compiling what is imported.
            [str(python), "-m", "pip", "install", "--no-compile", "--editable", f"{CHECKOUT}[testing]"],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        while True:
            try:
                status = pip.wait(timeout=1)
                break
            except subprocess.TimeoutExpired:
                print(".", end="", flush=True)
        if status:
            output.seek(0)
            print(f"\n{output.read().decode(errors='replace')}")
            sys.exit("pip could not install what the demo needs; its own words stand above.")
    stamp.write_text(made_of, encoding="utf-8")
    print(f" {time.monotonic() - began:.0f} s\n", flush=True)
    return str(python)


if __name__ == "__main__":
    sys.exit(main())
