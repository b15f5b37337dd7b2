"""Kind `tt`: softmax attention whose projections are tensor trains."""

from headwise.attention.tt.config import TensorTrainConfig
from headwise.attention.tt.layer import TensorTrainAttention

__all__ = ["TensorTrainAttention", "TensorTrainConfig"]
