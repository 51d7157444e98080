#!/bin/sh
# All stages of a small Llama in a quarter of an hour: corpus, tokenizer, pretraining with milestones, scores, chat, 4 and
# 8 bit, a draft model, publishing, the run report.
#
#   make demo          or, from any folder:   sh recipes/demo/demo.sh [FOLDER]
#
# DEMO_HUB: address of a Hub to publish to, with a write token in HF_TOKEN (`make demo` starts a local one). Without it,
# publishing is a dry run.
#
# Each `stage` below is one command, which is printed before it runs and can also be run by hand. After an interruption the
# next call resumes after the last finished stage. To start over, remove the folder or choose another.
set -eu

HERE=$(dirname "$0")
case $HERE in  # the parent folder, in its shortest form
    */*) RECIPES=${HERE%/*} ;;
    *) RECIPES=$HERE/.. ;;
esac
RUN=${1:-runs/demo}
mkdir -p "$RUN/.done"

stage() {  # stage NAME COMMAND...
    name=$1
    shift
    if [ -e "$RUN/.done/$name" ]; then
        printf '\n== %s: already finished\n' "$name"
        return
    fi
    printf '\n== %s\n$' "$name"
    for word; do  # quoted where necessary, so that the line can be copied
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

# A SentencePiece tokenizer in the style of Llama 2, since Llama 2's own file is not bundled.
stage tokenizer tinyllama-hf tokenizer train embedded:prose embedded:code \
    --vocab-size 2048 --output "$RUN/tokenizer" --overwrite

# Prose and code at 7:3, in an amount that training reads about four times.
stage prose tinyllama-hf prepare embedded:prose --tokenizer "$RUN/tokenizer" --output "$RUN/data/prose" \
    --validation-fraction 0.05 --sample-fraction 0.28
stage code tinyllama-hf prepare embedded:code --tokenizer "$RUN/tokenizer" --output "$RUN/data/code" \
    --validation-fraction 0.01 --sample-fraction 0.047

stage pretrain accelerate launch --quiet --config_file "$RECIPES/accelerate/cpu.yaml" "$RECIPES/pretrain.py" \
    "$HERE/pretrain.yaml" "output_dir=$RUN/pretrain" "data.tokenizer=$RUN/tokenizer" \
    "data.sources=[{path: $RUN/data/prose, weight: 0.7}, {path: $RUN/data/code, weight: 0.3}]"

# Scores every milestone on held-out text, by stock transformers, along with n-gram baselines.
stage score tinyllama-hf eval text "$RUN/pretrain" --baselines

# The seven commonsense tasks of lm-eval, on ten questions each; a model of this size scores at chance.
stage commonsense tinyllama-hf eval tasks "$RUN/pretrain" --data embedded:sample

LAST=$RUN/pretrain/milestones/$(ls "$RUN/pretrain/milestones" | sort -t- -k2 -n | tail -n 1)
stage generate tinyllama-hf generate "$LAST" "Return a list of" --temperature 0.7 --max-new-tokens 60 --seed 1

# Fine-tunes the last milestone for chat, on questions about modules that are not in its training data.
stage chat accelerate launch --quiet --config_file "$RECIPES/accelerate/cpu.yaml" "$RECIPES/sft.py" \
    "$RECIPES/sft/full.yaml" "output_dir=$RUN/chat" "model.path=$LAST" --overwrite
stage replies tinyllama-hf eval replies "$RUN/chat" --limit 100
echo "What is the class email.message.Message for?" > "$RUN/question.txt"
stage talk-8-bit tinyllama-hf chat "$RUN/chat" --quantization int8 --temperature 0 < "$RUN/question.txt"
stage talk-4-bit tinyllama-hf chat "$RUN/chat" --quantization nf4 --temperature 0 < "$RUN/question.txt"

# A smaller model of the same tokenizer drafts, and the last milestone verifies. (With a seed, the draft length is fixed;
# without one, drafting is turned off if it is not faster, as with models of this size.)
stage draft accelerate launch --quiet --config_file "$RECIPES/accelerate/cpu.yaml" "$RECIPES/pretrain.py" \
    "$RECIPES/pretrain/micro.yaml" "output_dir=$RUN/draft" "data.tokenizer=$RUN/tokenizer" \
    "data.sources=[{path: $RUN/data/prose, weight: 0.7}, {path: $RUN/data/code, weight: 0.3}]" \
    data.sequence_length=256 training.total_tokens=1_200_000 training.micro_batch_size=8 schedule.warmup_tokens=80_000 "milestones.tokens=[]" \
    validation.every_tokens=300_000 logging.every_steps=50
DRAFT=$(ls -d "$RUN"/draft/milestones/*)
stage drafted tinyllama-hf generate "$LAST" "Return a list of" --temperature 0 --max-new-tokens 60 --seed 1 \
    --draft "$DRAFT"

# Publishes every milestone as a revision and the newest on main, with cards made from the outputs of the stages above.
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
  $RUN/report/index.html     the run report: loss, scores, and samples of every milestone from the same prompts
  $LAST
                             a plain Llama folder, which AutoModelForCausalLM.from_pretrained loads without this package
  $RUN/chat                  the chat model, also a plain Llama folder, with the Llama 2 chat template
  $RUN/pretrain/metrics.jsonl, training.yaml, scores.json, commonsense.json

Try next (with the environment of the demo: . .venv/bin/activate)
  tinyllama-hf chat $RUN/chat
  tinyllama-hf generate $LAST "class Queue:"
  accelerate launch $RECIPES/pretrain.py $HERE/pretrain.yaml training.total_tokens=4_000_000 output_dir=$RUN/longer --dry-run
  tinyllama-hf recipes copy my-recipes      to edit them
END
