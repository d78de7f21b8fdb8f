"""All tests of the kernels, run on the device instead of Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

from benchmarks.gpu.stage import Row, Settings, installed, missing

TESTS = Path(__file__).parents[2] / "tests" / "kernels"
# Toy: the interpreter is slow.
NOT_PASSED = ("failure", "error", "skipped")
FEW = "float32_matches_float64 and not 500 and not 64 and not 240"


def rows(settings: Settings) -> Iterator[Row]:
    """Yield how many tests of each file passed, and each test that failed."""
    if not installed("pytest"):
        yield missing("tests of the kernels", "pytest")
        return
    report = settings.out / "kernels.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(TESTS)]
    # The tests' other fixtures need packages that are not needed here.
    command += [f"--confcutdir={TESTS}", f"--junitxml={report}"]
    command += ["-k", FEW] if settings.toy else []
    environment = {**os.environ, "LINEARSR_TEST_DEVICE": settings.device.type}
    subprocess.run(command, env=environment, check=False)
    counts: dict[str, Counter[str]] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        outcomes = {child.tag: child for child in case if child.tag in NOT_PASSED}
        outcome, element = next(iter(outcomes.items()), ("passed", case))
        counts.setdefault(case.get("classname", ""), Counter())[outcome] += 1
        if outcome in ("failure", "error"):
            yield {"what": case.get("name"), "note": element.get("message", "")[:300]}
    for file, count in counts.items():
        yield {"what": file, **count}
