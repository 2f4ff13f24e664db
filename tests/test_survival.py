"""Trainings that are killed, that find the disk full, and whose files are damaged: nothing is lost, nothing executed,
and what stops them is said in one line. Thorough: at every operation, many times over."""

import builtins
import errno
import io
import json
import multiprocessing
import os
import pickle
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
import warnings
from functools import partial
from multiprocessing import forkserver
from pathlib import Path

import pytest
import torch
from conftest import THOROUGH, needs_thorough
from hypothesis import given, settings
from hypothesis import strategies as st
from test_train import TIMES, At, learnt
from torch.utils.data import TensorDataset, get_worker_info
from typer.testing import CliRunner

pytest.importorskip("pydantic")
pytest.importorskip("sklearn")
pytest.importorskip("safetensors")

import snnkern
from snnkern import cli
from snnkern.data import Data, audio
from snnkern.data.base import DataError
from snnkern.train import fit
from snnkern.train import folder as runs
from snnkern.train.compare import read_results
from snnkern.train.evaluation import restore
from snnkern.train.folder import Interrupted, RunError, load_weights, read_metrics
from snnkern.train.recipe import RecipeError, load

SMALL = "device=cpu", "threads=1", "batch=20", "checkpoint_minutes=1e-9"
DIGITS = *SMALL, "data.train=40", "model.name=ToyCNN", "seed=3"
# Two stages; the second searches Dspike's temperature before its epoch.
TWO = "digits-tit", *DIGITS, "stage.epochs=1", "stage.0.steps=2", "stage.1.steps=3", \
    'neuron.surrogate={name = "Dspike"}', "stage.1.temperature={step = 0.5, batch = 20}"  # fmt: skip
ONE = "digits-tet", *DIGITS, "stage.epochs=2", "stage.steps=3"
MIXED = "digits-mtt", *SMALL, "data.train=40", "seed=3", "stage.epochs=2", "stage.steps=2", "stage.mtt.calibration=2", \
    "test_steps=[1,2]"  # fmt: skip
WORDS = "long-shd", *SMALL, "data.steps=5", "data.channels=70", "model.hidden=[8]", "stage.epochs=2", "stage.steps=5", \
    "test_steps=[5]", "workers=1", "seed=3"  # fmt: skip


def once(arguments):
    return load(arguments[0], arguments[1:])


once(TWO).load_data()  # what a process that is forked from here need not do again


