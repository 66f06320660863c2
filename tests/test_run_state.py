"""A run's state comes back bit for bit, and no kill, torn file, flipped bit or full disk loses what was saved."""

import json
import math
import os
import random
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from crash import every_crash, every_full_disk, small_files_only
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from tiny import tiny_model, tiny_tokens

from minidsv3 import run_state
from minidsv3.run_state import (CheckpointError, load_latest, random_state, save_state, saved_steps,
                                set_random_state)


@pytest.fixture(autouse=True)
def unsynced(monkeypatch) -> None:
    """Here processes die, not machines: nobody needs to wait for the disk."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def state_of(step: int) -> dict:
    """A small state of two files, different for every step."""
    return {"model": {"weight": torch.full((40,), float(step))}, "optimizer": {0: {"moment": torch.arange(9) + step}},
            "data": {"epoch": step, "position": (step, 0.1)}}


def same(a: object, b: object) -> bool:
    """Equality of trees to the bit, in types and dtypes too."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and bits(a) == bits(b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return repr(a) == repr(b)


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


# ---- what goes in comes out -------------------------------------------------------------------------------------

def test_every_dtype_and_number_comes_back_to_the_bit(tmp_path):
    state = {
        "floats": [torch.randn(5, 3).to(dtype) for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.half)],
        "odd": {"nan": torch.tensor([math.nan, -0.0, math.inf, 1e-45]), "scalar": torch.tensor(3),
                "none": torch.empty(0, 4), "transposed": torch.randn(4, 6).t(), "bool": torch.tensor([True, False]),
                "bytes": torch.get_rng_state()},
        "plain": [1, 2**80, -0.0, 0.1, math.inf, math.nan, None, True, "ü\n", (), [], {}, ("a", [1, (2,)])],
        "keys": {0: "int", "0": "text", (1, 2): "pair", None: "none", "$tensor": "text that looks like a mark"},
    }
    save_state(tmp_path, 7, state)
    loaded = load_latest(tmp_path)
    assert loaded.step == 7 and loaded.folder == tmp_path / "step-00000007"
    assert same(loaded.state, state)


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=5)
KEYS = st.text("a$", max_size=2) | st.integers() | st.tuples(st.integers())
TREES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.lists(inner, max_size=3).map(tuple)
    | st.dictionaries(KEYS, inner, max_size=3), max_leaves=12)


@settings(max_examples=100, deadline=None, database=None, derandomize=True)
@given(TREES)
def test_any_tree_survives_json(tree):
    packed = json.loads(json.dumps(run_state._pack(tree, (), {}, {})))
    assert same(run_state._unpack(packed, {}), tree)


