from dataclasses import replace

import pytest
import torch

from llmquant.algorithms import gptq, rtn
from llmquant.errors import CalibrationError
from llmquant.grid import decode, dequantize, fit_all, per_column
from llmquant.grids import affine, mxfp4, nf4, q2_k, q3_k, q4_0, q4_1, q4_k
from llmquant.stats import Stats

ONE_PASS = gptq.Config(scale_search=False, sweeps=0)
OPTIONS = {
    "plain": ONE_PASS,
    "static_groups": replace(ONE_PASS, static_groups=True),
    "actorder": replace(ONE_PASS, actorder=True),
}
REFINED = {
    "scale_search": gptq.Config(actorder=True, scale_search=True, sweeps=0),
    "sweeps": gptq.Config(scale_search=False, sweeps=2),
    "both": gptq.Config(actorder=True, scale_search=True, sweeps=2),
    "refit": gptq.Config(refit=True),
}
ALL = OPTIONS | REFINED
refined = pytest.mark.parametrize("config", REFINED.values(), ids=REFINED)
all_options = pytest.mark.parametrize("config", ALL.values(), ids=ALL)
options = pytest.mark.parametrize("config", OPTIONS.values(), ids=OPTIONS)
TOKENS = 2**20  # enough to damp no more than usual
strategies = pytest.mark.parametrize("strategy", ["group", "channel", "tensor"])


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def activations(tokens, cols, dtype=torch.float64):
    """Columns of very different size that depend on each other, as in a real layer."""
    mix = normal(cols, cols, seed=1) / cols**0.5 + torch.eye(cols)
    return (normal(tokens, cols, seed=2) @ mix * (normal(cols, seed=3)).exp()).to(dtype)


def stats_of(hessian):
    diagonal = hessian.diagonal()
    return Stats(hessian, diagonal, diagonal.sqrt(), TOKENS)


def hessian_of(x):
    return x.T @ x / len(x)


def grid_for(w, bits=4, strategy="group", group_size=8, **settings):
    return affine.Config(bits, group_size, strategy, **settings).bind(*w.shape, torch.float32)


def brain_surgeon(w, hessian, grid, config):
    """Return codes by optimal brain quantization, straight from its formulas and without any factorisation.

    Source: Frantar and Alistarh 2022, https://arxiv.org/abs/2208.11580: round column c, add
    -(error of c) / inverse[c, c] * inverse[c] to all columns that are left, and take c out of the inverse by one step
    of Gaussian elimination.
    """
    cols = w.shape[1]
    mean = hessian.diagonal().mean()
    inverse = torch.linalg.inv(hessian + 0.01 * mean * torch.eye(cols, dtype=w.dtype))
    fitted = fit_all(grid, w, hessian.diagonal())
    scale, offset = (t.double() for t in per_column(grid, fitted))
    order = sorted(range(cols), key=lambda c: -hessian[c, c]) if config.actorder else range(cols)
    w, codes = w.clone(), torch.empty_like(w, dtype=torch.uint8)
    for c in order:
        if c % grid.span == 0 and not (config.actorder or config.static_groups):
            span = slice(c, c + grid.span)
            own = fit_all(grid, w[:, span], hessian.diagonal()[span])
            scale[:, span], offset[:, span] = per_column(grid, own)
        levels = scale[:, c, None] * grid.table + offset[:, c, None]
        codes[:, c] = (levels - w[:, c, None]).abs().argmin(1)
        error = w[:, c] - levels.gather(1, codes[:, c, None].long())[:, 0]
        w -= torch.outer(error, inverse[c] / inverse[c, c])
        inverse = inverse - torch.outer(inverse[:, c], inverse[c]) / inverse[c, c]
    return codes


@options
@strategies
@pytest.mark.parametrize(("bits", "observer"), [(2, "mse"), (3, "minmax"), (8, "minmax")])
def test_the_codes_are_those_of_optimal_brain_quantization(config, strategy, bits, observer):
    w = normal(12, 24)
    hessian = hessian_of(activations(64, 24))
    grid = grid_for(w, bits, strategy, symmetric=False, observer=observer)
    codes = gptq.quantize(w, stats_of(hessian), grid, config).codes
    assert torch.equal(codes, brain_surgeon(w, hessian, grid, config))