@pytest.fixture(scope="module", autouse=True)
def prepared():
    """One thread; and the process that others are forked from has imported everything once, without a pool of threads,
    which no fork has."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)]))
        FORKS.set_forkserver_preload(["test_survival"])
        forkserver.ensure_running()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """A folder with a small data set that is read sample by sample: the override that names it."""
    h5py, numpy = pytest.importorskip("h5py"), pytest.importorskip("numpy")
    root, rng = tmp_path_factory.mktemp("words"), numpy.random.default_rng(0)
    (root / "SHD").mkdir()
    for part, count in (("train", 60), ("test", 20)):
        with h5py.File(root / "SHD" / f"shd_{part}.h5", "w") as file:
            for name, kind in (("times", numpy.float16), ("units", numpy.uint16)):
                held = file.create_dataset(f"spikes/{name}", (count,), h5py.vlen_dtype(kind))
                for index in range(count):
                    held[index] = (rng.random(40) * (1.4 if name == "times" else 699)).astype(kind)
            file["labels"] = rng.integers(0, 20, count).astype(numpy.uint16)
    return f"data.root={root}"


# Attempts: the command line in a process of its own, forked from one that has imported everything.

FORKS = multiprocessing.get_context("forkserver")


def attempt(arguments, log, meanwhile=None):
    """``snnkern train``, with ``meanwhile(n)`` called before the n-th update, counted from 1."""
    sys.argv = ["snnkern", "train", *arguments]
    with open(log, "wb") as file:
        for number in (1, 2):
            os.dup2(file.fileno(), number)
    sys.stdout, sys.stderr = (os.fdopen(os.dup(number), "w", buffering=1) for number in (1, 2))
    calls, step = [], torch.optim.Adam.step

    def counted(self, *args, **kwargs):
        calls.append(None)
        if meanwhile:
            meanwhile(len(calls))
        return step(self, *args, **kwargs)

    torch.optim.Adam.step = counted
    cli.main()


def start(arguments, log, meanwhile=None, target=attempt, **environment):
    process = FORKS.Process(target=with_environment, args=(environment, target, list(arguments), str(log), meanwhile))
    process.start()
    return process


def with_environment(environment, target, *args):
    os.environ.update(environment)
    multiprocessing.set_start_method("fork", force=True)  # of its own workers, as in a process that was not forked
    target(*args)


def ended(process, seconds=120):
    """Its exit code; a hang is a failure."""
    process.join(seconds)
    if process.exitcode is None:
        process.kill()
        process.join()
        pytest.fail(f"still running after {seconds} s")
    return process.exitcode


def assert_same_end(folder, whole):
    """Everything but times is the same, bit for bit."""
    files = {path.relative_to(whole) for path in whole.rglob("*") if path.is_file()}
    assert files == {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}
    for path in files:
        ours, theirs = folder / path, whole / path
        if path.name == "metrics.jsonl":
            assert learnt(ours.parent) == learnt(theirs.parent)
        elif path.name == "results.json":
            assert without_times(json.loads(ours.read_text())) == without_times(json.loads(theirs.read_text()))
        elif path.name == "checkpoint.pt":
            assert bits(torch.load(ours)) == bits(torch.load(theirs))
        else:
            assert ours.read_bytes() == theirs.read_bytes(), path


def without_times(value):
    if isinstance(value, dict):
        return {key: without_times(each) for key, each in value.items() if key not in TIMES}
    return [without_times(each) for each in value] if isinstance(value, list) else value


def bits(value):
    if isinstance(value, torch.Tensor):
        return value.dtype, list(value.shape), value.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    if isinstance(value, dict):
        return {key: bits(each) for key, each in value.items() if key not in TIMES}
    return [bits(each) for each in value] if isinstance(value, (list, tuple)) else value


# Killed


def kill_at(step, number):
    if number == step:
        os.kill(os.getpid(), signal.SIGKILL)


def slowly():
    """Files take long to be written, half of a checkpoint before the other."""
    sync, save = os.fsync, torch.save
    os.fsync = lambda file: (time.sleep(0.05), sync(file))

    def halves(state, file):
        held = io.BytesIO()
        save(state, held)
        for part in (held.getbuffer()[: held.tell() // 2], held.getbuffer()[held.tell() // 2 :]):
            file.write(part)
            file.flush()
            time.sleep(0.05)

    torch.save = halves


def slow_attempt(*args):
    slowly()
    attempt(*args)


@needs_thorough
def test_kill_9_at_random_moments_twenty_times_over(tmp_path, words, count):
    rng, kills = random.Random(), 0
    for case in range(20):
        base = rng.choice([TWO, ONE, MIXED, (*WORDS, words)])
        more = rng.sample(["amp=bfloat16", "amp=float16", "accumulate=2", "packed=true"], rng.randint(0, 2))
        more = more[:1] if all(text.startswith("amp") for text in more) else more
        if base is not TWO and base is not MIXED:
            more += rng.choice([[], ["stage.epochs=3"]])
        if base is ONE and rng.random() < 0.5:
            more += ["seed=3", "tensorboard=false", "test_steps=[1,4]"]
        whole, out = tmp_path / f"whole{case}", tmp_path / f"out{case}"
        arguments, began = [*base, *more, "--out"], time.monotonic()
        assert ended(start([*arguments, str(whole)], tmp_path / "log")) == 0, (tmp_path / "log").read_text()
        took = time.monotonic() - began
        for _ in range(8):
            target = slow_attempt if rng.random() < 0.5 else attempt
            process = start([*arguments, str(out)], tmp_path / "log", target=target)
            process.join(rng.uniform(0.1, 1.0) * took)
            if process.exitcode is not None:
                break
            process.kill()
            process.join()
            kills += 1
        assert ended(start([*arguments, str(out)], tmp_path / "log")) == 0, (tmp_path / "log").read_text()
        assert_same_end(out, whole)
    count("kills", kills)


class Disk:
    """Below ``folder``: from the ``at``-th operation on that writes (folder made, file opened, part written, on disk,
    renamed), ``act`` is called with the path before it. Counts them."""

    def __init__(self, folder, at=0, act=lambda path: None):
        self.folder, self.at, self.act, self.done = str(folder), at, act, 0

    def before(self, path):
        if str(path).startswith(self.folder):
            self.done += 1
            if self.at and self.done >= self.at:
                self.act(str(path))

    def __enter__(self):
        self.real = real = builtins.open, io.open, os.fsync, os.replace, os.mkdir

        class Raw(io.FileIO):
            def write(raw, data):
                self.before(raw.name)
                return super().write(data)

        def opened(path, mode="r", buffering=-1, encoding=None, *more, **options):
            if not str(path).startswith(self.folder) or not set(mode) & set("wax+"):
                return real[0](path, mode, buffering, encoding, *more, **options)
            self.before(path)
            raw = Raw(path, mode.replace("b", ""))
            if buffering == 0:
                return raw
            file = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
            return file if "b" in mode else io.TextIOWrapper(file, encoding)

        def around(function, path_of):
            return lambda *args, **options: (self.before(path_of(*args)), function(*args, **options))[1]

        builtins.open = io.open = opened
        os.fsync = around(os.fsync, lambda file: os.readlink(f"/proc/self/fd/{file}"))
        os.replace = around(os.replace, lambda source, target: target)
        os.mkdir = around(os.mkdir, lambda path, *mode: path)
        return self

    def __exit__(self, *error):
        builtins.open, io.open, os.fsync, os.replace, os.mkdir = self.real


def killed_at_operation(at, folder, arguments, log, meanwhile):
    with Disk(folder, at, lambda path: os.kill(os.getpid(), signal.SIGKILL)):
        attempt(arguments, log)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The folder of ``TWO``, and how many operations wrote it."""
    folder = tmp_path_factory.mktemp("two")
    with Disk(folder) as disk:
        fit(once(TWO), folder)
    return folder, disk.done


