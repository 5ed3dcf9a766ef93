"""Batches of rows of different lengths: padded on the left, or read apart."""


def pad_left(rows: list[list[int]]):
    """Rows of ids as one tensor, the shorter ones padded with -1 on the left: new tokens must follow the last real one."""
    import torch

    longest = max((len(row) for row in rows), default=0)
    return torch.tensor([[-1] * (longest - len(row)) + list(row) for row in rows])


def scored_apart(ids, mask, last: int | None, read):
    """Scores (batch × `last` or all positions × vocabulary) of rows that `read(row, last)` scores one by one, without padding.

    `read` gets one row's ids (a tensor) and how many of its last positions are wanted. A position before a row's first token
    scores 0 everywhere: nothing is read there.
    """
    width, out = last or ids.shape[1], None
    for number, (row, real) in enumerate(zip(ids, mask.bool(), strict=True)):
        scores = read(row[real], min(width, int(real.sum())))
        if out is None:
            out = scores.new_zeros(len(ids), width, scores.shape[-1])
        out[number, width - len(scores) :] = scores
    return out
