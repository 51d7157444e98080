#!/bin/sh
# The life of a small Llama in a quarter of an hour: corpus, tokenizer, pretraining with milestones, scores, chat, 4 and
# 8 bit, a draft model, the Hub, the story.
#
#   make demo          or, from any folder:   sh recipes/demo/demo.sh [FOLDER]
#
# DEMO_HUB: address of a Hub to publish to, with a writing token in HF_TOKEN (`make demo` starts one of its own); without
# it, publishing is a dry run.
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

# Seven parts language to three parts code, as much of it as is read about four times below.
stage prose tinyllama-hf prepare embedded:prose --tokenizer "$RUN/tokenizer" --output "$RUN/data/prose" \
    --validation-fraction 0.05 --sample-fraction 0.28
stage code tinyllama-hf prepare embedded:code --tokenizer "$RUN/tokenizer" --output "$RUN/data/code" \
    --validation-fraction 0.01 --sample-fraction 0.047

stage pretrain accelerate launch --quiet --config_file "$RECIPES/accelerate/cpu.yaml" "$RECIPES/pretrain.py" \
    "$HERE/pretrain.yaml" "output_dir=$RUN/pretrain" "data.tokenizer=$RUN/tokenizer" \
    "data.sources=[{path: $RUN/data/prose, weight: 0.7}, {path: $RUN/data/code, weight: 0.3}]"

# Every milestone on text that no block came from, by stock transformers, beside models that only count.
stage score tinyllama-hf eval "$RUN/pretrain" --baselines

# The seven commonsense tasks through lm-eval, on a sample of ten questions each: a model of this size knows nothing yet.
stage commonsense tinyllama-hf eval "$RUN/pretrain" --task commonsense --data embedded:sample

LAST=$RUN/pretrain/milestones/$(ls "$RUN/pretrain/milestones" | sort -t- -k2 -n | tail -n 1)
stage generate tinyllama-hf generate "$LAST" "Return a list of" --temperature 0.7 --max-new-tokens 60 --seed 1

# The last milestone learns to chat, from questions about modules that it has not read.
stage chat accelerate launch --quiet --config_file "$RECIPES/accelerate/cpu.yaml" "$RECIPES/sft.py" \
    "$RECIPES/sft/full.yaml" "output_dir=$RUN/chat" "model.path=$LAST" --overwrite
stage replies tinyllama-hf eval "$RUN/chat" --task replies --limit 100
echo "What is the class email.message.Message for?" > "$RUN/question.txt"
stage talk-8-bit tinyllama-hf chat "$RUN/chat" --quantization int8 --temperature 0 < "$RUN/question.txt"
stage talk-4-bit tinyllama-hf chat "$RUN/chat" --quantization nf4 --temperature 0 < "$RUN/question.txt"

# A smaller model of the same tokens proposes, the last milestone checks. (With a seed as many tokens are drafted in every
# round; without one, none where that does not pay, as on models of this size.)
stage draft accelerate launch --quiet --config_file "$RECIPES/accelerate/cpu.yaml" "$RECIPES/pretrain.py" \
    "$RECIPES/pretrain/micro.yaml" "output_dir=$RUN/draft" "data.tokenizer=$RUN/tokenizer" \
    "data.sources=[{path: $RUN/data/prose, weight: 0.7}, {path: $RUN/data/code, weight: 0.3}]" \
    data.sequence_length=256 training.total_tokens=1_200_000 training.micro_batch_size=8 schedule.warmup_tokens=80_000 "milestones.tokens=[]" \
    validation.every_tokens=300_000 logging.every_steps=50
DRAFT=$(ls -d "$RUN"/draft/milestones/*)
stage drafted tinyllama-hf generate "$LAST" "Return a list of" --temperature 0 --max-new-tokens 60 --seed 1 \
    --draft "$DRAFT"

# Every milestone a revision, the newest on main, with a card made from what the stages above wrote.
if [ -n "${DEMO_HUB:-}" ]; then
    stage publish env "HF_ENDPOINT=$DEMO_HUB" tinyllama-hf publish "$RUN/pretrain" --repo demo/nano-stdlib
else
    stage publish tinyllama-hf publish "$RUN/pretrain" --repo demo/nano-stdlib --dry-run
fi

stage report tinyllama-hf report "$RUN/pretrain" --output "$RUN/report" --stages "$RUN/stages.tsv" --chat "$RUN/chat" \
    --prompt "Return a list of" --prompt "    def __init__(self"

cat <<END

All stages together: $(awk '{s += $2} END {print s}' "$RUN/stages.tsv") seconds.

Look at
  $RUN/report/index.html     the story: loss, scores, the same beginnings continued by every milestone
  $LAST
                             a plain Llama folder: AutoModelForCausalLM.from_pretrained loads it, without this package
  $RUN/chat                  the chat model, a plain Llama folder too, with the Llama 2 chat template
  $RUN/pretrain/metrics.jsonl, training.yaml, scores.json, commonsense.json

Try next (with the environment of the demo: . .venv/bin/activate)
  tinyllama-hf chat $RUN/chat
  tinyllama-hf generate $LAST "class Queue:"
  accelerate launch $RECIPES/pretrain.py $HERE/pretrain.yaml training.total_tokens=4_000_000 output_dir=$RUN/longer --dry-run
  tinyllama-hf recipes copy my-recipes      and change them
END
