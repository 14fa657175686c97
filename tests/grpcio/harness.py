"""Counts checks, and compares what a refusal says."""

import sys
import time
import traceback

from domaind_client.errors import Refused


class Report:
    """One line for each verified thing, and a last one that counts them."""

    def __init__(self):
        self.passed = 0
        self.failed = 0

    def check(self, what):
        return _Check(self, what)

    def close(self):
        print(f"{self.passed} passed, {self.failed} failed", flush=True)
        return self.failed == 0


class _Check:
    """A block that passes if nothing in it raises. The next one runs anyway."""

    def __init__(self, report, what):
        self.report = report
        self.what = what
        self.note = None

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if kind is None:
            self.report.passed += 1
            note = f" ({self.note})" if self.note else ""
            print(f"ok    {self.what}{note}", flush=True)
            return True
        if not issubclass(kind, Exception):
            return False
        self.report.failed += 1
        print(f"FAIL  {self.what}", flush=True)
        traceback.print_exception(kind, error, trace, file=sys.stdout)
        return True


def same(got, wanted):
    assert got == wanted, f"{got!r} instead of {wanted!r}"


def refusal(work, code, reason, **numbers):
    """`work` must be refused like this, with these numbers in the metadata."""
    try:
        answer = work()
    except Refused as refused:
        same((refused.code, refused.reason), (code, reason))
        shown = {key: refused.metadata.get(key) for key in numbers}
        same(shown, {key: str(value) for key, value in numbers.items()})
        assert refused.message, "a refusal without a sentence"
        return refused
    raise AssertionError(f"not refused: {answer}")


def eventually(what, condition, seconds=10):
    """Waits for what the daemon does in the background."""
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, f"not within {seconds} s: {what}"
        time.sleep(0.02)