@all_options
@strategies
def test_the_block_size_does_not_change_the_result(config, strategy):
    w, stats = normal(16, 24), stats_of(hessian_of(activations(64, 24)))
    results = [
        gptq.quantize(w, stats, grid_for(w, 3, strategy), replace(config, block_size=size)) for size in (1, 3, 7, 128)
    ]
    for other in results[1:]:
        assert torch.equal(other.codes, results[0].codes)
        assert torch.equal(other.params["scale"], results[0].params["scale"])


@options
@strategies
def test_without_correlation_it_is_rounding_to_nearest(config, strategy):
    w = normal(8, 32, dtype=torch.float32)
    grid = grid_for(w, 4, strategy)
    ours = gptq.quantize(w, stats_of(torch.eye(32)), grid, config)
    nearest = rtn.quantize(w, Stats.none(32), grid, rtn.Config())
    assert torch.equal(ours.codes, nearest.codes)
    assert torch.equal(dequantize(ours), dequantize(nearest))


@all_options
@strategies
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_its_output_error_is_below_that_of_rounding_to_nearest(config, strategy, bits):
    w, x = normal(24, 32, dtype=torch.float32), activations(256, 32, dtype=torch.float32)
    grid, stats = grid_for(w, bits, strategy, group_size=16), stats_of(hessian_of(x))

    def error(q):
        return float((x.double() @ (dequantize(q) - w).double().T).square().sum())

    ours = error(gptq.quantize(w, stats, grid, config))
    assert ours < 0.9 * error(rtn.quantize(w, stats, grid, rtn.Config(calibrated=True)))


@pytest.mark.parametrize("name", ["actorder", "static_groups"])
@strategies
def test_static_scales_are_those_of_the_original_weights(name, strategy):
    w, hessian = normal(8, 32), hessian_of(activations(64, 32))
    grid = grid_for(w, 3, strategy, symmetric=False, observer="mse")
    q = gptq.quantize(w, stats_of(hessian), grid, OPTIONS[name])
    for key, value in fit_all(grid, w, hessian.diagonal()).items():
        assert torch.equal(q.params[key], value)


@all_options
def test_stacked_matrices_become_what_each_becomes_alone(config):
    first, second = normal(5, 32), normal(9, 32, seed=9)
    stats, grid = stats_of(hessian_of(activations(64, 32))), grid_for(first)
    both = gptq.quantize(torch.cat([first, second]), stats, grid, config)
    for alone, rows in ((first, slice(0, 5)), (second, slice(5, 14))):
        q = gptq.quantize(alone, stats, grid, config)
        assert torch.equal(both.codes[rows], q.codes)
        assert torch.equal(both.params["scale"][rows], q.params["scale"])


@options
def test_columns_without_activations_are_rounded_to_nearest_and_disturb_no_other(config):
    dead = [3, 17]
    x = activations(64, 32)
    x[:, dead] = 0
    w = normal(8, 32)
    w[:, ::8] *= 3  # these hold the largest weights, so that the dead ones do not move any scale
    w[:, dead] = w[:, dead].clamp(-0.5, 0.5)
    stats = stats_of(hessian_of(x))
    grid = grid_for(w, 4, "channel")
    q = gptq.quantize(w, stats, grid, config)
    scale, offset = per_column(grid, q.params)
    nearest = ((w - offset) / scale).round()
    assert torch.equal(q.codes[:, dead].double(), nearest[:, dead])

    assert gptq.quantize(w, stats, grid, replace(config, dampening_frac=0.0)).record["damping"] == 0

    w[:, dead] = -w[:, dead]
    alive = [c for c in range(32) if c not in dead]
    assert torch.equal(gptq.quantize(w, stats, grid, config).codes[:, alive], q.codes[:, alive])


