import pytest
import torch

from fedlr.lowrank.factors import AdapterSite
from fedlr.lowrank.subspace import kaiming
from fedlr.methods.fedavg_lora import FedAvgLoRA
from fedlr.methods.method import ClientUpdate, Layout, PartKey, Role
from tests.methods.federation import LAYOUT, clients, effective, generator, run_round


def test_counter_example_product_of_means_is_not_the_mean_of_products() -> None:
    # Both clients hold B·A = 1, as 1·1 and as (−1)·(−1); the factor means are 0 and 0.
    layout = Layout((AdapterSite("q", out_features=1, in_features=1, rank=1, scaling=1.0),))
    method = FedAvgLoRA(kaiming)
    updates = [
        ClientUpdate(
            name,
            {
                PartKey("q", Role.A): torch.full((1, 1), value),
                PartKey("q", Role.B): torch.full((1, 1), value),
            },
            steps=1,
        )
        for name, value in (("plus", 1.0), ("minus", -1.0))
    ]
    state = method.aggregate(method.init(layout, generator()), updates, [1, 1])
    assert effective(layout, state.parts)["q"].item() == 0.0


def test_the_error_is_the_covariance_of_the_factors() -> None:
    # Σ p_k B_k A_k − B̄ Ā = Σ p_k (B_k − B̄)(A_k − Ā), which does not vanish here.
    method, weights = FedAvgLoRA(kaiming), [0.2, 0.3, 0.5]
    start, _ = run_round(method, method.init(LAYOUT, generator()), clients(2, seed=9), [1, 1])
    state, released = run_round(method, start, clients(3), weights)
    for site in LAYOUT.sites:
        keys = PartKey(site.name, Role.B), PartKey(site.name, Role.A)
        b_mean, a_mean = (state.parts[key].double() for key in keys)
        covariance = torch.zeros(site.out_features, site.in_features, dtype=torch.float64)
        products = torch.zeros_like(covariance)
        for p, parts in zip(weights, released.values(), strict=True):
            b, a = (parts[key].double() for key in keys)
            covariance += p * (b - b_mean) @ (a - a_mean)
            products += p * b @ a
        assert float(covariance.norm()) > 0.1
        torch.testing.assert_close(products - b_mean @ a_mean, covariance, atol=1e-6, rtol=0)


def test_factors_of_different_rank_in_one_update_are_refused() -> None:
    method = FedAvgLoRA(kaiming)
    state = method.init(LAYOUT, generator())
    update = clients(1)[0].answer(LAYOUT, method.plan(state).phases[0], method.broadcast(state), {})
    b_key = PartKey("block.0.query", Role.B)
    spoiled = {**update.parts, b_key: update.parts[b_key][:, :2]}
    with pytest.raises(ValueError, match="b of rank 2 and a of rank 3"):
        method.aggregate(state, [ClientUpdate("c", spoiled, 1)], [1])
