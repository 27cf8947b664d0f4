"""Task affinity: cosines against whole gradients, memory, interruptions at any moment, files, pictures."""

from __future__ import annotations

import copy
import math
import os
import random
import signal
import subprocess
import sys
import weakref
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from comparing import Allocations
from refusals import refused
from torch import nn

import dtr_kernels as dtr
from dtr_kernels.analysis import affinity as module
from dtr_kernels.analysis import progress as progress_module
from dtr_kernels.plotting import _cell_edges

pytestmark = pytest.mark.usefixtures("one_thread")

TIMESTEPS = [0, 3, 4, 250, 700, 999]


class Toy(nn.Module):
    """A small model with a parameter that is used twice, one that is frozen and one that is not used."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(7, 5)
        self.tied = nn.Linear(5, 5)
        self.scale = nn.Parameter(torch.tensor(1.3))
        self.frozen = nn.Parameter(torch.randn(5), requires_grad=False)
        self.unused = nn.Parameter(torch.randn(3, 2))
        self.last = nn.Linear(5, 1)

    def forward(self, x):
        x = torch.tanh(self.tied(torch.tanh(self.first(x)) * self.frozen))
        return self.last(torch.tanh(self.tied(x) + x)) * self.scale


def toy_loss(model):
    """The loss of a timestep; every sample of a timestep comes from a generator of its own."""

    def loss(t):
        x = torch.randn(3, 7, generator=torch.Generator().manual_seed(t), dtype=torch.float64)
        return ((model(x.to(model.first.weight)) - math.cos(t)) ** 2).mean()

    return loss


def tiny_dit(dtype=torch.float64):
    model = dtr.nn.DiT(4, 2, 1, 16, 2, 2, num_classes=3, routing=dtr.DenoisingTaskRouting(1000)).to(dtype)
    for p in model.parameters():
        nn.init.normal_(p, std=0.2)  # no gate is closed
    return model.eval()  # no labels are dropped


def dit_loss(model):
    like = model.pos_embed

    def loss(t):
        generator = torch.Generator().manual_seed(t)
        x = torch.randn(3, 1, 4, 4, generator=generator, dtype=torch.float64).to(like)
        y = torch.randint(3, (3,), generator=generator).to(like.device)
        return model(x, torch.full((3,), t, device=like.device), y).square().mean()

    return loss


def gradients_one_by_one(loss, parameters, timesteps):
    """The oracle: n whole gradients, fp64 [n, P], by backward()."""
    rows = []
    for t in timesteps:
        for p in parameters:
            p.grad = None
        loss(t).backward()
        rows.append(torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1) for p in parameters]))
        rows[-1] = rows[-1].double()
    return torch.stack(rows)


def cosines(gradients):
    return torch.stack([torch.cosine_similarity(g, gradients, eps=1e-300) for g in gradients])


def trainable(model):
    return [p for p in model.parameters() if p.requires_grad]


def size_of(model):
    return sum(p.numel() for p in trainable(model))


def analyse(loss, model, **options):
    return dtr.task_affinity(loss, model.named_parameters(), TIMESTEPS, progress=False, **options)


def assert_same_bits(actual, expected):
    for name, tensor in vars(expected).items():
        assert torch.equal(getattr(actual, name), tensor), name


# --- the cosines -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make, make_loss", [(lambda: Toy().double(), toy_loss), (tiny_dit, dit_loss)])
@pytest.mark.parametrize("part", [0.02, 0.31, 0.9999, 1])
def test_cosines_are_those_of_the_whole_gradients(seed, make, make_loss, part):
    """With room for all gradients, and for few enough elements that parameters are cut anywhere."""
    model = make()
    loss, n, P = make_loss(model), len(TIMESTEPS), size_of(model)
    width, calls = math.ceil(part * P), []

    affinity = analyse(lambda t: calls.append(t) or loss(t), model, memory=n * 8 * width)
    gradients = gradients_one_by_one(loss, trainable(model), TIMESTEPS)
    torch.testing.assert_close(affinity.matrix, cosines(gradients), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(affinity.norms, gradients.norm(dim=1), rtol=1e-11, atol=0)
    torch.testing.assert_close(affinity.losses, torch.stack([loss(t).detach() for t in TIMESTEPS]), rtol=0, atol=0)
    assert affinity.timesteps.tolist() == TIMESTEPS and affinity.timesteps.dtype == torch.int64
    assert len(calls) == n * math.ceil(n * P * 8 / (n * 8 * width))  # as documented
    assert torch.equal(affinity.matrix, affinity.matrix.T) and (affinity.matrix.diagonal() == 1).all()


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.05), (torch.float16, 0.01)])
def test_a_model_of_low_precision_against_itself_in_fp64(seed, device, dtype, tolerance):
    model = tiny_dit(dtype).to(device)
    affinity = analyse(dit_loss(model), model, memory=len(TIMESTEPS) * 4 * 1111)
    wide = copy.deepcopy(model).cpu().double()
    gradients = gradients_one_by_one(dit_loss(wide), trainable(wide), TIMESTEPS)
    torch.testing.assert_close(affinity.matrix, cosines(gradients), rtol=0, atol=tolerance)
    assert all(tensor.device.type == "cpu" for tensor in vars(affinity).values())


def test_dtypes_may_be_mixed(seed):
    """Every parameter has its own; a chunk has one."""
    dtypes = [torch.float32, torch.bfloat16, torch.float64, torch.float16, torch.float32, torch.bfloat16]
    parameters = [nn.Parameter(torch.randn(7, 3).to(dtype)) for dtype in dtypes]

    def loss(t):
        return sum((p.double() * (t + i)).sin().sum() for i, p in enumerate(parameters))

    expected = cosines(gradients_one_by_one(loss, parameters, TIMESTEPS))
    for memory in (6 * 8, 6 * 50, 1 << 20):
        affinity = dtr.task_affinity(loss, parameters, TIMESTEPS, memory=memory, progress=False)
        torch.testing.assert_close(affinity.matrix, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("scale", [1e-30, 1e25])
def test_small_and_large_gradients_of_fp32_neither_vanish_nor_overflow(seed, scale):
    model = Toy()
    expected = analyse(toy_loss(model), model)
    affinity = analyse(lambda t: toy_loss(model)(t) * scale, model)
    torch.testing.assert_close(affinity.matrix, expected.matrix, rtol=0, atol=1e-5)


def test_timesteps_of_any_kind_are_sorted(seed):
    model = Toy()
    expected = dtr.task_affinity(toy_loss(model), model.parameters(), [2, 5, 9], progress=False)
    for timesteps in ([9, 2, 5], np.array([5, 9, 2]), torch.tensor([9, 5, 2])):
        given = []
        affinity = dtr.task_affinity(
            lambda t, given=given: given.append(t) or toy_loss(model)(t), model.parameters(), timesteps, progress=False
        )
        assert_same_bits(affinity, expected)
        assert all(type(t) is int for t in given)


def test_one_timestep(seed):
    model = Toy()
    affinity = dtr.task_affinity(toy_loss(model), model.parameters(), [17], progress=False)
    assert affinity.matrix.tolist() == [[1.0]]
    assert torch.equal(affinity.resized(20), torch.ones(20, 20, dtype=torch.float64))


def test_a_gradient_of_zero_has_cosine_zero_also_with_itself(seed):
    model = Toy()
    loss = toy_loss(model)
    affinity = analyse(lambda t: loss(t) * (t != 4), model)
    expected = cosines(gradients_one_by_one(loss, trainable(model), TIMESTEPS))
    expected[2] = expected[:, 2] = 0
    torch.testing.assert_close(affinity.matrix, expected, rtol=0, atol=1e-6)


def test_sparse_gradients_and_other_memory_layouts(seed):
    table = nn.Embedding(9, 4, sparse=True)
    kernel = nn.Parameter(torch.randn(4, 3, 2, 2).contiguous(memory_format=torch.channels_last))
    loose = nn.Parameter(torch.randn(5, 6).t())

    def loss(t):
        x = torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(t))
        x = x.contiguous(memory_format=torch.channels_last)
        conv = nn.functional.conv2d(x, kernel).sin().sum() + (loose * t).cos().sum()
        return conv + table(torch.tensor([t % 9, 3])).square().sum()

    parameters = [table.weight, kernel, loose]
    rows = []
    for t in TIMESTEPS:
        rows.append(torch.cat([g.to_dense().reshape(-1) for g in torch.autograd.grad(loss(t), parameters)]).double())
    affinity = dtr.task_affinity(loss, parameters, TIMESTEPS, memory=6 * 4 * 17, progress=False)
    torch.testing.assert_close(affinity.matrix, cosines(torch.stack(rows)), rtol=0, atol=1e-5)


def test_the_model_is_left_as_it_was(seed):
    model = Toy().train()
    model.tied.eval()
    before = copy.deepcopy(model.state_dict())
    marked = torch.ones(5, 7)
    model.first.weight.grad = marked
    with torch.no_grad():  # as somebody may call it
        analyse(toy_loss(model), model, memory=6 * 4 * 10)
    assert model.first.weight.grad is marked and (marked == 1).all()
    assert all(p.grad is None for p in model.parameters() if p is not model.first.weight)
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["frozen"]
    assert model.training and not model.tied.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# --- random numbers --------------------------------------------------------------------------------------------------


def test_random_numbers_start_from_seed_and_timestep_and_are_restored(seed, device):
    model = Toy().to(device)
    drawn = {}

    def loss(t):
        numbers = torch.rand(3, device=device).tolist() + torch.rand(3).tolist()
        drawn.setdefault(t, []).append(numbers)
        return nn.functional.dropout(model.first.weight, 0.5).sum() + toy_loss(model)(t) * numbers[0]

    def draw():
        return torch.rand(2, device=device).tolist(), torch.rand(2).tolist()

    torch.manual_seed(5)
    expected = draw()
    torch.manual_seed(5)
    analyse(loss, model, memory=6 * 4 * 10, seed=3)
    assert draw() == expected
    assert all(len(each) > 2 and each.count(each[0]) == len(each) for each in drawn.values())
    first = [each[0] for each in drawn.values()]
    drawn.clear()
    analyse(loss, model, seed=4)
    others = [each[0] for each in drawn.values()]
    assert len({tuple(numbers) for numbers in first + others}) == 2 * len(TIMESTEPS)


def test_a_loss_that_changes_between_chunks_is_an_error(seed, path):
    model = Toy()
    noise = np.random.default_rng(seed)  # which nobody restores

    def loss(t):
        return toy_loss(model)(t) + noise.random()

    fragments = ["loss(0) was", "deterministic", "NumPy", f"delete {path}"]
    refused(lambda: analyse(loss, model, memory=6 * 4 * 20, path=path), RuntimeError, fragments)
    analyse(loss, model)  # one chunk asks for each loss once


def test_sums_in_another_order_are_no_error(seed):
    model = Toy()
    signs = np.random.default_rng(seed)
    affinity = analyse(lambda t: toy_loss(model)(t) * (1 + signs.choice([-1e-6, 1e-6])), model, memory=6 * 4 * 20)
    torch.testing.assert_close(affinity.matrix, analyse(toy_loss(model), model).matrix, rtol=0, atol=1e-5)


# --- memory ----------------------------------------------------------------------------------------------------------


def test_no_tensor_is_larger_than_the_memory(seed):
    """The buffer is the largest there is, and there is one at a time."""
    parameter = nn.Parameter(torch.randn(50_000))
    buffers, n, memory = [], 50, 1 << 20  # 10 MB of gradients

    def gram(buffer, original=module._gram):
        buffers.append(buffer.nbytes)
        return original(buffer)

    with Allocations() as made, pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_gram", gram)
        dtr.task_affinity(lambda t: (parameter * t).sin().sum(), [parameter], range(n), memory=memory, progress=False)
    assert len(buffers) == math.ceil(n * 50_000 * 4 / memory) and sum(buffers) == n * 50_000 * 4
    assert max(buffers) <= max(made.sizes.values()) <= memory


def test_a_buffer_is_gone_before_the_next_is_made(seed, monkeypatch):
    parameter = nn.Parameter(torch.randn(1000))
    living = []

    def loss(t):
        count = sum(1 for buffer in living if buffer() is not None)
        assert count == 1
        return (parameter * t).sin().sum()

    original = torch.empty

    def empty(*size, **options):
        made = original(*size, **options)
        if len(size) == 2:
            assert not any(buffer() is not None for buffer in living)
            living.append(weakref.ref(made))
        return made

    monkeypatch.setattr(module.torch, "empty", empty)
    dtr.task_affinity(loss, [parameter], range(5), memory=5 * 4 * 300, progress=False)
    assert len(living) == 4


# --- interruptions ---------------------------------------------------------------------------------------------------

MEMORY, CHUNKS = len(TIMESTEPS) * 8 * 13, 7  # of Toy in fp64
PASSES = len(TIMESTEPS) * CHUNKS


def fixed_toy():
    with torch.random.fork_rng([]):
        torch.manual_seed(11)
        return Toy().double()


@pytest.fixture
def model(seed):
    return fixed_toy()


@pytest.fixture
def loss(model):
    return toy_loss(model)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "progress.pt"


def never(t):
    raise AssertionError("called")


def test_ctrl_c_at_any_call_loses_at_most_that_call(seed, tmp_path, model, loss):
    path, draw = tmp_path / "folder" / "progress.pt", random.Random(seed)
    calls = interruptions = 0

    def interrupted(t):
        nonlocal calls
        calls += 1
        if draw.random() < 0.2:
            raise KeyboardInterrupt
        return loss(t)

    affinity = None
    while affinity is None and interruptions < 100:
        try:
            affinity = analyse(interrupted, model, memory=MEMORY, path=path)
        except KeyboardInterrupt:
            interruptions += 1
    assert_same_bits(affinity, analyse(loss, model, memory=MEMORY))
    assert interruptions > 0 and calls - interruptions == PASSES
    assert [file.name for file in path.parent.iterdir()] == ["progress.pt"]


def test_ctrl_c_between_any_two_instructions(seed, path, model, loss, monkeypatch):
    """A timer strikes anywhere: in the loss, in the analysis, while a file is written or read."""
    monkeypatch.setattr(progress_module, "_SECONDS_BETWEEN_SAVES", 0.0)
    draw = random.Random(seed)
    expected = analyse(loss, model, memory=MEMORY)

    def strike(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, strike)
    affinity, interruptions = None, 0
    try:
        for _ in range(40):
            try:
                signal.setitimer(signal.ITIMER_REAL, draw.uniform(0.001, 0.06))
                affinity = analyse(loss, model, memory=MEMORY, path=path)
                signal.setitimer(signal.ITIMER_REAL, 0)
                break
            except KeyboardInterrupt:
                interruptions += 1
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    print(f"{interruptions} interruptions")
    assert_same_bits(affinity or analyse(loss, model, memory=MEMORY, path=path), expected)


def killed_analysis(path, call, seconds):
    """Runs in a process of its own, which ends at a call of the loss."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    progress_module._SECONDS_BETWEEN_SAVES = seconds
    model = fixed_toy()
    loss, calls = toy_loss(model), 0

    def deadly(t):
        nonlocal calls
        calls += 1
        if calls == call:
            signal.raise_signal(signal.SIGKILL)
        return loss(t)

    analyse(deadly, model, memory=MEMORY, path=path)


