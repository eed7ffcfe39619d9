"""The zoo is sane: every kind runs, repeats itself, learns and keeps its rows apart."""

import pytest
import torch

from tests.zoo import KINDS, Kind

every_kind = pytest.mark.parametrize("kind", KINDS, ids=str)


def test_names_are_unique() -> None:
    assert len({kind.name for kind in KINDS}) == len(KINDS)


@every_kind
def test_two_builds_agree_to_the_bit_and_leave_the_random_state(kind: Kind) -> None:
    state = torch.get_rng_state()
    first, second = (kind.run(kind.model(), kind.batch()) for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(state, torch.get_rng_state())


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_output_is_finite_in_the_models_dtype(kind: Kind, dtype: torch.dtype) -> None:
    y = kind.run(kind.model(dtype), kind.batch(dtype=dtype))
    assert y.dtype == dtype and y.isfinite().all()


@every_kind
def test_every_parameter_gets_a_gradient_in_train_mode(kind: Kind) -> None:
    model = kind.model().train()
    kind.run(model, kind.batch()).square().sum().backward()
    numbers = [(name, p) for name, p in model.named_parameters() if p.is_floating_point()]
    dead = [name for name, p in numbers if p.grad is None or not p.grad.any()]
    assert not dead


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.batched], ids=str)
def test_a_row_is_the_same_alone(kind: Kind) -> None:
    model, batch = kind.model(), kind.batch(3)
    alone = kind.run(model, {name: x[1:2] for name, x in batch.items()})
    torch.testing.assert_close(kind.run(model, batch)[1:2], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.uncompilable], ids=str)
def test_an_uncompilable_base_still_is(kind: Kind) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(kind.model(), fullgraph=True, backend="eager")
    with pytest.raises(torch._dynamo.exc.Unsupported):
        kind.run(compiled, kind.batch())


@pytest.mark.skipif(torch.cuda.is_available(), reason="conftest leaves a GPU's memory as it is")
def test_memory_that_nobody_wrote_shows() -> None:
    made = torch.empty(3), torch.empty_like(torch.ones(3)), torch.ones(3).new_empty(3)
    assert all(tensor.isnan().all() for tensor in made)
    assert torch.empty(3, dtype=torch.int64).equal(torch.tensor([2**63 - 1] * 3))