def chosen(total, brief):
    """Places in 1 to ``total``: all, or spread."""
    return range(1, total + 1) if THOROUGH else sorted({1 + i * (total - 1) // (brief - 1) for i in range(brief)})


def test_kill_9_at_an_operation_on_a_file(tmp_path, two, count):
    whole, total = two
    assert total > 40
    for at in chosen(total, 2):
        out = tmp_path / str(at)
        process = start([*TWO, "--out", str(out)], tmp_path / "log", target=partial(killed_at_operation, at, out))
        code = ended(process)
        assert code == (-signal.SIGKILL if code else 0), (tmp_path / "log").read_text()
        count("kills", code != 0)
        fit(once(TWO), out / "seed3")
        assert_same_end(out / "seed3", whole)
        shutil.rmtree(out)


# What the system refuses


def refuse(number):
    def act(path):
        raise OSError(number, os.strerror(number))

    return act


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, *([errno.EROFS, errno.EDQUOT] if THOROUGH else [])])
def test_a_full_disk_at_any_operation(tmp_path, two, number, count):
    whole, total = two
    for at in chosen(total, 4):
        out = tmp_path / str(at)
        with warnings.catch_warnings(), Disk(out, at, refuse(number)) as disk:
            warnings.simplefilter("ignore", pytest.PytestUnraisableExceptionWarning)
            try:
                fit(once(TWO), out)
            except RunError as error:
                assert str(error).startswith(str(out)) and "\n" not in str(error)
                assert str(error).endswith(f"cannot be written: {os.strerror(number)}")
            else:
                assert disk.done <= at + 2  # the text in the lock, the very last file
        count("faults")
        assert not list(out.rglob("*.part"))
        if (out / "checkpoint.pt").exists():
            state, _ = runs.read_checkpoint(out)
            assert not state.lines or len(read_metrics(out)) >= state.lines
        fit(once(TWO), out)
        assert_same_end(out, whole)
        shutil.rmtree(out)


def test_results_of_a_comparison_on_a_full_disk(tmp_path, count):
    out = tmp_path / "out"
    words = ["digits-tet", "digits-sdt", *DIGITS, "stage.epochs=1", "stage.steps=2", "test_steps=[1,2]"]
    invoke = partial(CliRunner().invoke, cli.app, ["compare", *words, "--out", str(out)])
    with Disk(out) as disk:
        assert invoke().exit_code == 0
    before = {path: path.read_bytes() for path in out.glob("results.*")}
    assert len(before) == 2
    with Disk(out) as again:
        assert invoke().exit_code == 0
    for at in chosen(again.done, 3):
        with Disk(out, at, refuse(errno.ENOSPC)):
            result = invoke()
        count("faults")
        if result.exit_code:
            assert result.stderr.count("\n") == 1 and "cannot be written: No space left on device" in result.stderr
        for path in before:
            assert path.exists()
        read_results(out)
    assert disk.done > again.done


MOUNTED = """
import os, subprocess, sys
place, size, *arguments = sys.argv[1:]
subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", place], check=True)
command = [sys.executable, "-m", "snnkern", "train", *arguments, "--out", f"{place}/out"]
first = subprocess.run(command, capture_output=True, text=True)
subprocess.run(["mount", "-o", "remount,size=100m", place], check=True)
subprocess.run(["mount", "-o", "remount,ro", place], check=True)
closed = subprocess.run(command, capture_output=True, text=True)
subprocess.run(["mount", "-o", "remount,rw", place], check=True)
last = subprocess.run(command, capture_output=True, text=True)
print(first.returncode, first.stderr.strip(), closed.returncode, closed.stderr.strip(), last.returncode, sep="\\n")
print(last.stderr)
subprocess.run(["cp", "-r", f"{place}/out", sys.argv[1] + ".copy"], check=True)
"""


@needs_thorough
def test_a_small_file_system(tmp_path, two, count):
    if subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode:
        pytest.skip("this user may not mount anything here")
    for size in ("8k", "16k", "28k", "40k", "52k", "64k"):
        place = tmp_path / size
        place.mkdir()
        command = ["unshare", "-m", sys.executable, "-c", MOUNTED, str(place), size, *TWO]
        found = subprocess.run(command, capture_output=True, text=True)
        assert found.returncode == 0, found.stderr
        code, said, closed, refused, last, *errors = found.stdout.splitlines()
        assert (code, closed, last) == ("1", "1", "0"), found.stdout
        assert said.endswith("cannot be written: No space left on device") and str(place) in said, errors
        assert "Read-only file system" in refused and str(place) in refused
        count("faults", 2)
        assert_same_end(tmp_path / f"{size}.copy" / "seed3", two[0])


def test_a_folder_that_disappears(tmp_path, count):
    out = tmp_path / "out"
    with pytest.raises(RunError, match=rf"^{out}/.* cannot be written: No such file or directory$"):
        fit(once(ONE), out, At(2, lambda: shutil.rmtree(out)))
    assert not out.exists()
    count("faults")


def test_files_where_others_should_be(tmp_path, two, count):
    for name in ("checkpoint.pt", "metrics.jsonl", "settings.json", "lock", "stage1-last.safetensors"):
        out = tmp_path / name
        shutil.copytree(two[0], out)
        (out / name).unlink()
        (out / name).mkdir()
        with pytest.raises(RunError, match=rf"{name}.* (cannot be|is damaged).*Is a directory"):
            fit(once(TWO), out)
        count("faults")


def test_what_cannot_be_read(tmp_path, two, monkeypatch, count):
    """EIO, as from a disk that is failing."""
    real = io.open

    def opened(path, mode="r", *more, **options):
        if str(path).endswith(name) and "r" in mode:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(path, mode, *more, **options)

    for name in ("settings.json", "metrics.jsonl", "checkpoint.pt"):
        with monkeypatch.context() as patch:
            patch.setattr(io, "open", opened)
            with pytest.raises(RunError, match=rf"{name} (cannot be read|is damaged).*Input/output error"):
                fit(once(TWO), two[0])
        count("faults")


# Signals, workers, processes