def test_a_hessian_of_zeros_gives_rounding_to_nearest():
    w = normal(4, 16, dtype=torch.float32)
    grid = grid_for(w)
    q = gptq.quantize(w, stats_of(torch.zeros(16, 16)), grid, ONE_PASS)
    assert torch.equal(q.codes, rtn.quantize(w, Stats.none(16), grid, rtn.Config()).codes)


def test_a_hessian_that_cannot_be_factorised_climbs_the_damping_and_says_so():
    w = normal(4, 16)
    alike = stats_of(torch.ones(16, 16, dtype=torch.float64))  # every token the same, every column the same
    q = gptq.quantize(w, alike, grid_for(w), replace(ONE_PASS, dampening_frac=0.0))
    assert 0 < q.record["damping"] <= 1
    assert torch.isfinite(dequantize(q)).all()
    # one input with weight sum(w) a row: feedback must keep the sums, to half a step of the last column
    error = (dequantize(q) - w).sum(1).abs()
    assert (error <= q.params["scale"][:, -1, 0].double().abs() * 0.51).all()


def test_a_hessian_is_damped_until_it_can_be_factorised_in_the_order_of_every_visit():
    """With equal columns it depends on their order whether a factorisation goes through by a hair."""
    w, config = normal(2, 24), gptq.Config(dampening_frac=0.0)
    dampings = set()
    for seed in range(60):
        x = normal(64, 24, seed=seed)
        x[:, [5, 20]] = x[:, [2, 11]]
        q = gptq.quantize(w, stats_of(hessian_of(x)), grid_for(w), config)
        assert torch.isfinite(dequantize(q)).all()
        dampings.add(q.record["damping"])
    assert dampings <= {0.0, 1e-6}
    assert 1e-6 in dampings


@pytest.mark.parametrize("damping", [0.0, 0.01, 0.5])
def test_a_sound_hessian_is_damped_as_asked(damping):
    w = normal(4, 16)
    q = gptq.quantize(
        w, stats_of(hessian_of(activations(64, 16))), grid_for(w), replace(ONE_PASS, dampening_frac=damping)
    )
    assert q.record["damping"] == damping


@pytest.mark.parametrize(("tokens", "damping"), [(2**20, 0.01), (400, 0.01), (32, 0.125), (4, 1.0)])
def test_few_tokens_are_damped_more(tokens, damping):
    w, stats = normal(4, 16), stats_of(hessian_of(activations(64, 16)))
    assert gptq.quantize(w, replace(stats, tokens=tokens), grid_for(w), ONE_PASS).record["damping"] == damping


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", [(2, 2), (2, 5)], ids=["diagonal", "beside"])
def test_a_hessian_that_is_not_finite_is_refused(value, place):
    w, hessian = normal(4, 16), hessian_of(activations(64, 16))
    hessian[place] = hessian[place[::-1]] = value
    with pytest.raises(CalibrationError):
        gptq.quantize(w, stats_of(hessian), grid_for(w), gptq.Config())


def test_a_hessian_with_a_negative_eigenvalue_is_refused_with_the_remedy():
    w, hessian = normal(4, 16), torch.eye(16, dtype=torch.float64)
    hessian[0, 1] = hessian[1, 0] = 9
    with pytest.raises(CalibrationError, match=r"its Hessian \(16 x 16\).*more calibration tokens"):
        gptq.quantize(w, stats_of(hessian), grid_for(w), gptq.Config())


@all_options
def test_the_arguments_are_not_changed(config):
    w, hessian = normal(4, 16), hessian_of(activations(64, 16))
    hessian[3] = hessian[:, 3] = 0
    before = w.clone(), hessian.clone()
    gptq.quantize(w, stats_of(hessian), grid_for(w), config)
    assert torch.equal(w, before[0])
    assert torch.equal(hessian, before[1])


def damped(hessian):
    return hessian + 0.01 * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=hessian.dtype)


def losses(q, w, hessian, config):
    """The error that is judged, of each row, straight from its definition."""
    delta = dequantize(q).double() - w.double()
    return torch.stack([d @ damped(hessian) @ d for d in delta])


