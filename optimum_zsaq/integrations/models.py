"""What the lower floors must know of transformers' models, handed down by registration."""

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as MASKED
from transformers.pytorch_utils import Conv1D

from ..kinds import ModelFacts, ModelReader, register_embedding, register_reader, register_transposed
from ..layers import LowBitLayer


class TransformersReader(ModelReader):
    """Reads a `PreTrainedModel`: input embeddings, tied weights and heads as the model itself declares them."""

    def reads(self, model: nn.Module) -> bool:
        """A `PreTrainedModel` of any family."""
        return isinstance(model, PreTrainedModel)

    def facts(self, model: PreTrainedModel) -> ModelFacts:
        """Tables, tied layers and heads, by name."""
        names = {id(module): name for name, module in model.named_modules()}
        tables = {names[id(table)] for table in _input_tables(model) if id(table) in names}
        heads = {names[module] for module in _heads(model) if module in names}
        return ModelFacts(frozenset(tables), _tied_layers(model), frozenset(heads))

    def changed(self, model: PreTrainedModel) -> None:
        """Have the model save and reload as what it is now."""
        from .quantizer import attach_quantizer

        attach_quantizer(model)


def _input_tables(model: PreTrainedModel) -> list[nn.Embedding]:
    tables = []
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            try:
                table = module.get_input_embeddings()
            except NotImplementedError:  # a model that reads no token ids
                continue
            if isinstance(table, nn.Embedding):
                if type(table).__name__.endswith("ScaledWordEmbedding") and not isinstance(table, LowBitLayer):
                    register_embedding(type(table))
                tables.append(table)
    return tables


def _heads(model: PreTrainedModel) -> set[int]:
    """Ids of the modules outside the pre-trained body.

    The body is `base_model`; of a model that is its own base but is built of other models (T5ForQuestionAnswering), those.
    """
    parts = [module for module in model.modules() if isinstance(module, PreTrainedModel) and module is not model]
    bodies = [model.base_model] if model.base_model is not model else [part.base_model for part in parts] or [model]
    body = {id(module) for part in bodies for module in part.modules()}
    output = model.get_output_embeddings()
    return {id(module) for module in model.modules() if id(module) not in body or module is output}


def _tied_layers(model: PreTrainedModel) -> dict[str, str]:
    """Layer -> layer whose weight it shares, from transformers' parameter names."""
    suffix = ".weight"
    pairs = model.all_tied_weights_keys.items()
    return {t.removesuffix(suffix): s.removesuffix(suffix) for t, s in pairs if t.endswith(suffix) and s.endswith(suffix)}


def _build_conv1d(layer: LowBitLayer, weight: Tensor) -> nn.Module:
    conv = Conv1D.__new__(Conv1D)
    nn.Module.__init__(conv)
    conv.nf, conv.nx = layer.out_features, layer.in_features
    conv.weight, conv.bias = nn.Parameter(weight.t().contiguous()), layer.bias
    return conv


def is_decoder(model: nn.Module | None) -> bool:
    """Whether a model is a decoder language model or built on one, whatever its head: Llama or GPT-2, not BERT or T5."""
    if not isinstance(model, PreTrainedModel) or model.config.is_encoder_decoder:
        return False
    kind = model.config.model_type
    return model.can_generate() or (kind in CAUSAL and kind not in MASKED)


def register_models() -> None:
    """Make transformers' models and layer types known to `surgery`."""
    register_reader(TransformersReader())
    register_transposed(Conv1D, _build_conv1d)
