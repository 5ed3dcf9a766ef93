"""A broken value is rejected and a noisy one accepted, for every kind of figure; noise and breakage are drawn, not copied."""

import json
import math
import random
from pathlib import Path

import pytest

from qwlib.errors import QwlibError
from qwlib.nightly import gated, gates, history
from qwlib.nightly.runner import Outcome

PACKAGES = {"torch": "2.13.0", "transformers": "5.23.0"}
KLD = {"mean": 0.26, "stderr": 0.005, "top1": 0.74, "tokens": 8176, "ppl_ratio_stderr": 0.011}
TEXT = "ab" * 32


def row(scheme: str, **parts) -> dict:
    base = {"scheme": {"name": scheme}, "model": {"name": "m", "sha256": "12" * 32}}
    return base | {"memory": {"weights_bytes": 1000, "state_bytes": 16, "steady_bytes": 5}} | parts


def quality(ppl: float = 19.1, **kld) -> dict:
    scored = {"protocol": "gptq-512", "text_sha256": TEXT, "tokens": 8176, "ppl": ppl, "ppl_stderr": 0.5}
    return scored | {"kld": KLD | kld}


def speed(decode: float, ttft: float = 0.1, **more) -> dict:
    shape = {"engine": "eager", "batch": 1, "prompt_tokens": 64, "new_tokens": 32}
    return shape | {"decode_tok_s": decode, "ttft_s": {"p50": ttft}} | more


def night(
    *rows: dict, seconds: float = 100.0, status: str = "passed", packages=PACKAGES, name: str = "03"
) -> list[Outcome]:
    record = {"rows": list(rows), "env": {"python": "3.11.7", "packages": packages}}
    return [Outcome(name, status, seconds, record=record if status == "passed" else None)]


def accepted(tmp_path: Path, outcomes: list) -> dict:
    return gates.read(gates.accept(tmp_path / "b.json", "cpu", "smoke", outcomes))["sizes"]["smoke"]


def regressed(findings: list) -> dict[str, gates.Finding]:
    return {finding.name.rpartition("/")[2]: finding for finding in findings if finding.state == "regression"}


@pytest.fixture
def baseline(tmp_path):
    return accepted(tmp_path, night(row("nf4", quality=quality())))


def test_one_byte_is_a_change(baseline):
    grown = row("nf4", quality=quality(), memory={"weights_bytes": 1001, "state_bytes": 16})
    assert set(regressed(gates.judge(night(grown), baseline, gates.Past()))) == {"weights_bytes"}
    less = row("nf4", quality=quality(), memory={"weights_bytes": 1000, "state_bytes": 15})
    assert set(regressed(gates.judge(night(less), baseline, gates.Past()))) == {"state_bytes"}


def test_the_cache_of_a_token_is_exact_too(tmp_path):
    held = {"weights_bytes": 1000, "state_bytes": 16, "kv_bytes_per_token": 23040}
    baseline = accepted(tmp_path, night(row("nf4", memory=held)))
    assert not regressed(gates.judge(night(row("nf4", memory=held)), baseline, gates.Past()))
    grown = night(row("nf4", memory=held | {"kv_bytes_per_token": 23041}))
    assert set(regressed(gates.judge(grown, baseline, gates.Past()))) == {"kv_bytes_per_token"}


def test_what_the_process_took_is_not_gated(baseline):
    other = row("nf4", quality=quality(), memory={"weights_bytes": 1000, "state_bytes": 16, "steady_bytes": 77})
    assert not regressed(gates.judge(night(other), baseline, gates.Past()))


@pytest.mark.parametrize(
    ("figure", "noisy", "broken"),
    [
        ("ppl", quality(19.1 * 1.010), quality(19.1 * 1.012)),  # one paired standard error is 1.1 %
        ("ppl", quality(19.1 * 0.990), quality(19.1 * 0.988)),  # and what suddenly improves is another measurement
        ("kld", quality(mean=0.2649), quality(mean=0.2651)),
        ("kld", quality(mean=0.2551), quality(mean=0.2549)),
        ("top1", quality(top1=0.7301), quality(top1=0.7299)),  # the floor: the binomial error of 8,176 tokens is 0.005
    ],
)
def test_quality_within_a_standard_error_is_noise_and_beyond_it_a_change(baseline, figure, noisy, broken):
    assert not regressed(gates.judge(night(row("nf4", quality=noisy)), baseline, gates.Past()))
    assert set(regressed(gates.judge(night(row("nf4", quality=broken)), baseline, gates.Past()))) == {figure}


