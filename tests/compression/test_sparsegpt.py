"""SparseGPT against the optimal update and the choice of weights, both solved from scratch in float64."""

import pytest
import torch

from compression.pruning.sparsegpt import sparsegpt
from compression.pruning.wanda import wanda


def layer(rows: int = 6, width: int = 16, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A random weight, and the second moment of correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(400, width, generator=generator) @ torch.randn(width, width, generator=generator)
    return torch.randn(rows, width, generator=generator), x.T @ x / len(x)


def damped(hessian: torch.Tensor, damp_percent: float = 0.01) -> torch.Tensor:
    return hessian.double() + damp_percent * hessian.diagonal().mean().double() * torch.eye(len(hessian), dtype=torch.float64)


def choose_and_solve(
    weight: torch.Tensor, hessian: torch.Tensor, rows: list[int], sparsity: float, group: tuple[int, int] | None, run: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Column by column: choose where a run (or group) begins, prune, and set all columns that follow to the minimum of
    (w - w0)H(w - w0)T given those settled, solved from scratch."""
    h, original, current = damped(hessian), weight.double(), weight.double().clone()
    keep = torch.ones(weight.shape, dtype=torch.bool)
    span = group[1] if group else run
    for j in range(weight.shape[1]):
        if j % span == 0:
            columns = range(j, min(j + span, weight.shape[1]))
            left = [
                1 / float(torch.linalg.inv(h[c:, c:])[0, 0]) for c in columns
            ]  # what removing a column costs once all before are settled
            costs = current[:, columns].square() * torch.tensor(left, dtype=torch.float64)
            chosen = torch.ones_like(costs, dtype=torch.bool)
            if group:
                chosen.scatter_(1, costs.argsort(1)[:, : group[1] - group[0]], False)
            else:
                for part, kept in zip(costs.split(rows), chosen.split(rows), strict=True):
                    lowest = sorted(range(part.numel()), key=part.flatten().tolist().__getitem__)[: round(sparsity * part.numel())]
                    for position in lowest:
                        kept[position // part.shape[1], position % part.shape[1]] = False
            keep[:, columns] = chosen
        current[:, j] *= keep[:, j]
        rest = list(range(j + 1, weight.shape[1]))
        shift = (current[:, : j + 1] - original[:, : j + 1]) @ h[: j + 1][:, rest]
        current[:, rest] = original[:, rest] - torch.linalg.solve(h[rest][:, rest], shift.T).T
    return current, keep


@pytest.mark.parametrize("run", [5, 8, 128])
@pytest.mark.parametrize(
    ("sparsity", "group"), [(0.5, None), (0.3, None), (0.8, None), (0.5, (2, 4)), (0.5, (4, 8))], ids=["50%", "30%", "80%", "2:4", "4:8"]
)
def test_choice_and_weights_are_those_of_the_optimal_update(
    run: int, sparsity: float, group: tuple[int, int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compression.pruning.sparsegpt.COLUMNS_PER_SELECTION", max(run, group[1] if group else 0))
    weight, hessian = layer()
    before = weight.clone()
    solved = sparsegpt(weight, hessian, rows=[4, 2], sparsity=sparsity, group=group)
    assert solved is not None
    expected, kept = choose_and_solve(weight, hessian, [4, 2], sparsity, group, run)
    assert torch.equal(solved[1], kept)
    torch.testing.assert_close(solved[0].double(), expected, rtol=1e-3, atol=1e-3)
    assert torch.equal(solved[0] == 0, ~solved[1])
    assert torch.equal(weight, before)


def test_layers_that_share_an_input_come_out_as_if_alone() -> None:
    weight, hessian = layer(rows=10)
    weight[6:] *= 100  # one threshold for both would prune the first layer only
    together = sparsegpt(weight, hessian, rows=[6, 4], sparsity=0.5)
    assert together is not None
    for rows in (slice(0, 6), slice(6, 10)):
        alone = sparsegpt(weight[rows], hessian, rows=[rows.stop - rows.start], sparsity=0.5)
        assert alone is not None
        assert torch.equal(together[1][rows], alone[1])
        torch.testing.assert_close(together[0][rows], alone[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("group", [None, (2, 4)])
def test_the_output_is_nearer_than_without_compensation(seed: int, group: tuple[int, int] | None) -> None:
    """Over more than one run of columns: within the first, all is chosen before anything is made up for, and the greedy choice may lose."""
    weight, hessian = layer(rows=32, width=256, seed=seed)
    sizes = torch.randn(256, generator=torch.Generator().manual_seed(seed)).exp()  # of the inputs; magnitude does not see them
    hessian *= sizes.outer(sizes)

    def error(pruned: torch.Tensor) -> float:
        change = pruned.double() - weight.double()
        return float((change @ hessian.double() * change).sum())

    solved = sparsegpt(weight, hessian, rows=[32], sparsity=0.5, group=group)
    assert solved is not None
    by_wanda, _ = wanda(weight, hessian.diagonal(), sparsity=0.5, group=group)
    by_magnitude, _ = wanda(weight, torch.ones(256), sparsity=0.5, group=group)
    assert error(solved[0]) < error(by_wanda) < error(by_magnitude)


def test_what_is_pruned_already_stays_so_and_counts() -> None:
    weight, hessian = layer(rows=8, width=32)
    kept = torch.rand(8, 32, generator=torch.Generator().manual_seed(1)) > 0.3
    solved = sparsegpt(weight * kept, hessian, rows=[8], sparsity=0.5, kept=kept)
    assert solved is not None
    assert not (solved[1] & ~kept).any()
    assert int((~solved[1]).sum()) == 128
    less = sparsegpt(weight * kept, hessian, rows=[8], sparsity=0.1, kept=kept)
    assert less is not None
    assert torch.equal(less[1], kept)


def test_an_input_that_is_always_zero_goes_first_and_disturbs_no_other() -> None:
    weight, hessian = layer(rows=4)
    hessian[5], hessian[:, 5] = 0, 0
    weight[:, 5] = 100
    solved = sparsegpt(weight, hessian, rows=[4], sparsity=0.25)
    assert solved is not None
    assert (solved[0][:, 5] == 0).all()
    weight[:, 5] = 7
    other = sparsegpt(weight, hessian, rows=[4], sparsity=0.25)
    assert other is not None
    assert torch.equal(other[0], solved[0])


def test_a_hessian_without_an_inverse_is_refused() -> None:
    assert sparsegpt(torch.ones(4, 4), torch.ones(4, 4), rows=[4], sparsity=0.5, damp_percent=0.0) is None
