"""classify against second derivations: pairs counted one by one, every threshold tried, closed forms, and hand-made rows."""

import json
import math
from fractions import Fraction
from statistics import NormalDist

import numpy
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from qwlib.errors import QwlibError
from qwlib.guard import classify

NAN = math.nan
FEW = {"resamples": 100}
# few different scores, so that ties are common; 0, 1 and the threshold are among them
ROWS = st.lists(st.tuples(st.sampled_from([0.0, 0.1, 0.3, 0.5, 0.7, 1.0]), st.integers(0, 1)), min_size=2, max_size=40)


def split(rows):
    """Scores and labels of rows that hold both classes."""
    scores, labels = zip(*rows, strict=True)
    assume(0 < sum(labels) < len(labels))
    return list(scores), list(labels)


def sides(scores, labels):
    return [[s for s, y in zip(scores, labels, strict=True) if y == side] for side in (1, 0)]


def draw(seed, *, unsafe=60, safe=90, apart=2.0, grid=None):
    """Scores of normal logits, `apart` standard deviations between the classes, and labels, shuffled."""
    rng = numpy.random.default_rng(seed)
    labels = rng.permutation([1] * unsafe + [0] * safe)
    scores = 1 / (1 + numpy.exp(-rng.normal(apart * (labels - 0.5))))
    return (numpy.round(scores * grid) / grid if grid else scores), labels


def moved(scores, seed, by):
    """The same guard with noise on its logits."""
    return 1 / (
        1 + numpy.exp(-numpy.log(scores / (1 - scores)) - numpy.random.default_rng(seed).normal(0, by, len(scores)))
    )


# figures of one guard


@given(ROWS)
@settings(deadline=None, max_examples=50)
def test_verdict_figures_are_ratios_of_counts(rows):
    scores, labels = split(rows)
    found = classify.evaluate(scores, labels, threshold=0.3)
    blocked = [s >= 0.3 for s in scores]
    tp = sum(b and y for b, y in zip(blocked, labels, strict=True))
    fp = sum(blocked) - tp
    p, n = sum(labels), len(labels)
    assert found["confusion"] == {"tp": tp, "fp": fp, "fn": p - tp, "tn": n - p - fp}
    assert (found["n"], found["positives"], found["threshold"], found["errors"]) == (n, p, 0.3, 0)
    assert found["recall"] == pytest.approx(tp / p)
    assert found["false_positive_rate"] == pytest.approx(fp / (n - p))
    assert ("precision" in found) == any(blocked)
    if any(blocked):
        precision = tp / sum(blocked)
        assert found["precision"] == pytest.approx(precision)
        harmonic = 2 * precision * found["recall"] / (precision + found["recall"]) if tp else 0
        assert found["f1"] == pytest.approx(harmonic)
    else:
        assert found["f1"] == 0


@given(ROWS)
@settings(deadline=None, max_examples=50)
def test_auroc_is_the_chance_that_an_unsafe_row_outranks_a_safe_one(rows):
    scores, labels = split(rows)
    unsafe, safe = sides(scores, labels)
    wins = sum(Fraction((u > s) * 2 + (u == s), 2) for u in unsafe for s in safe)
    assert classify.evaluate(scores, labels)["auroc"] == pytest.approx(float(wins / (len(unsafe) * len(safe))))


@given(ROWS)
@settings(deadline=None, max_examples=50)
def test_average_precision_sums_precision_over_steps_in_recall(rows):
    scores, labels = split(rows)
    wanted, before = 0, 0
    for at in sorted(set(scores), reverse=True):
        above = [y for s, y in zip(scores, labels, strict=True) if s >= at]
        wanted += Fraction(sum(above) - before, sum(labels)) * Fraction(sum(above), len(above))
        before = sum(above)
    assert classify.evaluate(scores, labels)["average_precision"] == pytest.approx(float(wanted))


def test_average_precision_by_hand_and_not_from_verdicts():
    """Unsafe rows stand at ranks 1 and 3: (1/1 + 2/3) / 2. Verdicts at 0.5 would tie all but the first: (1/1 + 2/4) / 2."""
    scores, labels = [0.1, 0.4, 0.35, 0.8], [0, 0, 1, 1]
    found = classify.evaluate(scores, labels)["average_precision"]
    assert found == pytest.approx(5 / 6)
    verdicts = classify.evaluate([float(s >= 0.5) for s in scores], labels)["average_precision"]
    assert verdicts == pytest.approx(3 / 4) != pytest.approx(found)


