"""The official metrics of the fine-tuning tasks, from the files that the tasks are published as.

vqa          VQA v2: soft accuracy, by answer type and by question type
gqa          GQA: accuracy, consistency, validity, plausibility, distribution
nlvr2        NLVR2: accuracy, consistency
submission   files of predictions as the evaluations take them, written and read
predictions  what the scores have in common: predictions by question, means by name

Scores are flat: a name such as `accuracy/number`, and a number. All are fractions, 0 to 1, but
GQA's distribution, which is a distance.
"""