def test_without_an_error_of_its_own_perplexity_has_a_floor(tmp_path):
    plain = {key: value for key, value in quality(15.0).items() if key != "kld"}
    baseline = accepted(tmp_path, night(row("bf16", quality=plain)))
    assert not regressed(gates.judge(night(row("bf16", quality=plain | {"ppl": 15.07})), baseline, gates.Past()))
    assert regressed(gates.judge(night(row("bf16", quality=plain | {"ppl": 15.08})), baseline, gates.Past()))


def test_a_broken_night_does_not_bring_its_own_tolerance(baseline):
    """An error that grew with the breakage widens nothing: the accepted one counts."""
    broken = quality(30.0, mean=0.9, stderr=5.0, ppl_ratio_stderr=5.0)
    assert {"ppl", "kld"} <= set(regressed(gates.judge(night(row("nf4", quality=broken)), baseline, gates.Past())))


@pytest.mark.parametrize("metric", gated.GUARD)
def test_a_guard_may_move_by_the_error_of_its_rows(tmp_path, metric):
    judged = {"n": 450, "positives": 200} | dict.fromkeys(gated.GUARD, 0.9)
    baseline = accepted(tmp_path, night(row("nf4", guard=judged)))
    of = {"f1": 100, "false_positive_rate": 250, "brier": 450}.get(metric, 200)
    allowed = max(0.02, math.sqrt(0.9 * 0.1 / of))
    for sign in (-1, 1):
        for share, broken in ((0.99, False), (1.01, True)):
            moved = row("nf4", guard=judged | {metric: 0.9 + sign * share * allowed})
            assert (metric in regressed(gates.judge(night(moved), baseline, gates.Past()))) == broken


def trained(loss: float, step_s: float = 1.0, peak_bytes: int = 1000) -> dict:
    checks = [{"step": 20, "loss": loss + 0.3}, {"step": 40, "loss": loss}, {"step": 60, "loss": loss + 0.1}]
    return {"validation_losses": checks, "step_s": step_s, "peak_bytes": peak_bytes, "data": {"sha256": "ab" * 32}}


def test_a_training_run_may_end_with_another_loss_by_rounding_alone(tmp_path):
    baseline = accepted(tmp_path, night(row("nf4", training=trained(2.5))))
    assert baseline["given"]["03/m/nf4"]["data"] == "abababababab"
    for loss, broken in ((2.519, False), (2.521, True), (2.481, False), (2.479, True)):
        found = gates.judge(night(row("nf4", training=trained(loss))), baseline, gates.Past())
        assert set(regressed(found)) == ({"validation_loss"} if broken else set())


def test_time_and_peak_of_training_are_ratios_to_16_bits_of_the_same_run():
    passes = {
        "03/m/nf4/step_over_16_bit": [1.10, 1.12, 1.09],
        "03/m/nf4/train_peak_over_16_bit": [0.8, 0.8, 0.8],
        "03/m/bf16/train_step_s": [2.0, 2.1, 1.9],
    }
    for step, peak, wanted in (
        (4.4, 800, set()),
        (5.2, 800, {"step_over_16_bit"}),
        (4.4, 950, {"train_peak_over_16_bit"}),
    ):
        rows = row("bf16", training=trained(2.5, 3.0)), row("nf4", training=trained(2.5, step * 3 / 4, peak))
        assert set(regressed(gates.judge(night(*rows), None, past(passes)))) == wanted
    slow = night(row("bf16", training=trained(2.5, 4.0)), row("nf4", training=trained(2.5, 4.4, 800)))
    assert set(regressed(gates.judge(slow, None, past(passes)))) == {"train_step_s"}


def past(passes: dict[str, list[float]]) -> gates.Past:
    """A history in which every figure strayed last night: what is beyond its tolerance tonight is a regression."""
    return gates.Past(passes, set(passes))


