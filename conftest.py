"""What holds for every test, of the package and of the notebooks: one thread a process."""

import os

# Before anyone imports torch, here and in the workers and kernels that inherit it: two workers share two cores, and
# sums in another order change last digits.
for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[_name] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"   # tokenizers warns if a process forks after it used threads

# Chooses Triton's interpreter where there is no GPU, before some test imports transformers and that imports Triton.
import minidsv3.kernels  # noqa: E402
