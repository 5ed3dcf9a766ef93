"""Whether a loaded transformers model is a causal decoder, and how it takes padding: asked once a load, of a few token ids.

A perplexity means something only where what comes later does not move the scores of what came before. An encoder's do move, and
it can be loaded all the same. More differs among architectures without a word. Some know no mask, and read padding as if it were
text (RWKV). Some get no positions where they generate, and count padding as some (Whisper). Some count positions in a way of
their own (RoBERTa begins at 2), so that they must not be given any. `look` compares scores instead of believing names.

Two readings are enough for a model that does all of it right: of 7 tokens, and of 14. Where scores moved, one more tells what
another row beside the first moves: rounding, or LLM.int8's search for outliers in all rows of a batch.
"""

import inspect
from dataclasses import dataclass

from ..errors import QwlibError

LONG, SHORT = 7, 3  # tokens of a row, and of its beginning; two such rows are fewer than `arithmetic.ROWS`
# what moves scores by more than rounding: the root mean square of a position over the standard deviation of its scores. Rounding
# moved the embedded model's by less than 0.0001, LLM.int8 by 0.15, padding that is read as text those of a tiny RWKV by 1.1
MOVES = 0.05
SEEDS = (7, 8, 9)
ALONE = ": rows of other lengths one by one"


@dataclass(frozen=True)
class Manner:
    """How a model is to be read: with `positions` or without; `why` rows of other lengths are read one by one, if they are."""

    positions: bool = True
    why: str = ""


def look(model, device, vocabulary: int, longest: int | None = None, pad: int = 0) -> Manner:
    """What a few scores of the model tell; `pad` is the token id that stands where there is none.

    What is wrong with some ids only is taken for rounding: it can send a token to other experts of a mixture.

    Raises QwlibError for a model that is no causal decoder.
    """
    import torch

    shape = (1, min(LONG, longest or LONG))
    for seed in SEEDS:
        ids = torch.randint(vocabulary // 4, vocabulary, shape, generator=torch.Generator().manual_seed(seed))
        found = _seen(model, ids.to(device), vocabulary, longest, pad)
        if found == Manner():
            break
    if found is None:
        raise QwlibError(
            f"{type(model).__name__} is no causal decoder: tokens that come later change the scores of earlier ones, so that "
            "neither perplexity nor generation means anything"
        )
    return found


def _seen(model, ids, vocabulary: int, longest: int | None, pad: int) -> Manner | None:
    """What the scores of these ids (1 × n) tell; None where later ones move earlier scores."""
    import torch

    long = ids.shape[1]
    short = min(SHORT, long - 1)
    mask = torch.ones(2, long, dtype=torch.long, device=ids.device)
    mask[1, : long - short] = 0
    padded = torch.cat([ids, ids.roll(-short, 1)])
    padded[1, : long - short] = pad  # the second row: some padding, then how the first begins
    other = ids.clone()
    other[:, short:] = (other[:, short:] + vocabulary // 2) % vocabulary

    def scores(rows, mask=None, positions=False):
        given = {} if mask is None else {"attention_mask": mask}
        if positions:
            given["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
        with torch.inference_mode():
            return model(rows, use_cache=False, **given).logits.float()

    def off(found, wanted) -> float:
        return ((found - wanted).square().mean(-1).sqrt() / wanted.std(-1).clamp(min=1e-12)).max().item()

    def padding_moves(positions: bool) -> tuple[float, float]:
        first, second = scores(padded, mask, positions)
        return off(first, plain), off(second[long - short :], plain[:short])

    plain, name = scores(ids)[0], type(model).__name__
    if not max(padding_moves(positions=True)) > MOVES:  # what is no number is found where it is used
        if "position_ids" in inspect.signature(model.forward).parameters:
            return Manner()
        later = (torch.ones_like(ids).cumsum(-1) + short - 1).clamp(max=(longest or 2 * long) - 1)
        with torch.inference_mode():
            moved = off(model(ids, position_ids=later, use_cache=False).logits.float()[0], plain) > MOVES
        return Manner(True, f"{name}'s generate counts padding as positions{ALONE}" if moved else "")
    moves = max(MOVES, 2 * off(scores(torch.cat([ids, other]))[0], plain))
    if off(scores(other)[0, :short], plain[:short]) > moves:
        return None
    positions = not padding_moves(positions=True)[0] > moves
    if not padding_moves(positions)[1] > moves:
        return Manner(positions)
    return Manner(positions, f"{name} reads padding as text{ALONE}")