def test_speed_is_judged_as_a_ratio_to_16_bits_of_the_same_run():
    """A machine at half its speed halves both, and is no regression of 4 bits; its own speed is one, by the looser limit."""
    passes = {
        "03/m/nf4/decode_over_16_bit": [1.50, 1.52, 1.49],
        "03/m/nf4/ttft_over_16_bit": [1.1, 1.1, 1.1],
        "03/m/bf16/decode_tok_s": [25.0, 25.5, 24.8],
    }
    fast = night(row("bf16", speed=speed(25.0)), row("nf4", speed=speed(37.0, 0.11)))
    assert not regressed(gates.judge(fast, None, past(passes)))
    slow_machine = night(row("bf16", speed=speed(12.0)), row("nf4", speed=speed(18.0, 0.11)))
    assert set(regressed(gates.judge(slow_machine, None, past(passes)))) == {"decode_tok_s"}
    slow_4_bits = night(row("bf16", speed=speed(25.0)), row("nf4", speed=speed(31.0, 0.11)))
    assert set(regressed(gates.judge(slow_4_bits, None, past(passes)))) == {"decode_over_16_bit"}
    late = night(row("bf16", speed=speed(25.0)), row("nf4", speed=speed(37.0, 0.13)))
    assert set(regressed(gates.judge(late, None, past(passes)))) == {"ttft_over_16_bit"}
    faster = night(row("bf16", speed=speed(99.0, 0.01)), row("nf4", speed=speed(990.0, 0.001)))
    assert not regressed(gates.judge(faster, None, past(passes)))


@pytest.mark.parametrize(
    ("name", "norm", "fine", "slow"),
    [("decode_tok_s", 25.0, speed(17.0), speed(16.0)), ("ttft_s", 0.1, speed(9.0, 0.14), speed(9.0, 0.16))],
)
def test_16_bits_own_speed_may_be_half_as_slow_again(name, norm, fine, slow):
    passes = {f"03/m/bf16/{name}": [norm] * 3}
    assert not regressed(gates.judge(night(row("bf16", speed=fine)), None, past(passes)))
    assert set(regressed(gates.judge(night(row("bf16", speed=slow)), None, past(passes)))) == {name}


def test_the_share_of_the_roofline_is_gated():
    timed = row("nf4", speed=speed(37.0, roofline_share=0.19))
    passes = {"03/m/nf4/roofline_share": [0.24, 0.235, 0.234]}
    assert set(regressed(gates.judge(night(timed), None, past(passes)))) == {"roofline_share"}
    timed["speed"]["roofline_share"] = 0.21
    assert not regressed(gates.judge(night(timed), None, past(passes)))


def test_a_median_needs_three_passes_and_takes_seven():
    outcomes = night(row("bf16", speed=speed(10.0)))
    name = "03/m/bf16/decode_tok_s"
    for passes, state in (([], "learning"), ([30.0] * 2, "learning"), ([30.0] * 3, "regression")):
        (finding,) = (f for f in gates.judge(outcomes, None, past({name: passes})) if f.name == name)
        assert finding.state == state
    forgotten = [30.0] * 9 + [10.0] * 7  # what was before the last seven does not count
    assert not regressed(gates.judge(outcomes, None, past({name: forgotten})))


def test_the_slack_follows_the_noise_of_the_history():
    """Drawn: normal noise around a median is accepted on nearly every night, and a quarter less is rejected where it is small."""
    draw = random.Random(5)
    name = "03/m/nf4/roofline_share"
    for spread, rejected in ((0.01, True), (0.12, False)):
        accepted = 0
        for _ in range(300):
            values = [draw.gauss(1, spread) for _ in range(7)]
            fine = night(row("nf4", speed=speed(1.0, roofline_share=draw.gauss(1, spread))))
            accepted += not regressed(gates.judge(fine, None, past({name: values})))
        assert accepted > 280
        broken = night(row("nf4", speed=speed(1.0, roofline_share=0.75)))
        steady = [1 - spread, 1 - spread / 2, 1.0, 1.0, 1 + spread / 2, 1 + spread, 1 + spread]
        assert bool(regressed(gates.judge(broken, None, past({name: steady})))) == rejected


def test_a_wild_history_does_not_let_everything_pass():
    wild = [0.1, 10.0, 1.0, 0.2, 5.0, 2.0, 1.0]
    assert gates.slack("ratio", wild) == gates.MOST_SLACK
    outcomes = night(row("nf4", speed=speed(1.0, roofline_share=0.49)))
    assert regressed(gates.judge(outcomes, None, past({"03/m/nf4/roofline_share": wild})))


