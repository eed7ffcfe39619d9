"""Layout: what it says of a weight is what the module does with it, there and back."""

import math

import pytest
import torch
from torch import Tensor, nn

from peftlite.core.site import Site, sites, slice_of

# a module, and an input for it; the channels of an input lie along its dimension 1
MODULES: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "linear": (nn.Linear(6, 4, bias=False), (3, 6)),
    "conv1d": (nn.Conv1d(6, 4, 3, bias=False), (2, 6, 9)),
    "conv2d grouped": (nn.Conv2d(6, 4, (3, 2), groups=2, bias=False), (2, 6, 5, 5)),
    "depthwise": (nn.Conv2d(6, 6, 3, groups=6, bias=False), (2, 6, 5, 5)),
    "transposed": (nn.ConvTranspose2d(6, 4, 3, bias=False), (2, 6, 5, 5)),
    "transposed grouped": (nn.ConvTranspose1d(6, 4, 3, groups=2, bias=False), (2, 6, 5)),
}
each = pytest.mark.parametrize("name", MODULES)


def site_of(module: nn.Module) -> Site:
    return next(site for site in sites(module) if site.slot == "weight")


def along(v: Tensor, y: Tensor) -> Tensor:
    return v.view(-1, *(1 for _ in y.shape[2:]))


@each
@pytest.mark.parametrize("inputs", [False, True])
def test_a_scaled_weight_scales_what_comes_out_or_goes_in(name: str, inputs: bool) -> None:
    module, shape = MODULES[name]
    site, x = site_of(module), torch.randn(shape)
    v = torch.randn(site.layout.vector(inputs))
    scaled = site.layout.scaled(site.tensor, v, inputs)
    y = module(x * along(v, x)) if inputs else module(x) * along(v, module(x))
    torch.testing.assert_close(torch.func.functional_call(module, {"weight": scaled}, (x,)), y)


@each
def test_a_change_of_the_matrices_is_the_change(name: str) -> None:
    site = site_of(MODULES[name][0])
    layout, w = site.layout, site.tensor
    matrices = layout.matrices(w)
    assert matrices.shape == (*layout.stack, layout.o, layout.i)
    change = torch.randn_like(matrices)
    added = layout.add(w, change, 2.0)
    assert added.dtype == w.dtype and added.shape == w.shape
    torch.testing.assert_close(layout.matrices(added), matrices + 2 * change)


@each
def test_factors_are_of_the_matrices(name: str) -> None:
    site = site_of(MODULES[name][0])
    layout = site.layout
    a, b = torch.randn(*layout.stack, 2, layout.i), torch.randn(*layout.stack, layout.o, 2)
    product = layout.product(a, b)
    torch.testing.assert_close(layout.matrices(product), b @ a)
    left, right = layout.factors(a, b)
    torch.testing.assert_close((left @ right).reshape(site.shape), product)


@each
def test_a_neuron_is_all_that_makes_one_output(name: str) -> None:
    """Without one neuron, one output is nothing, and the others are as they were."""
    module, shape = MODULES[name]
    site, x = site_of(module), torch.randn(shape)
    layout, neurons = site.layout, site.layout.neurons(site.tensor)
    assert neurons.shape == (math.prod(site.shape) // layout.neuron, layout.neuron)
    assert torch.equal(layout.from_neurons(neurons), site.tensor)
    neurons = neurons.clone()
    neurons[1] = 0
    weight = layout.from_neurons(neurons)
    y, without = module(x), torch.func.functional_call(module, {"weight": weight}, (x,))
    assert not without[:, 1].any()
    kept = torch.arange(y.shape[1]) != 1
    torch.testing.assert_close(without[:, kept], y[:, kept])


def test_an_embedding_is_looked_up() -> None:
    site = site_of(nn.Embedding(7, 3))
    layout = site.layout
    assert layout.embeds and layout.transposed and (layout.o, layout.i) == (3, 7)
    assert torch.equal(layout.neurons(site.tensor), site.tensor)


def test_experts_are_a_stack() -> None:
    module = nn.Module()
    module.experts = nn.Parameter(torch.randn(2, 5, 4, 3))
    site = next(site for site in sites(module) if not site.is_call)
    layout = site.layout
    assert (layout.stack, layout.o, layout.i, layout.taps) == ((2, 5), 4, 3, 1)
    assert layout.vector() == (2, 5, 4) and layout.vector(inputs=True) == (2, 5, 3)
    v = torch.randn(layout.vector(inputs=True))
    torch.testing.assert_close(layout.scaled(site.tensor, v, True), site.tensor * v[..., None, :])


@pytest.mark.parametrize("part, inputs", [("[1:3]", False), ("[:, 1:3]", True)])
def test_a_part_is_of_the_outputs_or_of_the_inputs(part: str, inputs: bool) -> None:
    site = slice_of(site_of(nn.Linear(6, 4)), part.strip("[]"))
    assert site.cuts_inputs is inputs
    assert (site.layout.o, site.layout.i) == tuple(site.tensor.shape)