def surgery(w, inverse, scale, offset, table, columns):
    """Return (values, codes, loss) of one row's columns by optimal brain quantization, with the row and inverse left.

    The loss is that of Frantar and Alistarh: the sum of error² / inverse[c, c], as the inverse is then.
    """
    w, inverse, values, codes, loss = w.clone(), inverse.clone(), {}, {}, 0.0
    for c in columns:
        levels = scale[c] * table.double() + offset[c]
        codes[c] = int((levels - w[c]).abs().argmin())
        values[c] = levels[codes[c]]
        error = w[c] - values[c]
        loss += float(error**2 / inverse[c, c])
        w = w - error * inverse[c] / inverse[c, c]
        inverse = inverse - torch.outer(inverse[:, c], inverse[c]) / inverse[c, c]
    return values, codes, loss, w, inverse


def wished(grid, params, row, span, multiple):
    """One row's scale and offset for every column of a span, at a multiple, as stored."""
    given = {name: value[row, span][None] for name, value in params.items()}
    if multiple != 1:
        given = grid.store(*(t * multiple for t in grid.levels(given)))
    return [t.double()[0].repeat_interleave(grid.group) for t in grid.levels(given)]


@pytest.mark.parametrize("symmetric", [True, False])
def test_searched_scales_are_those_of_the_least_loss_of_optimal_brain_quantization(symmetric):
    w, hessian = normal(6, 24), hessian_of(activations(64, 24))
    grid, config = grid_for(w, 2, symmetric=symmetric), REFINED["scale_search"]
    importance = hessian.diagonal()
    expected = []
    for r, row in enumerate(w):
        left, inverse, found = row, torch.linalg.inv(damped(hessian)), torch.empty_like(row)
        for span in sorted(range(3), key=lambda s: -importance[8 * s : 8 * s + 8].mean()):
            columns = sorted(range(8 * span, 8 * span + 8), key=lambda c: -importance[c])
            trials = []
            for multiple in gptq.MULTIPLES:
                scale, offset = (torch.zeros(24, dtype=torch.double) for _ in range(2))
                own = wished(grid, fit_all(grid, w, importance), r, span, multiple)
                scale[8 * span : 8 * span + 8], offset[8 * span : 8 * span + 8] = own
                trials.append(surgery(left, inverse, scale, offset, grid.table, columns))
            values, _, _, left, inverse = min(trials, key=lambda t: t[2])
            for c, value in values.items():
                found[c] = value
        expected.append(found)
    one_pass = gptq.quantize(w, stats_of(hessian), grid, OPTIONS["actorder"])
    before, after = dequantize(one_pass).double(), torch.stack(expected)
    loss = [torch.stack([d @ damped(hessian) @ d for d in x - w]) for x in (before, after)]
    better = loss[1] < loss[0]
    assert better.any()
    ours = dequantize(gptq.quantize(w, stats_of(hessian), grid, config)).double()
    torch.testing.assert_close(ours, torch.where(better[:, None], after, before))


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_sweep_rounds_each_span_towards_the_minimum_around_all_other_columns(symmetric):
    w, hessian = normal(6, 24), hessian_of(activations(64, 24))
    grid, config = grid_for(w, 2, symmetric=symmetric), replace(REFINED["sweeps"], sweeps=1)
    full = damped(hessian)
    start = gptq.quantize(w, stats_of(hessian), grid, ONE_PASS)
    expected = dequantize(start).double()
    changed = 0
    for r, row in enumerate(w):
        for span in range(3):
            block = slice(8 * span, 8 * span + 8)
            others = expected[r] - row
            others[block] = 0
            target = row[block] - torch.linalg.solve(full[block, block], (full @ others)[block])
            columns = sorted(range(8), key=lambda c: -hessian[8 * span + c, 8 * span + c])
            for multiple in gptq.MULTIPLES:
                scale, offset = wished(grid, start.params, r, span, multiple)
                inverse = torch.linalg.inv(full[block, block])
                values = surgery(target, inverse, scale, offset, grid.table, columns)[0]
                trial = expected[r].clone()
                trial[block] = torch.stack([values[c] for c in range(8)])
                if (trial - row) @ full @ (trial - row) < (expected[r] - row) @ full @ (expected[r] - row) - 1e-12:
                    expected[r], changed = trial, changed + 1
    assert changed > 0
    torch.testing.assert_close(dequantize(gptq.quantize(w, stats_of(hessian), grid, config)).double(), expected)


