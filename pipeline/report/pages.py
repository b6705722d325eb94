"""Rendering of the pages: Jinja2 templates, with autoescape, into one self-contained HTML file."""

from __future__ import annotations

from jinja2 import Environment, PackageLoader, StrictUndefined

from pipeline.report import device_latency, provenance, quantities
from pipeline.report.run_data import Unavailable

FILTERS = (
    quantities.as_number, quantities.decibels, quantities.duration, quantities.fixed,
    quantities.large, quantities.milliseconds, quantities.plural, quantities.ratio,
    quantities.scientific, quantities.size, quantities.whole, device_latency.conditions,
    device_latency.device_name, device_latency.flattened, device_latency.shown_operators,
    device_latency.throttling,
    provenance.commands, provenance.common_facts, provenance.indented, provenance.settings,
    provenance.shortened, provenance.stage_facts,
)  # fmt: skip

ENVIRONMENT = Environment(
    loader=PackageLoader("pipeline.report"),
    autoescape=True,  # text from files is never markup
    undefined=StrictUndefined,
    extensions=["jinja2.ext.do"],
    trim_blocks=True,
    lstrip_blocks=True,
)
ENVIRONMENT.filters |= {function.__name__: function for function in FILTERS}
ENVIRONMENT.tests["unavailable"] = lambda value: isinstance(value, Unavailable)
ENVIRONMENT.globals |= {
    "NOT_AVAILABLE": quantities.NOT_AVAILABLE,
    "DOES_NOT_APPLY": quantities.DOES_NOT_APPLY,
    "interval": quantities.interval,
}


def page(template: str, **data: object) -> str:
    """The page that a template makes of the data."""
    return ENVIRONMENT.get_template(template).render(data)