def whole_group(number, step, count):
    """A signal to the training and its workers, as a lost terminal, a batch system or systemd sends it."""
    if count == step:
        os.killpg(0, number)


def group_attempt(*args):
    os.setsid()
    attempt(*args)


def attempt_with_a_fatal_word(*args):
    read = audio.Words.__getitem__

    def fatal(self, index):
        if get_worker_info() and index == 7:
            os.kill(os.getpid(), signal.SIGKILL)
        return read(self, index)

    audio.Words.__getitem__ = fatal
    attempt(*args)


def test_signals_to_all_and_a_killed_worker(tmp_path, words, count):
    whole, out, log = tmp_path / "whole", tmp_path / "out", tmp_path / "log"
    arguments = [*WORDS, words]
    assert ended(start([*arguments, "--out", str(whole)], log)) == 0, log.read_text()
    assert ended(start([*arguments, "--out", str(out)], log, target=attempt_with_a_fatal_word)) == 1
    said = log.read_text().splitlines()[-1]
    assert said.startswith("Error: a worker that loads data was killed") and "goes on from its last check" in said, said
    count("kills")
    for number in (signal.SIGTERM, signal.SIGHUP):
        meanwhile = partial(whole_group, number, 2)
        assert ended(start([*arguments, "--out", str(out)], log, meanwhile, group_attempt)) == 130, log.read_text()
        assert "interrupted in stage.0, epoch" in log.read_text().splitlines()[-1], log.read_text()
    assert ended(start([*arguments, "--out", str(out)], log)) == 0, log.read_text()
    assert_same_end(out, whole)


def on_a_terminal(*args):
    os.setsid()
    arguments, log, _ = args
    sys.argv = ["snnkern", "train", *arguments]
    terminal = os.open(log, os.O_RDWR)  # the first that a session opens is its own
    for number in (0, 1, 2):
        os.dup2(terminal, number)
    sys.stdout, sys.stderr = (os.fdopen(os.dup(number), "w", buffering=1) for number in (1, 2))
    cli.main()


def test_a_lost_terminal_leaves_a_checkpoint(tmp_path, two):
    ours, theirs = os.openpty()
    name = os.ttyname(theirs)
    arguments = [*TWO, "checkpoint_minutes=100", "stage.epochs=50", "--out", str(tmp_path)]
    process = start(arguments, name, target=on_a_terminal)
    while not (tmp_path / "seed3" / "checkpoint.pt").exists() and process.is_alive():
        os.read(ours, 1000)
    assert process.is_alive()
    os.close(theirs)
    os.close(ours)
    ended(process)
    state, _ = runs.read_checkpoint(tmp_path / "seed3")
    assert state.step > 0  # it came in the middle of an epoch: only a request to stop writes one there


def test_nohup_goes_on(tmp_path):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        fit(once(ONE), tmp_path, At(2, lambda: os.kill(os.getpid(), signal.SIGHUP)))
    finally:
        signal.signal(signal.SIGHUP, before)
    with pytest.raises(Interrupted, match="after step 2 of 2"):
        fit(once([*ONE, "seed=4"]), tmp_path / "4", At(1, lambda: os.kill(os.getpid(), signal.SIGHUP)))


def of_two(rank, port):
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    return place | {"RANK": str(rank), "LOCAL_RANK": str(rank)}


def trained_by_two(arguments, logs, meanwhile=(None, None)):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    processes = [start(arguments, logs[rank], meanwhile[rank], **of_two(rank, port)) for rank in (0, 1)]
    return [ended(process) for process in processes]


def test_one_of_two_processes_is_killed(tmp_path, count):
    logs = tmp_path / "log0", tmp_path / "log1"
    arguments = [*ONE, "--out", str(tmp_path / "whole")]
    if THOROUGH:
        assert trained_by_two(arguments, logs) == [0, 0], [log.read_text() for log in logs]
    arguments = [*ONE, "--out", str(tmp_path / "out")]
    for rank, step in [(1, 2), *([(0, 1), (1, 1), (0, 2)] if THOROUGH else [])]:
        killer = [None, None]
        killer[rank] = partial(kill_at, step)
        codes = trained_by_two(arguments, logs, killer)
        assert codes[rank] == -signal.SIGKILL and codes[1 - rank] == 1, [log.read_text() for log in logs]
        said = logs[1 - rank].read_text().splitlines()[-1]
        assert said.startswith("Error: another of the processes ended or cannot be reached"), said
        count("kills")
    if THOROUGH:
        assert trained_by_two(arguments, logs) == [0, 0], [log.read_text() for log in logs]
        assert_same_end(tmp_path / "out", tmp_path / "whole")
    else:  # one process goes on where two were, and ends there but for rounding
        model = fit(once(ONE), tmp_path / "out" / "seed3")
        wanted = fit(once(ONE), tmp_path / "alone")
        for name, value in wanted.state_dict().items():
            torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-3, atol=1e-4)


# Damaged and hostile files


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """A finished training of one seed, whose folders are copied and damaged."""
    folder = tmp_path_factory.mktemp("one")
    result = CliRunner().invoke(cli.app, ["train", *ONE, "test_steps=[1,2]", "--out", str(folder)])
    assert result.exit_code == 0, result.output
    return folder


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != "lock"}


damages = st.one_of(
    st.tuples(st.just("cut"), st.floats(0, 1)),
    st.tuples(st.just("flip"), st.floats(0, 1, exclude_max=True)),
    st.tuples(st.just("replace"), st.floats(0, 1), st.binary(min_size=1, max_size=20)),
    st.tuples(st.just("all"), st.binary(max_size=200)),
)


