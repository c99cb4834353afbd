"""What is tested here needs a GPU: each file skips itself without one."""

import os

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for deterministic sums; read when CUDA starts
