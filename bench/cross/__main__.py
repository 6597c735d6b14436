"""The GPU path without a GPU: the trainer's whole schedule at full size, traced, compiled and costed for a GPU
that is not there.

    python -m bench.cross [--gpu=H100] [--parts trace kernels costs] [--stages 0 1 2 3] [--out=FOLDER] [--field=value ...]

trace    a short run through every stage on tensors without memory: the graphs that it makes, and when; lines at
         which the host would wait for the device; the memory in use
kernels  what inductor makes of the graphs of some stages, compiled to machine code: registers, spills
costs    the least time of a step by part, from the bytes and operations of those kernels

Needs Triton (bench/cross/requirements.txt) and g++, and touches no driver. Writes cross.json and cross.md into the
folder. bench/CROSS.md says what was found, what is assumed, and what cannot be known this way.
"""
import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

from bench.cross import device
from data.errors import UsageError, report_usage