def test_a_killed_process_loses_what_came_after_the_last_save(seed, path, model, loss):
    call = random.Random(seed).randint(2, PASSES)
    script = f"from test_affinity import killed_analysis\nkilled_analysis({str(path)!r}, {call}, 0.0)"
    folder = Path(__file__).parent
    done = subprocess.run([sys.executable, "-c", script], cwd=folder, env=None, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    calls = []
    affinity = analyse(lambda t: calls.append(t) or loss(t), model, memory=MEMORY, path=path)
    assert len(calls) == PASSES - (call - 1)
    assert_same_bits(affinity, analyse(loss, model, memory=MEMORY))


@pytest.mark.parametrize("torn", [False, True])
def test_a_kill_between_any_two_writes_leaves_a_file_that_is_right(seed, tmp_path, model, loss, monkeypatch, torn):
    """From some write on nothing reaches the disk; of rows, that one may leave rubbish."""
    monkeypatch.setattr(progress_module, "_SECONDS_BETWEEN_SAVES", 0.0)
    checkpoint = progress_module.Checkpoint
    write, write_rows = checkpoint._write, checkpoint._write_rows
    expected = analyse(loss, model, memory=MEMORY)
    writes = fatal = 0

    class Killed(BaseException):
        pass

    def count(rows=None):
        nonlocal writes
        writes += 1
        if writes == fatal and torn and rows is not None:
            rows()
        if writes >= fatal:
            raise Killed

    def counted_rows(self, rows, first):
        count(lambda: write_rows(self, torch.full_like(rows, math.nan), first))
        write_rows(self, rows, first)

    monkeypatch.setattr(checkpoint, "_write", lambda self, progress: (count(), write(self, progress)))
    monkeypatch.setattr(checkpoint, "_write_rows", counted_rows)
    for number, fatal in enumerate(random.Random(seed).sample(range(2, 2 * PASSES), 5)):
        path, writes = tmp_path / str(number), 0
        with pytest.raises(Killed):
            analyse(loss, model, memory=MEMORY, path=path)
        print(f"killed at write {fatal}")
        fatal = math.inf
        assert_same_bits(analyse(loss, model, memory=MEMORY, path=path), expected)


def stopped(loss, model, path, calls, **options):
    """An analysis that stopped after so many calls."""
    left = calls

    def stopping(t):
        nonlocal left
        if left == 0:
            raise KeyboardInterrupt
        left -= 1
        return loss(t)

    with pytest.raises(KeyboardInterrupt):
        analyse(stopping, model, path=path, **options)


def test_saves_come_half_a_minute_apart(path, model, monkeypatch):
    now = 1000.0
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: now)
    saves = []
    save = progress_module.Checkpoint.save
    monkeypatch.setattr(progress_module.Checkpoint, "save", lambda *args: saves.append(now) or save(*args))

    def loss(t):
        nonlocal now
        now += 9
        return toy_loss(model)(t)

    analyse(loss, model, memory=MEMORY, path=path)
    gaps = np.diff(saves[:-1])  # the last is at the end
    assert len(saves) > 8 and gaps.min() >= 30 and gaps.max() <= 30 + 9


