"""Rendering of HTML pages: one file each, without anything from elsewhere."""

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined


def render(package: str, template: str, **values: object) -> str:
    """Render a template of a package, with all values escaped; it may extend `page.html.jinja`."""
    pages = Environment(
        loader=ChoiceLoader([PackageLoader(package), PackageLoader("parity.report")]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return pages.get_template(template).render(values)
