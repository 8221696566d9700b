#!/bin/bash
# One job on Hugging Face Jobs: launch/hf-jobs.sh FOLDER IMAGE BUCKET NAME
#   FOLDER  holds recipe.yaml and its data; the recipe names them by relative paths
#   IMAGE   was built from launch/Dockerfile, and pushed to where the job can pull it
#   BUCKET  owner/name of a bucket that keeps the run; `hf buckets create` makes one
#   NAME    of the run
# DRY_RUN=1 shows the job and sends nothing. The token comes from your environment and is not written anywhere.
set -euo pipefail
usage="give FOLDER IMAGE BUCKET NAME"
folder=${1:?$usage}
image=${2:?$usage}
bucket=${3:?$usage}
name=${4:?$usage}

# Runs are renamed and locked, so they lie on the job's own disk; the bucket gets a copy, whatever ended the run.
# A second job of the same name goes on from that copy.
# shellcheck disable=SC2016
work='cp -r "/runs/$NAME/." /tmp/run 2>/dev/null
cd /job && llmtune run recipe.yaml --out /tmp/run
code=$?
mkdir -p "/runs/$NAME" && cp -r /tmp/run/. "/runs/$NAME"
exit $code'
hf jobs run ${DRY_RUN:+--dry-run} --name "$name" --flavor "${FLAVOR:-a100-large}" --timeout "${TIMEOUT:-8h}" \
  --env NAME="$name" --secrets HF_TOKEN --volume "$folder:/job" --volume "hf://buckets/$bucket:/runs" \
  "$image" bash -c "$work"
