"""Pages from templates: HTML that holds its style and script, so that it opens from disk."""

from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jinja2 import Environment


@cache
def _environment() -> "Environment":
    from jinja2 import Environment, FunctionLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=FunctionLoader(_text),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    # Style and script are parts of the package and hold no `</style>` or `</script>`.
    environment.globals |= {"style": Markup(_text("page.css")), "script": Markup(_text("page.js"))}
    return environment


def _text(name: str) -> str:
    return (files("qkd_jax.reports") / "templates" / name).read_text(encoding="utf-8")


def rendered(template: str, facts: dict[str, Any]) -> bytes:
    """The page of a template in `reports/templates`; every value is escaped."""
    text = _environment().get_template(template).render(facts)
    return text.encode("utf-8", "backslashreplace")
