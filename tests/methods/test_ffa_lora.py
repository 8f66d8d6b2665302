import torch

from fedlr.lowrank.subspace import kaiming
from fedlr.methods.ffa_lora import FFALoRA
from fedlr.methods.method import PartKey, Role
from tests.methods.federation import LAYOUT, clients, generator, run_round


def test_a_is_bit_identical_in_every_round() -> None:
    method = FFALoRA(kaiming)
    first = method.init(LAYOUT, generator())
    state = first
    for index in range(4):
        state, _ = run_round(method, state, clients(3, seed=10 * index), [1, 2, 3])
    for site in LAYOUT.sites:
        key = PartKey(site.name, Role.A)
        assert torch.equal(state.parts[key], first.parts[key])
        assert float(state.parts[PartKey(site.name, Role.B)].norm()) > 0.1


def test_mean_of_b_times_a_is_the_mean_of_the_products() -> None:
    method = FFALoRA(kaiming)
    weights = [0.2, 0.3, 0.5]
    state, released = run_round(method, method.init(LAYOUT, generator()), clients(3), weights)
    for site in LAYOUT.sites:
        a = state.parts[PartKey(site.name, Role.A)].double()
        b_key = PartKey(site.name, Role.B)
        products = sum(
            p * (parts[b_key].double() @ a)
            for p, parts in zip(weights, released.values(), strict=True)
        )
        torch.testing.assert_close(state.parts[b_key].double() @ a, products, atol=1e-7, rtol=1e-6)
