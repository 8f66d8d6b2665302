"""FedSVD with plain SGD is FFA-LoRA frozen at the same orthonormal A.

Clients fit a linear map by DP-SGD on B: per-example gradients s·δ(Ax)ᵀ, each
clipped in Frobenius norm, averaged, Gaussian noise. FedSVD's A is Q·A_0 with Q
orthogonal; isotropic noise Z has the law of Z·Qᵀ, so feeding FedSVD the rotated
draw couples the two runs and turns equality in law into equality.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fedlr.lowrank.factors import AdapterSite
from fedlr.lowrank.subspace import Subspace, kaiming, orthonormal
from fedlr.methods.fedsvd import FedSVD
from fedlr.methods.ffa_lora import FFALoRA
from fedlr.methods.method import ClientUpdate, Layout, Method, PartKey, Role

SITE = AdapterSite("q", out_features=12, in_features=20, rank=4, scaling=2.0)
LAYOUT = Layout((SITE,))
A, B = PartKey("q", Role.A), PartKey("q", Role.B)
ROUNDS, STEPS, CLIENTS, EXAMPLES = 3, 5, 3, 30
CLIP, NOISE, RATE = 40.0, 0.5, 0.05

Direction = Callable[[Tensor], Tensor]
"""Clipped, noised mean gradient → step; the identity is plain SGD."""


def data(client: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(client)
    target = torch.randn(SITE.out_features, SITE.in_features, generator=generator)
    x = torch.randn(EXAMPLES, SITE.in_features, generator=generator)
    return x, x @ target.mT


def clipped_gradients(b: Tensor, a: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of the clipped per-example gradients of ½‖sBAx − y‖², and which were clipped."""
    hidden = x @ a.mT
    delta = SITE.scaling * hidden @ b.mT - y
    gradients = SITE.scaling * delta.unsqueeze(2) * hidden.unsqueeze(1)  # (N, m, r)
    norms = gradients.flatten(1).norm(dim=1)
    factors = (CLIP / norms).clamp_max(1.0)
    return (factors[:, None, None] * gradients).sum(dim=0), norms > CLIP


def train(
    client: int, round_index: int, b: Tensor, a: Tensor, rotation: Tensor, direction: Direction
) -> tuple[Tensor, Tensor]:
    x, y = data(client)
    generator = torch.Generator().manual_seed(1000 * round_index + client)
    clipped = torch.zeros(0, dtype=torch.bool)
    for _ in range(STEPS):
        total, over = clipped_gradients(b, a, x, y)
        noise = torch.randn(b.shape, generator=generator) @ rotation.mT
        b = b - RATE * direction((total + CLIP * NOISE * noise) / EXAMPLES)
        clipped = torch.cat([clipped, over])
    return b, clipped


def run(method: Method, direction: Direction = lambda step: step) -> tuple[Tensor, float]:
    """B·A after the rounds, and the share of examples that were clipped."""
    state = method.init(LAYOUT, torch.Generator().manual_seed(0))
    first = state.parts[A]
    clipped = []
    for round_index in range(ROUNDS):
        down = method.broadcast(state)
        rotation = down[A] @ torch.linalg.pinv(first)  # Q of A = Q·A_0
        updates = []
        for client in range(CLIENTS):
            b, over = train(client, round_index, down[B], down[A], rotation, direction)
            updates.append(ClientUpdate(f"c{client}", {B: b}, STEPS))
            clipped.append(over)
        state = method.aggregate(state, updates, [1, 2, 3])
    return state.parts[B] @ state.parts[A], float(torch.cat(clipped).float().mean())


def difference(subspace: Subspace, direction: Direction = lambda step: step) -> float:
    """Relative Frobenius difference of B·A between FedSVD and FFA-LoRA."""
    ours, _ = run(FedSVD(subspace), direction)
    theirs, _ = run(FFALoRA(subspace), direction)
    return float((ours - theirs).norm() / theirs.norm())


def test_equal_under_sgd_with_frobenius_clipping_and_noise() -> None:
    product, share = run(FFALoRA(orthonormal))
    assert float(product.norm()) > 0.1
    assert 0.1 < share < 0.9  # some examples are clipped and some are not
    assert difference(orthonormal) <= 1e-5


def test_fedsvd_does_rotate_a() -> None:
    method = FedSVD(orthonormal)
    state = method.init(LAYOUT, torch.Generator().manual_seed(0))
    b, _ = train(0, 0, state.parts[B], state.parts[A], torch.eye(SITE.rank), lambda step: step)
    new = method.aggregate(state, [ClientUpdate("c", {B: b}, STEPS)], [1])
    assert float((new.parts[A] - state.parts[A]).norm()) > 0.5


def test_not_equal_from_an_a_whose_rows_are_not_orthonormal() -> None:
    assert difference(kaiming) > 1e-2


def test_not_equal_under_an_element_wise_optimiser() -> None:
    assert difference(orthonormal, torch.sign) > 1e-2
