#!/bin/bash
# One machine, several processes, started by torchrun: launch/torchrun.sh RECIPE RUN PROCESSES
# `llmtune run RECIPE` does the same by itself. When it is stopped, it waits for the checkpoint as long as that takes;
# torchrun kills its processes after 30 seconds.
set -euo pipefail
recipe=${1:?give RECIPE RUN PROCESSES}
run=${2:?give RECIPE RUN PROCESSES}
processes=${3:?give RECIPE RUN PROCESSES}

torchrun --standalone --nproc-per-node "$processes" -m llmtune.train "$recipe" --out "$run"
# Evaluation, merge and what else the recipe asks for.
llmtune run "$run"
