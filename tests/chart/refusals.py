"""Values that the chart must not take."""

from pathlib import Path

import helm_python as helm
import yaml


def table():
    return yaml.safe_load((Path(__file__).parent / "refusals.yaml").read_text())


def not_refused(chart, row):
    """The schema's refusals come before any template is rendered, the templates' after the schema has let them pass."""
    by = "schema" if "schema" in row else "fail"
    try:
        chart.render(row["values"])
    except helm.HelmError as error:
        said = str(error)
        found = "fail" if isinstance(error, helm.HelmRenderError) else "schema"
        if found != by:
            yield f"refused by {found}, not by {by}: {said}"
        if row[by] not in said:
            yield f"refused, but without the words {row[by]!r}: {said}"
    else:
        yield "it is taken"
