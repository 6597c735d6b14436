import os

# Before any module here imports torch, as in train_gpt.py, which says why.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
