#!/bin/sh
# The commands that a person types to run vLLM from a release archive and a wheel's kernels, without
# this workspace and with warm caches. `nox -s perf` times them against `inv bootstrap`.
# The folder holds only patches/ and the lists *.txt. UV, PYTHON, ARCHIVE, TAG, PROBE and the VLLM_*
# variables of vLLM's setup.py are in the environment; the arguments select torch and its index.
set -eu
export GIT_CONFIG_GLOBAL=/dev/null GIT_CONFIG_SYSTEM=/dev/null
export GIT_AUTHOR_NAME=me GIT_AUTHOR_EMAIL=me@localhost
export GIT_COMMITTER_NAME=me GIT_COMMITTER_EMAIL=me@localhost
python=$PWD/.venv/bin/python

mkdir vllm
tar -xzf "$ARCHIVE" --strip-components=1 --no-same-owner -C vllm
rm -rf vllm/*.egg-info vllm/PKG-INFO vllm/vllm/_version.py
cd vllm
git init --quiet
git add --all --force
git commit --quiet -m "vLLM $TAG"
git tag "$TAG"
series=$(sed -e '/^[[:space:]]*#/d' -e '/^[[:space:]]*$/d' -e 's|^|../patches/|' ../patches/series)
# shellcheck disable=SC2086 # names of patches hold no blanks
[ -z "$series" ] || git am --quiet $series
cd ..

"$UV" venv --no-project --python "$PYTHON" .venv
"$UV" pip install --python "$python" "$@"
"$UV" pip install --python "$python" --constraints constraints.txt --overrides overrides.txt \
    -r requirements.txt
[ ! -s companions.txt ] ||
    "$UV" pip install --python "$python" --constraints constraints.txt -r companions.txt
[ ! -s accelerators.txt ] ||
    "$UV" pip install --python "$python" --constraints constraints.txt \
        --overrides overrides.txt -r accelerators.txt
"$UV" pip install --python "$python" --no-build-isolation --no-deps --editable vllm

# The same verification as in a bootstrap: vLLM is imported from another folder and from inside its
# tree, and every library is loaded.
tree=$PWD/vllm
mkdir elsewhere
cd elsewhere
"$python" "$PROBE" "$tree" > report.json
cd "$tree"
"$python" "$PROBE" "$tree" --no-libraries > ../report.json
