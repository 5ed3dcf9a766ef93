"""The emulated kernel against a plain product, and its registers against the layout that the PTX manual prints."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwlib import QwlibError
from qwlib.kernels import linear4bit
from qwlib.lessons import fourbit, integers, tiles

LEVELS = fourbit.normal_float()


def stored(shape, *, block_size=64, double_quant=True, seed=0):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return fourbit.quantize_4bit(weight, "nf4", block_size, double_quant)


def inputs(rows, columns, seed=1):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def off(got, x, weight) -> float:
    wanted = x.double() @ fourbit.dequantize_4bit(weight).double().T
    return integers.errors(wanted, got)["relative"]


def manual(lane: int) -> tuple[list, list, list]:
    """(row, column) of a0 to a7, b0 to b3 and c0 to c3 of a lane, as the formulas of the PTX manual for m16n8k16 have them."""
    group, member = lane >> 2, lane % 4
    a = [(group if i in (0, 1, 4, 5) else group + 8, member * 2 + (i & 1) + (0 if i < 4 else 8)) for i in range(8)]
    b = [(member * 2 + (i & 1) + (0 if i < 2 else 8), group) for i in range(4)]
    c = [(group if i < 2 else group + 8, member * 2 + (i & 1)) for i in range(4)]
    return a, b, c


def held(rows, columns, lane) -> list:
    return list(zip(rows[lane].flatten().tolist(), columns[lane].flatten().tolist(), strict=True))


@pytest.mark.parametrize("lane", range(32))
def test_fragments_are_those_of_the_manual(lane):
    a, b, c = manual(lane)
    assert held(tiles.A_ROW, tiles.A_COLUMN, lane) == a
    assert held(tiles.B_ROW, tiles.B_COLUMN, lane) == b
    assert held(tiles.C_ROW, tiles.C_COLUMN, lane) == c


def test_mma_is_a_product_of_what_the_lanes_hold():
    left, right, before = inputs(16, 16), inputs(16, 8, 2), inputs(16, 8, 3)
    a, b, c = torch.empty(32, 4, 2), torch.empty(32, 2, 2), torch.empty(32, 4)
    for lane in range(32):
        places = manual(lane)
        a[lane] = torch.stack([left[place] for place in places[0]]).view(4, 2)
        b[lane] = torch.stack([right[place] for place in places[1]]).view(2, 2)
        c[lane] = torch.stack([before[place] for place in places[2]])
    got, wanted = tiles.mma(c, a, b), before + left @ right
    for lane in range(32):
        assert torch.allclose(got[lane], torch.stack([wanted[place] for place in manual(lane)[2]]), atol=1e-5)


def test_a_lane_has_the_same_columns_of_weights_and_of_x():
    """Each register pair of a meets the same columns in b, and each of the 64 columns is in one product once."""
    columns = torch.arange(64).expand(16, 64)
    by_byte = (columns[:, ::2] // 2).to(torch.uint8)  # byte i has columns 2 i and 2 i + 1
    table = torch.stack([2.0 * torch.arange(256), 2.0 * torch.arange(256) + 1], dim=1)
    a, b = tiles.a_registers(by_byte, table), tiles.b_registers(columns[:8].float())
    for product in range(4):
        left, right = torch.empty(16, 16), torch.empty(16, 8)
        for lane in range(32):
            places = manual(lane)
            for place, value in zip(places[0], a[product, lane].flatten(), strict=True):
                left[place] = value
            for place, value in zip(places[1], b[product, lane].flatten(), strict=True):
                right[place] = value
        assert torch.equal(left[:8], left[8:])
        assert torch.equal(left[:8].T, right)
        assert torch.equal(right[:, 0].long(), tiles.column_order()[product])
    assert sorted(b[:, :4].flatten().tolist()) == list(range(64))


def test_registers_come_from_bytes_as_the_cuda_source_takes_them():
    """Shifts and masks of LOOK, for every lane, on a table that tells the byte."""
    unit = torch.randint(256, (16, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    table = torch.arange(256.0)[:, None].expand(256, 2)
    got = tiles.a_registers(unit, table)[..., 0].int()
    for lane in range(32):
        g, t = lane >> 2, lane & 3
        for h in range(2):
            p, q = (
                int.from_bytes(bytes(unit[row, t * 8 + 4 * h : t * 8 + 4 * h + 4].tolist()), "little")
                for row in (g, g + 8)
            )
            p0, p1, p2, p3 = (((s & 0x7F80) >> 7) for s in (p << 7, p >> 1, p >> 9, p >> 17))
            r0, r1, r2, r3 = (((s & 0x7F80) >> 7) for s in (q << 7, q >> 1, q >> 9, q >> 17))
            assert got[2 * h, lane].tolist() == [p0, r0, p1, r1]
            assert got[2 * h + 1, lane].tolist() == [p2, r2, p3, r3]
            # the spread table: an entry begins every 256 bytes
            places = [byte_perm(p, 4 * lane, 0x5504 | byte << 4) for byte in range(4)]
            assert places == [256 * each + 4 * lane for each in (p0, p1, p2, p3)]


def byte_perm(low: int, high: int, selector: int) -> int:
    """CUDA's `__byte_perm`: four of eight bytes, by the digits of the selector (CUDA math API)."""
    given = low.to_bytes(4, "little") + high.to_bytes(4, "little")
    return int.from_bytes(bytes(given[selector >> 4 * place & 7] for place in range(4)), "little")


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 40),
    units=st.integers(1, 9),
    batch=st.integers(1, 16),
    block_size=st.sampled_from([64, 128, 4096]),
    double_quant=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_shape_gives_the_product(rows, units, batch, block_size, double_quant, seed):
    weight = stored((rows, 64 * units), block_size=block_size, double_quant=double_quant, seed=seed)
    x = inputs(batch, 64 * units, seed)
    got = tiles.multiply(x, weight, LEVELS)
    assert got.shape == (batch, rows)
    assert off(got, x, weight) < 2e-6


