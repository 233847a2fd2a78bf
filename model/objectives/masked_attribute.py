"""Masked objects, attributes: the attribute that the detector saw in each object (see
labels.py)."""

from __future__ import annotations

from model.objectives.labels import label_objective

MASKED_ATTRIBUTE = label_objective(
    "masked_attribute", "attr", lambda batch: (batch.attribute_label, batch.attribute_conf)
)
