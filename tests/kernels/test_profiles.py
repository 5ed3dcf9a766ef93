"""The record of an H100 that the package brings, and how a profile is sorted."""

import copy
import json
from types import SimpleNamespace

import pytest
import torch

from qwlib import QwlibError
from qwlib.kernels import profiles
from qwlib.models import estimates


def test_the_record_is_whole_and_agrees_with_the_estimates():
    record = profiles.h100()
    parts = estimates.breakdown(record["model"], "nf4-dq")
    assert record["bytes"] == pytest.approx(parts["linear layers"] + parts["scales and code books"], rel=0.005)
    least = 1e3 * record["bytes"] / record["copy_bytes_per_s"]
    assert all(row["joined_ms"] > least for row in record["products"])
    assert record["products"][0]["rows"] == 1


@pytest.mark.parametrize(
    "spoil",
    [
        lambda record: record.pop("date"),
        lambda record: record["products"][0].pop("bf16_ms"),
        lambda record: record["products"][0].update(joined_ms=0),
        lambda record: record["products"].clear(),
        lambda record: record.update(more=1),
    ],
)
def test_a_record_with_a_hole_is_refused(spoil, tmp_path):
    record = copy.deepcopy(profiles.h100())
    spoil(record)
    file = tmp_path / "h100.json"
    file.write_text(json.dumps(record))
    with pytest.raises(QwlibError, match="not a valid record"):
        profiles.h100(file)


def test_kernels_are_sorted_by_their_names():
    kernels = {
        "linear4bit": (128, 2.0),
        "void kgemm_4bit_inference_naive<__nv_bfloat16, 128, 16>(int, int, int)": (3, 0.5),
        "void kDequantizeBlockwise<__nv_bfloat16, 512, 64, 8, 2>(float*)": (1, 0.25),
        "fmha_cutlassF_bf16_aligned_64x128_rf_sm80(Params)": (32, 0.3),
        "void pytorch_flash::flash_fwd_splitkv_kernel<Flash_fwd_kernel_traits>(Flash_fwd_params)": (2, 0.1),
        "nvjet_tst_64x8_64x16_4x1_v_bz_TNT": (1, 0.4),
        "void at::native::vectorized_elementwise_kernel<4, ...>": (700, 1.0),
    }
    found = {each["kind"]: (each["count"], each["ms"]) for each in profiles.by_kind(kernels, 5.0)}
    assert found == {
        "4-bit products": (132, 2.75),
        "16-bit products": (1, 0.4),
        "attention": (34, pytest.approx(0.4)),
        "norms and the rest": (700, 1.0),
        "idle": (0, pytest.approx(0.45)),
    }
    assert profiles.by_kind(kernels, 1.0)[-1] == {"kind": "idle", "count": 0, "ms": 0.0}


@pytest.mark.filterwarnings("ignore:CUDA is not available")
def test_kernels_of_a_request_are_counted_after_one_that_warms_up():
    asked = []
    lm = SimpleNamespace(stream=lambda ids, new_tokens: asked.append(new_tokens) or torch.ones(3, 3) @ torch.ones(3, 3))
    found = profiles._kernels(lm, None, 5)
    assert asked == [5, 5]
    assert all(count > 0 and ms >= 0 for count, ms in found.values())  # none without a GPU


def test_a_profile_is_of_one_step_without_the_prompt(monkeypatch):
    seen = {9: {"linear4bit": (90, 18.0), "softmax": (8, 4.0)}, 1: {"linear4bit": (10, 2.0), "prefill": (5, 7.0)}}
    monkeypatch.setattr(profiles, "_kernels", lambda lm, ids, new_tokens: seen[new_tokens])
    found = profiles.measured(SimpleNamespace(), None, new_tokens=9, step_ms=3.0)
    assert [(each["kind"], each["count"], each["ms"]) for each in found if each["ms"]] == [
        ("4-bit products", 10, 2.0),
        ("attention", 1, 0.5),
        ("idle", 0, 0.5),
    ]
