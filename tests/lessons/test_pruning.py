"""Masks are those of torch's own pruning and of exhaustive search; SparseGPT's weights are those of least squares."""

from itertools import combinations

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.ao.pruning import WeightNormSparsifier
from torch.nn.utils import prune
from torch.sparse._semi_structured_conversions import sparse_semi_structured_from_dense_cutlass

from qwlib import QwlibError
from qwlib.lessons import pruning


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def correlated(tokens: int, columns: int) -> torch.Tensor:
    """Inputs that share directions, and whose columns are of different sizes."""
    shared = random(tokens, columns // 4, seed=1) @ random(columns // 4, columns, seed=2) / (columns // 4) ** 0.5
    return (shared + 0.3 * random(tokens, columns, seed=3)) * (0.7 * random(columns, seed=4)).exp()


def linear(weight: torch.Tensor) -> nn.Linear:
    layer = nn.Linear(*weight.T.shape, bias=False)
    layer.weight.data = weight.clone()
    return layer


def off(x, weight, other) -> float:
    """The error of the output."""
    return (x.double() @ (weight - other).double().T).norm().item()


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.floats(0, 1), st.integers(0, 99))
def test_unstructured_masks_are_torchs(rows, columns, sparsity, seed):
    weight = random(rows, columns, seed=seed)
    whole = prune.l1_unstructured(linear(weight), "weight", amount=sparsity).weight_mask
    assert torch.equal(pruning.magnitude(weight, sparsity), whole.bool())
    each = [prune.l1_unstructured(linear(row[None]), "weight", amount=sparsity).weight_mask for row in weight]
    assert torch.equal(pruning.magnitude(weight, sparsity, "row"), torch.cat(each).bool())


@pytest.mark.parametrize("sparsity", [0.0, 0.25, 0.5, 1.0])
def test_rows_are_torchs(sparsity):
    weight = random(12, 7)
    theirs = prune.ln_structured(linear(weight), "weight", amount=sparsity, n=2, dim=0).weight_mask
    assert torch.equal(pruning.rows(weight, sparsity), theirs.bool())


def test_equal_weights_go_from_the_left():
    assert pruning.magnitude(torch.ones(1, 4), 0.5).tolist() == [[False, False, True, True]]
    assert pruning.two_of_four(torch.ones(1, 4)).tolist() == [[False, False, True, True]]
    assert pruning.magnitude(torch.ones(2, 2), 0.75).tolist() == [[False, False], [False, True]]


def test_the_hessian_has_the_squares_of_the_norms():
    x = random(2, 9, 6)
    assert torch.allclose(pruning.hessian(x).diagonal().float(), pruning.norms(x).square(), rtol=1e-5)
    assert not torch.allclose(pruning.hessian(x[:, :8]).diagonal().float(), pruning.norms(x).square(), rtol=1e-3)


def test_wanda_is_the_best_choice_where_inputs_are_uncorrelated():
    weight, sizes = random(3, 8), (2 * random(8, seed=5)).exp()
    x = torch.linalg.qr(random(40, 8, seed=6)).Q * sizes
    mask = pruning.wanda(weight, pruning.norms(x), 0.5)
    for row, kept in zip(weight, mask, strict=True):
        choices = [list(choice) for choice in combinations(range(8), 4)]
        errors = [(x[:, choice] @ row[choice]).norm().item() for choice in choices]
        best = choices[errors.index(min(errors))]
        assert (~kept).nonzero().flatten().tolist() == best
    assert not torch.equal(mask, pruning.magnitude(weight, 0.5, "row"))
    assert torch.equal(pruning.wanda(weight, torch.full((8,), 3.0), 0.5), pruning.magnitude(weight, 0.5, "row"))


def test_two_of_four_is_torchs_and_the_best_of_the_six_choices():
    weight = random(16, 32)
    mask = pruning.two_of_four(weight.abs())
    model = nn.Sequential(linear(weight))
    theirs = WeightNormSparsifier(sparsity_level=1.0, sparse_block_shape=(1, 4), zeros_per_block=2)
    theirs.prepare(model, [{"tensor_fqn": "0.weight"}])
    theirs.step()
    assert torch.equal(mask, model[0].parametrizations.weight[0].mask.bool())
    for four, kept in zip(weight.abs().reshape(-1, 4), mask.reshape(-1, 4), strict=True):
        assert kept.sum() == 2
        assert four[kept].sum() == max(four[list(choice)].sum() for choice in combinations(range(4), 2))