def test_a_notebooks_time_is_slow_by_half_and_by_a_minute():
    short, long = {"03/seconds": [50.0] * 3}, {"03/seconds": [1000.0] * 3}
    assert not regressed(gates.judge(night(seconds=109.0), None, past(short)))
    assert regressed(gates.judge(night(seconds=111.0), None, past(short)))
    assert not regressed(gates.judge(night(seconds=1490.0), None, past(long)))
    assert regressed(gates.judge(night(seconds=1510.0), None, past(long)))


@pytest.mark.parametrize("metric", ["recall", "false_positive_rate"])
@pytest.mark.parametrize("share", [0.0, 1.0])
def test_one_message_of_a_small_set_is_no_regression_and_three_are(tmp_path, metric, share):
    """A share of 0 or 1 has a standard error of 0, which would let nothing move."""
    judged = {"n": 32, "positives": 16, metric: share}
    baseline = accepted(tmp_path, night(row("nf4", guard=judged)))
    for messages, broken in ((1, False), (3, True)):
        moved = judged | {metric: abs(share - messages / 16)}
        assert bool(regressed(gates.judge(night(row("nf4", guard=moved)), baseline, gates.Past()))) == broken


def test_one_slow_night_is_a_suspicion_and_two_are_a_regression():
    name = "03/m/nf4/roofline_share"
    passes = {name: [0.20, 0.20, 0.20]}

    def state(share: float, **known) -> str:
        outcomes = night(row("nf4", speed=speed(1.0, roofline_share=share)))
        return next(f.state for f in gates.judge(outcomes, None, gates.Past(passes, **known)) if f.name == name)

    assert state(0.171) == "fine"
    assert state(0.169) == state(0.141) == "suspect"
    assert state(0.139) == "regression"  # twice beyond: no second night is needed
    assert state(0.169, suspects={name}) == "regression"
    assert state(0.171, suspects={name}) == "fine"


def test_false_alarms_are_rare_and_a_lasting_loss_is_found():
    """Drawn: twenty ratios with 8 % noise for 200 nights, the rules as they run, then every ratio a third less."""
    draw = random.Random(11)

    def weeks(number: int, level: float, nights: list) -> int:
        alarms = 0
        for _ in range(number):
            rows = [row(f"s{n}", speed=speed(1.0, roofline_share=level * draw.gauss(1, 0.08))) for n in range(20)]
            outcomes = night(*rows)
            findings = gates.judge(outcomes, None, history.past(nights))
            names = {s: [f.name for f in findings if f.state == s] for s in ("regression", "suspect")}
            figures = {each: figure.value for each, figure in gated.figures(outcomes).items()}
            line = {"regressions": names["regression"], "suspects": names["suspect"], "packages": {}}
            nights.append(line | {"night": str(len(nights)), "figures": figures})
            alarms += bool(names["regression"])
        return alarms

    nights: list = []
    assert weeks(200, 1.0, nights) <= 10
    assert weeks(5, 0.67, nights) >= 4


def test_at_smoke_size_speed_is_shown_and_not_judged():
    outcomes = night(row("bf16", speed=speed(1.0)), seconds=9999)
    passes = {"03/m/bf16/decode_tok_s": [30.0] * 3, "03/seconds": [1.0] * 3}
    findings = gates.judge(outcomes, None, past(passes), timed=False)
    assert {f.state for f in findings if "bytes" not in f.name} == {"learning"}


def test_a_speed_that_vanishes_is_a_regression_too():
    passes = {"03/m/bf16/decode_tok_s": [30.0] * 3}
    assert set(regressed(gates.judge(night(row("bf16")), None, past(passes)))) == {"decode_tok_s"}


def test_a_row_that_fails_is_a_regression_although_no_figure_of_it_is_known():
    failed = row("new", failure={"reason": "out of memory"})
    (found,) = regressed(gates.judge(night(failed), None, gates.Past())).values()
    assert (found.name, found.cause) == ("03/m/new/failed", "out of memory")


def test_every_row_has_a_name_of_its_own():
    """Of two rows of one scheme, of random and trained weights, of folders with a slash."""
    random_weights = {"model": {"name": "m", "weights": "random"}}
    rows = [
        row("nf4"),
        row("nf4"),
        row("nf4") | random_weights,
        row("a/b"),
        row("a b"),
        row("nf4") | {"model": {"name": "o/m"}},
    ]
    names = {name.rpartition("/")[0] for name in gated.figures(night(*rows)) if name.endswith("/weights_bytes")}
    assert names == {"03/m/nf4", "03/m/nf4#2", "03/m-random/nf4", "03/m/a--b", "03/m/a_b", "03/o--m/nf4"}


