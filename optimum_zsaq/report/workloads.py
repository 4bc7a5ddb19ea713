"""What is timed: a forward, a prefill, greedy decoding, or an encoder pass with decoding; alike for every contestant.

A model is anything that is called as a transformers model is and returns its logits (or hidden states) first.
torch and transformers are imported when a model is run, so that the command line can read the names here quickly.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any


ENCODER, DECODER, ENCODER_DECODER = KINDS = ("encoder", "decoder", "encoder-decoder")
DEFAULT_BATCHES = {ENCODER: ("1x128", "8x128"), DECODER: ("1x128",), ENCODER_DECODER: ("1x128",)}
DEFAULT_NEW_TOKENS = {ENCODER: 0, DECODER: 32, ENCODER_DECODER: 16}
PROMPT = 16  # tokens read before decoding
_CHECK_ROWS, _CHECK_LENGTH, _CHECK_STEPS = 2, 24, 4


@dataclass(frozen=True)
class Workload:
    """One thing that is timed.

    Args:
        name (`str`): as it is shown: "1x128", "prefill 1x128", "decode".
        action (`str`): "forward", "prefill", "decode" or "translate" (encoder pass, then decoding).
        rows (`int`): sequences in the batch.
        length (`int`): tokens of each.
        steps (`int`): tokens that are decoded, one forward each.
    """

    name: str
    action: str
    rows: int
    length: int
    steps: int = 0

    @property
    def rate(self) -> bool:
        """Whether it is shown as tokens a second; otherwise as milliseconds a call."""
        return self.action == "decode"


def parse_batch(text: str) -> tuple[int, int]:
    """Rows and length of a batch: "8x128" -> (8, 128).

    Raises:
        ValueError: the text is no such pair of counts.
    """
    rows, _, length = text.lower().partition("x")
    if not (rows.isdecimal() and length.isdecimal() and int(rows) and int(length)):
        raise ValueError(f"--batch {text} is no batch; write rows x tokens, such as 1x128 or 8x128")
    return int(rows), int(length)


def workloads(kind: str, batches: Iterable[str], new_tokens: int) -> list[Workload]:
    """What is timed of a kind of model."""
    pairs = [(text.lower(), *parse_batch(text)) for text in dict.fromkeys(batches)]
    if kind == ENCODER:
        return [Workload(name, "forward", rows, length) for name, rows, length in pairs]
    if kind == DECODER:
        prefill = [Workload(f"prefill {name}", "prefill", rows, length) for name, rows, length in pairs]
        return [Workload(f"decode {new_tokens}", "decode", 1, PROMPT, new_tokens), *prefill]
    return [
        Workload(f"{name} + {new_tokens} tokens", "translate", rows, length, new_tokens) for name, rows, length in pairs
    ]


def kind_of_model(config: Any) -> str:
    """ "encoder", "decoder" or "encoder-decoder", from the architecture that a checkpoint was saved with.

    Decoders without an output embedding and classifiers are timed as encoders: one forward.
    """
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    from ..integrations.tasks import model_class

    cls = model_class(config)
    for kind, auto in ((DECODER, AutoModelForCausalLM), (ENCODER_DECODER, AutoModelForSeq2SeqLM)):
        if type(config) in auto._model_mapping and issubclass(cls, auto._model_mapping[type(config)]):
            return kind
    return ENCODER


# Running -------------------------------------------------------------------------------------------------------------


class Runner:
    """A workload on a model: `reset()` is not timed, `run()` is.

    Args:
        model (`Callable`): see the top of the file.
        workload (`Workload`): what is run.
        config (`PreTrainedConfig`): of the float model: vocabulary and first decoder token.
        seed (`int`): of the random token ids.
    """

    def __init__(self, model: Callable, workload: Workload, config: Any, seed: int):
        self.model, self.workload, self.config = model, workload, config
        self.inputs = token_batch(config, workload.rows, workload.length, seed)
        self.start = first_tokens(config, workload.rows)
        self.cache = self.token = None

    def reset(self) -> None:
        """Bring the KV cache back to the prompt."""
        if self.workload.action != "decode":
            return
        if self.cache is None:  # of a fixed length, for everybody: compiled models need one
            from transformers import StaticCache

            self.cache = StaticCache(config=self.config, max_cache_len=self.workload.length + self.workload.steps)
        self.cache.reset()
        output = self.model(**self.inputs, past_key_values=self.cache, use_cache=True)
        self.token = output.logits[:, -1:].argmax(dim=-1)

    def run(self) -> None:
        """The timed work."""
        action, steps = self.workload.action, self.workload.steps
        if action == "forward":
            self.model(**self.inputs)
        elif action == "prefill":
            self.model(**self.inputs, use_cache=True, logits_to_keep=1)
        elif action == "decode":
            token = self.token
            for _ in range(steps):
                token = (
                    self.model(input_ids=token, past_key_values=self.cache, use_cache=True).logits[:, -1:].argmax(dim=-1)
                )
        else:
            encoded, token, cache = self.model.get_encoder()(**self.inputs), self.start, None
            mask = self.inputs["attention_mask"]
            for _ in range(steps):
                output = self.model(
                    encoder_outputs=encoded,
                    attention_mask=mask,
                    decoder_input_ids=token,
                    past_key_values=cache,
                    use_cache=True,
                )
                token, cache = output.logits[:, -1:].argmax(dim=-1), output.past_key_values


def token_batch(config: Any, rows: int, length: int, seed: int) -> dict[str, Any]:
    """Random token ids (rows, length) int64, the end token last where there is one, and a mask of ones."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    vocabulary = config.get_text_config().vocab_size
    ids = torch.randint(min(5, vocabulary - 1), vocabulary, (rows, length), generator=generator)
    end = getattr(config, "eos_token_id", None)
    if isinstance(end, int):  # some classification heads look for the one end token of a row
        ids[ids == end] = vocabulary - 1 - (end == vocabulary - 1)
        ids[:, -1] = end
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def first_tokens(config: Any, rows: int) -> Any:
    """What the decoder of an encoder-decoder model reads first: (rows, 1) int64."""
    import torch

    found = [getattr(config, name, None) for name in ("decoder_start_token_id", "pad_token_id")]
    return torch.full((rows, 1), next((token for token in found if token is not None), 0))