def damaged(whole, damage):
    kind, *how = damage
    if kind == "all":
        return how[0]
    at = int(how[0] * len(whole))
    if kind == "cut":
        return whole[:at]
    if kind == "flip":
        at = int(how[0] * 8 * len(whole))
        changed = bytearray(whole)
        changed[at // 8] ^= 1 << at % 8
        return bytes(changed)
    return whole[:at] + how[1] + whole[at + len(how[1]) :]


@settings(max_examples=2000 if THOROUGH else 60)
@given(damages)
def test_a_damaged_checkpoint_is_found(one, tmp_path_factory, count, damage):
    folder = tmp_path_factory.getbasetemp() / "checkpoint"
    shutil.copytree(one / "seed3", folder, dirs_exist_ok=True)
    whole = (folder / "checkpoint.pt").read_bytes()
    (folder / "checkpoint.pt").write_bytes(damaged(whole, damage))
    count("bytes fuzzed", len(whole))
    before = contents(folder)
    try:
        state, parts = runs.read_checkpoint(folder)
    except RunError as error:
        assert "checkpoint.pt is damaged and was left as it is; move it away" in str(error) and "\n" not in str(error)
        assert contents(folder) == before
        return
    wanted = torch.load(one / "seed3" / "checkpoint.pt")
    assert bits(parts) == bits({key: value for key, value in wanted.items() if key != "state"})
    assert bits(vars(state)) == bits(wanted["state"])


@settings(max_examples=2000 if THOROUGH else 60)
@given(damages)
def test_damaged_weights_are_found(one, tmp_path_factory, count, damage):
    whole = one / "seed3" / "stage0-last.safetensors"
    path = tmp_path_factory.getbasetemp() / "w.safetensors"
    path.write_bytes(damaged(whole.read_bytes(), damage))
    count("bytes fuzzed", path.stat().st_size)
    try:
        weights, about = load_weights(path)
    except RunError as error:
        assert str(path) in str(error) and "\n" not in str(error)
        return
    wanted = load_weights(whole)
    assert bits(weights) == bits(wanted[0])
    assert {key: value for key, value in about.items() if key in wanted[1]} == wanted[1]


class Execute:
    def __reduce__(self):
        return os.system, ("touch executed",)


def test_nothing_in_a_checkpoint_is_executed(one, tmp_path, monkeypatch, count):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "run"
    shutil.copytree(one / "seed3", folder)
    path = folder / "checkpoint.pt"
    held = torch.load(path)
    torch.save(held | {"model": Execute()}, path)
    hostile = path.read_bytes(), pickle.dumps(Execute()), pickle.dumps(held | {"state": Execute()})
    for text in hostile:
        for place in ("checkpoint.pt", "stage0-last.safetensors", "settings.json", "metrics.jsonl"):
            shutil.rmtree(folder)
            shutil.copytree(one / "seed3", folder)
            (folder / place).write_bytes(text)
            before = contents(folder)
            for command in (["train", *ONE, "test_steps=[1,2]", "--out", str(tmp_path / "x")], ["eval", str(folder)]):
                shutil.rmtree(tmp_path / "x", ignore_errors=True)
                shutil.copytree(folder, tmp_path / "x" / "seed3")
                result = CliRunner().invoke(cli.app, command)
                assert isinstance(result.exception, SystemExit | None), result.exception
                count("faults")
            assert contents(folder) == before
    assert not (tmp_path / "executed").exists()


CHANGES = {
    "another version": lambda held: held["state"].update(phase=1),
    "an older version": lambda held: held["state"].pop("cosines"),
    "no state": lambda held: held.pop("state"),
    "no optimiser": lambda held: held.pop("optimiser"),
    "a stage that is not there": lambda held: held["state"].update(stage=1),
    "an epoch that is not there": lambda held: held["state"].update(epoch=3),
    "a step that is not there": lambda held: held["state"].update(epoch=1, step=7),
    "no samples": lambda held: held["state"].update(epoch=1, step=1, sums=[0.0, 0.0, 0.0]),
    "text for a number": lambda held: held["state"].update(lines="2"),
    "sums of what": lambda held: held["state"].update(sums=["a", "b", "c"]),
    "two sums": lambda held: held["state"].update(sums=[1.0, 1.0]),
    "fewer lines of metrics": lambda held: held["state"].update(lines=3),
    "a weight missing": lambda held: held["model"].pop(next(iter(held["model"]))),
    "a weight more": lambda held: held["model"].update(more=torch.zeros(1)),
    "a weight of another shape": lambda held: held["model"].update({next(iter(held["model"])): torch.zeros(1)}),
    "text for weights": lambda held: held.update(model="weights"),
    "a moment of another shape": lambda held: held["optimiser"]["state"][0].update(exp_avg=torch.zeros(3, 3)),
    "a moment missing": lambda held: held["optimiser"]["state"][0].pop("exp_avg_sq"),
    "a parameter missing": lambda held: held["optimiser"]["param_groups"][0]["params"].pop(),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_checkpoint_of_something_else(one, tmp_path, change, count):
    shutil.copytree(one / "seed3", tmp_path / "run")
    path = tmp_path / "run" / "checkpoint.pt"
    held = torch.load(path)
    change(held)
    torch.save(held, path)
    before = contents(tmp_path)
    with pytest.raises(RunError, match=r"checkpoint.pt is damaged and was left as it is; move it away") as error:
        fit(once([*ONE, "test_steps=[1,2]"]), tmp_path / "run")
    assert "\n" not in str(error.value) and contents(tmp_path) == before
    count("faults")


def test_checksums_do_not_depend_on_the_caller(one, tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        with pytest.raises(Interrupted):
            fit(once(ONE), tmp_path, At(1, lambda: os.kill(os.getpid(), signal.SIGINT)))
        fit(once(ONE), tmp_path)
        assert not torch.serialization.get_crc32_options()
    finally:
        torch.serialization.set_crc32_options(True)


def header_of(path):
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def with_header(header, rest):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + rest


def test_hostile_weights(one, tmp_path, count):
    path = one / "seed3" / "stage0-last.safetensors"
    header, rest = header_of(path)
    names = [name for name in header if name != "__metadata__"]
    first = header[names[0]]
    about = json.loads(header["__metadata__"]["snnkern"])
    recipe = about["recipe"]
    bare = {key: value for key, value in about.items() if key != "digest"}
    cases = {
        "length": (2**63).to_bytes(8, "little") + path.read_bytes()[8:],
        "longer": (2**40).to_bytes(8, "little") + path.read_bytes()[8:],
        "nested": with_header(b"[" * 100_000, rest),
        "overlap": with_header(header | {names[1]: header[names[1]] | {"data_offsets": first["data_offsets"]}}, rest),
        "beyond": with_header(header | {names[0]: first | {"data_offsets": [0, 2**40]}}, rest),
        "shape": with_header(header | {names[0]: first | {"shape": [2**40]}}, rest),
        "no metadata": with_header({name: header[name] for name in names}, rest),
        "swapped": with_header(header | {names[0]: first | {"dtype": "I32"}}, rest),
    }
    said = {
        "list": [],
        "nothing": {},
        "no recipe": {key: value for key, value in bare.items() if key != "recipe"},
        "deep": None,
        "stage": bare | {"stage": 7},
        "stage as text": bare | {"stage": "0"},
        "no epoch": {key: value for key, value in bare.items() if key != "epoch"},
        "huge": bare | {"classes": 10**15},
        "large": bare | {"classes": 10**9},
        "negative": bare | {"classes": -3},
        "shape as text": bare | {"shape": "3"},
        "shapes": bare | {"shape": [1, 10**9, 10**9]},
        "model": bare | {"recipe": recipe | {"model": {"name": "os.system"}}},
        "other model": bare | {"recipe": recipe | {"model": {"name": "CNN6"}}},
        "recipe as text": bare | {"recipe": "digits-tet"},
        "newer": bare | {"recipe": recipe | {"quantised": True}},
    }
    for name, value in said.items():
        text = "[" * 100_000 if value is None else json.dumps(value)
        cases[name] = with_header(header | {"__metadata__": {"snnkern": text}}, rest)
    for name, data in cases.items():
        (tmp_path / "w.safetensors").write_bytes(data)
        with pytest.raises(RunError, match=r"w.safetensors (is not a file of weights|cannot be read)") as error:
            restore(tmp_path / "w.safetensors")
        assert "\n" not in str(error.value) and len(str(error.value)) < 600, name
        count("faults")


def test_weights_of_the_first_files_have_no_digest(one, tmp_path):
    header, rest = header_of(one / "seed3" / "stage0-last.safetensors")
    about = json.loads(header["__metadata__"]["snnkern"])
    del about["digest"]
    (tmp_path / "w.safetensors").write_bytes(
        with_header(header | {"__metadata__": {"snnkern": json.dumps(about)}}, rest)
    )
    assert restore(tmp_path / "w.safetensors").about["epoch"] == 2


HOSTILE = [None, True, -1, 0, 2, 10**30, -1e308, float("nan"), float("inf"), "", "x" * 999, "\x1b[31m", [], {}, [[1]],
           {"name": "digits"}, [0.5], [0.5, 0.5], "nested"]  # fmt: skip


def nested():
    found = []
    for _ in range(300):
        found = [found]
    return found


@st.composite
def changes(draw, value):
    """JSON with one value of it changed, anywhere, or a key more or less."""
    if isinstance(value, (dict, list)) and value and draw(st.integers(0, 9)):
        key = draw(st.sampled_from(sorted(value) if isinstance(value, dict) else range(len(value))))
        copy = value.copy()
        kind = draw(st.integers(0, 19))
        if kind == 0:
            del copy[key]
        elif kind == 1 and isinstance(value, dict):
            copy[draw(st.text(max_size=5))] = draw(st.sampled_from(HOSTILE))
        else:
            copy[key] = draw(changes(value[key]))
        return copy
    found = draw(st.sampled_from(HOSTILE))
    return nested() if found == "nested" else found


FILES = {
    "seed3/settings.json": ("eval", "train"),
    "seed3/metrics.jsonl": ("plot", "train"),
    "results.json": ("plot",),
    "seed3/search/measured.json": ("search",),
    "seed3/checkpoint.pt": ("train",),
    "seed3/stage0-last.safetensors": ("eval", "export"),
}
COMMANDS = {
    "train": lambda folder: ["train", *ONE, "test_steps=[1,2]", "--out", str(folder)],
    "eval": lambda folder: ["eval", str(folder / "seed3"), "--steps", "1"],
    "plot": lambda folder: ["plot", str(folder)],
    "export": lambda folder: ["export", str(folder / "seed3"), str(folder.parent / "exported.safetensors")],
    "search": lambda folder: ["search", str(folder / "seed3"), "--budget", "1", "--samples", "2", "--fresh", "1"],
}


@pytest.mark.parametrize("name", FILES)
@settings(max_examples=100 if THOROUGH else 3)
@given(st.data())
def test_commands_on_a_folder_with_a_damaged_file(one, tmp_path_factory, count, name, data):
    pytest.importorskip("matplotlib")
    folder = tmp_path_factory.getbasetemp() / "damaged"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(one, folder)
    path = folder / name
    if name.endswith("measured.json"):
        path.parent.mkdir()
        path.write_text(json.dumps({"of": {}, "measured": [{"t": [1, 2], "accuracy": 0.5}]}))
    if name.endswith(("json", "jsonl")) and data.draw(st.booleans()):
        lines = [json.loads(line) for line in path.read_text().splitlines()] if name.endswith("l") else None
        changed = data.draw(changes(lines or json.loads(path.read_text())))
        text = "".join(json.dumps(line) + "\n" for line in changed) if lines and isinstance(changed, list) else ""
        path.write_text(text or json.dumps(changed))
    else:
        path.write_bytes(damaged(path.read_bytes(), data.draw(damages)))
    count("bytes fuzzed", path.stat().st_size)
    before = contents(folder)
    for command in FILES[name]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = CliRunner().invoke(cli.app, COMMANDS[command](folder))
        assert isinstance(result.exception, SystemExit | None), result.exception
        if result.exit_code:
            said = result.stderr.splitlines()
            assert len(said) == 1 and said[0].startswith("Error: ") and str(folder) in said[0], result.stderr
            assert all(before[file] == held for file, held in contents(folder).items() if file in before)


KEYS = ("seed", "batch", "stage.steps", "stage.mtt", "neuron.decay", "data.train", "model", "stage.loss",
        "stage.0.optimiser.lr")  # fmt: skip


@settings(max_examples=1000 if THOROUGH else 25)
@given(st.data())
def test_recipes_that_are_none(tmp_path_factory, count, data):
    path = tmp_path_factory.getbasetemp() / "my.toml"
    text = (Path(snnkern.__file__).parent / "recipes" / "digits-mtt.toml").read_bytes()
    path.write_bytes(damaged(text, data.draw(damages)))
    count("bytes fuzzed", path.stat().st_size)
    wrong = st.tuples(st.sampled_from(KEYS), st.sampled_from(HOSTILE))
    overrides = data.draw(st.lists(wrong, max_size=2))
    try:
        recipe = load(str(path), [f"{key}={json.dumps(value)}" for key, value in overrides])
    except RecipeError as error:
        assert str(error)
        return
    assert recipe.runs() is not None and recipe.total_cost > 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a = " + "[" * 100_000, "is not TOML: "),
        (f"a = {'9' * 10_000}", "is not TOML: "),
        ("\udcff", "is not TOML: "),
    ],
)
def test_hostile_toml(tmp_path, text, message):
    (tmp_path / "my.toml").write_bytes(text.encode(errors="surrogateescape"))
    result = CliRunner().invoke(cli.app, ["train", str(tmp_path / "my.toml")])
    assert result.exit_code == 2 and f"my.toml {message}" in result.stderr and result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stage.epoch=3", "stage.0.epoch is no key, did you mean epochs?"),
        ("bach=3", "bach is no key, did you mean batch?"),
        ("lr=0.1", "lr is no key, did you mean stage.optimiser.lr?"),
        ("batch=2.5", "batch must be a valid integer, got 2.5"),
        ("batch=9223372036854775808", "batch must be less than 2147483648, got 9223372036854775808"),
        (f"seed={2**64}", f"seed must be less than {2**63}, got {2**64}"),
        ("stage.epochs=nan", "stage.0.epochs must be a valid integer, got nan"),
        ("packed=1", "packed must be a valid boolean, got 1"),
        (f"batch={'9' * 5000}", "batch must be"),
        ("data=" + "[" * 10_000, "data must be a table"),
    ],
)
def test_wrong_keys_and_values_are_named(override, message):
    result = CliRunner().invoke(cli.app, ["train", "digits-tet", override])
    assert result.exit_code == 2 and isinstance(result.exception, SystemExit)
    assert message in result.stderr and result.stderr.count("\n") == 1