def defined(weight, hessian, kept=None, sparsity=0.0, block=pruning.BLOCK):
    """SparseGPT from its definition: the inverse of the remaining Hessian is computed anew for every column."""
    w, rows, columns = weight.double().clone(), *weight.shape
    inverses = [torch.linalg.inv(hessian[j:, j:]) for j in range(columns)]
    mask = torch.ones(rows, columns, dtype=torch.bool) if kept is None else kept.clone()
    for j in range(columns):
        if kept is None and j % block == 0:
            end = min(j + block, columns)
            scores = torch.stack([w[:, c] ** 2 / inverses[c][0, 0] for c in range(j, end)], dim=1)
            threshold = scores.flatten().sort().values[round(sparsity * scores.numel())]
            mask[:, j:end] = scores >= threshold
        step = torch.where(mask[:, j], 0, w[:, j] / inverses[j][0, 0])
        w[:, j:] -= step[:, None] * inverses[j][0]
    return torch.where(mask, w, 0)


def test_sparsegpt_is_its_definition_beyond_a_block():
    weight, x = random(6, 160), correlated(400, 160)
    hessian = pruning.hessian(x)
    wanted = defined(weight, hessian + 0.01 * hessian.diagonal().mean() * torch.eye(160), sparsity=0.5)
    got = pruning.sparsegpt(weight, hessian, 0.5)
    assert torch.equal(got == 0, wanted == 0)
    assert torch.allclose(got.double(), wanted, rtol=1e-4, atol=1e-5)
    kept = random(6, 160, seed=8) > 0
    given = pruning.sparsegpt(weight, hessian, kept, damp=0)
    assert torch.allclose(given.double(), defined(weight, hessian, kept), rtol=1e-4, atol=1e-5)
    # the tolerance tells damping from none
    assert not torch.allclose(given, pruning.sparsegpt(weight, hessian, kept, damp=0.01), rtol=1e-4, atol=1e-5)


def test_two_of_four_by_sparsegpt_is_its_definition_row_by_row():
    weight, x = random(3, 140), correlated(400, 140)
    hessian = pruning.hessian(x)
    got = pruning.sparsegpt(weight, hessian, "2:4", damp=0)
    wanted = torch.cat([defined(row[None], hessian, sparsity=0.5, block=4) for row in weight])
    assert torch.equal(got == 0, wanted == 0)
    assert torch.allclose(got.double(), wanted, rtol=1e-4, atol=1e-5)
    # weights are corrected before later ones are chosen
    assert not torch.equal(got != 0, pruning.two_of_four(weight.abs()))


def best(x, row, kept):
    """The weights of the kept columns with the least error of the output."""
    found = torch.zeros(len(row), dtype=torch.float64)
    found[kept] = torch.linalg.lstsq(x.double()[:, kept], (x.double() @ row.double())[:, None]).solution.flatten()
    return found


def test_columns_that_come_first_are_made_up_for_exactly():
    weight, x = random(4, 24), correlated(80, 24)
    kept = (torch.arange(24) >= 10).expand(4, 24)
    got = pruning.sparsegpt(weight, pruning.hessian(x), kept, damp=0)
    wanted = torch.stack([best(x, row, kept[0]) for row in weight])
    assert torch.allclose(got.double(), wanted, rtol=1e-4, atol=1e-4)
    assert not torch.allclose((weight * kept).double(), wanted, rtol=1e-4, atol=1e-4)


def test_columns_that_come_last_are_not_made_up_for():
    weight, x = random(4, 24), correlated(80, 24)
    kept = (torch.arange(24) < 14).expand(4, 24)
    assert torch.equal(pruning.sparsegpt(weight, pruning.hessian(x), kept), weight * kept)


def test_its_error_lies_between_least_squares_and_the_mask_alone():
    weight, x = random(4, 24), correlated(80, 24)
    kept = pruning.magnitude(weight, 0.5, "row")
    got = pruning.sparsegpt(weight, pruning.hessian(x), kept, damp=0)
    least = torch.stack([best(x, row, mask) for row, mask in zip(weight, kept, strict=True)])
    assert off(x, weight, least) < off(x, weight, got) < 0.9 * off(x, weight, weight * kept)


@pytest.mark.parametrize("pattern", [0.5, "2:4"])
def test_sparsegpt_is_better_than_wanda_and_wanda_than_magnitude(pattern):
    weight, x = random(32, 64), correlated(512, 64)
    corrected = pruning.sparsegpt(weight, pruning.hessian(x), pattern)
    scores = {"wanda": pruning.wanda_scores(weight, pruning.norms(x)), "magnitude": weight.abs()}
    if pattern == "2:4":
        masks = {name: pruning.two_of_four(each) for name, each in scores.items()}
        assert ((corrected.reshape(-1, 4) == 0).sum(1) == 2).all()
    else:
        masks = {name: pruning.magnitude(each, 0.5, "row") for name, each in scores.items()}
        assert torch.equal(masks["wanda"], pruning.wanda(weight, pruning.norms(x), 0.5))
    errors = {name: off(x, weight, weight * mask) for name, mask in masks.items()}
    assert off(x, weight, corrected) < 0.8 * errors["wanda"] < 0.7 * errors["magnitude"]


