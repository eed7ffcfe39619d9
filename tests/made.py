"""Writes all that is made of the methods and their cards: `python -m tests.made`.

The catalog of methods, the golden deltas that this release lacks, docs/methods.md, README's table.
"""

from tests import catalog

if __name__ == "__main__":
    catalog.FILE.write_text(catalog.text())
    # the cards name methods by the catalog, so it comes first
    from tests import golden, methods_page

    golden.complete()
    methods_page.PAGE.write_text(methods_page.render())
    methods_page.README.write_text(methods_page.render_readme())