@pytest.mark.parametrize("seed", range(12))
def test_recall_at_few_false_positives_is_the_best_of_all_thresholds(seed):
    scores, labels = draw(seed, unsafe=80, safe=220 + seed, apart=3.0, grid=200)
    unsafe, safe = sides(scores.tolist(), labels.tolist())
    found = classify.evaluate(scores, labels)
    for percent in (1, 5):
        allowed = [at for at in [*scores, 2.0] if 100 * sum(s >= at for s in safe) <= percent * len(safe)]
        wanted = max(sum(u >= at for u in unsafe) for at in allowed) / len(unsafe)
        assert found[f"recall_at_{percent}pct_fpr"] == pytest.approx(wanted)
    assert found["recall_at_1pct_fpr"] < found["recall_at_5pct_fpr"]


def test_one_per_cent_of_a_hundred_rows_is_one_row_and_of_99_none():
    scores = [0.9, 0.8, 0.6] + [0.85, 0.7] + [0.1] * 98
    labels = [1] * 3 + [0] * 100
    assert classify.evaluate(scores, labels)["recall_at_1pct_fpr"] == pytest.approx(2 / 3)
    assert classify.evaluate(scores[:-1], labels[:-1])["recall_at_1pct_fpr"] == pytest.approx(1 / 3)


@given(st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=30))
@settings(deadline=None, max_examples=50)
def test_brier_is_the_mean_square(rows):
    scores, labels = zip(*rows, strict=True)
    wanted = math.fsum((s - y) ** 2 for s, y in rows) / len(rows)
    assert classify.evaluate(scores, labels)["brier"] == pytest.approx(wanted, abs=1e-12)


def test_brier_by_hand():
    assert classify.evaluate([0.9, 0.2, 0.5], [1, 0, 0])["brier"] == pytest.approx((0.01 + 0.04 + 0.25) / 3)


def test_a_calibrated_guard_has_no_calibration_error():
    """In each bin 20 rows at its middle, as many of them unsafe as the middle says; one more unsafe row is 1/200 too much."""
    scores = [(k + 0.5) / 10 for k in range(10) for _ in range(20)]
    labels = [int(i < 2 * k + 1) for k in range(10) for i in range(20)]
    assert classify.evaluate(scores, labels)["ece"] == pytest.approx(0, abs=1e-12)
    labels[labels.index(0)] = 1
    assert classify.evaluate(scores, labels)["ece"] == pytest.approx(1 / 200)


def test_calibration_error_weighs_bins_by_their_rows():
    """30 rows say 0.9 where half is unsafe, 10 rows say 0.1 where none is: 3/4 of 0.4 and 1/4 of 0.1."""
    scores, labels = [0.9] * 30 + [0.1] * 10, [1, 0] * 15 + [0] * 10
    assert classify.evaluate(scores, labels)["ece"] == pytest.approx(0.75 * 0.4 + 0.25 * 0.1)
    low, high = classify.reliability(scores, labels)
    assert (low["low"], low["high"], low["n"], low["share_unsafe"]) == (0.0, 0.1, 10, 0)
    assert (high["low"], high["high"], high["n"], high["share_unsafe"]) == (0.8, 0.9, 30, 0.5)
    assert high["mean_score"] == pytest.approx(0.9)


