"""Bias tables for another window: SciPy's spline, the published ratios, the gradient, errors."""

import pytest
import torch

from mimfast._check import UserError
from mimfast.encoders.tables import _ratio, geometric_resize, resize_matrix, spline_matrix

SCIPY = "scipy is the peer of this test and comes with scikit-learn: pip install 'mimfast[demo]'"


def test_the_ratios_of_the_published_windows() -> None:
    assert _ratio(3, 6) == pytest.approx(1.7913, abs=1e-4)  # 4 -> 7, beyond 1.5
    assert _ratio(5, 6) == pytest.approx(1.0913, abs=1e-4)  # 6 -> 7
    assert _ratio(6, 3) < 1  # 7 -> 4
    assert _ratio(2, 6) == pytest.approx(5)  # 3 -> 7


@pytest.mark.parametrize(
    ("window_from", "window_to"), [(4, 7), (6, 7), (7, 4), (3, 7), (12, 14), (4, 5), (7, 12), (3, 2), (12, 6)]
)
def test_equals_scipys_spline(window_from: int, window_to: int) -> None:
    interpolate = pytest.importorskip("scipy.interpolate", reason=SCIPY)
    n, m, s = window_from - 1, window_to - 1, 2 * window_from - 1
    q = _ratio(n, m)
    right = [sum(q**i for i in range(k)) for k in range(1, n + 1)]
    points = [-x for x in reversed(right)] + [0.0] + right
    table = torch.randn(s * s, 3, dtype=torch.float64)
    found = geometric_resize(table, window_from, window_to).view(2 * m + 1, 2 * m + 1, 3)
    reach = min(m, right[-1])
    wanted = [min(max(k, -reach), reach) for k in range(-m, m + 1)]
    for head in range(3):
        values = table[:, head].view(s, s).numpy()
        spline = interpolate.RectBivariateSpline(points, points, values, kx=3, ky=3, s=0)
        assert torch.allclose(found[:, :, head], torch.from_numpy(spline(wanted, wanted)), atol=1e-9)


def test_the_farthest_offsets_and_the_centre_stay() -> None:
    table = torch.randn(49, 2)
    old, new = table.view(7, 7, 2), geometric_resize(table, 4, 7).view(13, 13, 2)
    for a, b in ((0, 0), (3, 6), (6, 12), (2, 5), (4, 7)):
        assert torch.allclose(new[b, b], old[a, a], atol=1e-5)
        assert torch.allclose(new[b, 6], old[a, 3], atol=1e-5)


@pytest.mark.parametrize("pair", [(4, 7), (7, 4), (2, 3), (1, 4), (5, 1), (2, 7), (7, 2), (3, 3)])
def test_constants_stay_constant(pair: tuple[int, int]) -> None:
    side = 2 * pair[1] - 1
    new = geometric_resize(torch.full(((2 * pair[0] - 1) ** 2, 2), 3.0), *pair)
    assert torch.allclose(new, torch.full((side * side, 2), 3.0), atol=1e-5)


def test_a_window_of_two_keeps_its_neighbours_and_repeats_them_farther_out() -> None:
    table = torch.randn(9, 1)
    assert torch.allclose(geometric_resize(table, 2, 4).view(7, 7)[2:5, 2:5], table.view(3, 3), atol=1e-6)
    assert torch.allclose(geometric_resize(table, 2, 4).view(7, 7)[0], geometric_resize(table, 2, 4).view(7, 7)[2])


def test_is_the_kronecker_matrix_and_so_is_the_gradient() -> None:
    m = resize_matrix(4, 7)
    both = torch.kron(m, m)
    table = torch.randn(49, 5, dtype=torch.float64, requires_grad=True)
    out = geometric_resize(table, 4, 7)
    assert torch.allclose(out, both @ table)
    weight = torch.randn_like(out)
    (out * weight).sum().backward()
    assert table.grad is not None
    assert torch.allclose(table.grad, both.T @ weight)


def test_a_cubic_is_reproduced() -> None:
    at = torch.tensor([-3.0, -1.0, 0.5, 2.0, 2.5, 4.0], dtype=torch.float64)
    wanted = torch.linspace(-3, 4, 23, dtype=torch.float64)

    def cubic(x: torch.Tensor) -> torch.Tensor:
        return 2 * x**3 - x**2 + 5 * x - 1

    assert torch.allclose(spline_matrix(at, wanted) @ cubic(at), cubic(wanted))


def test_dtype_and_errors() -> None:
    assert geometric_resize(torch.zeros(49, 2, dtype=torch.bfloat16), 4, 7).dtype == torch.bfloat16
    table = torch.zeros(49, 2)
    assert geometric_resize(table, 4, 4) is table
    with pytest.raises(
        UserError, match=r"geometric_resize: table has shape \(49, 2\), expected \(169, any\) because win"
    ):
        geometric_resize(table, 7, 4)
    with pytest.raises(UserError, match=r"geometric_resize: window_to has 0, expected at least 1 because"):
        geometric_resize(table, 4, 0)