def test_a_rejected_night_never_becomes_the_norm():
    """Ten slow nights after three fast ones are a suspicion and nine regressions."""
    nights = []
    name = "03/m/bf16/decode_tok_s"
    for number in range(13):
        outcomes = night(row("bf16", speed=speed(30.0 if number < 3 else 10.0)))
        findings = gates.judge(outcomes, None, history.past(nights))
        names = {s: [f.name for f in findings if f.state == s] for s in ("regression", "suspect")}
        assert names["suspect"] == ([name] if number == 3 else [])
        assert names["regression"] == ([name] if number > 3 else [])
        figures = {each: figure.value for each, figure in gated.figures(outcomes).items()}
        line = {"regressions": names["regression"], "suspects": names["suspect"], "packages": {}}
        nights.append(line | {"night": str(number), "figures": figures})
    nights.append(nights[-1] | {"regressions": [], "accepted": True})
    assert history.past(nights).passes[name] == [10.0]


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        ({"packages": PACKAGES | {"transformers": "5.24.0"}}, "transformers 5.23.0 → 5.24.0"),
        ({"model": {"name": "m", "sha256": "99" * 32}}, "weights 121212121212 → 999999999999"),
        ({"text": "cd" * 32}, "text abababababab → cdcdcdcdcdcd"),
        ({"artefact": {"tools": {"llama-cpp-python": "0.4.0"}}}, "llama-cpp-python 0.3.36 → 0.4.0"),
        ({"protocol": "gptq-2048"}, "protocol gptq-512 → gptq-2048"),
        ({}, "no recorded package, hash or setting changed, so it may be the code"),
    ],
)
def test_the_probable_cause_is_named(tmp_path, change, cause):
    scored = quality(25.0)
    scored["text_sha256"] = change.get("text", TEXT)
    scored["protocol"] = change.get("protocol", "gptq-512")
    tools = {"artefact": {"tools": {"llama-cpp-python": "0.3.36"}}}
    baseline = accepted(tmp_path, night(row("nf4", quality=quality()) | tools))
    worse = row("nf4", quality=scored) | tools | {key: change[key] for key in ("model", "artefact") if key in change}
    found = regressed(gates.judge(night(worse, packages=change.get("packages", PACKAGES)), baseline, gates.Past()))
    assert found["ppl"].cause == cause


def test_speed_without_a_baseline_takes_its_cause_from_the_last_pass():
    passes, before = {"03/seconds": [50.0] * 3}, {"python": "3.11.7"} | PACKAGES | {"torch": "2.12.0"}
    assert (
        regressed(gates.judge(night(seconds=500.0), None, gates.Past(passes, packages=before)))["seconds"].cause
        == "torch 2.12.0 → 2.13.0"
    )


def test_what_vanishes_is_a_regression_and_what_is_skipped_says_why(baseline):
    (gone,) = {f.cause for f in regressed(gates.judge(night(row("bf16")), baseline, gates.Past())).values()}
    assert gone == "tonight's record does not contain this metric"
    failed = row("nf4", failure={"reason": "out of memory"})
    assert {f.cause for f in regressed(gates.judge(night(failed), baseline, gates.Past())).values()} == {
        "out of memory"
    }
    skipped = row("nf4", failure={"reason": "no compiler", "skipped": True})
    findings = gates.judge(night(skipped), baseline, gates.Past())
    assert not regressed(findings)
    assert {f.cause for f in findings if f.state == "skipped"} == {"no compiler"}
    findings = gates.judge(night(status="failed"), baseline, gates.Past())
    assert {(f.state, f.cause) for f in findings} == {("skipped", "the status of notebook 03 is: failed")}
    findings = gates.judge(night(row("nf4"), name="renamed"), baseline, gates.Past())
    assert {f.cause for f in regressed(findings).values()} == {"there is no notebook 03 any more"}


