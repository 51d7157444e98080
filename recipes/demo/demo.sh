#!/bin/sh
# The life of a small Llama in ten minutes: a corpus, a tokenizer, a pretrained model with milestones, its scores, its story.
#
#   sh recipes/demo/demo.sh [FOLDER]        (make demo)
#
# Every line below that begins with `stage` runs one command that you can as well type yourself. Interrupted, the next call
# goes on after the last finished stage. A changed command runs again, and so does all that comes after it.
set -eu

HERE=$(dirname "$0")
RUN=${1:-runs/demo}
STAGES=$RUN/stages.tsv
mkdir -p "$RUN/.done"

stage() {  # stage NAME COMMAND...
    name=$1; shift
    if [ "$(cat "$RUN/.done/$name" 2>/dev/null)" = "$*" ]; then
        printf '\n== %s: done before\n' "$name"
        return
    fi
    rm -f "$RUN/.done/$name"
    printf '\n== %s\n$ %s\n' "$name" "$*"
    began=$(date +%s)
    "$@"
    seconds=$(($(date +%s) - began))
    printf '%s\t%s\n' "$name" "$seconds" >> "$STAGES"
    printf '%s' "$*" > "$RUN/.done/$name"
    printf -- '-- %s: %s seconds\n' "$name" "$seconds"
}