def test_a_row_is_written_once(path, model, loss, monkeypatch):
    """A save costs what is new, not the whole buffer."""
    monkeypatch.setattr(progress_module, "_SECONDS_BETWEEN_SAVES", 0.0)
    checkpoint, written = progress_module.Checkpoint, []
    write = checkpoint._write_rows
    monkeypatch.setattr(checkpoint, "_write_rows", lambda *args: written.append(len(args[1])) or write(*args))
    analyse(loss, model, memory=MEMORY, path=path)
    assert written == [1] * PASSES


def test_a_finished_file_returns_at_once(path, model, loss):
    first = analyse(loss, model, memory=MEMORY, path=path)
    assert_same_bits(analyse(never, model, memory=1 << 20, path=path), first)


@pytest.mark.parametrize("memory", [MEMORY // 3, MEMORY * 2, 1 << 20])
@pytest.mark.parametrize("calls", [4, 6, 15])
def test_memory_may_change_in_between(path, model, loss, memory, calls):
    stopped(loss, model, path, calls, memory=MEMORY)
    stopped(loss, model, path, 2, memory=memory)
    affinity = analyse(loss, model, memory=MEMORY, path=path)
    torch.testing.assert_close(affinity.matrix, analyse(loss, model).matrix, rtol=0, atol=1e-12)


@pytest.mark.parametrize("damage", ["removed", "cut", "empty", "flipped"])
def test_rows_that_are_gone_are_computed_again(tmp_path, path, model, loss, damage, monkeypatch):
    monkeypatch.setattr(progress_module, "_SECONDS_BETWEEN_SAVES", 0.0)
    stopped(loss, model, path, 11, memory=MEMORY)
    rows = tmp_path / "progress.pt.rows"
    assert rows.stat().st_size >= 5 * 13 * 8
    if damage == "removed":
        rows.unlink()
    elif damage == "flipped":  # a bit of a mantissa, which no value shows
        content = bytearray(rows.read_bytes())
        content[2 * 13 * 8 + 6] ^= 1
        rows.write_bytes(content)
    else:
        rows.write_bytes(rows.read_bytes()[: 2 * 13 * 8 + 5 if damage == "cut" else 0])
    stopped(loss, model, path, 2, memory=MEMORY)  # so that what is saved next is right, too
    affinity = analyse(loss, model, memory=MEMORY, path=path)
    assert_same_bits(affinity, analyse(loss, model, memory=MEMORY))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_rows_of_any_dtype_are_kept(path, model, loss, dtype):
    model.to(dtype)
    stopped(loss, model, path, 10, memory=MEMORY)
    assert_same_bits(analyse(loss, model, path=path, memory=MEMORY), analyse(loss, model, memory=MEMORY))


@pytest.mark.parametrize("memory", [MEMORY, MEMORY * 2])
def test_a_path_is_of_one_analysis_at_a_time(tmp_path, path, model, loss, monkeypatch, memory):
    """However it is spelled, also where the process works elsewhere by then."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link.pt").symlink_to("progress.pt")
    tried = 0

    def inner(t):
        nonlocal tried
        if tried == 3:
            monkeypatch.chdir("/")
        else:
            spelled = [path, "link.pt", f"../{tmp_path.name}/progress.pt"][tried]
            fragments = ["another analysis is using path", str(path), "name another path"]
            refused(lambda: analyse(never, model, memory=memory, path=spelled), ValueError, fragments)
            tried += 1
        return loss(t)

    assert_same_bits(analyse(inner, model, memory=MEMORY, path="link.pt"), analyse(loss, model, memory=MEMORY))
    assert tried == 3 and sorted(file.name for file in tmp_path.iterdir()) == ["link.pt", "progress.pt"]


def test_files_of_others_beside_a_path_are_left_alone(tmp_path, model, loss):
    """``<path>.rows`` and ``<path>.lock`` are names that others use too."""
    for name, keep in ("rows", "no part of an analysis"), ("lock", "in the place of a lock"):
        others = tmp_path / f"poetry.{name}"
        others.write_text("mine")
        refused(lambda: analyse(never, model, path=tmp_path / "poetry"), ValueError, [str(others), keep])
        assert others.read_text() == "mine"
        others.unlink()
    os.mkfifo(others)
    refused(lambda: analyse(never, model, path=tmp_path / "poetry"), ValueError, [str(others), keep])
    assert others.exists() and len(list(tmp_path.iterdir())) == 1
    others.unlink()
    assert_same_bits(analyse(loss, model, path=tmp_path / "poetry"), analyse(loss, model))


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, ValueError])
def test_an_exception_unlocks_the_path(tmp_path, path, model, loss, error):
    def broken(t):
        assert (tmp_path / "progress.pt.lock").exists()
        raise error

    with pytest.raises(error):
        analyse(broken, model, path=path)
    assert not (tmp_path / "progress.pt.lock").exists()
    analyse(loss, model, path=path)


def test_progress_of_another_problem_is_refused_and_kept(tmp_path, path, model, loss):
    stopped(loss, model, path, 10, memory=MEMORY)
    files = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    assert len(files) == 2

    def refuse(fragment, timesteps=TIMESTEPS, params=None, seed=0):
        params = model.named_parameters() if params is None else params
        refused(
            lambda: dtr.task_affinity(loss, params, timesteps, seed=seed, path=path, memory=MEMORY, progress=False),
            ValueError,
            [str(path), fragment, "delete the file"],
        )

    refuse("timesteps[2] is 4 there and 5 here", timesteps=[0, 3, 5, 250, 700, 999])
    refuse("timesteps[5] is 999 there and none here", timesteps=TIMESTEPS[:-1])
    refuse("seed is 0 there and 1 here", seed=1)
    refuse("scale (float64 []) there and params[0]", params=model.parameters())
    refuse("scale (float64 []) there and scale (float32 []) here", params=fixed_toy().float().named_parameters())
    with torch.no_grad():
        model.tied.bias[3] += 1e-15
    refuse("hash of the weights is")
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == files


def test_a_file_of_something_else_is_refused_and_kept(tmp_path, model, loss):
    torch.save({"model": model.state_dict()}, tmp_path / "checkpoint")
    torch.save(model, tmp_path / "pickle")
    analyse(loss, model).save(tmp_path / "npz")
    (tmp_path / "text").write_text("not a file of torch.save")
    (tmp_path / "empty").touch()
    for file in list(tmp_path.iterdir()):
        content = file.read_bytes()
        fragments = [f"{file} does not hold the progress", "delete the file"]
        refused(lambda file=file: analyse(loss, model, path=file), ValueError, fragments)
        assert file.read_bytes() == content
    refused(lambda: analyse(loss, model, path=tmp_path), ValueError, [f"{tmp_path} does not hold the progress"])
    with pytest.raises(OSError):  # before any work
        analyse(never, model, path=tmp_path / "text" / "progress")


def test_a_file_of_another_format_is_refused(path, model, loss, monkeypatch):
    stopped(loss, model, path, 3)
    monkeypatch.setattr(progress_module, "FORMAT", 3)
    refused(lambda: analyse(loss, model, path=path), ValueError, ["format is 2 there and 3 here"])


# --- refusals --------------------------------------------------------------------------------------------------------


def test_a_loss_and_a_gradient_that_are_not_finite_are_named(model, loss):
    for bad in (math.nan, math.inf):
        named = [f"loss(250) is {bad}"]
        refused(lambda bad=bad: analyse(lambda t: loss(t) * (bad if t == 250 else 1), model), ValueError, named)

    def root(t):
        steep = (model.tied.bias[2] - model.tied.bias[2].detach()).sqrt()  # of infinite slope at 0
        return loss(t) + steep if t == 700 else loss(t)

    refused(lambda: analyse(root, model), ValueError, ["the gradient of loss(700)", "inf or NaN", "first in tied.bias"])


def test_bad_arguments_are_named(model, loss):
    def call(loss=loss, params=None, timesteps=TIMESTEPS, **options):
        params = model.parameters() if params is None else params
        return lambda: dtr.task_affinity(loss, params, timesteps, progress=False, **options)

    refused(call(loss=torch.ones(3)), TypeError, ["loss must be a function", "Tensor"])
    refused(call(loss=lambda t: 0.5), TypeError, ["scalar tensor", "float", "loss(0)"])
    refused(call(loss=lambda t: torch.tensor(t)), TypeError, ["torch.int64"])
    refused(call(loss=lambda t: model.last(torch.ones(2, 5).double())), ValueError, ["[2, 1]", "take its mean"])
    refused(call(loss=lambda t: loss(t).detach()), ValueError, ["loss(0)", "require grad"])
    refused(call(params=[]), ValueError, ["at least one parameter"])
    refused(call(params=[model.frozen]), ValueError, ["requires grad"])
    refused(call(timesteps=[]), ValueError, ["at least one timestep"])
    refused(call(timesteps=[3, 1, 3]), ValueError, ["different", "3"])
    refused(call(timesteps=[-1, 2]), ValueError, ["at least 0", "-1"])
    refused(call(timesteps=[0.5, 1.0]), TypeError, ["timesteps must be integers", "float"])
    refused(call(timesteps=5), TypeError, ["timesteps must be integers"])
    refused(call(timesteps=[1, 2**63]), ValueError, ["timesteps must be below 2**63"])
    refused(call(seed=-1), ValueError, ["seed", "-1"])
    refused(call(seed=2**64), ValueError, ["seed must be below 2**63"])
    refused(call(memory=1e9), TypeError, ["memory", "1000000000.0"])


def test_too_little_memory_says_how_much_is_needed(seed):
    parameter = nn.Parameter(torch.randn(5001))
    calls = []

    def loss(t):
        calls.append(t)
        return (parameter * t).sum()

    least = 3 * 4 * 6  # 3 timesteps of 6 elements: at most 1000 passes each
    with pytest.raises(
        ValueError, match=f"at least {least} bytes for 3 timesteps and 5001 parameters, got {least - 1}"
    ):
        dtr.task_affinity(loss, [parameter], [1, 2, 3], memory=least - 1, progress=False)
    assert not calls
    dtr.task_affinity(loss, [parameter], [1], memory=4 * 6, progress=False)
    assert len(calls) == math.ceil(5001 / 6)


def test_the_bar(path, model, loss, capsys, monkeypatch):
    """It goes on where it stopped."""
    stopped(loss, model, path, 10, memory=MEMORY)
    assert capsys.readouterr().err == ""
    dtr.task_affinity(loss, model.named_parameters(), TIMESTEPS, memory=MEMORY, path=path)
    shown = capsys.readouterr().err
    assert f"10/{PASSES}" in shown and f"{PASSES}/{PASSES}" in shown
    monkeypatch.setitem(sys.modules, "tqdm", None)
    dtr.task_affinity(loss, model.parameters(), TIMESTEPS)
    assert capsys.readouterr().err == ""


# --- results ---------------------------------------------------------------------------------------------------------


def some_affinity(timesteps):
    n = len(timesteps)
    matrix = cosines(torch.randn(n, 6, dtype=torch.float64))
    norms, losses = torch.rand(2, n, dtype=torch.float64)
    return dtr.TaskAffinity(torch.tensor(timesteps), matrix, norms, losses)


def bilinear(affinity, T):
    """By the definition, element by element."""

    def hat(t):
        known = affinity.timesteps.tolist()
        t = min(max(t, known[0]), known[-1])
        above = next(i for i, k in enumerate(known) if k >= t)
        below = max(above - 1, 0) if known[above] != t else above
        part = 0.0 if below == above else (t - known[below]) / (known[above] - known[below])
        return below, above, part

    A = affinity.matrix.tolist()
    out = np.empty((T, T))
    for s in range(T):
        for t in range(T):
            (i, k, a), (j, l, b) = hat(s), hat(t)
            low = A[i][j] * (1 - b) + A[i][l] * b
            out[s, t] = low * (1 - a) + (A[k][j] * (1 - b) + A[k][l] * b) * a
    return torch.from_numpy(out)


@pytest.mark.parametrize("timesteps", [[0, 1, 2, 3], [2, 3, 9, 20], [7], [0, 22]])
def test_resized_is_bilinear_and_constant_beyond_the_ends(seed, timesteps):
    affinity = some_affinity(timesteps)
    resized = affinity.resized(23)
    torch.testing.assert_close(resized, bilinear(affinity, 23), rtol=0, atol=1e-14)
    assert resized.dtype == torch.float64 and resized.shape == (23, 23)
    refused(lambda: affinity.resized(timesteps[-1]), ValueError, ["num_timesteps", str(timesteps[-1])])
    refused(lambda: affinity.resized(2**63), ValueError, ["num_timesteps must be below 2**63"])
    refused(lambda: affinity.resized(1000.5), TypeError, ["num_timesteps", "1000.5"])


def test_resized_is_what_interval_clusters_takes():
    """Two groups of timesteps whose gradients have nothing in common."""
    matrix = torch.block_diag(torch.ones(3, 3), torch.ones(2, 2)).double()
    affinity = dtr.TaskAffinity(torch.tensor([0, 10, 20, 30, 40]), matrix, *torch.ones(2, 5).double())
    clusters = dtr.interval_clusters(50, 2, cost="affinity", values=affinity.resized(50))
    assert 20 < clusters.bounds[1] <= 30


def test_average_is_that_of_the_cosines(seed):
    several = [some_affinity([1, 5, 6]) for _ in range(3)]
    average = dtr.TaskAffinity.average(iter(several))
    for name in "matrix", "norms", "losses":
        expected = sum(getattr(affinity, name) for affinity in several) / 3
        torch.testing.assert_close(getattr(average, name), expected, rtol=0, atol=1e-15)
    assert average.timesteps.tolist() == [1, 5, 6]
    refused(lambda: dtr.TaskAffinity.average([]), ValueError, ["at least one"])
    refused(lambda: dtr.TaskAffinity.average([*several, some_affinity([1, 5, 7])]), ValueError, ["affinities[3]"])


def test_a_result_is_saved_and_loaded(seed, tmp_path):
    affinity, path = some_affinity([0, 4, 9]), tmp_path / "new" / "affinity"
    for _ in range(2):
        affinity.save(path)
        assert_same_bits(dtr.TaskAffinity.load(path), affinity)
    assert [file.name for file in path.parent.iterdir()] == ["affinity"]
    with pytest.raises(FileNotFoundError):
        dtr.TaskAffinity.load(tmp_path / "none")
    for name, write in {
        "text": lambda file: file.write_text("nothing"),
        "npy": lambda file: np.save(file.open("wb"), np.ones(3)),
        "other": lambda file: np.savez(file.open("wb"), matrix=np.ones(3)),
        "shapes": lambda file: np.savez(file.open("wb"), **{name: np.arange(2) for name in vars(affinity)}),
        "folder": lambda file: file.mkdir(),
        "pipe": os.mkfifo,
        "objects": lambda file: np.save(file.open("wb"), np.array([{}]), allow_pickle=True),
    }.items():
        write(tmp_path / name)
        refused(lambda name=name: dtr.TaskAffinity.load(tmp_path / name), ValueError, [str(tmp_path / name)])


def test_a_failed_save_leaves_the_old_file(seed, tmp_path, monkeypatch):
    affinity, path = some_affinity([0, 4, 9]), tmp_path / "affinity.npz"
    affinity.save(path)

    def full(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(OSError, match="disk full"):
        some_affinity([1]).save(path)
    assert_same_bits(dtr.TaskAffinity.load(path), affinity)
    assert [file.name for file in tmp_path.iterdir()] == ["affinity.npz"]


def test_an_affinity_that_does_not_fit_is_refused(seed):
    good = vars(some_affinity([0, 4]))
    refused(lambda: dtr.TaskAffinity(**good | {"matrix": torch.ones(2, 3)}), ValueError, ["matrix", "[2, 2]", "[2, 3]"])
    refused(lambda: dtr.TaskAffinity(**good | {"norms": torch.ones(3)}), ValueError, ["norms"])
    for name, tensor in good.items():
        for bad in (tensor.to(torch.complex64), tensor.half(), tensor.bool(), tensor.to("meta"), tensor.tolist(), None):
            refused(lambda name=name, bad=bad: dtr.TaskAffinity(**good | {name: bad}), ValueError, [f"{name} must be"])
        for number in (math.nan, math.inf) if tensor.is_floating_point() else ():
            bad = tensor.clone()
            bad.view(-1)[-1] = number
            refused(lambda name=name, bad=bad: dtr.TaskAffinity(**good | {name: bad}), ValueError, [name, "NaN or inf"])
    refused(lambda: dtr.TaskAffinity(**good | {"timesteps": torch.tensor([-1, 4])}), ValueError, ["from 0 on"])
    refused(lambda: dtr.TaskAffinity(**good | {"norms": -good["norms"]}), ValueError, ["norms", "negative", "-0."])
    refused(lambda: dtr.TaskAffinity(**good | {"matrix": good["matrix"] * 1.001}), ValueError, ["-1 to 1", "1.00"])
    dtr.TaskAffinity(**good | {"matrix": good["matrix"] * (1 + 1e-7), "losses": -good["losses"]})
    refused(lambda: dtr.TaskAffinity(**good | {"timesteps": torch.tensor([4, 4])}), ValueError, ["ascending"])
    none = torch.empty(0).double()
    refused(lambda: dtr.TaskAffinity(none.long(), none.view(0, 0), none, none), ValueError, ["at least one"])


# --- pictures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("timesteps", [[0, 10, 20], [3], [0, 1, 50, 99]])
@pytest.mark.parametrize("with_clusters", [False, True])
def test_a_picture_shows_the_cosines_along_the_timesteps(seed, tmp_path, timesteps, with_clusters):
    pytest.importorskip("matplotlib")
    affinity = some_affinity(timesteps)
    clusters = dtr.interval_clusters(100, 3) if with_clusters else None
    figure = dtr.plot_affinity(affinity, tmp_path / "affinity.png", clusters)
    axes = figure.axes[0]
    (mesh,) = axes.collections
    np.testing.assert_array_equal(np.asarray(mesh.get_array()).reshape(affinity.matrix.shape), affinity.matrix)
    assert (mesh.norm.vmin, mesh.norm.vmax) == (-1, 1)
    squares = [(p.get_x() + 0.5, p.get_y() + 0.5, p.get_width(), p.get_height()) for p in axes.patches]
    bounds = clusters.bounds if clusters else ()
    assert squares == [(a, a, b - a, b - a) for a, b in pairwise(bounds)]
    assert (tmp_path / "affinity.png").stat().st_size > 1000
    if clusters:
        assert axes.get_xlim() == axes.get_ylim() == (-0.5, 99.5)


def test_cells_reach_halfway_to_their_neighbours():
    def edges(timesteps, clusters=None):
        timesteps = torch.tensor(timesteps, dtype=torch.float64)
        with torch.device("meta"):  # whatever PyTorch's default device is
            return _cell_edges(timesteps, clusters).tolist()

    assert edges([10, 20, 40]) == [5, 15, 30, 50]
    assert edges([0, 10]) == [-0.5, 5, 15]
    assert edges([7]) == [6.5, 7.5]
    assert edges([10, 20, 40], dtr.interval_clusters(100, 2)) == [-0.5, 15, 30, 99.5]
    assert edges([7], dtr.interval_clusters(100, 2)) == [-0.5, 99.5]


def test_clusters_that_do_not_fit_are_refused(seed):
    pytest.importorskip("matplotlib")
    affinity, clusters, fragments = (
        some_affinity([0, 50]),
        dtr.interval_clusters(50, 2),
        ["of affinity, 50", "50 timesteps"],
    )
    refused(lambda: dtr.plot_affinity(affinity, clusters=clusters), ValueError, fragments)
    in_time = dtr.continuous_clusters(2)
    fragments = ["clusters must be IntervalClusters", "ContinuousClusters(bounds="]
    refused(lambda: dtr.plot_affinity(affinity, clusters=in_time), TypeError, fragments)
