#!/bin/sh
# The commands that a person types for a stack of patches, without this workspace. `nox -s perf`
# times them against the verbs. The folder is a checkout; BASE is the commit below the patches, NEXT
# the commit that they move to, PATCHES their folder, OUT a folder for results.
set -eu
export GIT_CONFIG_GLOBAL=/dev/null GIT_CONFIG_SYSTEM=/dev/null GIT_OPTIONAL_LOCKS=0
export GIT_AUTHOR_NAME=me GIT_AUTHOR_EMAIL=me@localhost
export GIT_COMMITTER_NAME=me GIT_COMMITTER_EMAIL=me@localhost
series() { sed -e '/^#/d' -e "s|^|$PATCHES/|" "$PATCHES/series"; }
case $1 in
    reset)
        git reset --quiet --hard "$BASE"
        ;;
    apply)
        # shellcheck disable=SC2046 # names of patches hold no blanks
        git am --quiet $(series)
        ;;
    export)
        rm -rf "$OUT"
        git format-patch --quiet --output-directory "$OUT" "$BASE..HEAD"
        export GIT_INDEX_FILE="$OUT/index"
        git read-tree "$BASE"
        git apply --cached "$OUT"/*.patch
        ;;
    forecast)
        rm -rf "$OUT"
        mkdir "$OUT"
        export GIT_INDEX_FILE="$OUT/index"
        git read-tree "$NEXT"
        series | while read -r patch; do git apply --cached "$patch"; done
        ;;
esac
