"""Affine: how a layer's output goes by one of its vectors, found by running it on small inputs."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from peftlite.core.host import ATTRIBUTE, base_class
from peftlite.core.site import Site
from peftlite.errors import TargetError


def one_of(site: Site, dim: int, unlike: TargetError) -> nn.Module | None:
    """n in f(x; v + d) = f(x; v) + d ⊙ n(x), for a vector v of a layer f: None if it is 1.

    n is the layer itself with 1 for v, or with 0 where it adds 1 by itself, and 0 for its other
    vectors. Raises `unlike` unless that holds, for each row by itself.
    """
    for unit in (None, 1.0, 0.0):
        try:
            holds = not site.module._modules and _holds(site, dim, unit)
        except Exception as error:
            raise unlike from error
        if holds:
            return None if unit is None else _with(site.module, _values(site, unit))
    raise unlike


def _holds(site: Site, dim: int, unit: float | None) -> bool:
    """Whether the equation holds, in training and in evaluation, for random vectors and inputs."""
    random = torch.Generator("cpu").manual_seed(0)
    w = site.whole

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, dtype=torch.float64, device="cpu").to(w.device)

    o = len(w)
    x = draw(2, 3, o) if dim == -1 else draw(2, o, 3)
    d = draw(o)
    v = {name: draw(*p.shape) for name, p in _vectors(site.module).items()}
    for training in (True, False):

        def f(values: dict[str, Tensor], x: Tensor = x, training: bool = training) -> Tensor:
            return _with(site.module, values).double().train(training).forward(x)

        before, after = f(v), f({**v, site.slot: v[site.slot] + d})
        n = 1.0 if unit is None else f(_values(site, unit))
        change = (d if dim == -1 else d[:, None]) * n
        alike = [(after - before, change.expand_as(before))]
        if unit is not None:
            alike.append((torch.cat([f(v, x[:1]), f(v, x[1:])]), before))
        if not all(torch.allclose(*pair, rtol=1e-4, atol=1e-5) for pair in alike):
            return False
    return True


def _vectors(module: nn.Module) -> dict[str, Tensor]:
    return {name: p for name, p in module._parameters.items() if p is not None}


def _values(site: Site, unit: float) -> dict[str, Tensor]:
    """The unit for the site's vector, and 0 for the others."""
    own = _vectors(site.module).items()
    return {name: torch.full_like(p, unit if name == site.slot else 0.0) for name, p in own}


def _with(module: nn.Module, values: dict[str, Tensor]) -> nn.Module:
    """A layer like this one with other vectors, and buffers of its own; none of them is saved."""
    kind: type[nn.Module] = base_class(module)
    made = kind.__new__(kind)
    made.__dict__.update(module.__dict__)
    made.__dict__.pop(ATTRIBUTE, None)
    buffers = {name: b.clone() for name, b in module._buffers.items() if b is not None}
    buffers |= {name: value.detach() for name, value in values.items()}
    empty = {*module._buffers, *module._parameters} - set(buffers)
    made._parameters, made._buffers = dict.fromkeys(empty), buffers
    made._non_persistent_buffers_set = set(buffers)
    return made