def check_outputs(model: Callable, kind: str, config: Any, seed: int) -> Any:
    """Logits (or hidden states) on fixed inputs, float32 (n,), to compare contestants by; a decoder's also cached."""
    import torch

    inputs = token_batch(config, _CHECK_ROWS, _CHECK_LENGTH, seed)
    if kind == ENCODER_DECODER:
        decoder = token_batch(config, _CHECK_ROWS, _CHECK_STEPS, seed + 1)["input_ids"]
        return model(**inputs, decoder_input_ids=decoder)[0].float().flatten()
    if kind == ENCODER:
        return model(**inputs)[0].float().flatten()
    from transformers import StaticCache

    cache, ids = StaticCache(config=config, max_cache_len=_CHECK_LENGTH), inputs["input_ids"]
    parts = [model(input_ids=ids[:, :-_CHECK_STEPS], past_key_values=cache, use_cache=True).logits]
    for step in range(_CHECK_LENGTH - _CHECK_STEPS, _CHECK_LENGTH):
        parts.append(model(input_ids=ids[:, step : step + 1], past_key_values=cache, use_cache=True).logits)
    return torch.cat(parts, dim=1).float().flatten()


# Models of random weights --------------------------------------------------------------------------------------------


def _encoder_shape() -> tuple[type, Any, str]:
    from transformers import BertConfig, BertModel

    return BertModel, BertConfig(), "float32"


def _decoder_shape() -> tuple[type, Any, str]:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 1536, "intermediate_size": 4096, "num_hidden_layers": 14, "num_attention_heads": 12}
    config = LlamaConfig(vocab_size=32000, tie_word_embeddings=True, max_position_embeddings=2048, **sizes)
    return LlamaForCausalLM, config, "bfloat16"


def _small_decoder_shape() -> tuple[type, Any, str]:
    """SmolLM2-135M's."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9}
    sizes |= {"num_key_value_heads": 3, "vocab_size": 49152, "max_position_embeddings": 8192}
    return LlamaForCausalLM, LlamaConfig(tie_word_embeddings=True, **sizes), "bfloat16"


def _translation_shape() -> tuple[type, Any, str]:
    from transformers import T5Config, T5ForConditionalGeneration

    return T5ForConditionalGeneration, T5Config(decoder_start_token_id=0), "float32"


SHAPES: dict[str, Callable[[], tuple[type, Any, str]]] = {
    "bert-base": _encoder_shape,
    "llama-450m": _decoder_shape,
    "smollm2-135m": _small_decoder_shape,
    "t5-small": _translation_shape,
}


def save_shape(name: str, folder: Any, seed: int) -> None:
    """Save a model of a shape with random weights, in the type that such checkpoints are published in."""
    import torch

    cls, config, dtype = SHAPES[name]()
    torch.manual_seed(seed)
    cls(config).to(getattr(torch, dtype)).save_pretrained(folder)