def test_a_gain_cancels():
    weight, x = stored((33, 320)), inputs(2, 320)
    assert off(tiles.multiply(x, weight, LEVELS, 1.7), x, weight) < 1e-6


@pytest.mark.parametrize("what", ["columns of x", "bytes of a lane", "rows of a", "levels", "scales"])
def test_a_wrong_order_is_seen(what, monkeypatch):
    weight, x = stored((32, 256)), inputs(3, 256)
    levels = LEVELS
    read = x
    if what == "columns of x":
        # products before lanes, as if the tensor core's order were that of the columns
        read = x.unflatten(1, (-1, 4, 4, 4)).transpose(2, 3).flatten(1)
    elif what == "bytes of a lane":
        plain = tiles.lane_bytes
        monkeypatch.setattr(tiles, "lane_bytes", lambda codes: plain(codes).flip(-1))
    elif what == "rows of a":
        monkeypatch.setattr(tiles, "A_ROW", tiles.A_ROW.flip(1))
    elif what == "levels":
        levels = LEVELS.flip(0)
    else:
        cut = tiles._cut
        monkeypatch.setattr(tiles, "_cut", lambda m, width: cut(m, width).flip(-1) if width == 4 else cut(m, width))
    assert off(tiles.multiply(read, weight, levels), x, weight) > 0.1


def test_sixteen_bits_lose_no_more_than_rounded_weights():
    weight, x = stored((96, 576)), inputs(16, 576).bfloat16()
    gain = linear4bit.rounded_well(LEVELS.tolist(), torch.bfloat16)
    got = tiles.multiply(x, weight, LEVELS, gain)
    assert got.dtype == torch.bfloat16
    plain = torch.nn.functional.linear(x, fourbit.dequantize_4bit(weight).bfloat16())
    assert off(got, x, weight) <= 1.02 * off(plain, x, weight)


def test_what_tiles_cannot_take_is_refused():
    x = inputs(1, 96)
    for weight in (stored((8, 96)), stored((8, 64), block_size=32), stored((64,))):
        with pytest.raises(QwlibError, match="multiples of 64"):
            tiles.pieces(weight)
    for bad in (inputs(17, 64), inputs(1, 128), inputs(0, 64), x[0]):
        with pytest.raises(QwlibError, match="1 to 16 rows of 64 columns"):
            tiles.multiply(bad, stored((8, 64)), LEVELS)


def test_pieces_fill_what_is_not_there():
    weight = stored((17, 320))
    codes, scales = tiles.pieces(weight)
    assert codes.shape == (2, 2, 16, 128)
    assert scales.shape == (2, 2, 16, 4)
    assert torch.equal(codes[1, :, 1:], codes[1, :, :1].expand(2, 15, 128))  # the last row again
    assert not codes[:, 1, :, 32:].any()
    assert not scales[:, 1, :, 1:].any()


def test_wavefronts_count_different_words_of_a_bank():
    lanes = torch.arange(32)
    assert tiles.wavefronts(4 * lanes) == 1  # one word of each bank
    assert tiles.wavefronts(0 * lanes) == 1  # one word for all
    assert tiles.wavefronts(lanes) == 1  # eight words
    assert tiles.wavefronts(128 * lanes) == 32  # one bank
    assert tiles.wavefronts(8 * lanes) == 2
    assert tiles.wavefronts(8 * lanes, 8) == 2  # two groups of lanes, all banks each
    assert tiles.wavefronts(16 * lanes, 16) == 4
    assert tiles.wavefronts(torch.stack([4 * lanes, 128 * lanes])).tolist() == [1, 32]


@given(st.lists(st.integers(0, 255), min_size=32, max_size=32))
def test_wavefronts_agree_with_sets(words):
    by_bank = [len({word for word in words if word % 32 == bank}) for bank in range(32)]
    assert tiles.wavefronts(4 * torch.tensor(words)) == max(by_bank)


def test_the_kernels_layout_has_no_conflicts():
    source = (Path(linear4bit.__file__).with_suffix(".cu")).read_text("utf-8")
    assert "160" in next(line for line in source.splitlines() if line.startswith("#define ROW "))
    for unit in range(4):
        assert tiles.wavefronts(tiles.GROUP * 160 + unit * 32 + tiles.MEMBER * 8, 8) == 2
