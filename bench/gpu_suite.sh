#!/usr/bin/env bash
# One command for a machine with a GPU: build, tests, benchmarks, sanitizer, one JSON record, a short table last. Under ten minutes.
# Needs this source tree, Python 3.10+ with torch, triton, pybind11 and pytest, nvcc, cmake, ninja; no network. See bench/README.md.
#   bash bench/gpu_suite.sh                  PYTHON=... chooses the interpreter, OUT=... a second folder for the record
#   bash bench/gpu_suite.sh --cpu-dry-run    exercise the stages without a GPU, in a minute; makes no record in bench/results
set -u
cd "$(dirname "$0")/.." || exit 1
exec "${PYTHON:-python3}" bench/gpu_suite.py "$@"
