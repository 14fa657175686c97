"""One line for each thing that was verified, and the end."""

import sys
import time


class Report:
    def __init__(self):
        self.passed = 0
        self.failed = []
        self.started = time.monotonic()

    def check(self, what, troubles):
        """Says that `what` holds, or which troubles there are with it."""
        try:
            troubles = list(troubles)
        except Exception as error:  # Whatever it is, it is this check's failure, and others go on.
            troubles = [f"{type(error).__name__}: {error}"]
        if troubles:
            self.failed.append(what)
            print(f"FAILED: {what}")
            for trouble in troubles:
                print("    " + str(trouble).replace("\n", "\n    "))
        else:
            self.passed += 1
            print(f"ok: {what}")
        sys.stdout.flush()

    def close(self):
        seconds = time.monotonic() - self.started
        print(f"chart: {self.passed} passed, {len(self.failed)} failed, in {seconds:.0f} s")
        for what in self.failed:
            print(f"chart: failed: {what}")
        return 1 if self.failed or not self.passed else 0
