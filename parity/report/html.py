"""How every HTML page here looks: one file that needs nothing from elsewhere."""

from typing import Any

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined


def render(package: str, template: str, **values: Any) -> str:
    """A page of a package's `templates`, which may extend `page.html.jinja`; values are escaped."""
    pages = Environment(
        loader=ChoiceLoader([PackageLoader(package), PackageLoader("parity.report")]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return pages.get_template(template).render(values)
