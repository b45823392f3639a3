"""Each fast function gives what its plain twin gives."""

import pytest
import torch

from llmquant.algorithms import gptq
from llmquant.kernels import gptq as kernel

TABLES = {
    "16 even levels": torch.arange(16.0),
    "256 even levels": torch.arange(256.0) - 128,
    "2 levels": torch.arange(2.0),
    "uneven levels": torch.tensor(
        [-1.0, -0.7, -0.5, -0.39, -0.28, -0.18, -0.09, 0, 0.08, 0.16, 0.25, 0.34, 0.44, 0.72]
    ),
}


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("first", [0, 3])
@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
def test_columns_are_rounded_as_by_the_plain_twin(table, first, threads, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    generator = torch.Generator().manual_seed(0)
    block, columns, rows = 12, 7, 700
    w = torch.randn(block, rows, generator=generator)
    scale = torch.rand(columns, rows, generator=generator) * 4 / len(table)
    scale[:, ::50] = 0
    scale[:, 1::50] *= -1
    offset = -scale * table.mean()
    factor = torch.randn(block, block, generator=generator).triu(1) / 4 + torch.eye(block)
    results = []
    for function in (gptq.round_columns, kernel.round_columns):
        left, codes, error = w.clone(), torch.empty(columns, rows, dtype=torch.uint8), torch.empty(columns, rows)
        function(left, scale, offset, table, factor, codes, error, first)
        results.append((left, codes, error))
    (left, codes, error), (fast_left, fast_codes, fast_error) = results
    # a rounding difference in the last bit may move a weight across the middle of two levels
    same = (codes == fast_codes).all(0)
    assert same.float().mean() > 0.99
    torch.testing.assert_close(fast_error[:, same], error[:, same])
    torch.testing.assert_close(fast_left[:, same], left[:, same])
