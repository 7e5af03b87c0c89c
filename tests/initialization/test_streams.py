"""Counter-based normal streams: bits, layout independence, distribution, frozen values."""

import itertools
import math
import random
import time

import numpy as np
import pytest
import torch

from megagamma.initialization import streams
from megagamma.initialization.streams import fingerprint, normal_, philox, stream_key, truncated_variance

N = 1 << 22


def draw(shape, global_shape=None, start=None, *, seed=1, name="w", dtype=torch.float32, **options):
    out = torch.full(shape, math.nan, dtype=dtype)
    return normal_(out, seed=seed, name=name, global_shape=global_shape or shape, start=start, **options)


@pytest.fixture(scope="module")
def sample():
    return draw((N,), seed=11, name="sample").double().numpy()


def same(a, b):
    return a.shape == b.shape and fingerprint(a) == fingerprint(b)


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture
def on_device(monkeypatch):
    """Sends CPU tensors down the path of other devices, in several chunks."""
    monkeypatch.setattr(streams, "_on_host", lambda device: False)
    monkeypatch.setattr(streams, "DEVICE_CHUNK", 1 << 12)


# Bits


@pytest.mark.parametrize("kind", ["torch", "numpy"])
@pytest.mark.parametrize("first", [0, 1, 12345, 2**32 - 3, 2**32 + 7, 2**40 + 5, 2**59])
def test_vectorised_philox_equals_numpy_generator(first, kind):
    for seed, name, attempt in [(0, "", 0), (1, "layers.0.wq", 0), (2**64 - 1, "é", 3), (77, "w", 1)]:
        key = stream_key(seed, name)
        blocks = np.arange(first, first + 40)
        blocks = torch.from_numpy(blocks) if kind == "torch" else blocks
        mine = np.stack([np.asarray(c) for c in philox(blocks, key, attempt)], -1).reshape(-1).view(np.uint64)
        generator = np.random.Philox(key=np.array(key, np.uint64), counter=first + (attempt << 192))
        assert np.array_equal(mine, generator.random_raw(160))


def test_philox_known_answer():
    # Random123's vector of philox4x64-10 for counter 0 (block -1) and key 0.
    words = [int(w) & (2**64 - 1) for w in philox(torch.tensor([-1]), (0, 0))]
    assert words == [0x16554D9ECA36314C, 0xDB20FE9D672D0FDC, 0xD7E772CEE186176B, 0x7E68B68AEC7BA23B]


def test_keys_are_unambiguous():
    pairs = [(s, n) for s in (0, 1, 10, 256, 2**56) for n in ("", "0", "w", "\0w", "0w", "1:w", "ww")]
    assert len({stream_key(*p) for p in pairs}) == len(pairs)


# Layout independence


def test_random_slices_of_matrices_equal_the_full_draw(threads, monkeypatch):
    rng = random.Random(5)
    for chunk in (8, 64, 1000, 1 << 17):
        monkeypatch.setattr(streams, "HOST_CHUNK", chunk)
        for trial in range(25):
            limit = 70 if chunk < 1000 else 700
            shape = rng.randint(1, limit), rng.choice([8, 64, rng.randint(1, limit), rng.randint(1, limit)])
            truncate = rng.choice([None, None, 1.5])
            full = reference(shape, trial, truncate)
            start = tuple(rng.randrange(s) for s in shape)
            size = tuple(rng.choice([s - a, rng.randint(1, s - a)]) for s, a in zip(shape, start, strict=True))
            part = draw(size, shape, start, seed=trial, truncate=truncate)
            rows, columns = (slice(a, a + n) for a, n in zip(start, size, strict=True))
            assert same(part, full[rows, columns]), (shape, rows, columns)


