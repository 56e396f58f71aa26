"""Rendering of HTML pages: one file each, without anything from elsewhere."""

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined


def render(package: str, template: str, **values: object) -> str:
    """Render a template to a page, with all values escaped.

    Args:
        package: whose folder `templates` holds the template.
        template: its file name; it may extend `page.html.jinja` of this package.
        values: that the template names.

    Raises:
        jinja2.UndefinedError: when the template names another value.
    """
    pages = Environment(
        loader=ChoiceLoader([PackageLoader(package), PackageLoader("parity.report")]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return pages.get_template(template).render(values)
