"""Anymail's own test suite with our back ends in the place of its own, without the queue and the breaker.

    python tests/anymail_suite.py CHECKOUT [TEST ...]

``nox -s anymail`` fetches the checkout of the installed version and runs this. The suite runs twice, once as it is, so
that what fails on this machine anyhow (tests that go out to the network) is not laid at our door. By its path, because
Anymail's tests are a package called ``tests`` too.
"""

from __future__ import annotations

import importlib
import json
import os
import pkgutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

#: Tests that cannot hold with ours, because a key of ours stands among the headers in the body.
BY_DESIGN = {
    "tests.test_brevo_backend.BrevoBackendAnymailFeatureTests.test_default_omits_options",
    "tests.test_brevo_backend.BrevoBackendAnymailFeatureTests.test_merge_headers",
    "tests.test_brevo_backend.BrevoBackendStandardEmailTests.test_email_message",
}


def swap() -> list[str]:
    """Put ours in the place of Anymail's. The names of the modules."""
    import anymail_retry.backends

    swapped = []
    for module in pkgutil.iter_modules(anymail_retry.backends.__path__):
        try:
            theirs: Any = importlib.import_module(f"anymail.backends.{module.name}")
        except ModuleNotFoundError:
            continue  # a wrapper of ours
        theirs.EmailBackend = importlib.import_module(f"anymail_retry.backends.{module.name}").EmailBackend
        swapped.append(module.name)
    return swapped


def run(whose: str, checkout: str, report: str, *labels: str) -> None:
    """Run the suite once, and leave in a file how many tests ran and which failed."""
    os.chdir(checkout)
    sys.path[0] = checkout  # in place of this script's folder, and before the installed Anymail
    if whose == "ours":
        print("with ours in the place of:", ", ".join(swap()), flush=True)
    from django.test.runner import DiscoverRunner

    seen: dict[str, Any] = {}
    suite_result = DiscoverRunner.suite_result

    def keep(self: Any, suite: Any, result: Any, **kwargs: Any) -> Any:
        failed = [test.id() for test, _ in (*result.failures, *result.errors)]
        seen.update(ran=result.testsRun, failed=failed)
        return suite_result(self, suite, result, **kwargs)

    DiscoverRunner.suite_result = keep
    importlib.import_module("runtests").setup_and_run_tests(list(labels) or None)
    Path(report).write_text(json.dumps(seen))


def main(checkout: str, *labels: str) -> int:
    seen = {}
    with tempfile.TemporaryDirectory() as folder:
        for whose in ("theirs", "ours"):
            report = f"{folder}/{whose}.json"
            command = [sys.executable, __file__, "--run", whose, str(Path(checkout).resolve()), report, *labels]
            subprocess.run(command, check=True, env={**os.environ, "CONTINUOUS_INTEGRATION": "true"})
            seen[whose] = json.loads(Path(report).read_text())
    more = set(seen["ours"]["failed"]) - set(seen["theirs"]["failed"])
    print(f"\n{seen['theirs']['ran']} tests as they are, {len(seen['theirs']['failed'])} failed")
    print(f"{seen['ours']['ran']} tests with ours, of the others failed: {sorted(more - BY_DESIGN)}")
    print(f"by design: {sorted(more & BY_DESIGN)}")
    return 1 if more - BY_DESIGN or seen["ours"]["ran"] != seen["theirs"]["ran"] or not seen["ours"]["ran"] else 0


if __name__ == "__main__":
    if sys.argv[1] == "--run":
        run(*sys.argv[2:])
    else:
        sys.exit(main(*sys.argv[1:]))