GRIDS = {
    "group": affine.Config(4, 128),
    "asymmetric": affine.Config(2, 64, symmetric=False),
    "channel": affine.Config(3, strategy="channel"),
    "tensor": affine.Config(4, strategy="tensor"),
} | {g.__name__.rpartition(".")[2]: g.Config() for g in (mxfp4, q2_k, q3_k, q4_0, q4_1, q4_k)}


@pytest.mark.parametrize("config", [REFINED["both"], REFINED["refit"]], ids=["both", "refit"])
@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
def test_no_row_gets_worse_and_the_whole_gets_better(grid, config):
    w, hessian = normal(4, 512, dtype=torch.float32), hessian_of(activations(1024, 512))
    grid = grid.bind(*w.shape, torch.float32)
    single = replace(config, scale_search=False, sweeps=0, refit=False)
    before = losses(gptq.quantize(w, stats_of(hessian), grid, single), w, hessian, config)
    q = gptq.quantize(w, stats_of(hessian), grid, config)
    after = losses(q, w, hessian, config)
    assert (after <= before * 1.001).all()
    assert after.sum() < before.sum()
    # what is stored is what was judged: the codes are levels of the stored parameters
    assert torch.equal(decode(grid, q.codes, *per_column(grid, q.params)), dequantize(q))


def test_where_only_powers_of_two_are_stored_the_neighbours_are_tried(monkeypatch):
    w, stats = normal(64, 128, dtype=torch.float32), stats_of(hessian_of(activations(1024, 128)))
    grid = mxfp4.Config().bind(*w.shape, torch.float32)
    tried = gptq.quantize(w, stats, grid, gptq.Config())
    monkeypatch.setattr(gptq, "COARSE", (1.0,))
    fitted = gptq.quantize(w, stats, grid, gptq.Config())
    steps = tried.params["e"].int() - fit_all(grid, w, stats.square_mean)["e"].int()
    assert set(steps.unique().tolist()) >= {-1, 0, 1}
    before, after = (losses(q, w, stats.hessian, None).sum() for q in (fitted, tried))
    assert after < before


@refined
@pytest.mark.parametrize("sweeps", [1, 3])
def test_further_sweeps_never_raise_the_error(config, sweeps):
    w, hessian = normal(12, 32), hessian_of(activations(64, 32))
    grid = grid_for(w, 3)
    few, more = (
        losses(gptq.quantize(w, stats_of(hessian), grid, replace(config, sweeps=n)), w, hessian, config)
        for n in (sweeps, sweeps + 1)
    )
    assert (more <= few * (1 + 1e-9)).all()


def test_refitted_multiples_are_those_of_a_plain_least_squares_solver():
    groups, size, rows = 3, 8, 5
    parts, left = normal(2, groups * size, rows), normal(groups * size, rows, seed=1)
    parts[:, :size, 2] = 0  # a group of zeros: nothing to refit
    hessian = damped(hessian_of(activations(64, groups * size)))
    change = gptq.least_squares(parts, left, hessian, size)
    root = torch.linalg.cholesky(hessian).T
    for row in range(rows):
        columns = torch.zeros(groups * size, groups, 2, dtype=torch.float64)
        for group in range(groups):
            own = slice(group * size, (group + 1) * size)
            columns[own, group] = parts[:, own, row].T
        best = torch.linalg.lstsq(root @ columns.flatten(1), root @ left[:, row], driver="gelsd").solution
        torch.testing.assert_close(change[:, row].T, best.view(groups, 2), rtol=1e-3, atol=1e-4)


