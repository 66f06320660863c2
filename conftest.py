"""What holds for every test, of the package and of the notebooks: one thread a process, and a file's tests together."""

import os

# Before anyone imports torch, here and in the workers and kernels that inherit it: two workers share two cores, and
# sums in another order change last digits.
for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[_name] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"   # tokenizers warns if a process forks after it used threads

import pytest  # noqa: E402


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keeps a file's tests, and a notebook's cells, on one worker, unless they name a group shared by several files."""
    for item in items:
        if item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(name=item.nodeid.partition("::")[0]))
