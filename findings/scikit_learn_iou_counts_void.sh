#!/usr/bin/env bash
# Versions: scikit-learn==1.9.1, numpy==2.4.6
# Behaviour: confusion_matrix(truth, predicted, labels=classes) leaves out a pixel whose true id is not in labels.
#   jaccard_score and f1_score with the same labels keep it: it is a false positive of the class that is predicted
#   there. The IoU of the matrix and the IoU of the function differ, with the same three arguments.
# Seen:
#   truth     [0, 0, 1, 1, 2, 2, 255, 255, 255]
#   predicted [0, 0, 1, 1, 2, 2, 0, 1, 1]
#   IoU of confusion_matrix(labels=[0, 1, 2]) [1.0, 1.0, 1.0]
#   jaccard_score(labels=[0, 1, 2])           [0.6667, 0.5, 1.0]
# Why it matters here: The list of classes is how one tells scikit-learn which ids to score. Void is in every picture
#   of a driving set, and a net must predict some class there: by jaccard_score its IoU is too low, by the matrix right.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --no-compile --disable-pip-version-check \
  scikit-learn==1.9.1 numpy==2.4.6
cd "$work"
"$work/venv/bin/python" -W ignore - <<'EOF'
import numpy as np
from sklearn.metrics import confusion_matrix, jaccard_score

truth = np.array([0, 0, 1, 1, 2, 2, 255, 255, 255])
predicted = np.array([0, 0, 1, 1, 2, 2, 0, 1, 1])
classes = [0, 1, 2]
counts = confusion_matrix(truth, predicted, labels=classes)
of_matrix = (np.diag(counts) / (counts.sum(0) + counts.sum(1) - np.diag(counts))).round(4).tolist()
of_function = jaccard_score(truth, predicted, labels=classes, average=None).round(4).tolist()
print("truth    ", truth.tolist())
print("predicted", predicted.tolist())
print(f"IoU of confusion_matrix(labels={classes})", of_matrix)
print(f"jaccard_score(labels={classes})          ", of_function)
known = truth != 255
assert jaccard_score(truth[known], predicted[known], labels=classes, average=None).tolist() == of_matrix
assert of_matrix == [1.0] * 3 and of_function == [0.6667, 0.5, 1.0]
EOF
