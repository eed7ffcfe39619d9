"""The errors of fuse."""

from torch import nn

from peftlite.verbs.fuse import fuse
from tests.errors.case import Case

CASES = [
    Case(lambda m, _: fuse(m, [["query", "key"]]),
         "no module has two low-rank linear maps that groups=[['query', 'key']] names together; "
         'name those that one module calls with one tensor, as in [["query", "key", "value"]]'),
    Case(lambda m, _: fuse(m), "this model has no deltas; pl.attach or pl.load one first",
         model=lambda: nn.Linear(2, 2)),
]  # fmt: skip
