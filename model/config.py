"""The sizes of an LXMERT."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field, model_validator


class ModelConfig(BaseModel):
    """Defaults are the base model of the paper (section 3; Tan & Bansal 2019).

    With 9,500 answers it has 228,051,752 parameters.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    vocab_size: int = Field(30522, ge=1, lt=2**31)
    num_answers: int = Field(9500, ge=1, lt=2**31)
    hidden_size: int = Field(768, ge=1, lt=2**31)
    num_heads: int = Field(12, ge=1, lt=2**31)
    intermediate_size: int = Field(3072, ge=1, lt=2**31)
    language_layers: int = Field(9, ge=0, lt=2**31)
    object_layers: int = Field(5, ge=0, lt=2**31)
    cross_layers: int = Field(5, ge=0, lt=2**31)
    top_down: bool = False
    """Bottom-up top-down attention in place of the cross-modality encoder (top_down.py)."""
    max_positions: int = Field(512, ge=2, lt=2**31)
    type_vocab_size: int = Field(2, ge=1, lt=2**31)
    feature_dim: int = Field(2048, ge=1, lt=2**31)
    box_dim: int = Field(4, ge=1, lt=2**31)
    num_object_classes: int = Field(1600, ge=1, lt=2**31)
    num_attribute_classes: int = Field(400, ge=1, lt=2**31)
    dropout: float = Field(0.1, ge=0, lt=1)
    attention_dropout: float = Field(0.1, ge=0, lt=1)
    initializer_range: float = Field(0.02, gt=0)

    @model_validator(mode="after")
    def _whole_heads(self) -> ModelConfig:
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of num_heads {self.num_heads}"
            )
        if self.top_down == (self.cross_layers > 0):
            raise ValueError(
                f"cross_layers={self.cross_layers} with top_down={str(self.top_down).lower()}: "
                "give at least 1, or 0 where top_down is to meet the objects in their place"
            )
        return self