@pytest.mark.parametrize("sparsity", [0, 0.3, 0.501, 1])
def test_sparsegpt_has_exactly_the_zeros_and_the_type_asked_for(sparsity):
    weight = random(3, 150).bfloat16()
    got = pruning.sparsegpt(weight, pruning.hessian(correlated(200, 150)), sparsity)
    assert int((got == 0).sum()) == round(sparsity * 450)
    assert got.dtype == torch.bfloat16
    assert sparsity or torch.equal(got, weight)


@pytest.mark.parametrize(("tokens", "fits"), [(64, False), (512, True)])
def test_with_few_tokens_sparsegpt_is_better_on_these_and_worse_on_others(tokens, fits):
    # inputs that are independent, so that all the correlation it finds is chance
    weight, x = random(32, 64), random(1024, 64, seed=1)
    seen, others = x[:tokens], x[512:]
    alone = weight * pruning.wanda(weight, pruning.norms(seen), 0.5)
    corrected = pruning.sparsegpt(weight, pruning.hessian(seen), 0.5)
    assert off(seen, weight, corrected) < off(seen, weight, alone)
    assert (off(others, weight, corrected) < 1.1 * off(others, weight, alone)) == fits


@pytest.mark.filterwarnings("ignore:Sparse CSR")
def test_bytes_are_those_of_real_formats():
    weight = random(64, 128).half()
    for sparsity in (0.3, 0.5, 0.9):
        mask = pruning.magnitude(weight, sparsity)
        csr = (weight * mask).to_sparse_csr()
        found = pruning.stored_bytes(mask)
        assert found["csr"] == csr.values().nbytes + 2 * len(csr.col_indices()) + 4 * len(csr.crow_indices())
        assert found["bitmap"] == numpy.packbits(mask.numpy()).nbytes + weight[mask].nbytes
        assert found["dense"] == found["rows"] == weight.nbytes
        assert "2:4" not in found
    mask = pruning.two_of_four(weight.abs())
    values, places = sparse_semi_structured_from_dense_cutlass(weight * mask)
    assert pruning.stored_bytes(mask)["2:4"] == values.nbytes + places.nbytes
    assert pruning.stored_bytes(pruning.rows(weight, 0.25))["rows"] == 48 * 128 * 2


def test_half_of_the_weights_in_csr_take_as_much_as_all_of_them():
    wide = torch.ones(4, 4096, dtype=torch.bool)
    wide[:, ::2] = False
    found = pruning.stored_bytes(wide)
    assert found["csr"] == found["dense"] + 4 * 5
    assert found["2:4"] == found["bitmap"] == 9 / 16 * found["dense"]
    # with 4-bit numbers only the bitmap is smaller than dense, and CSR is 2.5 times as large
    four = pruning.stored_bytes(wide, bits=4)
    assert (four["bitmap"], four["2:4"], four["csr"]) == (6144, 6144, 20500)
    assert four["dense"] == 8192


W, H = random(4, 8), pruning.hessian(random(20, 8))


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: pruning.magnitude(W, 1.5), "from 0 to 1, not 1.5"),
        (lambda: pruning.magnitude(W, "half"), "from 0 to 1, not 'half'"),
        (lambda: pruning.magnitude(W, float("nan")), "from 0 to 1, not nan"),
        (lambda: pruning.magnitude(W, 0.5, "column"), '"tensor" or "row"'),
        (lambda: pruning.magnitude(W[0], 0.5), "a matrix"),
        (lambda: pruning.magnitude(W * torch.nan, 0.5), "NaN"),
        (lambda: pruning.rows(W, -0.1), "from 0 to 1"),
        (lambda: pruning.wanda(W, torch.ones(4), 0.5), "each of 8 columns"),
        (lambda: pruning.two_of_four(W[:, :6].abs()), "multiple of 4, not 6"),
        (lambda: pruning.two_of_four(W), r"weight.abs\(\)"),
        (lambda: pruning.sparsegpt(W[:, :6], H[:6, :6], "2:4"), "multiple of 4"),
        (lambda: pruning.sparsegpt(W, H, "4:8"), "'4:8'"),
        (lambda: pruning.sparsegpt(W, H, 2), "from 0 to 1, not 2"),
        (lambda: pruning.sparsegpt(W, H, torch.ones(8, 4)), "shape of its weight"),
        (lambda: pruning.sparsegpt(W, H[:4], 0.5), "8 × 8"),
        (lambda: pruning.sparsegpt(W, torch.zeros(8, 8), 0.5), "more inputs"),
    ],
)
def test_what_cannot_be_pruned_is_refused_in_one_line(call, says):
    with pytest.raises(QwlibError, match=says) as refused:
        call()
    assert "\n" not in str(refused.value)
