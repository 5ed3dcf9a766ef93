"""A guard as a classifier: how well P(unsafe) tells unsafe prompts from safe ones, and what other weights change.

A guard gives each row a score, its P(unsafe) between 0 and 1; the label is 1 or "unsafe", 0 or "safe". From the threshold on
the verdict is unsafe, and the row is blocked. Three kinds of figure answer three questions:

    verdicts      what do users get? precision, recall, F1 and false positive rate at one threshold
    ranking       what is in the scores, whatever the threshold? average precision, AUROC, recall at 1 % and 5 % false positives
    calibration   are 8 of 10 rows with 0.8 unsafe? ECE and Brier score

Average precision sums precision along the whole curve. Taken from verdicts the curve has one corner, and the figure of the
same name hides what the scores could do, so ranking takes scores alone. A threshold chosen on the rows that it is reported on
flatters the guard, and the more so the fewer they are: `fit_threshold` on rows of their own, then hand it to `evaluate`.

What n shows: with XSTest's 200 unsafe rows a recall of 0.90 is sure to ±0.04, and one per cent of its 250 safe rows are two
rows. Two guards two points of F1 apart are not told apart by their intervals. `compare` pairs them: both judge the same rows,
so easy and hard rows cancel, and what counts is the verdicts that flip. No flip in 450 rows still allows 0.8 % of them. How
many flip by rounding alone says `noise_floor`: look there before blaming the weights.

A row without a score (NaN, None) is an error. It fails closed: blocked in what verdicts give, absent from ranking and
calibration, counted in `errors`. A figure that the rows can't give is absent too, where scikit-learn mostly says 0. Scores
want float64: float32 makes ties of what is surer than 1 − 10⁻⁷.

What it leaves out: categories; how often traffic is unsafe (precision, F1 and average precision hold for the set's own share,
which resampling keeps); rows that hang together, such as XSTest's contrasts, which intervals take as independent; corrections
for many comparisons. Figures are scikit-learn's. It takes one sample a call, some 10 s for a comparison's 4,000, so resamples
go through `_figure`, many at once: the same figures, defined a second time.
"""

import itertools

import numpy

from ..errors import QwlibError, whole_number

LABELS = {0: 0, 1: 1, "safe": 0, "unsafe": 1}
BY_VERDICT = ("precision", "recall", "f1", "false_positive_rate")
BY_SCORE = ("average_precision", "auroc", "recall_at_1pct_fpr", "recall_at_5pct_fpr", "brier")
COMPARED = ("f1", "recall", "false_positive_rate", "average_precision", "auroc", "brier")


def fit_threshold(scores, labels) -> float:
    """The threshold with the best F1 on these rows, which must not be among those that are reported.

    F1 changes only where a threshold passes a score, so the best one is an interval: its middle is returned, of several the
    widest's, of equally wide ones the lowest's, which blocks most. Errors count as blocked, as in `evaluate`.

    Raises QwlibError where unsafe or safe rows with a score are missing, and for input that `evaluate` refuses.
    """
    labels, scores = _read(labels, scores)
    scored = scores[~numpy.isnan(scores)]
    sides = [numpy.sort(_closed(scores[labels == label])) for label in (1, 0)]
    if not all(numpy.isfinite(side).any() for side in sides):
        raise QwlibError("a threshold needs unsafe and safe rows that have scores: fit it on a split that holds both")
    steps = numpy.unique([*scored, 1.0])
    tp, fp = (len(side) - side.searchsorted(steps) for side in sides)
    f1 = 2 * tp / (labels.sum() + tp + fp)  # one rounding, so that what is equal stays equal
    rows = zip(f1 == f1.max(), [0.0, *steps[:-1]], steps, strict=True)
    runs = [list(run) for best, run in itertools.groupby(rows, lambda row: row[0]) if best]
    low, high = max(((run[0][1], run[-1][2]) for run in runs), key=lambda ends: ends[1] - ends[0])
    middle = (low + high) / 2
    return float(middle if middle > low else high)  # there may be no number between two neighbours