def reference(shape, seed, truncate):
    """The full draw in one chunk."""
    worker = streams._Worker(stream_key(seed, "w"), torch.device("cpu"), -(-math.prod(shape) // 8))
    z = worker.draw(np.array([0]), -(-math.prod(shape) // 8), True, truncate)
    if truncate is not None:
        z = z * np.float32(1 / math.sqrt(truncated_variance(truncate)))
    return torch.from_numpy(z[: math.prod(shape)]).view(shape)


@pytest.mark.parametrize("truncate", [None, 2.0])
def test_large_matrix_rows_columns_and_threads(threads, truncate):
    shape = (1500, 1111)
    full = draw(shape, truncate=truncate)
    for rows, columns in [
        (slice(3, 1402), slice(None)),
        (slice(None), slice(555, 1111)),
        (slice(7, 900), slice(1, 2)),
    ]:
        view = full[rows, columns]
        start = rows.start or 0, columns.start or 0
        assert same(draw(tuple(view.shape), shape, start, truncate=truncate), view)
    before = torch.get_num_threads()
    torch.set_num_threads(3 - threads)
    assert same(full, draw(shape, truncate=truncate))
    torch.set_num_threads(before)


def test_every_offset_and_length_of_a_vector():
    full = draw((64,))
    for a, b in itertools.combinations(range(65), 2):
        assert same(draw((b - a,), (64,), (a,)), full[a:b])


def test_noncontiguous_out_and_neighbours_untouched():
    full = draw((40, 24))
    fused = torch.zeros(3, 40, 50)
    normal_(fused[1, :, 5:17], seed=1, name="w", global_shape=(40, 24), start=(0, 9))
    assert same(fused[1, :, 5:17], full[:, 9:21])
    assert fused[0].count_nonzero() == fused[2].count_nonzero() == 0
    assert fused[1, :, :5].count_nonzero() == fused[1, :, 17:].count_nonzero() == 0
    wide = torch.zeros(40, 48)[:, ::2]
    assert same(normal_(wide, seed=1, name="w", global_shape=(40, 24)), full)
    transposed = torch.zeros(24, 40).T
    assert same(normal_(transposed, seed=1, name="w", global_shape=(40, 24)), full)
    vector = torch.zeros(30)[::3]
    assert same(normal_(vector, seed=1, name="w", global_shape=(960,), start=(5,)), full.view(-1)[5:15])


def test_other_ranks():
    full = draw((6, 5, 7, 9))
    assert same(full.view(-1), draw((6 * 5 * 7 * 9,)))
    assert same(draw((2, 3, 7, 4), (6, 5, 7, 9), (3, 1, 0, 5)), full[3:5, 1:4, :, 5:])
    assert same(draw((2, 5, 7, 9), (6, 5, 7, 9), (3, 0, 0, 0)), full[3:5])
    assert draw(()).item() == full.view(-1)[0].item()
    assert draw((0, 4), (8, 4)).numel() == 0
    assert draw((4, 1), (4, 9), (0, 3)).isfinite().all()


@pytest.mark.parametrize("truncate", [None, 1.0])
def test_device_path_equals_cpu_path(on_device, monkeypatch, truncate):
    cases = [((20000,), (20000,), None), ((33, 77), (50, 200), (3, 5)), ((64, 512), (64, 4096), (0, 1024))]
    device = [draw(*c, truncate=truncate, std=0.02) for c in cases]
    device.append(draw((N // 16,), truncate=truncate))
    monkeypatch.setattr(streams, "_on_host", lambda device: True)
    host = [draw(*c, truncate=truncate, std=0.02) for c in cases]
    host.append(draw((N // 16,), truncate=truncate))
    assert all(map(same, device, host))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("truncate", [None, 2.0])
def test_gpu_equals_cpu(truncate):
    for shape, whole, start in [((N,), (N,), None), ((333, 777), (500, 2001), (3, 5))]:
        out = torch.empty(shape, device="cuda")
        normal_(out, seed=1, name="w", global_shape=whole, start=start, truncate=truncate)
        assert same(out, draw(shape, whole, start, truncate=truncate))


def test_small_slice_of_a_huge_matrix_is_instant():
    begin = time.perf_counter()
    shape = (131072 * 64, 8192 * 16)
    corner = draw((64, 64), shape, (shape[0] - 64, shape[1] - 64))
    row = draw((1, 64), shape, (shape[0] - 1, shape[1] - 64))
    assert time.perf_counter() - begin < 2
    assert same(corner[-1:], row)
    assert abs(corner.std() - 1) < 0.06


def test_cast_and_scale():
    full = draw((100, 33), std=0.02)
    assert same(full, draw((100, 33)) * torch.tensor(0.02))
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        assert same(draw((100, 33), std=0.02, dtype=dtype), full.to(dtype))
    assert draw((9,), std=0.0).tolist() == [0.0] * 9
    parameter = torch.nn.Parameter(torch.zeros(100, 33))
    assert normal_(parameter, seed=1, name="w", global_shape=(100, 33), std=0.02) is parameter
    assert same(parameter, full) and parameter.grad_fn is None
    assert normal_(torch.empty(3, device="meta"), seed=1, name="w", global_shape=(3,)).is_meta


def test_frozen_streams():
    # These values are the format: they may change only with streams.FORMAT.
    assert streams.FORMAT == b"stream-1"
    assert [f"{k:016x}" for k in stream_key(1234, "layers.0.attention.wq.weight")] == GOLDEN_KEY
    options = {"seed": 1234, "name": "layers.0.attention.wq.weight"}
    assert fingerprint(draw((300, 70), (1000, 1001), (500, 500), std=0.02, **options)) == GOLDEN
    assert fingerprint(draw((300, 70), (1000, 1001), (500, 500), truncate=1.5, **options)) == GOLDEN_TRUNCATED


GOLDEN_KEY = ["d9c88f8a61f0fae7", "1c59bda2a7f1eb81"]
GOLDEN = "d405d9b8fa20bd9e809073d63796a2fc0b9c012997810df8861ff004fe6d6526"
GOLDEN_TRUNCATED = "d247b1e10b4eeb02067ecf785a74bd81de82f0130d8301a154e72ff3ec27f7f7"


# Distribution


def box_muller(xp, high, low):
    """Radius (with the sign that the angle gives it), first and second normal of each pair of halves."""
    to = torch.from_numpy if xp is torch else (lambda a: a)
    halves = (low, high) if streams._HIGH else (high, low)
    words = to(np.stack(halves, -1).reshape(-1).view(np.int64))
    scratch = [to(np.empty(len(high), np.float32)) for _ in range(4)]
    views = [s.view(torch.int32 if xp is torch else np.int32) for s in scratch]
    z = to(np.empty(2 * len(high), np.float32))
    streams._box_muller(xp, words, z, scratch, views)
    return [np.ascontiguousarray(s) for s in (scratch[3], z[0::2], z[1::2])]


def test_box_muller_against_float64():
    rng = np.random.default_rng(0)
    edges = {s * (2**k + d) for k in range(31) for d in (-1, 0, 1) for s in (-1, 1)} | {2**31 - 1, -(2**31)}
    edges = np.array(sorted(edges), np.int32)
    high = np.concatenate([rng.integers(-(2**31), 2**31, 1 << 20, np.int32), np.repeat(edges, len(edges))])
    low = np.concatenate([rng.integers(-(2**31), 2**31, 1 << 20, np.int32), np.tile(edges, len(edges))])
    radius, first, second = box_muller(np, high, low)
    t = (high + 0.5) / 2**32
    with np.errstate(invalid="ignore", divide="ignore"):
        exact = np.sqrt(-2 * np.where(t < 0, np.log1p(t), np.log(t)))
    turn = np.where(low < 0, -1.0, 1.0)
    angle = math.pi / 2 * ((low * 2.0**-30 + 1) % 2 - 1)
    assert np.abs(np.abs(radius) / exact - 1).max() < 2.5e-7
    assert np.abs(first / exact - turn * np.cos(angle)).max() < 4e-7
    assert np.abs(second / exact - turn * np.sin(angle)).max() < 4e-7
    assert exact.max() > 6.7 and np.abs(radius).max() > 6.7
    for mine, other in zip((radius, first, second), box_muller(torch, high, low), strict=True):
        assert np.array_equal(mine.view(np.int32), other.view(np.int32))


def test_moments_and_tails(sample):
    z, root = sample, math.sqrt(N)
    assert np.isfinite(z).all()
    assert abs(z.mean()) < 4 / root
    assert abs(z.var() - 1) < 4 * math.sqrt(2) / root
    assert abs((z**3).mean()) < 4 * math.sqrt(15) / root
    assert abs((z**4).mean() - 3) < 4 * math.sqrt(96) / root
    for k in (1, 2, 3, 4, 5):
        expected = N * math.erfc(k / math.sqrt(2))
        assert abs((np.abs(z) > k).sum() - expected) < 4.5 * math.sqrt(expected) + 1, k
    assert 4.7 < np.abs(z).max() < 6.8


@pytest.mark.parametrize("part", [slice(None), slice(0, None, 2), slice(1, None, 2)])
def test_kolmogorov_smirnov(sample, part):
    z = np.sort(sample[part])
    cdf = 0.5 * (1 + torch.special.erf(torch.from_numpy(z / math.sqrt(2))).numpy())
    grid = np.arange(len(z) + 1) / len(z)
    distance = max(np.abs(cdf - grid[1:]).max(), np.abs(cdf - grid[:-1]).max())
    assert distance < 1.95 / math.sqrt(len(z))  # 0.1 % level


def test_independence(sample):
    def correlation(a, b):
        return abs((a * b).mean()) * math.sqrt(len(a))

    for lag in (1, 2, 3, 4, 7, 8, 16, 4096):
        assert correlation(sample[:-lag], sample[lag:]) < 4.5
        assert correlation(sample[:-lag] ** 2 - 1, sample[lag:] ** 2 - 1) < 2 * 4.5
    assert correlation(sample[0::2] ** 2 - 1, sample[1::2] ** 2 - 1) < 2 * 4.5
    size = 1 << 18
    others = [draw((size,), seed=s, name=n).double().numpy() for s, n in [(11, "sample1"), (12, "sample"), (0, "")]]
    for a, b in itertools.combinations([sample[:size], *others], 2):
        assert correlation(a, b) < 4.5


@pytest.mark.parametrize("k", [0.25, 1.0, 2.0, 3.0])
def test_truncation(k):
    size = 1 << (17 if k < 1 else 20)
    z = draw((size,), std=0.02, truncate=k).double()
    phi, mass = math.exp(-k * k / 2) / math.sqrt(2 * math.pi), math.erf(k / math.sqrt(2))
    variance = 1 - 2 * k * phi / mass
    assert math.isclose(truncated_variance(k), variance, rel_tol=1e-12)
    bound = k * 0.02 / math.sqrt(variance)
    assert 0.99 * bound < z.abs().max() <= bound * (1 + 2e-7)
    assert abs(z.std() / 0.02 - 1) < 5 / math.sqrt(2 * size) and abs(z.mean()) < 5 * 0.02 / math.sqrt(size)
    plain = draw((size,))
    kept = plain.abs() <= k
    assert abs(kept.double().mean() - mass) < 5 * math.sqrt(mass * (1 - mass) / size)
    assert same((plain * torch.tensor(0.02 / math.sqrt(variance)))[kept].double(), z[kept])


def test_truncated_variance_ends():
    assert truncated_variance(9.5) == truncated_variance(math.inf) == 1.0
    assert math.isclose(truncated_variance(0.1), 0.1**2 / 3, rel_tol=2e-3)  # almost uniform
    assert same(draw((5000,), truncate=math.inf), draw((5000,)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"truncate": 0.0}, "truncate must be > 0"),
        ({"truncate": -1.0}, "truncate must be > 0"),
        ({"truncate": math.nan}, "truncate must be > 0"),
        ({"std": -1.0}, "std must be finite"),
        ({"std": math.nan}, "std must be finite"),
        ({"std": 1e39}, "overflows float32"),
        ({"seed": -1}, "seed must be"),
        ({"seed": 2**64}, "seed must be"),
        ({"seed": 1.0}, "seed must be"),
        ({"start": (0, 1)}, "does not fit"),
        ({"start": (-1, 0)}, "does not fit"),
        ({"start": (0,)}, "differ in rank"),
        ({"global_shape": (4,)}, "differ in rank"),
        ({"global_shape": (3, 4)}, "does not fit"),
        ({"global_shape": (2**31, 2**31)}, "more than"),
        ({"dtype": torch.int64}, "floating-point"),
    ],
)
def test_bad_arguments(options, message):
    options = {"seed": 1, "global_shape": (4, 4), **options}
    out = torch.zeros(4, 4, dtype=options.pop("dtype", torch.float32))
    with pytest.raises(ValueError, match=message):
        normal_(out, name="w", **options)
    assert not out.any()
