"""Writes all that is made: `python -m tests.made`.

Of the methods and their cards: the catalog, the golden deltas that this release lacks,
docs/methods.md and README's table. Of the benchmarks' results: the tables of docs/performance.md
and docs/which_method.md.
"""

from tests import catalog

if __name__ == "__main__":
    catalog.FILE.write_text(catalog.text())
    # the cards name methods by the catalog, so it comes first
    from tests import golden, methods_page, performance_page

    golden.complete()
    methods_page.PAGE.write_text(methods_page.render())
    methods_page.README.write_text(methods_page.render_readme())
    performance_page.PAGE.write_text(performance_page.render())
    performance_page.WHICH.write_text(performance_page.render_which())