REFITTED = {name: grid for name, grid in GRIDS.items() if name not in ("tensor", "mxfp4")} | {"nf4": nf4.Config()}


@pytest.mark.parametrize("grid", REFITTED.values(), ids=REFITTED)
def test_refitted_scales_lower_the_error_of_most_rows(grid):
    w, stats = normal(48, 512, dtype=torch.float32), stats_of(hessian_of(activations(1024, 512)))
    grid = grid.bind(*w.shape, torch.float32)
    config = gptq.Config(sweeps=1)
    before, after = (
        losses(gptq.quantize(w, stats, grid, c), w, stats.hessian, c) for c in (config, replace(config, refit=True))
    )
    assert (after < before).float().mean() > 0.8
    assert after.sum() < 0.99 * before.sum()


@pytest.mark.parametrize("grid", [affine.Config(3, strategy="tensor"), mxfp4.Config()], ids=["tensor", "mxfp4"])
def test_scales_that_cannot_follow_are_not_refitted(grid):
    w, stats = normal(8, 64), stats_of(hessian_of(activations(64, 64)))
    grid = grid.bind(*w.shape, torch.float32)
    with_it, without = (gptq.quantize(w, stats, grid, gptq.Config(refit=value)) for value in (True, False))
    assert torch.equal(with_it.codes, without.codes)
    assert all(torch.equal(value, without.params[name]) for name, value in with_it.params.items())


def test_nothing_is_refitted_unless_it_is_asked_for(monkeypatch):
    w, stats = normal(8, 32), stats_of(hessian_of(activations(64, 32)))
    monkeypatch.setattr(gptq, "least_squares", lambda *_: pytest.fail("refitted"))
    gptq.quantize(w, stats, grid_for(w), gptq.Config(sweeps=2))
    with pytest.raises(pytest.fail.Exception, match="refitted"):
        gptq.quantize(w, stats, grid_for(w), gptq.Config(sweeps=2, refit=True))


def test_a_refit_without_anything_to_go_on_from_is_refused():
    with pytest.raises(ValueError, match="scale_search and of sweeps"):
        gptq.Config(scale_search=False, sweeps=0, refit=True)


def test_one_set_of_parameters_for_all_rows_is_kept():
    w, hessian = normal(8, 32), hessian_of(activations(64, 32))
    grid = grid_for(w, 4, "tensor")
    q = gptq.quantize(w, stats_of(hessian), grid, REFINED["both"])
    assert torch.equal(q.params["scale"], fit_all(grid, w, hessian.diagonal())["scale"])


def test_a_negative_number_of_sweeps_is_refused():
    with pytest.raises(ValueError, match="-1"):
        gptq.Config(sweeps=-1)


def two_sided(w, x, outputs, grid, **settings):
    """Return a quantized matrix and tr(G E H Eᵀ), the cost of its errors with the undamped matrices."""
    config = gptq.Config(**settings, two_sided=True)
    q = gptq.quantize(w, replace(stats_of(hessian_of(x)), outputs=outputs), grid, config)
    error = dequantize(q).double() - w
    outputs = torch.block_diag(*outputs) if outputs else torch.eye(len(w), dtype=w.dtype)
    return q, float((outputs * (error @ hessian_of(x) @ error.T)).sum())


def of_outputs(rows, seed):
    """Fisher information of outputs that depend on each other, those with small numbers mattering most."""
    g = normal(400, rows, seed=seed) @ (normal(rows, rows, seed=seed + 1) / rows**0.5 + torch.eye(rows))
    return hessian_of(g[:, g.square().mean(0).argsort(descending=True)])


@pytest.mark.parametrize("make", [lambda w: grid_for(w, 3, group_size=16), lambda w: q3_k.Q3_K()], ids=["w3", "q3_k"])
def test_rows_that_absorb_the_errors_of_others_cost_less(make):
    w, x = normal(72, 256), activations(600, 256)
    outputs = (of_outputs(40, 1), of_outputs(32, 2))
    known = torch.block_diag(*outputs)
    grid = make(w)
    q, cost = two_sided(w, x, outputs, grid)
    alone = gptq.quantize(w, stats_of(hessian_of(x)), grid, gptq.Config())
    error = dequantize(alone).double() - w
    assert cost < 0.9 * float((known * (error @ hessian_of(x) @ error.T)).sum())
    assert not torch.equal(q.codes, alone.codes)


