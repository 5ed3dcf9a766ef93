"""Pruning by hand: which weights of a layer become zero, how the others make up for it, and what the zeros save.

**What.** A linear layer computes y = x Wᵀ. Pruning sets a share of W, the *sparsity*, to zero. A *mask* says which weights are
kept. Unstructured masks are free to choose any weight. A 2:4 mask keeps two of every four neighbours in a row, which NVIDIA's
sparse tensor cores can multiply by (arXiv 2104.08378). Structured masks remove whole rows.

**How.** A mask comes from scores: the weights with the lowest scores are pruned.

    magnitude    |W_ij|                       needs no data; a tensor or each row has its share of zeros
    Wanda        |W_ij| × ‖x_j‖               x_j: the inputs of column j over a calibration batch (arXiv 2306.11695)
    SparseGPT    W_ij² ÷ [H⁻¹]_jj             H = xᵀ x, of column j and those to the right of it (arXiv 2301.00774)

SparseGPT also changes the weights that are kept. It goes through the columns from left to right. When it prunes a weight, it
changes the weights to the right of it so that the output of the layer changes as little as possible. This is the update of
Optimal Brain Surgeon (Hassibi and Stork, 1993) restricted to these columns. With U upper triangular and Uᵀ U = H⁻¹ of all
columns, column j needs only row j of U, and the score is divided by U_jj²:

    e = W_ij ÷ U_jj        W_i,j: −= e × U_j,j:        the sum of all e² is the squared error of the output

The changes are fitted to the calibration batch. With few tokens for its inputs, a layer is better on these tokens and worse on
others.

**What zeros save** depends on the format that stores them: `stored_bytes` counts it from a mask.

**What it leaves out**: sparsity that differs from layer to layer, inputs that come from layers which are pruned already,
fine-tuning after pruning, and kernels that skip zeros. A dense product by a pruned weight takes as long as before.
"""

from math import ceil

import torch

from ..errors import QwlibError
from .integers import matrix

BLOCK = 128  # columns for which SparseGPT chooses a mask at once, as in its paper


def magnitude(weight: torch.Tensor, sparsity: float, per: str = "tensor") -> torch.Tensor:
    """Mask (bool, True is kept) of `weight` (outputs × inputs) without its smallest magnitudes.

    `per` is "tensor" or "row": among which weights the share is pruned. Of n weights exactly round(sparsity × n) are pruned,
    and of equal ones those on the left, or in upper rows, go first. Raises QwlibError for other values.
    """
    if per not in ("tensor", "row"):
        raise QwlibError(f'per must be "tensor" or "row", not {per!r}')
    scores = matrix(weight).abs()
    return _highest(scores if per == "row" else scores.reshape(1, -1), sparsity).reshape(scores.shape)


def rows(weight: torch.Tensor, sparsity: float) -> torch.Tensor:
    """Mask of `weight` without the round(sparsity × rows) rows of the smallest L2 norm: structured pruning.

    Each row is an output of the layer. Without it the matrix is smaller, and so is the layer that reads these outputs.
    Errors as for `magnitude`.
    """
    weight = matrix(weight)
    return _highest(weight.norm(dim=1)[None], sparsity).reshape(-1, 1).expand(weight.shape).clone()


def norms(inputs: torch.Tensor) -> torch.Tensor:
    """The L2 norm of each input column over a calibration batch (… × inputs), float32."""
    return inputs.reshape(-1, inputs.shape[-1]).float().norm(dim=0)


def hessian(inputs: torch.Tensor) -> torch.Tensor:
    """xᵀ x (inputs × inputs, float64) of a calibration batch x (… × inputs).

    It is half the Hessian of the squared error of the output; the factor changes neither mask nor weights.
    """
    x = inputs.reshape(-1, inputs.shape[-1]).double()
    return x.T @ x


def wanda(weight: torch.Tensor, norms: torch.Tensor, sparsity: float) -> torch.Tensor:
    """Mask of `weight` (outputs × inputs): in each row the lowest |W_ij| × norms_j are pruned, round(sparsity × inputs) of them.

    `norms` (inputs): see the function `norms`. For 2:4 give `wanda_scores` to `two_of_four`.
    Raises QwlibError where the shapes differ, and for a sparsity outside 0…1.
    """
    return _highest(wanda_scores(weight, norms), sparsity)


def wanda_scores(weight: torch.Tensor, norms: torch.Tensor) -> torch.Tensor:
    """|W_ij| × norms_j (outputs × inputs, float32); errors as for `wanda`."""
    weight = matrix(weight)
    if norms.shape != weight.shape[1:]:
        raise QwlibError(
            f"norms needs one number for each of {weight.shape[1]} columns, not the shape {tuple(norms.shape)}"
        )
    return weight.abs() * norms.float()


def two_of_four(scores: torch.Tensor) -> torch.Tensor:
    """Mask that keeps the two highest of every four neighbours in a row; of equal scores those on the right are kept.

    `scores` (rows × columns): the magnitudes of the weights, or `wanda_scores`.
    Raises QwlibError for columns that are no multiple of 4, and for scores below zero.
    """
    scores = matrix(scores)
    if (scores < 0).any():
        raise QwlibError("scores below zero: give weight.abs(), or wanda_scores(weight, norms)")
    _in_fours(scores)
    return _highest(scores.reshape(-1, 4), 0.5).reshape(scores.shape)