def test_model_and_optimizer_continue_as_if_never_saved(tmp_path):
    def step(model, optimizer):
        model.loss(tiny_tokens(2, 9), mtp_weight=0.3).total.backward()
        optimizer.step()

    def fresh(seed):
        model = tiny_model(seed, dtype=torch.float32)
        return model, torch.optim.AdamW(model.parameters(), lr=0.01)

    model, optimizer = fresh(seed=0)
    step(model, optimizer)
    save_state(tmp_path, 1, {"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    again, its_optimizer = fresh(seed=1)
    again.zero_grad()
    state = load_latest(tmp_path).state
    again.load_state_dict(state["model"])
    its_optimizer.load_state_dict(state["optimizer"])
    optimizer.zero_grad()
    step(model, optimizer)
    step(again, its_optimizer)
    assert same(dict(model.state_dict()), dict(again.state_dict()))


def test_shared_tensors_are_stored_once_and_shared_again(tmp_path):
    model = tiny_model(dtype=torch.float32)
    save_state(tmp_path, 0, {"model": model.state_dict()})
    values = sum(t.numel() for t in [*model.parameters(), *model.buffers()])
    assert 4 * values < (tmp_path / "step-00000000" / "model.safetensors").stat().st_size < 4 * values + 20_000
    loaded = load_latest(tmp_path).state["model"]
    assert loaded["lm_head.weight"] is loaded["model.layers.3.shared_head.head.weight"]


def test_random_generators_go_on_where_they_stood(tmp_path):
    save_state(tmp_path, 0, {"random": random_state()})
    wanted = torch.rand(3), random.random()
    torch.manual_seed(99)
    random.seed(99)
    set_random_state(load_latest(tmp_path).state["random"])
    assert same((torch.rand(3), random.random()), wanted)


def test_a_loaded_state_does_not_depend_on_its_files(tmp_path):
    folder = save_state(tmp_path, 0, state_of(3))
    loaded = load_latest(tmp_path).state
    for path in folder.iterdir():
        with path.open("r+b") as file:
            file.write(bytes(path.stat().st_size))
    assert same(loaded, state_of(3))


@pytest.mark.parametrize("state, sentence", [
    ({"model": {"layers": [torch.float32]}}, "model/layers/0 is of type dtype; a state holds"),
    ({"a": {"b": b"bytes"}}, "a/b is of type bytes; a state holds"),
    ({"a": {0: torch.ones(1), "0": torch.zeros(1)}}, "two tensors of the state are both called a/0"),
])
def test_what_cannot_be_stored_is_named_and_nothing_is_written(tmp_path, state, sentence):
    with pytest.raises(CheckpointError, match=sentence):
        save_state(tmp_path, 0, state)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("step, keep", [(-1, 2), (0, 0)])
def test_negative_steps_and_keeping_nothing_are_refused(tmp_path, step, keep):
    with pytest.raises(CheckpointError, match=f"step is {step} and keep is {keep}"):
        save_state(tmp_path, step, state_of(0), keep=keep)


# ---- which save is the latest -----------------------------------------------------------------------------------

def test_the_newest_two_saves_remain(tmp_path):
    for step in (5, 10, 15, 20):
        save_state(tmp_path, step, state_of(step))
    assert saved_steps(tmp_path) == [20, 15] and load_latest(tmp_path).step == 20
    assert sorted(os.listdir(tmp_path)) == ["latest", "step-00000015", "step-00000020"]
    save_state(tmp_path, 25, state_of(25), keep=1)
    assert saved_steps(tmp_path) == [25]


def test_the_pointer_decides_and_without_it_the_newest(tmp_path):
    for step in (1, 2):
        save_state(tmp_path, step, state_of(step))
    (tmp_path / "latest").write_text("step-00000001")
    assert load_latest(tmp_path).step == 1
    (tmp_path / "latest").write_bytes(b"\xff\x00nonsense")
    assert load_latest(tmp_path).step == 2
    (tmp_path / "latest").unlink()
    assert load_latest(tmp_path).step == 2


def test_a_run_that_went_back_writes_its_steps_again(tmp_path):
    for step in (1, 2, 3):
        save_state(tmp_path, step, state_of(step), keep=3)
    save_state(tmp_path, 2, state_of(200))
    assert same(load_latest(tmp_path).state, state_of(200))


def test_a_folder_without_saves_is_refused(tmp_path):
    (tmp_path / "step-by-step").mkdir()
    for folder in (tmp_path, tmp_path / "nothing"):
        assert saved_steps(folder) == []
        with pytest.raises(CheckpointError, match="there is no saved state in"):
            load_latest(folder)


# ---- damage -----------------------------------------------------------------------------------------------------

def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def flip(file: Path, position: int = 100, bit: int = 3) -> None:
    content = bytearray(file.read_bytes())
    content[position % len(content)] ^= 1 << bit
    file.write_bytes(content)


DAMAGES = {
    "torn": (lambda save: truncate(save / "model.safetensors"), r"model.safetensors has \d+ bytes where \d+ were"),
    "flipped": (lambda save: flip(save / "optimizer.safetensors"), "optimizer.safetensors has changed since"),
    "missing": (lambda save: (save / "model.safetensors").unlink(), "model.safetensors is missing"),
    "torn manifest": (lambda save: truncate(save / "manifest.json"), "manifest.json cannot be read"),
    "empty manifest": (lambda save: (save / "manifest.json").write_text("{}"), "manifest.json does not list"),
    "odd manifest": (lambda save: (save / "manifest.json").write_text("[1]"), "manifest.json cannot be read"),
    "no manifest": (lambda save: (save / "manifest.json").unlink(), "manifest.json cannot be read"),
    "empty folder": (lambda save: (shutil.rmtree(save), save.mkdir()), "manifest.json cannot be read"),
}


@pytest.mark.parametrize("damage, sentence", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_save_is_reported_and_the_one_before_it_used(tmp_path, damage, sentence):
    save_state(tmp_path, 1, state_of(1))
    damage(save_state(tmp_path, 2, state_of(2)))
    with pytest.warns(UserWarning, match=f"{sentence}.*; trying the save before it"):
        loaded = load_latest(tmp_path)
    assert loaded.step == 1 and same(loaded.state, state_of(1))


def test_if_all_saves_are_damaged_the_error_says_what_was_found(tmp_path):
    truncate(save_state(tmp_path, 1, state_of(1)) / "model.safetensors")
    flip(save_state(tmp_path, 2, state_of(2)) / "state.json")
    found = "no save in .* is whole: .*state.json has changed.*; .*model.safetensors has"
    with pytest.warns(UserWarning), pytest.raises(CheckpointError, match=found):
        load_latest(tmp_path)


def flips_that_go_unnoticed(tmp_path: Path, tries: int = 120) -> int:
    """Flips single bits all over a save; counts those after which something else than what was saved is loaded."""
    rng, unnoticed = random.Random(0), 0
    save_state(tmp_path, 1, state_of(1))
    for _ in range(tries):
        save = save_state(tmp_path, 2, state_of(2))
        flip(rng.choice(sorted(save.iterdir())), rng.randrange(10**6), rng.randrange(8))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                step, state, _ = load_latest(tmp_path)
            except Exception:   # such as a file that parses no more
                unnoticed += 1
                continue
        unnoticed += not (same(state, state_of(2)) if not caught else step == 1 and same(state, state_of(1)))
    return unnoticed


def test_no_single_flipped_bit_goes_unnoticed(tmp_path):
    assert flips_that_go_unnoticed(tmp_path) == 0


def test_sizes_alone_would_not_notice_flipped_bits(tmp_path, monkeypatch):
    monkeypatch.setattr(run_state, "_sha256", lambda file: "always the same")
    assert flips_that_go_unnoticed(tmp_path) > 10


# ---- crashes and full disks -------------------------------------------------------------------------------------

def loaded_after_every_crash(tmp_path: Path, first: int, second: int) -> list[int]:
    """The steps found after a process died at each step of saving `second`, `first` having been saved before."""
    found = []

    def fresh() -> None:
        shutil.rmtree(tmp_path)
        save_state(tmp_path, first, state_of(1), keep=1)

    def check() -> None:
        step, state, _ = load_latest(tmp_path)
        found.append(state["data"]["epoch"])
        assert (step, found[-1]) in ((first, 1), (second, 2)) and same(state, state_of(found[-1]))
        save_state(tmp_path, second + 1, state_of(3), keep=1)     # leftovers are in nobody's way, and go
        assert sorted(os.listdir(tmp_path)) == ["latest", f"step-{second + 1:08d}"]

    with pytest.MonkeyPatch.context() as patch:   # tensors are written in Python, so that their file can be torn
        patch.setattr(run_state, "save_file", lambda tensors, file: file.write_bytes(save(tensors)))
        every_crash(lambda: save_state(tmp_path, second, state_of(2), keep=1), check, fresh)
    return found


@pytest.mark.parametrize("first, second", [(1, 2), (2, 2)], ids=["next step", "same step again"])
def test_a_crash_at_any_step_of_saving_loses_nothing(tmp_path, first, second):
    found = loaded_after_every_crash(tmp_path, first, second)
    assert len(found) >= 16 and found == sorted(found) and set(found) == {1, 2}


@contextmanager
def in_place(path: Path) -> Iterator[Path]:
    path.mkdir(parents=True, exist_ok=True)
    yield path


@contextmanager
def pointer_first(path: Path) -> Iterator[Path]:
    with in_place(path) as new:
        run_state.replace_file(path.parent / "latest", path.name)
        yield new


@pytest.mark.parametrize("mutant, second", [(in_place, 1), (pointer_first, 2)])
def test_writing_where_others_may_read_is_caught(tmp_path, monkeypatch, mutant, second):
    monkeypatch.setattr(run_state, "whole_folder", mutant)
    with pytest.raises(UserWarning, match="trying the save before it"):
        loaded_after_every_crash(tmp_path, 1, second)


def test_a_full_disk_gives_a_sentence_and_leaves_the_earlier_save(tmp_path):
    save_state(tmp_path, 1, state_of(1))

    def check() -> None:
        assert load_latest(tmp_path).step in (1, 2) and not list(tmp_path.glob(".*"))
        save_state(tmp_path, 1, state_of(1), keep=1)

    assert every_full_disk(lambda: save_state(tmp_path, 2, state_of(2)), check) >= 8


def test_a_system_that_refuses_a_file_gives_a_sentence(tmp_path):
    save_state(tmp_path, 1, state_of(1))
    with small_files_only(8192), pytest.raises(CheckpointError, match="File too large.*; what was saved before is"):
        save_state(tmp_path, 2, {"model": {"weight": torch.zeros(100_000)}})
    assert sorted(os.listdir(tmp_path)) == ["latest", "step-00000001"] and load_latest(tmp_path).step == 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")
def test_fifty_kills_at_random_moments_lose_nothing(tmp_path):
    script = Path(__file__).with_name("kill_saves.py")
    command = [sys.executable, script, tmp_path, "50"]
    report = json.loads(subprocess.run(command, capture_output=True, timeout=120, check=True).stdout)
    assert report["kills"] == 50 and report["lost"] == []
    assert report["amid a save"] >= 5 and report["saves"] >= 10      # the kills did hit where it hurts, and beside it