# Losses that are not finite


def with_data(monkeypatch, train=0.0, test=0.0):
    x, y = torch.rand(60, 1, 8, 8), torch.arange(60) % 10
    parts = [TensorDataset(x.clone(), y), TensorDataset(x.clone(), y)]
    parts[0].tensors[0][7] += train
    parts[1].tensors[0][7] += test
    monkeypatch.setattr(snnkern.data, "load", lambda **options: Data(*parts, 10, (1, 8, 8), False, parts[0]))


@pytest.mark.parametrize(
    ("options", "value", "message"),
    [
        (["amp=off"], {"train": float("nan")}, "the loss of epoch 1 of stage.0 is nan; try a smaller lr, or look for"),
        (["amp=float16"], {"train": float("nan")}, "the loss of epoch 1 of stage.0 is nan; try a smaller lr or ano"),
        (["amp=off"], {"test": float("nan")}, "the loss on the test data of epoch 1 of stage.0 is nan; try a smaller"),
    ],
)  # fmt: skip
def test_data_that_are_not_finite(tmp_path, monkeypatch, options, value, message, count):
    with_data(monkeypatch, **value)
    network = [*ONE, 'stage.network="ann"', "stage.steps=1"]
    with pytest.raises(RunError, match=message):
        fit(once([*network, *options]), tmp_path)
    if "train" in value:
        assert not (tmp_path / "checkpoint.pt").exists()  # though one is due after every step
    assert not list(tmp_path.glob("*-last.*")) and not (tmp_path / "metrics.jsonl").exists()
    with_data(monkeypatch)  # mended, the same command goes on
    fit(once([*network, *options]), tmp_path)
    count("faults")