def sparsegpt(
    weight: torch.Tensor, hessian: torch.Tensor, pattern: float | str | torch.Tensor, damp: float = 0.01
) -> torch.Tensor:
    """`weight` (outputs × inputs) pruned by SparseGPT, its other weights changed to make up for it; in the type of `weight`.

    `hessian` (inputs × inputs): see the function `hessian`; `damp` times the mean of its diagonal is added to the diagonal.
    `pattern`: a sparsity (0…1), "2:4", or a mask of what is kept. For a sparsity the mask is chosen block by block, from the
    weights as they are when their block of 128 columns is reached, with all rows compared with each other.
    Raises QwlibError for other patterns, shapes that do not fit, and a Hessian that has no inverse.
    """
    weights = matrix(weight)
    columns = weights.shape[1]
    if hessian.shape != (columns, columns):
        raise QwlibError(f"the Hessian of {columns} columns is {columns} × {columns}, not {tuple(hessian.shape)}")
    given, fours = isinstance(pattern, torch.Tensor), isinstance(pattern, str)
    if given and pattern.shape != weights.shape:
        raise QwlibError(f"a mask has the shape of its weight, {tuple(weights.shape)}, not {tuple(pattern.shape)}")
    if fours and pattern != "2:4":
        raise QwlibError(f'pattern must be a sparsity from 0 to 1, "2:4" or a mask, not {pattern!r}')
    if fours:
        _in_fours(weights)
    u = _factor(hessian.double(), damp)
    spread = u.diagonal()[:, None]
    # transposed, so that a column of the weight is contiguous: 5 times as fast
    w = weights.double().T.contiguous()
    kept = pattern.bool().T if given else torch.ones_like(w, dtype=torch.bool)
    pruned = 0
    for begin in range(0, columns, BLOCK):
        end = min(begin + BLOCK, columns)
        if not given and not fours:
            # the count is that of all columns so far, so that the whole has round(sparsity × n) zeros
            count = _count(pattern, end * len(weights)) - pruned
            kept[begin:end] = _lowest_out((w[begin:end] / spread[begin:end]).abs(), count)
            pruned += count
        errors = torch.zeros_like(w[begin:end])
        for j in range(begin, end):
            if fours and j % 4 == 0:
                kept[j : j + 4] = two_of_four((w[j : j + 4] / spread[j : j + 4]).abs().float().T).T
            errors[j - begin] = torch.where(kept[j], 0, w[j] / u[j, j])
            w[j:end] -= u[j, j:end, None] * errors[j - begin]
        # columns beyond the block get the changes of the whole block in one product
        w[end:] -= u[begin:end, end:].T @ errors
    return torch.where(kept, w, 0).T.to(weight.dtype).contiguous()


def stored_bytes(mask: torch.Tensor, bits: int = 16) -> dict[str, int]:
    """Bytes that a weight with this mask (rows × columns, True is kept) takes in each format; a number has `bits` bits.

    `dense`: every number, zeros too. `rows`: dense, without rows that are pruned as a whole. `bitmap`: the kept numbers, and
    one bit for every weight. `csr`: the kept numbers, a column index of 16 bits for each (32 with more than 65,536 columns),
    and where each row begins, in 32 bits. `2:4`, if no four neighbours keep more than two: two numbers of every four, and two
    bits for the place of each.
    """
    mask = matrix(mask.float()).bool()
    count, kept = mask.numel(), int(mask.sum())
    index = 16 if mask.shape[1] <= 2**16 else 32
    sizes = {
        "dense": count * bits,
        "rows": int(mask.any(1).sum()) * mask.shape[1] * bits,
        "bitmap": kept * bits + count,
        "csr": kept * (bits + index) + (len(mask) + 1) * 32,
    }
    if mask.shape[1] % 4 == 0 and (mask.reshape(-1, 4).sum(1) <= 2).all():
        sizes["2:4"] = count // 2 * (bits + 2)
    return {name: ceil(size / 8) for name, size in sizes.items()}


def _in_fours(matrix) -> None:
    if matrix.shape[1] % 4:
        raise QwlibError(f"2:4 needs columns in a multiple of 4, not {matrix.shape[1]}: leave this layer dense")


def _count(sparsity, of: int) -> int:
    if isinstance(sparsity, bool) or not isinstance(sparsity, int | float) or not 0 <= sparsity <= 1:
        raise QwlibError(f"sparsity is the share of the weights that become zero, from 0 to 1, not {sparsity!r}")
    return round(sparsity * of)


def _highest(scores, sparsity) -> torch.Tensor:
    """Mask of each row of `scores` without its lowest round(sparsity × columns)."""
    order = scores.argsort(dim=1, stable=True)
    kept = torch.ones_like(scores, dtype=torch.bool)
    return kept.scatter_(1, order[:, : _count(sparsity, scores.shape[1])], False)


def _lowest_out(scores, count: int) -> torch.Tensor:
    """Mask in the shape of `scores` without the `count` lowest of them all."""
    kept = torch.ones_like(scores, dtype=torch.bool).flatten()
    kept[scores.flatten().argsort(stable=True)[:count]] = False
    return kept.reshape(scores.shape)


def _factor(hessian, damp: float) -> torch.Tensor:
    """U, upper triangular, with Uᵀ U the inverse of the Hessian, to whose diagonal `damp` times its mean was added."""
    damped = hessian + damp * hessian.diagonal().mean() * torch.eye(len(hessian)).to(hessian)
    try:
        return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True)
    except torch.linalg.LinAlgError:
        raise QwlibError(f"the Hessian has no inverse with damp={damp}: use a higher damp or more inputs") from None