def test_accepting_replaces_what_was_measured_and_keeps_what_was_not(tmp_path):
    whole = accepted(tmp_path, [*night(row("nf4"), row("int8")), *night(row("nf4"), name="04")])
    assert len(whole["figures"]) == 6
    grown = row("nf4", memory={"weights_bytes": 2000, "state_bytes": 16})
    failed = row("int8", failure={"reason": "x"})
    again = accepted(tmp_path, [*night(grown, failed), *night(status="failed", name="04")])
    assert again["figures"]["03/m/nf4/weights_bytes"]["value"] == 2000
    assert again["figures"].keys() == whole["figures"].keys()
    assert again["given"].keys() == whole["given"].keys()
    dropped = accepted(tmp_path, [*night(grown), *night(row("nf4"), name="04")])
    assert "03/m/int8/weights_bytes" not in dropped["figures"]  # it vanished, and that was accepted
    assert "04/m/nf4/weights_bytes" not in accepted(tmp_path, night(grown))["figures"]  # and so did a notebook


def test_sizes_keep_apart(tmp_path):
    gates.accept(tmp_path / "b.json", "cpu", "smoke", night(row("nf4")))
    gates.accept(tmp_path / "b.json", "cpu", "nightly", night(row("int8")))
    whole = gates.read(tmp_path / "b.json")
    assert set(whole["sizes"]) == {"smoke", "nightly"}


def test_a_baseline_has_a_line_a_figure_and_reads_back(tmp_path, baseline):
    text = (tmp_path / "b.json").read_text()
    lines = [line for line in text.splitlines() if '"value"' in line]
    assert len(lines) == len(baseline["figures"])
    assert '"03/m/nf4/kld": {"tolerance": 0.005, "value": 0.26}' in text
    gates.accept(tmp_path / "b.json", "cpu", "smoke", night(row("nf4", quality=quality())))
    assert (tmp_path / "b.json").read_text() == text  # the same night changes nothing


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ('{"schema": 0}', "has schema 0, but this version reads 1"),
        *((bad, "damaged") for bad in ("{", "[]", "{}", '{"schema": 1}', '{"schema": 1, "device": "x", "sizes": []}')),
        (
            '{"schema": 1, "device": "x", "sizes": {"smoke": {"packages": {}, "given": {}, "figures": {"a": 1}}}}',
            "damaged",
        ),
        *(
            (
                '{"schema": 1, "device": "x", "sizes": {"smoke": {"packages": {}, "given": {}, "figures": {"a": '
                f'{{"value": 1, "tolerance": {endless}}}}}}}}}}}',
                "tolerance: inf is no number",
            )
            for endless in ("Infinity", "1e999")  # every night would be fine for ever
        ),
    ],
)
def test_a_baseline_that_cant_be_read_is_told_and_kept_aside(tmp_path, content, match):
    path = tmp_path / "b.json"
    path.write_text(content)
    with pytest.raises(QwlibError, match=match):
        gates.read(path)
    gates.accept(path, "cpu", "smoke", night(row("nf4")))
    assert (tmp_path / "b.json.old").read_text() == content
    assert json.loads(path.read_text())["schema"] == gates.SCHEMA


@pytest.mark.parametrize(
    "odd",
    [
        {"quality": 5},
        {"quality": {"kld": {}}},
        {"quality": quality(tokens=0)},
        {"memory": 7},
        {"speed": {"ttft_s": 3}},
        {"guard": {"f1": "high"}},
        {"training": {"validation_losses": [3]}},
        {"model": "a name"},
        {"scheme": {"bits": 4}},
    ],
)
def test_one_odd_row_costs_its_own_figures_only(baseline, odd):
    names = []
    found = gated.figures(night(row("nf4", quality=quality(ppl=25.0)), row("int8") | odd), names)
    assert "03/m/nf4/ppl" in found
    assert len(names) == (not {"model", "scheme"} & set(odd))
    judged = gates.judge(night(row("nf4", quality=quality(ppl=25.0)), row("int8") | odd), baseline, gates.Past())
    assert set(regressed(judged)) == {"ppl"}


def test_a_device_has_a_file(tmp_path):
    assert gates.read(tmp_path / "none.json") is None
    assert gates.path_of(tmp_path, "NVIDIA H100 80GB HBM3").name == "nvidia-h100-80gb-hbm3.json"
    assert gates.path_of(tmp_path, "../../etc/passwd").parent == tmp_path
    odd = ["显卡 A", "显卡 B", "Prozessor ä", "Prozessor ö", "", "…"]
    assert len({gates.path_of(tmp_path, device) for device in odd}) == len(odd)