def test_gradients_that_overflow_float16_at_any_scale(tmp_path, monkeypatch, count):
    scaler = torch.amp.GradScaler.step
    monkeypatch.setattr(torch.amp.GradScaler, "step", lambda self, optimiser: (
        next(p for group in optimiser.param_groups for p in group["params"]).grad.fill_(float("inf")),
        scaler(self, optimiser))[1])  # fmt: skip
    with pytest.raises(RunError, match=r"the scale of the loss, as gradients overflow float16, .* another amp"):
        fit(once([*ONE, "amp=float16", "stage.epochs=20"]), tmp_path)
    state, _ = runs.read_checkpoint(tmp_path)
    assert state.epoch > 5
    count("faults")


def test_memory_that_runs_out(tmp_path, monkeypatch):
    def more(*args):
        return torch.empty(2**60)

    monkeypatch.setattr("snnkern.train.loop.to_device", more)
    with pytest.raises(RunError, match=r"memory ran out; a smaller batch, .*can't allocate memory"):
        fit(once(ONE), tmp_path)


# Samples that cannot be read


@pytest.mark.parametrize("workers", [0, 1])
def test_a_sample_that_cannot_be_read(tmp_path, words, workers, count):
    root = tmp_path / "data"
    shutil.copytree(words.partition("=")[2], root)
    recipe = [*WORDS, f"data.root={root}", f"workers={workers}"]
    path = root / "SHD" / "shd_train.h5"

    def damage():
        os.truncate(path, 3000)

    out = tmp_path / "out"
    with pytest.raises(DataError, match=rf"^{path}: word \d+ cannot be read: [^\n]*$"):
        fit(once(recipe), out, At(1, damage))
    result = CliRunner().invoke(cli.app, ["train", *recipe, "--out", str(out)])
    assert result.exit_code == 1 and "shd_train.h5: " in result.stderr and "Traceback" not in result.stderr
    count("faults", 2)


