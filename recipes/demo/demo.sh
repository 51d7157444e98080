#!/bin/sh
# The life of a small Llama in ten minutes: corpus, tokenizer, pretraining with milestones, scores, story.
#
#   make demo          or, from any folder:   sh recipes/demo/demo.sh [FOLDER]
#
# Each `stage` below is one command, printed before it runs, that you can as well type yourself. Interrupted, the next
# call goes on after the last finished stage; to start anew, remove the folder or name another.
set -eu

HERE=$(dirname "$0")
case $HERE in  # the folder above, in its shortest form
    */*) RECIPES=${HERE%/*} ;;
    *) RECIPES=$HERE/.. ;;
esac
RUN=${1:-runs/demo}
mkdir -p "$RUN/.done"

stage() {  # stage NAME COMMAND...
    name=$1
    shift
    if [ -e "$RUN/.done/$name" ]; then
        printf '\n== %s: done before\n' "$name"
        return
    fi
    printf '\n== %s\n$' "$name"
    for word; do  # quoted where the shell needs it, so that the line can be copied
        case $word in
            *[!A-Za-z0-9_./:=,-]*) printf " '%s'" "$word" ;;
            *) printf ' %s' "$word" ;;
        esac
    done
    printf '\n'
    began=$(date +%s)
    "$@"
    seconds=$(($(date +%s) - began))
    printf '%s\t%s\n' "$name" "$seconds" >> "$RUN/stages.tsv"
    touch "$RUN/.done/$name"
    printf -- '-- %s took %s seconds\n' "$name" "$seconds"
}

# A SentencePiece tokenizer of Llama 2's kind, since Llama 2's own file does not come along.
stage tokenizer tinyllama-hf tokenizer train embedded:prose embedded:code \
    --vocab-size 2048 --output "$RUN/tokenizer" --overwrite

# Seven parts language to three parts code, as much of it as can be read three times in five minutes.
stage prose tinyllama-hf prepare embedded:prose --tokenizer "$RUN/tokenizer" --output "$RUN/data/prose" \
    --validation-fraction 0.05 --sample-fraction 0.28
stage code tinyllama-hf prepare embedded:code --tokenizer "$RUN/tokenizer" --output "$RUN/data/code" \
    --validation-fraction 0.01 --sample-fraction 0.047

stage pretrain accelerate launch --quiet --config_file "$RECIPES/accelerate/cpu.yaml" "$RECIPES/pretrain.py" \
    "$HERE/pretrain.yaml" "output_dir=$RUN/pretrain" "data.tokenizer=$RUN/tokenizer" \
    "data.sources=[{path: $RUN/data/prose, weight: 0.7}, {path: $RUN/data/code, weight: 0.3}]" --overwrite

# Every milestone on text that no block came from, by stock transformers, beside models that only count.
stage score tinyllama-hf eval "$RUN/pretrain" --baselines

LAST=$RUN/pretrain/milestones/$(ls "$RUN/pretrain/milestones" | sort -t- -k2 -n | tail -n 1)
stage generate tinyllama-hf generate "$LAST" "Return a list of" --temperature 0.7 --max-new-tokens 60 --seed 1

stage report tinyllama-hf report "$RUN/pretrain" --output "$RUN/report" --stages "$RUN/stages.tsv" \
    --prompt "Return a list of" --prompt "    def __init__(self"

cat <<END

All stages together: $(awk '{s += $2} END {print s}' "$RUN/stages.tsv") seconds.

Look at
  $RUN/report/index.html     the story: loss, scores, the same beginnings continued by every milestone
  $LAST
                             a plain Llama folder: AutoModelForCausalLM.from_pretrained loads it, without this package
  $RUN/pretrain/metrics.jsonl, training.yaml

Try next (with the environment of the demo: . .venv/bin/activate)
  tinyllama-hf generate $LAST "class Queue:"
  accelerate launch $RECIPES/pretrain.py $HERE/pretrain.yaml training.total_tokens=4_000_000 output_dir=$RUN/longer --dry-run
  tinyllama-hf recipes copy my-recipes      and change them
END
