"""Committed logs that tests read, each at its only home."""
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TRACK = "records/track_0_laptop"
ADAMW = f"{TRACK}/2026-11-22_AdamW"
MUON = f"{TRACK}/2026-11-22_Muon"
YARDSTICK = "bench/results/2026-11-22_shakespeare_cpu/yardstick"
