"""Orthogonal matrices for rotations: Hadamard matrices of every order that Paley's and Sylvester's methods reach.

A Hadamard matrix divided by sqrt(n) spreads any one channel evenly over all n, which is what a rotation is for.
Sylvester doubles an order; Paley (1933) gives order q + 1 for a prime q = 3 mod 4 and 2 (q + 1) for a prime
q = 1 mod 4. Together they reach every hidden width of the models we work with: 576 = 36 x 16, 896 = 28 x 32,
3,072 = 12 x 256. What they do not reach gets a random orthogonal matrix.
"""

from __future__ import annotations

import torch


def randomised_hadamard(order: int, generator: torch.Generator) -> torch.Tensor:
    """An orthogonal float32 (n, n): Hadamard / sqrt(n) with random signs of its rows, as QuaRot's (2404.00456).

    Where no Hadamard matrix of that order is known here, a random orthogonal matrix.
    """
    matrix_nn = hadamard(order)
    if matrix_nn is None:
        return random_orthogonal(order, generator)
    sign_n = torch.randint(0, 2, (order,), generator=generator).float() * 2 - 1
    turned_nn: torch.Tensor = sign_n[:, None] * matrix_nn / order**0.5
    return turned_nn


def random_orthogonal(order: int, generator: torch.Generator) -> torch.Tensor:
    """An orthogonal float32 (n, n), evenly distributed: QR of a normal matrix with R's diagonal made positive."""
    normal_nn = torch.randn(order, order, generator=generator, dtype=torch.float64)
    q_nn, r_nn = torch.linalg.qr(normal_nn)
    turned_nn: torch.Tensor = (q_nn * r_nn.diagonal().sign()).float()
    return turned_nn


def hadamard(order: int) -> torch.Tensor | None:
    """A matrix (n, n) of +1 and -1 with orthogonal rows, float32; None where neither method gives one."""
    size, doublings = order, 0
    while True:
        core = torch.ones(1, 1) if size == 1 else _paley(size)
        if core is not None:
            for _ in range(doublings):
                core = torch.cat([torch.cat([core, core], 1), torch.cat([core, -core], 1)])
            return core
        if size % 2:
            return None
        size, doublings = size // 2, doublings + 1


def _paley(order: int) -> torch.Tensor | None:
    """Paley's matrices, of the first or the second kind; None where the order is of neither."""
    if order == 2:
        return torch.tensor([[1.0, 1.0], [1.0, -1.0]])
    if order % 4 == 0 and _is_prime(order - 1):  # the first kind: order - 1 is then 3 mod 4
        return torch.eye(order) + _conference(order - 1, -1.0)
    if order % 4 == 0 and (order // 2 - 1) % 4 == 1 and _is_prime(order // 2 - 1):
        conference = _conference(order // 2 - 1, 1.0)
        return torch.kron(conference, torch.tensor([[1.0, 1.0], [1.0, -1.0]])) + torch.kron(
            torch.eye(order // 2), torch.tensor([[1.0, -1.0], [-1.0, -1.0]])
        )
    return None


def _conference(prime: int, corner: float) -> torch.Tensor:
    """The (q + 1, q + 1) matrix C with zeros on its diagonal, +-1 elsewhere and C C^T = q I.

    Its core is the Legendre symbol of i - j; `corner` is the sign of its first column: C is symmetric for +1 (q = 1
    mod 4), skew for -1 (q = 3 mod 4).
    """
    squares = {(i * i) % prime for i in range(1, prime)}
    legendre = torch.tensor([0.0] + [1.0 if i in squares else -1.0 for i in range(1, prime)])
    index = torch.arange(prime)
    conference = torch.zeros(prime + 1, prime + 1)
    conference[0, 1:], conference[1:, 0] = 1.0, corner
    conference[1:, 1:] = legendre[(index[:, None] - index[None]) % prime]
    return conference


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % i for i in range(2, int(number**0.5) + 1))