# Time and place


def test_clocks_that_go_backwards(tmp_path, two, monkeypatch):
    start = time.time()
    monkeypatch.setattr(time, "time", lambda: 2 * start - time.monotonic())
    with pytest.raises(Interrupted):
        fit(once(TWO), tmp_path, At(1, lambda: os.kill(os.getpid(), signal.SIGINT)))
    monkeypatch.setattr(time, "monotonic", lambda before=time.monotonic: before() - 1e6)  # the machine began anew
    fit(once(TWO), tmp_path)
    assert_same_end(tmp_path, two[0])
    assert all(0 < line["seconds"] < 1000 for line in read_metrics(tmp_path))


def test_a_folder_goes_on_elsewhere(tmp_path, two, count):
    with pytest.raises(Interrupted):
        fit(once(TWO), tmp_path / "a", At(1, lambda: os.kill(os.getpid(), signal.SIGINT)))
    (tmp_path / "a" / "lock").write_text("process 1 on another since 2000-01-01")  # of a process that was killed
    shutil.copytree(tmp_path / "a", tmp_path / "elsewhere" / "b")
    shutil.rmtree(tmp_path / "a")
    fit(once(TWO), tmp_path / "elsewhere" / "b")
    assert_same_end(tmp_path / "elsewhere" / "b", two[0])
    count("faults")


def test_other_versions_are_told(tmp_path, two):
    with pytest.raises(Interrupted):
        fit(once(TWO), tmp_path, At(1, lambda: os.kill(os.getpid(), signal.SIGINT)))
    path = tmp_path / "settings.json"
    held = json.loads(path.read_text())
    held["versions"]["torch"] = "2.6.0"
    path.write_text(json.dumps(held))
    told = r"begun elsewhere \(torch 2.6.0 there, .* here\): it goes on, but its last bits may differ"
    with pytest.warns(UserWarning, match=told):
        fit(once(TWO), tmp_path)
    assert len(read_metrics(tmp_path)) == 2


def racing(settings, folder, together, found):
    together.wait()
    try:
        fit(once([*ONE, *settings]), folder)
        found.put("ended")
    except RunError as error:
        found.put(str(error))


def test_two_at_once_in_a_new_folder(tmp_path, count):
    """One trains; the other says why not. What the folder says of itself is what was trained in it."""
    for case in range(20 if THOROUGH else 1):
        folder, found, together = tmp_path / str(case), FORKS.Queue(), FORKS.Barrier(2)
        lrs = ["stage.0.optimiser.lr=0.002"], ["stage.0.optimiser.lr=0.02"]
        processes = [FORKS.Process(target=racing, args=(lr, str(folder), together, found)) for lr in lrs]
        for process in processes:
            process.start()
        said = [found.get(timeout=120), found.get(timeout=120)]
        assert [ended(process) for process in processes] == [0, 0]
        (refused,) = [text for text in said if text != "ended"]
        assert "is being trained by" in refused or "holds a run with other settings" in refused
        assert restore(folder).recipe.settings() == runs.read_settings(folder)
        count("faults")
