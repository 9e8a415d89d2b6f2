"""Packed integers: what the bytes mean, and what they take."""

from __future__ import annotations

import pytest
import torch

from lowrank.errors import LowrankError
from lowrank.nn.codes import Codes, codes_cost, packed, row_bytes, unpacked


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("columns", [1, 7, 16, 33])
def test_codes_come_back(bits: int, columns: int) -> None:
    draw = torch.Generator().manual_seed(columns)
    codes = torch.randint(2**bits, (5, columns), generator=draw)
    codes[0], codes[1] = 2**bits - 1, 0
    stored = packed(codes, bits)
    assert stored.dtype == torch.uint8
    assert stored.shape == (5, row_bytes(columns, bits))
    assert torch.equal(unpacked(stored, bits, columns), codes.int())
    if columns % 8 == 0:
        assert row_bytes(columns, bits) == columns * bits // 8


def test_the_layout_of_bytes_is_the_format() -> None:
    """Lower places first; of six bits the lower four, then the upper two."""
    assert packed(torch.tensor([[1, 2, 15]]), 4).tolist() == [[0x21, 0x0F]]
    assert packed(torch.tensor([[0, 1, 2, 3, 1]]), 2).tolist() == [[0b11_10_01_00, 0b01]]
    assert packed(torch.tensor([[0b10_0011, 0b01_0100]]), 6).tolist() == [[0x43, 0b01_10]]
    assert packed(torch.tensor([[7, 255]]), 8).tolist() == [[7, 255]]


def test_rows_of_groups_multiply_as_their_numbers() -> None:
    layer = Codes(3, 10, 4, 4, dtype=torch.float64)
    codes = torch.arange(30).view(3, 10) % 16
    scale = torch.tensor([[1.0, 2.0, -3.0]] * 3, dtype=torch.float64)
    layer.hold(codes, scale)
    places = torch.arange(10) // 4
    want = scale[:, places] * (codes.double() - 8)
    assert torch.equal(layer.dense(), want)
    x = torch.randn(2, 10, dtype=torch.float64)
    torch.testing.assert_close(layer(x), x @ want.T)
    layer.turned = True
    torch.testing.assert_close(layer(x[:, :3]), x[:, :3] @ want)
    stored = sum(t.numel() * t.element_size() for t in layer.state_dict().values())
    assert codes_cost(3, 10, 4, 4, 8) == (9, stored) == (9, 3 * 5 + 9 * 8)


@pytest.mark.parametrize(("bits", "group"), [(0, 4), (9, 4), (4, 0), (4, 11)])
def test_sizes_that_do_not_fit(bits: int, group: int) -> None:
    with pytest.raises(LowrankError, match=rf"got {bits} bits in groups of {group}"):
        Codes(3, 10, bits, group, device="meta")
