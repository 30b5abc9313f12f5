#!/bin/sh
# Install edgepress from the current directory into a new environment: docker/install.sh FOLDER
#   TORCH_INDEX  where torch comes from, for a build other than that of pip's own index
#   EXTRAS       extras of edgepress, with commas between
set -eu
python3 -m venv "$1"
"$1/bin/pip" install -c constraints.txt ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} torch
"$1/bin/pip" install -c constraints.txt ".[${EXTRAS:-export}]"
