"""TtT models: configuration, model, objective and generation. Importing this package registers the auto classes."""

from .configuration_ttt import TttConfig
from .modeling_ttt import TttCausalLMOutputWithPast, TttForConditionalGeneration, TttModel, TttPreTrainedModel
from .objective_ttt import compute_span_ids

__all__ = [
    "TttCausalLMOutputWithPast",
    "TttConfig",
    "TttForConditionalGeneration",
    "TttModel",
    "TttPreTrainedModel",
    "compute_span_ids",
]