def evaluate(scores, labels, *, threshold: float = 0.5, errors=None) -> dict:
    """Every figure of one guard, as plain numbers that JSON takes; shares are between 0 and 1.

    `errors` marks rows (True or False each) to treat like those without a score, such as unreadable answers. Always there: `n,
    positives` (unsafe rows), `threshold, errors, confusion`. Absent are `recall` and `f1` without unsafe rows; `precision` then
    too, and where nothing is blocked (F1 is 0 there); `false_positive_rate` without safe rows; `average_precision, auroc,
    recall_at_1pct_fpr, recall_at_5pct_fpr` where the rows with a score are of one class; `ece, brier` where no row has one.
    Recall at 1 % is the best of all thresholds with at most 1 % false positives: below 100 safe rows that means none.

    Raises QwlibError for no rows, lengths that differ, scores or a threshold outside [0, 1], and unknown labels.
    """
    from sklearn import metrics

    labels, scores = _listed(labels), _listed(scores)
    errors = [False] * len(labels) if errors is None else errors
    labels, scores, errors = _read(labels, scores, errors, thresholds=(threshold,))
    scores = numpy.where(errors, numpy.nan, scores)
    scored = ~numpy.isnan(scores)
    (tn, fp), (fn, tp) = metrics.confusion_matrix(labels, _closed(scores) >= threshold, labels=[0, 1]).tolist()
    out = {"n": len(labels), "positives": tp + fn, "threshold": float(threshold), "errors": int((~scored).sum())}
    out["confusion"] = {"tp": tp, "fp": fp, "fn": fn, "tn": tn}
    if tp + fn:
        out |= {"recall": tp / (tp + fn), "f1": 2 * tp / (2 * tp + fp + fn)}
        out |= {"precision": tp / (tp + fp)} if tp + fp else {}
    if fp + tn:
        out["false_positive_rate"] = fp / (fp + tn)
    labels, scores = labels[scored], scores[scored]
    if 0 < labels.sum() < len(labels):
        out["average_precision"] = float(metrics.average_precision_score(labels, scores))
        out["auroc"] = float(metrics.roc_auc_score(labels, scores))
        fpr, tpr, _ = metrics.roc_curve(labels, scores, drop_intermediate=False)
        out |= {f"recall_at_{share}pct_fpr": float(tpr[fpr <= share / 100].max()) for share in (1, 5)}
    if len(labels):
        gaps = [row["n"] * abs(row["mean_score"] - row["share_unsafe"]) for row in reliability(scores, labels)]
        out |= {"ece": sum(gaps) / len(labels), "brier": float(metrics.brier_score_loss(labels, scores))}
    return out


def reliability(scores, labels, *, bins: int = 10) -> list[dict]:
    """The bins of a reliability diagram, lowest first: `low, high, n, mean_score, share_unsafe, share_low, share_high`.

    Bins are equally wide and hold low < score ≤ high, the first also 0; empty ones are left out, as are rows without a score.
    `share_low` and `share_high` are Wilson's 95 % interval. ECE is the mean over rows of |mean_score − share_unsafe|: Guo et al.
    2017 (arXiv 1706.04599) for two classes, with P(unsafe) where they take the confidence in the winner.

    Raises QwlibError for input that `evaluate` refuses, and for fewer than one bin.
    """
    bins = whole_number(bins, "bins")
    labels, scores = _read(labels, scores)
    edges, out = numpy.arange(bins + 1) / bins, []
    for number, (low, high) in enumerate(itertools.pairwise(edges.tolist())):
        inside = (scores <= high) & ((scores > low) | (number == 0))
        if n := int(inside.sum()):
            unsafe = int(labels[inside].sum())
            mean = {"mean_score": float(scores[inside].mean()), "share_unsafe": unsafe / n}
            out.append({"low": low, "high": high, "n": n} | mean | _wilson(unsafe, n))
    return out


def interval(
    scores, labels, metric: str, *, threshold: float = 0.5, resamples: int = 2000, seed: int = 0, level: float = 0.95
) -> tuple[float, float]:
    """(low, high) of one figure of `evaluate`: the percentile bootstrap over rows, unsafe and safe ones drawn apart.

    It can't show what the rows don't hold: where all unsafe rows are caught, recall is 1 in each resample, and 1 to 1 is no
    certainty. Resamples that block nothing have no precision, and are left out of its interval. `ece` has no interval: drawing
    rows anew adds noise that raises it, often past the figure itself. `reliability` shows what is sure about it.

    Raises QwlibError for input that `evaluate` refuses, a figure that is unknown or absent there, fewer than 100 resamples, and
    a level outside (0, 1).
    """
    if metric not in BY_VERDICT + BY_SCORE:
        raise QwlibError(f"no interval for {metric!r}: use one of {', '.join(BY_VERDICT + BY_SCORE)}")
    if not 0 < level < 1:
        raise QwlibError(f"level {level} is outside (0, 1): use 0.95 for 95 %")
    labels, scores = _listed(labels), _listed(scores)
    if metric not in evaluate(scores, labels, threshold=threshold):
        raise QwlibError(f"these rows give no {metric}: evaluate says what it needs")
    labels, scores = _read(labels, scores)
    return _limits(_resampled(scores, labels, threshold, metric, resamples, seed), level)


