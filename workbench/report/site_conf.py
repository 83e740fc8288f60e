"""Settings of Sphinx for `workbench.report.site`, which copies this file beside the pages as `conf.py`.

Sphinx reads it in an environment of its own, so it imports nothing of the workbench. No page may need an address
outside the folder: formulas become MathML, which browsers draw themselves, instead of Sphinx's MathJax from a server;
the search shows titles without text around them, because pages opened from disk may not read each other.
"""

from typing import Any

extensions = ["myst_nb"]
myst_enable_extensions = ["dollarmath", "amsmath"]
suppress_warnings = ["myst.header"]  # a heading that skips a level is no fault of a notebook
nb_execution_mode = "off"
nb_merge_streams = True
nb_ipywidgets_js: dict[str, Any] = {}
html_theme = "furo"
html_math_renderer = "mathml"
html_show_search_summary = False
html_show_copyright = False
html_copy_source = False
html_use_index = False
html_domain_indices = False
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_extra_path = ["extra"]
smartquotes = False


def draw_math(self: Any, node: Any) -> None:
    """Write a formula as MathML, by the converter that docutils brings."""
    from docutils.nodes import SkipNode, math_block
    from docutils.utils.math.latex2mathml import tex2mathml

    block = isinstance(node, math_block)
    formula = tex2mathml(node.astext(), as_block=block)
    self.body.append(f'<div class="math">{formula}</div>' if block else formula)
    raise SkipNode


def setup(app: Any) -> None:
    """Register the renderer of formulas under the name that `html_math_renderer` gives."""
    app.add_html_math_renderer("mathml", (draw_math, None), (draw_math, None))