def test_later_rows_are_rounded_where_the_earlier_errors_want_them(monkeypatch):
    """The best continuous second block for errors E of the first is W - G22⁻¹ G21 E."""
    monkeypatch.setattr(gptq, "BLOCKS", 2)
    w, x = normal(40, 32), activations(300, 32)
    outputs = of_outputs(40, 3)
    q, _ = two_sided(w, x, (outputs,), grid_for(w))
    known = stats_of(hessian_of(x))
    first = gptq.quantize(w[:20], known, grid_for(w), gptq.Config())
    damped = outputs + 0.01 * outputs.diagonal().mean() * torch.eye(40, dtype=w.dtype)
    error = dequantize(first).double() - w[:20]
    second = w[20:] - torch.linalg.solve(damped[20:, 20:], damped[20:, :20] @ error)
    want = torch.cat([first.codes, gptq.quantize(second, known, grid_for(w), gptq.Config()).codes])
    assert torch.equal(q.codes, want)


def test_outputs_that_do_not_depend_on_each_other_change_nothing():
    w, x = normal(40, 32), activations(300, 32)
    uneven = torch.diag(torch.linspace(1, 5, 40, dtype=torch.float64))  # the last row matters most, and is first
    q, _ = two_sided(w, x, (uneven,), grid_for(w))
    alone = gptq.quantize(w, stats_of(hessian_of(x)), grid_for(w), gptq.Config())
    assert torch.equal(q.codes, alone.codes)
    assert all(torch.equal(q.params[name], value) for name, value in alone.params.items())


def test_few_rows_are_rounded_too():
    w, x = normal(3, 32), activations(300, 32)
    q, _ = two_sided(w, x, (of_outputs(2, 1), of_outputs(1, 2)), grid_for(w))
    assert q.codes.shape == w.shape
    assert float((dequantize(q) - w).abs().max()) < float(w.abs().max())


def test_without_information_of_outputs_and_on_shared_scales_rows_stay_independent():
    w, x = normal(40, 32), activations(300, 32)
    for outputs, grid in ((None, grid_for(w)), ((of_outputs(40, 4),), grid_for(w, strategy="tensor"))):
        q, _ = two_sided(w, x, outputs, grid)
        assert torch.equal(q.codes, gptq.quantize(w, stats_of(hessian_of(x)), grid, gptq.Config()).codes)
        assert q.record["two_sided"] is False
        assert "outputs_damping" not in q.record


def test_the_largest_damping_of_the_outputs_is_recorded_for_two_sided_feedback_alone():
    w, x = normal(40, 32), activations(300, 32)
    stiff = torch.eye(16, dtype=w.dtype)
    stiff[0, 1] = stiff[1, 0] = 1.02  # its smallest eigenvalue is -0.02
    q, _ = two_sided(w, x, (of_outputs(24, 1), stiff), grid_for(w))
    assert q.record == {"damping": 0.01, "two_sided": True, "outputs_damping": pytest.approx(0.01 * gptq.LADDER)}
    assert gptq.quantize(w, stats_of(hessian_of(x)), grid_for(w), gptq.Config()).record == {"damping": 0.01}


@pytest.mark.parametrize(("value", "said"), [(9.0, "not positive definite"), (float("nan"), "not finite")])
def test_outputs_whose_information_cannot_be_factorised_are_named(value, said):
    w, x = normal(16, 32), activations(300, 32)
    broken = torch.eye(16, dtype=w.dtype)
    broken[0, 1] = broken[1, 0] = broken[0, 0] = value
    with pytest.raises(CalibrationError, match=f"^the Fisher information of its outputs.*{said}"):
        two_sided(w, x, (broken,), grid_for(w))
