"""Where the first A comes from: the row space a federation trains in.

With B trained alone, row(B·A) ⊆ row(A) in every round, so this choice, and
not the refactorisation, decides what the adapter can learn (package README).

``kaiming`` and ``orthonormal`` need a generator alone. The others read off *ordered*
directions: of the base weight, of the layer's input on public text, or of the gradient on
public text. Nothing private may be given to them, and then none costs privacy: the ledger
books what a site releases, and a direction computed from its rows would be a release.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fedlr import checks
from fedlr.lowrank.factors import AdapterSite
from fedlr.lowrank.svd import sign_of_largest

Draw = Callable[[AdapterSite, torch.Generator], Tensor]
"""(site, generator) → A of shape (r, n), or a basis of shape (m, r); float32.

Draws from the generator only, and lies on its device, so sites in the same order and an
equally seeded generator give the same A on one machine; across machines send A itself.
"""


Block = Callable[[AdapterSite, int], Tensor]
"""(site, turn ≥ 0) → the turn-th r of a site's ordered directions, shape (r, n), float32."""


@dataclass(frozen=True)
class Subspace:
    """One policy.

    Attributes:
        name: Name in the configuration.
        rows: A of a site, shape (r, n).
        columns: Orthonormal columns for the output side of a site, shape (m, r), for the
            methods that train a core between two fixed bases (Fed-SB).
        block: Where the rows are not drawn but ordered: which of them a later turn gets.
            None where the generator makes every draw new.
    """

    name: str
    rows: Draw
    columns: Draw
    block: Block | None = None

    def __call__(self, site: AdapterSite, generator: torch.Generator) -> Tensor:
        """Return A of ``site``: `rows`."""
        return self.rows(site, generator)

    def redraw(self, site: AdapterSite, generator: torch.Generator, turn: int) -> Tensor:
        """Return another A, once an earlier one has been folded into the base.

        Args:
            site: Whose A.
            generator: Source of a new draw; not read where the directions are ordered.
            turn: How many draws came before, ≥ 0.

        Returns:
            Shape (r, n), float32. Drawn anew; or the next r of the ordered directions, as
            the same A again would span what has been trained, and begin again with the
            first ones when fewer than r are left.
        """
        return self.rows(site, generator) if self.block is None else self.block(site, turn)