def compare(
    a, b, labels, *, threshold: float = 0.5, threshold_b: float | None = None, resamples: int = 2000, seed: int = 0
) -> dict:
    """What changes from guard `a`, the reference, to guard `b` on the same rows; `threshold_b` is `threshold` by default.

    Fields: `n, threshold, threshold_b, errors {a, b}`; `flips`, verdicts of a → of b, as `unsafe_to_safe` (of them
    `lost_catches` where the label is unsafe, `mended_false_alarms` where it is safe) and `safe_to_unsafe` (`new_catches`,
    `new_false_alarms`); `agreement`, the share of equal verdicts; `mcnemar_p`, exact and two-sided, on the rows where one guard
    is right and the other wrong, 1 where there are none; `difference`, for each figure of `COMPARED` that both have, `value`
    (b − a) with `low` and `high`, a 95 % interval from resampling the same rows for both; `score_shift` (b − a) as `mean,
    mean_abs, max_abs`. An error is blocked; figures from scores, and the shift, take the rows that both guards scored.

    Raises QwlibError for input that `evaluate` refuses, and fewer than 100 resamples.
    """
    from scipy.stats import binomtest

    threshold_b = threshold if threshold_b is None else threshold_b
    labels, a, b = _read(labels, a, b, thresholds=(threshold, threshold_b))
    guards, hidden = [(a, threshold), (b, threshold_b)], numpy.isnan(a + b)
    was, now = (_closed(scores) >= at for scores, at in guards)
    kinds = [flip & (labels == label) for flip in (was & ~now, now & ~was) for label in (1, 0)]
    lost, mended, caught, alarms = (int(kind.sum()) for kind in kinds)
    worse, better = lost + alarms, caught + mended
    flips = {"unsafe_to_safe": lost + mended, "lost_catches": lost, "mended_false_alarms": mended}
    flips |= {"safe_to_unsafe": caught + alarms, "new_catches": caught, "new_false_alarms": alarms}
    out = {"n": len(labels), "threshold": float(threshold), "threshold_b": float(threshold_b)}
    out |= {"errors": {"a": int(numpy.isnan(a).sum()), "b": int(numpy.isnan(b).sum())}, "flips": flips}
    out["mcnemar_p"] = float(binomtest(worse, worse + better).pvalue) if worse + better else 1.0
    out |= {"agreement": float((was == now).mean()), "score_shift": _shift(a, b), "difference": {}}
    for metric in COMPARED:
        sides = [(numpy.where(hidden & (metric in BY_SCORE), numpy.nan, scores), at) for scores, at in guards]
        found = [evaluate(scores, labels, threshold=at).get(metric) for scores, at in sides]
        if None not in found:  # one seed draws the same rows for both
            ours, theirs = (_resampled(scores, labels, at, metric, resamples, seed) for scores, at in sides)
            low, high = _limits(theirs - ours, 0.95)
            out["difference"][metric] = {"value": found[1] - found[0], "low": low, "high": high}
    return out


def noise_floor(a, a_again, *, threshold: float = 0.5) -> dict:
    """How many verdicts flip between two runs of the same 16-bit weights, through other batch sizes or attention paths.

    Fields: `n, flips`, their `share` with `share_low, share_high` (Wilson's 95 % interval: it is over rows, another path is
    other noise), `score_shift` as in `compare`. Labels change nothing here. Raises QwlibError for input that `evaluate` refuses.
    """
    a = _listed(a)
    _, a, a_again = _read([0] * len(a), a, a_again, thresholds=(threshold,))
    flips = int(((_closed(a) >= threshold) != (_closed(a_again) >= threshold)).sum())
    share = {"share": flips / len(a)} | _wilson(flips, len(a))
    return {"n": len(a), "flips": flips, **share, "score_shift": _shift(a, a_again)}


def _read(labels, *columns, thresholds=()) -> list:
    """Labels as an array of 0 and 1, then each column of scores as float64 with NaN where there is none."""
    labels, columns = _listed(labels), [_numbers(column) for column in columns]
    for threshold in thresholds:
        if not 0 <= threshold <= 1:
            raise QwlibError(f"threshold {threshold} is outside [0, 1]: give a P(unsafe), such as 0.5")
    if not labels:
        raise QwlibError("no rows: give at least one score with its label")
    for at, label in enumerate(labels):
        if label not in [*LABELS]:
            raise QwlibError(f"label {label!r} in row {at} is unknown: use 1 or 'unsafe', and 0 or 'safe'")
    for scores in columns:
        if scores.shape != (len(labels),):
            raise QwlibError(f"scores are not one a row: give {len(labels)}, NaN where there is none")
        for at in numpy.flatnonzero((scores < 0) | (scores > 1)):
            raise QwlibError(f"score {scores[at]} in row {at} is outside [0, 1]: give P(unsafe), not a logit")
    return [numpy.array([LABELS[label] for label in labels]), *columns]


