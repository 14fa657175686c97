"""What is rendered lies in the repository, so that a change of it is seen in review."""

import difflib
import shutil


def update(case, texts):
    shutil.rmtree(case.rendered, ignore_errors=True)
    for path, text in texts.items():
        file = case.rendered / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(tidy(text))


def differences(case, texts):
    there = {}
    if case.rendered.is_dir():
        files = [file for file in case.rendered.rglob("*") if file.is_file()]
        there = {str(file.relative_to(case.rendered)): file.read_text() for file in files}
    for path in sorted(there.keys() | texts.keys()):
        old = there.get(path, "")
        new = tidy(texts[path]) if path in texts else ""
        if old != new or (path in there) != (path in texts):
            lines = difflib.unified_diff(
                old.splitlines(), new.splitlines(), f"examples/{case.name}/rendered/{path}", "now", lineterm="", n=1
            )
            yield "\n".join(list(lines)[:40]) or f"{path} is only in one of both"


def tidy(text):
    """Without blanks at the ends, which editors and reviews trip over."""
    return "\n".join(line.rstrip() for line in text.strip().splitlines()) + "\n"
