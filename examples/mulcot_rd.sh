#!/usr/bin/env bash
# MulCoT-RD from posts to scores: teacher -> assistant -> augmentation -> student -> evaluation.
#
#   TRAIN=train.jsonl DEV=dev.jsonl TEST=test.jsonl IMAGES=images bash examples/mulcot_rd.sh
#
# The three files are what docs/data.md calls posts with a sentiment (TomBERT's .tsv, MVSA's folders, JSON Lines). With
# TEACHER_URL (and TEACHER_MODEL) a teacher behind an OpenAI-compatible server writes the rationales first; without it the
# training posts need their own `rationale`. Started again, the script continues where it stopped.
# DRY_RUN=1 prints the commands. ASSISTANT_OPTIONS and STUDENT_OPTIONS are passed on to dynkp train.
set -euo pipefail

: "${TRAIN:?give the training posts}" "${DEV:?give the validation posts}" "${TEST:?give the test posts}"
: "${IMAGES:?give the folder of the images}"
TASK=${TASK:-masc}
OUT=${OUT:-runs/mulcot_rd}
ASSISTANT=${ASSISTANT:-Qwen/Qwen2.5-VL-7B-Instruct}
STUDENT=${STUDENT:-Qwen/Qwen2.5-VL-3B-Instruct}
TOP_K=${TOP_K:-64}
MAX_NEW_TOKENS=${MAX_NEW_TOKENS:-512}
LAUNCH=${LAUNCH:-accelerate launch}

run() {
  echo "+ $*"
  if [ -z "${DRY_RUN:-}" ]; then "$@"; fi
}

# 1. The teacher predicts with reasons; where it is wrong, a second request gives the label and asks for an explanation.
if [ -n "${TEACHER_URL:-}" ]; then
  run dynkp rationales --posts "$TRAIN" --image-dir "$IMAGES" --task "$TASK" --base-url "$TEACHER_URL" \
    --model "${TEACHER_MODEL:?give the name of the teacher}" --output "$OUT/teacher.jsonl"
  TRAIN=$OUT/teacher.jsonl
fi

# 2. The assistant learns response chains and labels.
# shellcheck disable=SC2086
run $LAUNCH -m dynkp train --recipe masc_mulcot_rd_assistant_qwen2_5_vl_7b --task "$TASK" \
  --model_name_or_path "$ASSISTANT" --train_file "$TRAIN" --eval_file "$DEV" --image_dir "$IMAGES" \
  --output_dir "$OUT/assistant" --resume_from_checkpoint last ${ASSISTANT_OPTIONS:-}

# 3. It writes a response chain for every training post; those that end in the post's label are added. The task of prediction and
#    distillation is the one saved with the model.
run dynkp predict --model "$OUT/assistant" --prompt chain --do-sample --temperature 0.7 \
  --max-new-tokens "$MAX_NEW_TOKENS" --posts "$TRAIN" --split train --image-dir "$IMAGES" --output "$OUT/chains.jsonl"
run dynkp distill augment --posts "$TRAIN" --image-dir "$IMAGES" --chains "$OUT/chains.jsonl" \
  --output "$OUT/augmented.jsonl"

# 4. Its soft labels are written to the disk, so that the student trains without it.
run dynkp distill cache --model "$OUT/assistant" --student "$STUDENT" --top-k "$TOP_K" \
  --posts "$OUT/augmented.jsonl" --image-dir "$IMAGES" --output "$OUT/soft_labels"

# 5. The student learns from both; the validation posts are predicted and scored.
# shellcheck disable=SC2086
run $LAUNCH -m dynkp train --recipe masc_mulcot_rd_student_qwen2_5_vl_3b --task "$TASK" \
  --model_name_or_path "$STUDENT" --train_file "$OUT/augmented.jsonl" --eval_file "$DEV" --image_dir "$IMAGES" \
  --soft_labels "$OUT/soft_labels" --output_dir "$OUT/student" --resume_from_checkpoint last ${STUDENT_OPTIONS:-}

# 6. The test posts: classification is scored from the label prompt, response chains from the chain prompt.
for system in assistant student; do
  for prompt in label chain; do
    run dynkp predict --model "$OUT/$system" --prompt "$prompt" --max-new-tokens "$MAX_NEW_TOKENS" \
      --posts "$TEST" --image-dir "$IMAGES" --output "$OUT/$system.$prompt.jsonl"
  done
done
run dynkp evaluate --task sentiment --posts "$TEST" --json "$OUT/scores.json" --names assistant student \
  --predictions "$OUT/assistant.label.jsonl" "$OUT/student.label.jsonl" \
  --chains "$OUT/assistant.chain.jsonl" "$OUT/student.chain.jsonl"