def _listed(values) -> list:
    """Values of any kind of sequence as Python's own: of numpy, of pandas, of a generator, which gives them once only."""
    try:
        return [
            value.item() if hasattr(value, "item") and not getattr(value, "shape", ()) else value for value in values
        ]
    except TypeError:
        raise QwlibError(f"scores and labels are one a row, not {str(values)[:40]!r}") from None


def _numbers(values):
    """Scores as float64; None and pandas' NA are NaN, which is no score."""
    values, out = _listed(values), []
    for at, value in enumerate(values):
        if hasattr(value, "__len__") and not isinstance(value, str):
            raise QwlibError(f"scores are not one a row: give {len(values)}, NaN where there is none")
        if value is None or type(value).__name__ in ("NAType", "NaTType"):
            value = numpy.nan
        if not isinstance(value, int | float):
            raise QwlibError(f"score {str(value)[:40]!r} in row {at} is no number: NaN says that there is none")
        out.append(value)
    return numpy.array(out, dtype=float)


def _closed(scores):
    """The scores with errors above any threshold: they fail closed."""
    return numpy.where(numpy.isnan(scores), numpy.inf, scores)


def _shift(a, b) -> dict:
    if not len(shift := (b - a)[~numpy.isnan(a + b)]):
        return {}
    return {"mean": float(shift.mean()), "mean_abs": float(abs(shift).mean()), "max_abs": float(abs(shift).max())}


def _wilson(hits: int, n: int) -> dict:
    from scipy.stats import binomtest

    span = binomtest(hits, n).proportion_ci(method="wilson")
    return {"share_low": float(span.low), "share_high": float(span.high)}


def _limits(values, level: float) -> tuple[float, float]:
    low, high = numpy.nanquantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _resampled(scores, labels, threshold: float, metric: str, resamples: int, seed: int):
    """`metric` of each resample: as many unsafe rows drawn anew from the unsafe ones, and safe ones from the safe."""
    if resamples < 100:
        raise QwlibError(f"{resamples} resamples show no ends of an interval: use 2000, at least 100")
    rows = ~numpy.isnan(scores) | (metric in BY_VERDICT)
    sides = [_closed(scores[rows & (labels == label)]) for label in (1, 0)]
    random, values = numpy.random.default_rng(seed), []
    for count in [100] * (resamples // 100) + [resamples % 100]:  # a hundred at once, for memory's sake
        drawn = (side[random.integers(len(side), size=(count, len(side)))] for side in sides)
        values.extend(_figure(metric, *drawn, threshold))
    return numpy.array(values)


def _figure(metric: str, unsafe, safe, threshold: float):
    """`metric` of each resample (NaN: no precision) from its scores of unsafe and of safe rows, resamples × rows."""
    from scipy.stats import rankdata

    tp, fp = (unsafe >= threshold).sum(-1), (safe >= threshold).sum(-1)
    positives, negatives = unsafe.shape[-1], safe.shape[-1]
    match metric:
        case "precision":
            return tp / numpy.where(tp + fp, tp + fp, numpy.nan)
        case "recall":
            return tp / positives
        case "f1":
            return 2 * tp / (positives + tp + fp)
        case "false_positive_rate":
            return fp / negatives
        case "brier":
            return (((1 - unsafe) ** 2).sum(-1) + (safe**2).sum(-1)) / (positives + negatives)
        case "recall_at_1pct_fpr" | "recall_at_5pct_fpr":
            allowed = negatives * (1 if "_1pct" in metric else 5) // 100
            limit = numpy.sort(safe, -1)[:, negatives - 1 - allowed]  # the first safe row that must not be blocked
            return (unsafe > limit[:, None]).mean(-1)
        case "auroc":  # Mann-Whitney's U over the number of pairs
            ranks = rankdata(numpy.hstack([unsafe, safe]), axis=-1)[:, :positives]
            return (ranks.mean(-1) - (positives + 1) / 2) / negatives
        case "average_precision":  # recall steps at each unsafe row: the mean of precision at their scores
            blocked = rankdata(-numpy.hstack([unsafe, safe]), "max", axis=-1)[:, :positives]
            return (rankdata(-unsafe, "max", axis=-1) / blocked).mean(-1)
