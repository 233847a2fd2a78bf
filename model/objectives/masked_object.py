"""Masked objects, object ids: the class that the detector saw in each object (see labels.py)."""

from __future__ import annotations

from model.objectives.labels import label_objective

MASKED_OBJECT = label_objective(
    "masked_object", "obj", lambda batch: (batch.object_label, batch.object_conf)
)