@dataclass(frozen=True)
class Directions:
    """Directions of one site, the most wanted first.

    Attributes:
        rows: Orthonormal rows for A, shape (k, n), float32, k ≥ r.
        columns: Orthonormal columns that belong to them, shape (m, k), float32; None
            where there are none, and an orthonormal basis is drawn.
    """

    rows: Tensor
    columns: Tensor | None = None

    def block(self, rank: int, turn: int) -> Tensor:
        """Return rows [turn·r, (turn + 1)·r), counted again from the first where they end.

        Args:
            rank: r, in [1, k].
            turn: ≥ 0.

        Returns:
            Shape (r, n); of the k rows the last k mod r are never used.
        """
        checks.in_range("rank", rank, 1, len(self.rows))
        start = checks.at_least("turn", turn, 0) % (len(self.rows) // rank) * rank
        return self.rows[start : start + rank].clone()


Found = Callable[[], Mapping[str, Directions]]
"""The directions of every site by its name; may take long, and is called when one is drawn."""


def ordered(name: str, found: Found) -> Subspace:
    """Return the policy that takes its A's from directions, in their order.

    Args:
        name: Name in the configuration.
        found: Called at the first draw, not before: a process that is sent its A needs
            no directions. It must keep what it has computed.

    Example:
        >>> site = AdapterSite("q", out_features=4, in_features=4, rank=2, scaling=1.0)
        >>> policy = ordered("own", lambda: {"q": Directions(torch.eye(4))})
        >>> policy.redraw(site, torch.Generator(), turn=1).tolist()
        [[0.0, 0.0, 1.0, 0.0], [0.0, 0.0, 0.0, 1.0]]
    """

    def block(site: AdapterSite, turn: int) -> Tensor:
        return found()[site.name].block(site.rank, turn)

    def columns(site: AdapterSite, generator: torch.Generator) -> Tensor:
        given = found()[site.name].columns
        if given is None:
            return orthonormal_columns(site, generator)
        return given[:, : site.rank].clone()

    def rows(site: AdapterSite, generator: torch.Generator) -> Tensor:
        return block(site, 0).to(generator.device)

    return Subspace(name, rows, columns, block)


def singular_directions(matrix: Tensor, rank: int, keep: int, minor: bool = False) -> Directions:
    """Return leading, or trailing, singular directions of a matrix.

    Of W = U Σ Vᵀ (thin, σ_1 ≥ … ≥ σ_k, k = min(m, n)) rows of Vᵀ and columns of U. The null
    space of a wide W is not among the minor directions, as in MiLoRA.

    Args:
        matrix: W or a gradient, shape (m, n), finite, any floating dtype and device.
        rank: r, least number of directions, ≥ 1.
        keep: Largest number of them, ≥ r; as many as there are, where there are fewer.
        minor: Take the smallest singular values, smallest first, instead of the largest.

    Returns:
        Rows (q, n) and columns (m, q), r ≤ q ≤ ``keep``, float32 on the CPU.

    Raises:
        ValueError: An entry is not finite; ``rank`` exceeds min(m, n) or, unless ``minor``,
            the number of singular values above rounding: the others have no direction.

    Guarantees:
        Computed in float64, rounded once. The entry of largest magnitude in each row is
        positive, and its column has the matching sign: distinct singular values fix the
        result. Equal ones (and σ = 0 among the minor) leave a rotation open.

    Example:
        >>> w = torch.tensor([[0.0, -3.0, 0.0], [2.0, 0.0, 0.0]])
        >>> singular_directions(w, 1, 1).rows.abs().tolist()
        [[0.0, 1.0, 0.0]]
        >>> singular_directions(w, 1, 1, minor=True).columns.tolist()
        [[0.0], [1.0]]

    Reference:
        Leading: PiSSA, Meng et al., arXiv 2404.02948, section 3, and of a gradient LoRA-SB,
        Ponkshe et al., arXiv 2411.19557. Minor: MiLoRA, Wang et al., arXiv 2406.09044. Of
        these only the subspace is taken: B starts at 0, and W is left whole.
    """
    left, sigma, right = torch.linalg.svd(_finite(matrix), full_matrices=False)
    count = len(sigma) if minor else _above_rounding(sigma, max(matrix.shape))
    _check_available(rank, count)
    if minor:
        left, right = left.flip(-1), right.flip(-2)
    kept = min(keep, count)
    rows, columns = right[:kept].float(), left[:, :kept].float()
    sign = sign_of_largest(rows)
    return Directions((rows * sign.unsqueeze(-1)).contiguous(), (columns * sign).contiguous())


@dataclass(frozen=True)
class Moments:
    """What principal directions need of N vectors.

    Attributes:
        count: N ≥ 0.
        total: Σ x, shape (n,), float64.
        squares: Σ x·xᵀ, shape (n, n), float64.
    """

    count: int
    total: Tensor
    squares: Tensor


def principal_directions(moments: Moments, rank: int, keep: int) -> Directions:
    """Return the principal directions of vectors: what varies most among them.

    Leading eigenvectors of the covariance E[xxᵀ] − E[x]E[x]ᵀ. It is centred: what all
    inputs share is not variance, and would only be a bias of the layer.

    Args:
        moments: Of the vectors.
        rank: r, least number of directions, ≥ 1.
        keep: Largest number of them, ≥ r.

    Returns:
        Rows (q, n), r ≤ q ≤ ``keep``, float32 on the CPU, largest variance first, signs as
        in `singular_directions`; no columns.

    Raises:
        ValueError: Not finite, or fewer than ``rank`` variances above rounding: N vectors
            span at most N − 1 directions around their mean.

    Example:
        >>> x = torch.tensor([[5.0, 1.0], [5.0, -1.0]], dtype=torch.float64)
        >>> principal_directions(Moments(2, x.sum(0), x.T @ x), 1, 1).rows.tolist()
        [[0.0, 1.0]]

    Reference:
        EVA, Paischer et al., arXiv 2410.07170, which takes right singular vectors of
        activations; centred as in its implementation in PEFT, an incremental PCA.
    """
    mean = _finite(moments.total) / max(moments.count, 1)
    centred = _finite(moments.squares) / max(moments.count, 1) - torch.outer(mean, mean)
    variance, vectors = torch.linalg.eigh((centred + centred.mT) / 2)
    variance, rows = variance.flip(0).clamp_min(0), vectors.flip(-1).mT
    # Rounding of the difference is of the order of the second moment that was subtracted from.
    scale = (mean.square().sum() + variance[:1].sum()).reshape(1)
    count = _above_rounding(torch.cat([scale, variance]), len(variance)) - 1
    _check_available(rank, min(max(count, 0), max(moments.count - 1, 0)))
    kept = rows[: min(keep, count)].float()
    return Directions((kept * sign_of_largest(kept).unsqueeze(-1)).contiguous())


def _finite(matrix: Tensor) -> Tensor:
    """``matrix`` in float64 on the CPU; ValueError where an entry is not finite."""
    exact = matrix.detach().to("cpu", torch.float64)
    if not bool(torch.isfinite(exact).all()):
        raise ValueError("it holds NaN or infinite entries; every entry must be finite")
    return exact


def _above_rounding(values: Tensor, size: int) -> int:
    """How many of ``values`` are above ``size`` roundings of the first, the largest.

    The rounding is that of float32, in which models compute what is decomposed.
    """
    largest = float(values[0])
    return int((values > size * torch.finfo(torch.float32).eps * largest).sum())


def _check_available(rank: int, count: int) -> None:
    checks.at_least("rank", rank, 1)
    if rank > count:
        raise ValueError(
            f"rank = {rank} must be ≤ {count}, the number of directions that there are"
        )


def kaiming_rows(site: AdapterSite, generator: torch.Generator) -> Tensor:
    """Return A with independent entries from U(−1/√n, 1/√n), PEFT's default.

    Kaiming-uniform with a = √5 has bound √(2 / (1 + a²)) · √(3 / n) = 1/√n, so
    a row has expected squared norm n · (1/3n) = 1/3: rows of norm ≈ 0.58.

    Args:
        site: Gives r and n.
        generator: Source of the draws; advanced.

    Returns:
        Shape (r, n), float32.

    Reference:
        He et al., arXiv 1502.01852, section 2.2; LoRA, arXiv 2106.09685, section 4.1.
    """
    bound = 1.0 / math.sqrt(site.in_features)
    shape = (site.rank, site.in_features)
    uniform = torch.rand(shape, generator=generator, device=generator.device)
    return uniform.mul_(2.0).sub_(1.0).mul_(bound)


def orthonormal_rows(site: AdapterSite, generator: torch.Generator) -> Tensor:
    """Return A with A·Aᵀ = I, its row space uniform on the Grassmannian.

    Q of the QR of an n × r Gaussian, with the sign of each column fixed by the
    diagonal of R: then Q is Haar-distributed (Mezzadri, arXiv math-ph/0609050,
    section 5). PEFT's ``"orthogonal"`` initialisation is something else: its A
    does not have orthonormal rows.

    Args:
        site: Gives r and n.
        generator: Source of the draws; advanced.

    Returns:
        Shape (r, n), float32; A·Aᵀ = I up to float32 rounding (computed in float64).

    Example:
        >>> site = AdapterSite("q", out_features=4, in_features=6, rank=3, scaling=1.0)
        >>> a = orthonormal(site, torch.Generator().manual_seed(0))
        >>> bool(torch.allclose(a @ a.T, torch.eye(3), atol=1e-6))
        True
    """
    return _orthonormal(site.in_features, site.rank, generator).mT.contiguous()


def orthonormal_columns(site: AdapterSite, generator: torch.Generator) -> Tensor:
    """Return a basis with orthonormal columns, shape (m, r), float32, drawn likewise."""
    return _orthonormal(site.out_features, site.rank, generator)


def _orthonormal(size: int, rank: int, generator: torch.Generator) -> Tensor:
    """Haar-distributed orthonormal columns, shape (size, rank), float32."""
    gaussian = torch.randn(
        (size, rank), generator=generator, device=generator.device, dtype=torch.float64
    )
    basis, triangle = torch.linalg.qr(gaussian)
    sign = torch.where(triangle.diagonal() < 0, -1.0, 1.0)
    columns: Tensor = basis * sign
    return columns.float()


kaiming = Subspace("kaiming", kaiming_rows, orthonormal_columns)
orthonormal = Subspace("orthonormal", orthonormal_rows, orthonormal_columns)

SUBSPACES: Mapping[str, Subspace] = {"kaiming": kaiming, "orthonormal": orthonormal}
"""The policies that need nothing but a generator, by their configuration name.

`fedlr.method_choice` makes the others, which look at the model, with `ordered`."""