@given(st.lists(st.integers(0, 40), min_size=1, max_size=60), st.sampled_from([1, 4, 5, 10, 20]))
@settings(deadline=None, max_examples=50)
def test_bins_hold_their_upper_edge(forties, bins):
    """Bin k holds k/bins < score ≤ (k+1)/bins, worked out in whole numbers; 0 is in the first."""
    found = classify.reliability([k / 40 for k in forties], [0] * len(forties), bins=bins)
    homes = [max(-(-k * bins // 40), 1) for k in forties]
    assert [(row["high"], row["n"]) for row in found] == [(h / bins, homes.count(h)) for h in sorted(set(homes))]


def wilson(hits, n):
    z = NormalDist().inv_cdf(0.975)
    middle, half = (hits + z * z / 2) / (n + z * z), z / (n + z * z) * math.sqrt(hits * (n - hits) / n + z * z / 4)
    return middle - half, middle + half


def test_the_interval_of_a_bin_is_wilsons():
    (row,) = classify.reliability([0.75] * 12, [1] * 9 + [0] * 3)
    assert (row["share_low"], row["share_high"]) == pytest.approx(wilson(9, 12))
    plain = 1.96 * math.sqrt(0.75 * 0.25 / 12)  # the textbook's, which Wilson's isn't
    assert row["share_high"] != pytest.approx(0.75 + plain, abs=0.01)


@given(ROWS, st.randoms())
@settings(deadline=None, max_examples=50)
def test_the_order_of_rows_changes_nothing(rows, shuffler):
    shuffler.shuffle(other := rows[:])
    wanted, found = (classify.evaluate(*zip(*some, strict=True)) for some in (rows, other))
    assert found.pop("confusion") == wanted.pop("confusion")
    assert found == pytest.approx(wanted)


def test_ranking_knows_the_order_of_scores_alone():
    scores, labels = draw(3)
    plain, bent = classify.evaluate(scores, labels), classify.evaluate(scores**3, labels)
    for metric in ("average_precision", "auroc", "recall_at_1pct_fpr", "recall_at_5pct_fpr"):
        assert bent[metric] == pytest.approx(plain[metric])
    for metric in ("f1", "ece", "brier"):
        assert bent[metric] != pytest.approx(plain[metric], rel=1e-3)


VERDICT, RANKING, CALIBRATION = (
    {"precision", "recall", "f1", "false_positive_rate"},
    {"average_precision", "auroc", "recall_at_1pct_fpr", "recall_at_5pct_fpr"},
    {"ece", "brier"},
)


@pytest.mark.parametrize(
    ("scores", "labels", "present"),
    [
        ([0.2, 0.9], [0, 1], VERDICT | RANKING | CALIBRATION),
        ([0.2, 0.4], [0, 1], VERDICT - {"precision"} | RANKING | CALIBRATION),  # nothing blocked
        ([0.2, 0.9], [1, 1], {"precision", "recall", "f1"} | CALIBRATION),
        ([0.2, 0.9], [0, 0], {"false_positive_rate"} | CALIBRATION),
        ([0.2, NAN], [0, 1], VERDICT | CALIBRATION),
        ([NAN, 0.9], [0, 1], VERDICT | CALIBRATION),
        ([NAN, NAN], [0, 1], VERDICT),
        ([NAN], [0], {"false_positive_rate"}),
    ],
)
def test_what_can_not_be_measured_is_absent(scores, labels, present):
    found = classify.evaluate(scores, labels)
    assert set(found) - {"n", "positives", "threshold", "errors", "confusion"} == present
    json.dumps(found, allow_nan=False)


@pytest.mark.parametrize("missing", [NAN, None])
def test_an_error_is_blocked_and_counted_and_else_left_out(missing):
    scores, labels = [0.9, missing, missing, 0.1, 0.2, 0.8], [1, 1, 0, 0, 1, 0]
    found = classify.evaluate(scores, labels)
    assert found["confusion"] == {"tp": 2, "fp": 2, "fn": 1, "tn": 1}
    assert found["errors"] == 2
    without = classify.evaluate(
        *zip(*((s, y) for s, y in zip(scores, labels, strict=True) if s == s and s), strict=True)
    )
    for metric in RANKING | CALIBRATION:
        assert found[metric] == without[metric]
    assert classify.evaluate(scores, labels, threshold=1.0)["confusion"]["tp"] == 1  # above any threshold
    marked = classify.evaluate([0.9, 0.0, 0.0, 0.1, 0.2, 0.8], labels, errors=[False, True, True, False, False, False])
    assert marked == found


def test_a_score_on_the_threshold_is_unsafe():
    assert classify.evaluate([0.5, 0.5], [1, 0])["confusion"] == {"tp": 1, "fp": 1, "fn": 0, "tn": 0}
    assert classify.evaluate([1.0], [1], threshold=1)["recall"] == 1
    below = math.nextafter(0.5, 0)
    assert classify.evaluate([below, below], [1, 0])["confusion"] == {"tp": 0, "fp": 0, "fn": 1, "tn": 1}


@pytest.mark.parametrize(
    "labels", [["unsafe", "safe", "unsafe"], [True, False, True], [1.0, 0.0, 1.0], numpy.array([1, 0, 1])]
)
def test_labels_come_in_many_shapes(labels):
    scores = numpy.array([0.75, 0.25, 0.5], dtype="float32")
    assert classify.evaluate(scores, labels) == classify.evaluate([0.75, 0.25, 0.5], [1, 0, 1])


# the threshold


def best_f1(scores, labels, at):
    blocked = [not s < at for s in scores]
    return Fraction(2 * sum(b and y for b, y in zip(blocked, labels, strict=True)), sum(blocked) + sum(labels))


@given(st.lists(st.tuples(st.floats(0, 1) | st.sampled_from([0.0, 0.5, 1.0, NAN]), st.integers(0, 1)), max_size=25))
@settings(deadline=None, max_examples=200)
def test_no_threshold_has_a_better_f1(rows):
    assume({y for s, y in rows if s == s} == {0, 1})
    scores, labels = split(rows)
    found = classify.fit_threshold(scores, labels)
    assert 0 <= found <= 1
    assert best_f1(scores, labels, found) == max(best_f1(scores, labels, at) for at in [*scores, 0, 1] if at == at)


@pytest.mark.parametrize(
    ("scores", "labels", "wanted"),
    [
        ([0.2, 0.8], [0, 1], 0.5),
        # 0.1 … 0.3 gives 2·2/(2+3), as does no other; below and above are worse
        ([0.1, 0.3, 0.6, 0.9], [0, 1, 0, 1], 0.2),
        # F1 2/3 both from 0.5 to 0.9 (one of two caught) and below 0.1 (both, and two alarms): the wider one
        ([0.1, 0.3, 0.5, 0.9], [1, 0, 0, 1], 0.7),
        # the same with equal widths: the lower one, which blocks more
        ([0.25, 0.375, 0.5, 0.75], [1, 0, 0, 1], 0.125),
        # 1 of 2 caught without an alarm above 0.6, 2 of 2 with two alarms above 0.2: 2/3 both, so they are one interval
        ([0.8, 0.6, 0.6, 0.6, 0.2], [1, 1, 0, 0, 0], 0.5),
        # four unsafe rows are errors, blocked in any case: best blocks nothing else; were they left out, it would be 0.125
        ([NAN] * 4 + [0.25] + [0.5] * 3, [1] * 5 + [0] * 3, 0.75),
    ],
)
def test_the_threshold_is_the_middle_of_the_widest_best_interval(scores, labels, wanted):
    assert classify.fit_threshold(scores, labels) == pytest.approx(wanted)


def test_a_threshold_between_neighbours_keeps_them_apart():
    low = 0.7
    high = math.nextafter(low, 1)
    assert classify.fit_threshold([low, high], [0, 1]) == high


# intervals


@given(ROWS)
@settings(deadline=None, max_examples=50)
def test_resamples_are_measured_like_rows(rows):
    """Two resamples at once, the rows themselves and one row of each class many times, by scikit-learn and by `_figure`."""
    scores, labels = split(rows)
    unsafe, safe = (numpy.array([side, side[:1] * len(side)]) for side in sides(scores, labels))
    truth = [1] * unsafe.shape[1] + [0] * safe.shape[1]
    wanted = [classify.evaluate(row, truth) for row in numpy.hstack([unsafe, safe])]
    for metric in classify.BY_VERDICT + classify.BY_SCORE:
        found = classify._figure(metric, unsafe, safe, 0.5)
        assert found == pytest.approx([figures.get(metric, NAN) for figures in wanted], nan_ok=True)


def test_resamples_allow_as_many_false_positives_as_rows_do():
    scores, labels = draw(8, unsafe=80, safe=230, apart=3.0, grid=200)
    drawn = [numpy.array([side]) for side in sides(scores.tolist(), labels.tolist())]
    found = [classify._figure(f"recall_at_{percent}pct_fpr", *drawn, 0.5)[0] for percent in (1, 5)]
    wanted = classify.evaluate(scores, labels)
    assert found == pytest.approx([wanted["recall_at_1pct_fpr"], wanted["recall_at_5pct_fpr"]])
    assert found[0] < found[1]


def binomial(n, p, share):
    """The least k with P(X ≤ k) ≥ share."""
    total = 0.0
    for k in range(n + 1):
        total += math.comb(n, k) * p**k * (1 - p) ** (n - k)
        if total >= share:
            return k


@pytest.mark.parametrize("level", [0.95, 0.8])
def test_the_interval_of_a_share_is_the_binomials(level):
    """Drawing 60 of 60 rows anew, 45 of them caught, catches Binomial(60, 0.75), whatever the safe rows are."""
    scores, labels = [0.9] * 45 + [0.1] * 15 + [0.9] * 30, [1] * 60 + [0] * 30
    low, high = classify.interval(scores, labels, "recall", resamples=20_000, level=level)
    assert low == pytest.approx(binomial(60, 0.75, (1 - level) / 2) / 60, abs=1.01 / 60)
    assert high == pytest.approx(binomial(60, 0.75, (1 + level) / 2) / 60, abs=1.01 / 60)
    other = 0.8 if level == 0.95 else 0.95
    assert low != pytest.approx(binomial(60, 0.75, (1 - other) / 2) / 60, abs=1.01 / 60)


def test_resampling_keeps_the_share_of_unsafe_rows():
    """Where everything is blocked with one score, precision and average precision are that share, which must not move."""
    scores, labels = [0.7] * 100, [1] * 30 + [0] * 70
    for metric in ("precision", "average_precision"):
        assert classify.interval(scores, labels, metric, **FEW) == pytest.approx((0.3, 0.3), abs=1e-12)
    assert classify.interval(scores, labels, "auroc", **FEW) == (0.5, 0.5)


def test_nineteen_of_twenty_intervals_hold_the_truth():
    """Logits of normal rows 1.5 apart have the AUROC Φ(1.5 / √2)."""
    truth, hits, middle = NormalDist().cdf(1.5 / math.sqrt(2)), 0, 0
    for seed in range(150):
        scores, labels = draw(seed, apart=1.5)
        low, high = classify.interval(scores, labels, "auroc", resamples=200, seed=seed)
        hits += low <= truth <= high
        middle += abs(truth - (low + high) / 2) < (high - low) / 8  # a quarter as wide would be too sure
    assert 0.89 <= hits / 150 <= 0.99
    assert middle / 150 < 0.6


def test_more_rows_make_narrower_intervals():
    narrow, wide = (
        numpy.diff(classify.interval(*draw(1, unsafe=60 * k, safe=90 * k), "f1", resamples=500))[0] for k in (9, 1)
    )
    assert narrow == pytest.approx(wide / 3, rel=0.35)


@pytest.mark.parametrize("metric", classify.BY_VERDICT + classify.BY_SCORE)
def test_an_interval_holds_its_figure_and_repeats_with_its_seed(metric):
    scores, labels = draw(2, safe=150)
    scores[::10] = NAN
    low, high = classify.interval(scores, labels, metric, resamples=300, threshold=0.6)
    assert low < classify.evaluate(scores, labels, threshold=0.6)[metric] < high
    assert classify.interval(scores, labels, metric, resamples=300, threshold=0.6) == (low, high)
    assert classify.interval(scores, labels, metric, resamples=300, threshold=0.6, seed=1) != (low, high)


def test_one_class_is_enough_for_what_needs_one():
    scores = [0.9] * 10 + [0.1] * 40
    low, high = classify.interval(scores, [0] * 50, "false_positive_rate")
    assert 0.05 < low < 0.2 < high < 0.35
    low, high = classify.interval(scores, [1] * 50, "recall")
    assert 0.05 < low < 0.2 < high < 0.35


def test_resamples_without_precision_are_left_out():
    """One row of 40 is blocked: a third of the resamples block none, the rest is always right."""
    assert classify.interval([0.9] + [0.1] * 39, [1] * 20 + [0] * 20, "precision") == (1, 1)


# two guards


def test_flips_by_hand():
    labels = ["unsafe"] * 5 + ["safe"] * 6
    #    lost      new  same      new alarms     mended same
    a = [0.9, 0.8, 0.2, 0.9, 0.1, 0.1, 0.2, 0.3, 0.9, 0.1, 0.8]
    b = [0.1, 0.2, 0.7, 0.8, 0.3, 0.8, 0.9, 0.6, 0.2, 0.2, 0.9]
    found = classify.compare(a, b, labels, **FEW)
    assert found["flips"] == {
        "unsafe_to_safe": 3,
        "lost_catches": 2,
        "mended_false_alarms": 1,
        "safe_to_unsafe": 4,
        "new_catches": 1,
        "new_false_alarms": 3,
    }
    assert found["n"] == 11
    assert found["agreement"] == pytest.approx(4 / 11)
    # a alone is right 5 times, b alone twice: 2 · P(Binomial(7, ½) ≤ 2)
    assert found["mcnemar_p"] == pytest.approx(2 * (1 + 7 + 21) / 2**7)
    shift = [-0.8, -0.6, 0.5, -0.1, 0.2, 0.7, 0.7, 0.3, -0.7, 0.1, 0.1]
    assert found["score_shift"] == pytest.approx({"mean": 0.4 / 11, "mean_abs": 4.8 / 11, "max_abs": 0.8})
    assert sum(shift) == pytest.approx(0.4)
    assert found["difference"]["recall"]["value"] == pytest.approx(2 / 5 - 3 / 5)
    assert found["difference"]["false_positive_rate"]["value"] == pytest.approx(4 / 6 - 2 / 6)
    json.dumps(found, allow_nan=False)


@given(st.integers(0, 12), st.integers(0, 12), st.integers(0, 12), st.integers(0, 12), st.integers(1, 5))
@settings(deadline=None, max_examples=25)
def test_mcnemars_test_sums_binomial_coefficients(lost, caught, alarms, mended, same):
    """Under the null each row where one guard alone is right is a fair coin; both tails as far out as what was seen."""
    a = [1.0] * lost + [0.0] * caught + [0.0] * alarms + [1.0] * mended + [1.0] * same
    b = [0.0] * lost + [1.0] * caught + [1.0] * alarms + [0.0] * mended + [1.0] * same
    labels = [1] * (lost + caught) + [0] * (alarms + mended) + [1] * same
    worse, n = lost + alarms, lost + caught + alarms + mended
    far = abs(2 * worse - n)
    wanted = Fraction(sum(math.comb(n, k) for k in range(n + 1) if abs(2 * k - n) >= far), 2**n)
    found = classify.compare(a, b, labels, **FEW)
    assert found["mcnemar_p"] == pytest.approx(float(wanted))
    assert found["flips"]["unsafe_to_safe"] == lost + mended
    assert found["flips"]["new_catches"] == caught


def test_a_guard_does_not_differ_from_itself():
    scores, labels = draw(4)
    scores[:5] = NAN
    found = classify.compare(scores, scores, labels, **FEW)
    assert set(found["flips"].values()) == {0}
    assert found["agreement"] == found["mcnemar_p"] == 1
    assert found["score_shift"] == {"mean": 0, "mean_abs": 0, "max_abs": 0}
    assert set(found["difference"]) == set(classify.COMPARED)
    assert all(d == {"value": 0, "low": 0, "high": 0} for d in found["difference"].values())
    assert classify.compare(scores, moved(scores, 0, 0.5), labels, **FEW)["difference"]["auroc"]["low"] < 0


def test_there_and_back_is_the_opposite():
    a, labels = draw(5)
    b = moved(a, 5, 0.7)
    there, back = classify.compare(a, b, labels, **FEW), classify.compare(b, a, labels, **FEW)
    for one, other in (
        ("unsafe_to_safe", "safe_to_unsafe"),
        ("lost_catches", "new_catches"),
        ("mended_false_alarms", "new_false_alarms"),
    ):
        assert there["flips"][one] == back["flips"][other] > 0
    assert there["mcnemar_p"] == back["mcnemar_p"]
    assert there["score_shift"]["mean"] == -back["score_shift"]["mean"]
    for metric, found in there["difference"].items():
        opposite = back["difference"][metric]
        assert found["value"] == -opposite["value"]
        assert (found["low"], found["high"]) == pytest.approx((-opposite["high"], -opposite["low"]))


def test_differences_are_those_of_the_guards_figures():
    a, labels = draw(6, unsafe=100, safe=150)
    b = moved(a, 6, 0.7)
    found = classify.compare(a, b, labels, threshold=0.4, threshold_b=0.6, **FEW)
    before, after = classify.evaluate(a, labels, threshold=0.4), classify.evaluate(b, labels, threshold=0.6)
    assert (found["threshold"], found["threshold_b"]) == (0.4, 0.6)
    for metric in classify.COMPARED:
        assert found["difference"][metric]["value"] == pytest.approx(after[metric] - before[metric])
        assert found["difference"][metric]["low"] < after[metric] - before[metric] < found["difference"][metric]["high"]
    blocked = sum((a >= 0.4) & (b < 0.6)), sum((a < 0.4) & (b >= 0.6))
    assert (found["flips"]["unsafe_to_safe"], found["flips"]["safe_to_unsafe"]) == blocked
    assert classify.compare(a, b, labels, threshold=0.4, **FEW)["threshold_b"] == 0.4


def test_the_paired_interval_is_as_wide_as_the_flips_say():
    """Of 100 unsafe rows 8 are lost and 3 newly caught: the change in recall has variance (0.11 − 0.05²) / 100."""
    a = [0.9] * 68 + [0.1] * 32 + [0.1] * 20
    b = [0.1] * 8 + [0.9] * 63 + [0.1] * 29 + [0.1] * 20
    labels = [1] * 100 + [0] * 20
    found = classify.compare(a, b, labels)["difference"]["recall"]
    assert found["value"] == pytest.approx(-0.05)
    width, paired = found["high"] - found["low"], 2 * 1.96 * math.sqrt((0.11 - 0.05**2) / 100)
    assert width == pytest.approx(paired, rel=0.12)
    unpaired = 2 * 1.96 * math.sqrt((0.68 * 0.32 + 0.63 * 0.37) / 100)
    assert width != pytest.approx(unpaired, rel=0.12)


def test_pairing_narrows_the_interval_of_every_figure():
    a, labels = draw(7)
    b = moved(a, 7, 0.1)
    found = classify.compare(a, b, labels, resamples=500)["difference"]
    for metric in classify.COMPARED:
        ends = [classify.interval(side, labels, metric, resamples=500, seed=seed) for side, seed in ((a, 1), (b, 2))]
        unpaired = math.hypot(*(high - low for low, high in ends))
        assert found[metric]["high"] - found[metric]["low"] < 0.7 * unpaired


def test_errors_are_blocked_on_both_sides_and_ranked_on_neither():
    labels = [1, 1, 1, 0, 0, 0]
    a = [0.9, 0.2, NAN, 0.1, 0.3, 0.4]
    b = [0.8, NAN, NAN, NAN, 0.2, 0.9]
    found = classify.compare(a, b, labels, **FEW)
    assert found["errors"] == {"a": 1, "b": 3}
    assert (found["flips"]["new_catches"], found["flips"]["new_false_alarms"]) == (1, 2)
    assert found["flips"]["unsafe_to_safe"] == 0
    assert found["score_shift"] == pytest.approx({"mean": 0.3 / 3, "mean_abs": 0.7 / 3, "max_abs": 0.5})
    kept = [0, 4, 5]  # the rows that both scored
    before, after = (classify.evaluate([side[i] for i in kept], [labels[i] for i in kept]) for side in (a, b))
    for metric in ("average_precision", "auroc", "brier"):
        assert found["difference"][metric]["value"] == pytest.approx(after[metric] - before[metric])
    assert found["difference"]["auroc"]["value"] == -0.5
    assert found["difference"]["recall"]["value"] == pytest.approx(1 / 3)
    gone = classify.compare([NAN] * 6, b, labels, **FEW)
    assert set(gone["difference"]) == {"f1", "recall", "false_positive_rate"}
    assert gone["score_shift"] == {}


def test_figures_that_one_class_does_not_give_are_absent_from_the_difference():
    safe = classify.compare([0.2, 0.9, 0.4], [0.6, 0.8, 0.4], [0, 0, 0], **FEW)["difference"]
    assert set(safe) == {"false_positive_rate", "brier"}
    unsafe = classify.compare([0.2, 0.9, 0.4], [0.6, 0.8, 0.4], [1, 1, 1], **FEW)["difference"]
    assert set(unsafe) == {"f1", "recall", "brier"}


def test_the_noise_floor_counts_flips_and_says_what_none_means():
    found = classify.noise_floor([0.4, 0.6, 0.9, NAN, 0.5], [0.6, 0.4, 0.8, 0.1, 0.5])
    assert (found["n"], found["flips"], found["share"]) == (5, 3, 0.6)
    assert (found["share_low"], found["share_high"]) == pytest.approx(wilson(3, 5))
    assert found["score_shift"] == pytest.approx({"mean": -0.025, "mean_abs": 0.125, "max_abs": 0.2})
    assert classify.noise_floor([0.4, 0.6], [0.5, 0.7], threshold=0.65)["flips"] == 1
    none = classify.noise_floor([0.2] * 450, [0.3] * 450)
    assert none["flips"] == none["share_low"] == 0
    assert 0.008 < none["share_high"] < 0.009


# mistakes


@pytest.mark.parametrize(
    ("work", "message"),
    [
        (lambda: classify.evaluate([], []), "no rows: give at least one score"),
        (
            lambda: classify.evaluate(["high", 0.1], [1, 0]),
            "score 'high' in row 0 is no number: NaN says that there is none",
        ),
        (lambda: classify.evaluate(["0.5", 0.1], [1, 0]), "score '0.5' in row 0 is no number"),
        (lambda: classify.evaluate(0.5, [1, 0]), "scores and labels are one a row, not '0.5'"),
        (lambda: classify.evaluate([0.5], [1, 0]), "scores are not one a row: give 2, NaN where there is none"),
        (lambda: classify.evaluate([[0.5], [0.5]], [1, 0]), "scores are not one a row: give 2"),
        (lambda: classify.evaluate([0.5, 0.1], [1, 0], errors=[True]), "not one a row: give 2"),
        (lambda: classify.compare([0.5, 0.1], [0.5], [1, 0]), "scores are not one a row: give 2"),
        (lambda: classify.noise_floor([0.5, 0.1], [0.5]), "scores are not one a row: give 2"),
        (lambda: classify.noise_floor([], []), "no rows"),
        (lambda: classify.reliability([], []), "no rows"),
        (lambda: classify.evaluate([0.1, 1.5], [1, 0]), r"score 1\.5 in row 1 is outside \[0, 1\]: give P\(unsafe\)"),
        (lambda: classify.evaluate([-1e-9, 1], [1, 0]), r"score -1e-09 in row 0 is outside"),
        (lambda: classify.evaluate([math.inf, 1], [1, 0]), "score inf in row 0 is outside"),
        (
            lambda: classify.evaluate([0.1, 1], [1, 2]),
            "label 2 in row 1 is unknown: use 1 or 'unsafe', and 0 or 'safe'",
        ),
        (lambda: classify.evaluate([0.1, 1], ["safe", "Unsafe"]), "label 'Unsafe' in row 1 is unknown"),
        (lambda: classify.evaluate([0.1, 1], [0, None]), "label None in row 1 is unknown"),
        (lambda: classify.evaluate([0.1, 1], [[0], [1]]), r"label \[0\] in row 0 is unknown"),
        (lambda: classify.evaluate([0.1], [0], threshold=50), r"threshold 50 is outside \[0, 1\]: give a P\(unsafe\)"),
        (lambda: classify.evaluate([0.1], [0], threshold=NAN), "threshold nan is outside"),
        (lambda: classify.compare([0.1], [0.1], [0], threshold_b=-1), "threshold -1 is outside"),
        (lambda: classify.compare([0.1], [0.1], [0], threshold=-1, threshold_b=0.5), "threshold -1 is outside"),
        (lambda: classify.noise_floor([0.1], [0.1], threshold=2), "threshold 2 is outside"),
        (lambda: classify.reliability([0.1], [0], bins=0), "bins is a whole number of at least 1, not 0"),
        (lambda: classify.fit_threshold([0.1, 0.2], [1, 1]), "a threshold needs unsafe and safe rows that have scores"),
        (lambda: classify.fit_threshold([0.1, NAN], [1, 0]), "a threshold needs unsafe and safe rows that have scores"),
        (lambda: classify.interval([0.1], [0], "accuracy"), "no interval for 'accuracy': use one of precision, recall"),
        (lambda: classify.interval([0.1], [0], "ece"), "no interval for 'ece'"),
        (lambda: classify.interval([0.1], [0], "recall"), "these rows give no recall: evaluate says what it needs"),
        (lambda: classify.interval([0.1], [0], "brier", level=95), r"level 95 is outside \(0, 1\): use 0.95 for 95 %"),
        (lambda: classify.interval([0.1], [0], "brier", resamples=99), "99 resamples show no ends of an interval"),
        (lambda: classify.compare([0.1], [0.1], [0], resamples=0), "0 resamples show no ends"),
    ],
)
def test_mistakes_are_told_in_one_line(work, message):
    with pytest.raises(QwlibError, match=message) as told:
        work()
    assert "\n" not in str(told.value)


def test_rows_may_come_in_any_kind_of_sequence():
    import pandas

    scores, labels = [0.9, 0.2, None, 0.6, 0.1], [1, 0, 1, 1, 0]
    wanted = classify.evaluate([0.9, 0.2, float("nan"), 0.6, 0.1], labels)
    assert wanted["errors"] == 1
    for kind in (
        list,
        tuple,
        iter,
        lambda x: numpy.array(x, dtype=object),
        lambda x: pandas.Series(x, dtype="Float64"),
    ):
        assert classify.evaluate(kind(scores), kind(labels)) == wanted
    made = [classify.interval(kind(scores), kind(labels), "recall", resamples=100) for kind in (list, iter)]
    assert made[0] == made[1]
    made = [classify.compare(kind(scores), kind(scores), kind(labels), resamples=100) for kind in (list, iter)]
    assert made[0] == made[1]
    assert classify.noise_floor(iter(scores), iter(scores))["flips"] == 0
