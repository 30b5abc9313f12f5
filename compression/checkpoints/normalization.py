"""A base model normalised once by transformers' own classes, so that nothing downstream reads a config with defaults of its own.

`normalize` writes a directory beside the source in which

- config.json states everything: the class's defaults, today's spellings, the standard names of widths and lengths; no remote code;
- weights are links to the files that transformers reads, and list the tensors of the model's class, no others;
- the tokenizer is that of tokenizer.json, without truncation and padding, for whoever opens the directory.

A model whose tensors are not those of its class is refused, naming them.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import MoeModelOutputWithPast

from compression.checkpoints.checkpoint import (
    INDEX,
    PRUNING_FILES,
    SINGLE,
    Checkpoint,
    Limits,
    open_checkpoint,
    tokenizer_files,
    weight_map,
)
from compression.checkpoints.loading import check_tensors, load_tokenizer
from compression.checkpoints.shards import read_tensors
from compression.checkpoints.skeleton import linear_layers, skeleton
from compression.checkpoints.tokenizer_corpus import TEXTS
from compression.errors import Incompatible, UnusableModel, first_of

_STANDARD_NAMES = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")
_STANDS_FOR_WEIGHT = ("qweight", "qzeros", "scales", "g_idx", "weight_scale", "weight_zero_point", "weight_shape")
_REBUILDS = ("add_bos_token", "add_eos_token", "auto_map")  # with which transformers writes a tokenizer's post-processor anew
_DTYPES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}


@dataclass(frozen=True)
class Normalized:
    """What was found while a model was normalised.

    changed   whether the normalised directory differs from the source in anything that is read
    warnings  what a person must see
    limits    what its architecture does not take
    """

    changed: bool
    warnings: tuple[str, ...]
    limits: Limits


def normalize(source: Path, out: Path) -> Normalized:
    """Write the normalised form of a model directory into the new directory `out`.

    Raises UnusableModel for an architecture that transformers does not open as a causal language model without code of the model's own,
    for tensors that are missing, unknown to the class or in float64, and for a tokenizer that cannot be read.
    """
    warnings: list[str] = []
    raw = open_checkpoint(source)
    config = _open_config(source, warnings)
    model = _check_tensors(raw, config, warnings)
    document = complete_config(config) | {"architectures": [type(model).__name__], "dtype": _dtype(raw)}
    if config.tie_word_embeddings and _has_own_head(model, raw):
        document["tie_word_embeddings"] = False
        warnings.append(
            "config.json ties the output head to the embedding, but the files hold a head of other values: that head is used, as transformers does"
        )
    out.mkdir(parents=True)
    changed = [
        _write_config(source, out, document),
        _link_weights(raw, out, _stored_names(model, raw, tied=document["tie_word_embeddings"])),
        _write_tokenizer(source, out, warnings),
    ]
    normal = open_checkpoint(out)
    limits = Limits(compression=_compression_limit(normal), training=_training_limit(normal))
    return Normalized(any(changed), tuple(warnings), limits)


def complete_config(config: PreTrainedConfig) -> dict[str, Any]:
    """A config as JSON with every default of its class written out, and the standard names of what the class calls otherwise.

    `max_position_embeddings` is null where an architecture has no limit of positions.
    """
    document = json.loads(config.to_json_string(use_diff=True))
    for key in ("auto_map", "transformers_version", "_name_or_path"):
        document.pop(key, None)
    document |= {name: getattr(config, name) for name in _STANDARD_NAMES if name not in document and hasattr(config, name)}
    if "max_position_embeddings" not in document:
        document["max_position_embeddings"] = getattr(config, "max_position_embeddings", getattr(config, "max_seq_len", None))
    return document


def _open_config(source: Path, warnings: list[str]) -> PreTrainedConfig:
    raw = json.loads((source / "config.json").read_text())
    kind, here = raw.get("model_type"), f"transformers {transformers.__version__}"
    if kind not in CONFIG_MAPPING:
        own = "; it would run code of its own (auto_map in config.json), which edgepress never does" if "auto_map" in raw else ""
        raise UnusableModel(f"{source} has the model_type {kind!r}, and {here} has no such architecture{own}", key="model")
    try:
        config = AutoConfig.from_pretrained(source, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever a config class raises about values that it does not take
        raise UnusableModel(
            f"{here} does not open {source / 'config.json'} (model_type {kind!r}): {_reason(error)}", key="model"
        ) from error
    if "auto_map" in raw:
        warnings.append(
            f"auto_map in config.json is ignored: transformers has the architecture {kind!r} itself, and the model's own code never runs"
        )
    causal: Any = MODEL_FOR_CAUSAL_LM_MAPPING
    if config.get_text_config() is not config:
        inner = config.get_text_config().model_type
        raise UnusableModel(
            f"{source} is a model of several parts ({', '.join(raw.get('architectures') or [kind])}); edgepress takes text decoders "
            f"alone: save its text part (model_type {inner!r}) as a directory of its own",
            key="model",
        )
    if type(config) not in causal or config.is_encoder_decoder:
        raise UnusableModel(
            f"{source} is not a causal language model (model_type {kind!r}, architectures {', '.join(raw.get('architectures') or ['none'])}); "
            "one that transformers' AutoModelForCausalLM opens is needed",
            key="model",
        )
    return config


def _reason(error: Exception) -> str:
    """The last line of an error that says something: validators of transformers put their own name in the first."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1].removeprefix("ValueError: ") if lines else type(error).__name__


def _check_tensors(raw: Checkpoint, config: PreTrainedConfig, warnings: list[str]) -> PreTrainedModel:
    """The model without weights, once its tensors are found to be those of its class, as transformers itself reads the files."""
    if (raw.path / SINGLE).is_file() and (raw.path / INDEX).is_file():
        warnings.append(f"{SINGLE} and {INDEX} are both there; {SINGLE} is read, as transformers does")
    if doubles := [name for name, info in raw.tensors.items() if info.dtype == "F64"]:
        raise UnusableModel(f"{raw.path} holds float64 tensors ({first_of(doubles)}); save it in float32, bfloat16 or float16", key="model")
    causal: Any = AutoModelForCausalLM  # annotated without the second value
    if raw.layout == "dense":
        try:
            model, found = causal.from_pretrained(
                raw.path, config=config, device_map="meta", dtype="auto", output_loading_info=True, local_files_only=True, use_safetensors=True,
                trust_remote_code=False, ignore_mismatched_sizes=True,
            )  # fmt: skip
        except (RuntimeError, ValueError) as error:
            raise UnusableModel(f"transformers does not open {raw.path}: {_reason(error)}", key="model") from error
        if unlike := [str(name[0]) for name in found["mismatched_keys"]]:
            raise UnusableModel(f"{raw.path}: {first_of(unlike)} have other shapes than its config.json says", key="model")
        check_tensors(model, raw.path, missing=found["missing_keys"], unknown=found["unexpected_keys"])
    else:
        model = skeleton(raw)
        has, knows = _dense_names(raw), set(model.state_dict())
        check_tensors(model, raw.path, missing=knows - has - set(model.all_tied_weights_keys), unknown=has - knows)
    return model


def _dense_names(raw: Checkpoint) -> set[str]:
    """The names that the tensors of a quantized checkpoint have in the dense model."""
    heads = {name.rpartition(".")[0] for name in raw.tensors if name.endswith((".qweight", ".weight_scale"))}
    return {
        f"{name.rpartition('.')[0]}.weight" if name.rpartition(".")[0] in heads and name.endswith(_STANDS_FOR_WEIGHT) else name
        for name in raw.tensors
    }


def _stored_names(model: PreTrainedModel, raw: Checkpoint, *, tied: bool) -> set[str]:
    """The tensors of the files that mean something: those of the class, a tied one once. All, where transformers renames them as it loads."""
    names = set(model.state_dict()) - (set(model.all_tied_weights_keys) if tied else set())
    return names if raw.layout == "dense" and names <= raw.tensors.keys() else set(raw.tensors)


def _has_own_head(model: PreTrainedModel, raw: Checkpoint) -> bool:
    """Whether a tied tensor is in the files too, with other values: transformers then ties nothing."""
    for target, original in model.all_tied_weights_keys.items():
        if target in raw.tensors and original in raw.tensors:
            first, second = (read_tensors(raw.path, [name])[name] for name in (target, original))
            if not torch.equal(first, second):
                return True
    return False


def _dtype(raw: Checkpoint) -> str:
    """The dtype of most of the float weights: what the files hold, whatever the config says."""
    counts = dict.fromkeys(_DTYPES, 0)
    for info in raw.tensors.values():
        if info.dtype in counts:
            counts[info.dtype] += info.numel
    return _DTYPES[max(counts, key=lambda name: counts[name])]


def _write_config(source: Path, out: Path, document: dict[str, Any]) -> bool:
    original = json.loads((source / "config.json").read_text())
    version = original.pop("transformers_version", None)
    if original == document:
        _link(source / "config.json", out / "config.json")
        return False
    if version is not None:
        document = document | {"transformers_version": version}
    (out / "config.json").write_text(json.dumps(document, indent=2) + "\n")
    try:
        AutoConfig.from_pretrained(out, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise UnusableModel(
            f"{source}: transformers does not open its config with all defaults written out: {_reason(error)}", key="model"
        ) from error
    return True


def _link_weights(raw: Checkpoint, out: Path, names: set[str]) -> bool:
    """Link the files that are read. Where they hold more than `names`, an index says what counts, and the weights differ from the source's."""
    for name in PRUNING_FILES:
        if (raw.path / name).is_file():
            _link(raw.path / name, out / name)
    files = {name: file for name, file in weight_map(raw.path).items() if name in names}
    if files.keys() == raw.tensors.keys():
        for file in {*files.values()} | ({raw.path / INDEX} if not (raw.path / SINGLE).is_file() else set()):
            _link(file, out / file.relative_to(raw.path))
        return False
    shards = sorted({*files.values()})
    links = {file: f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number, file in enumerate(shards, 1)}
    for file, name in links.items():
        _link(file, out / name)
    index = {"metadata": {}, "weight_map": {name: links[file] for name, file in sorted(files.items())}}
    (out / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    return True


def _write_tokenizer(source: Path, out: Path, warnings: list[str]) -> bool:
    """Link the tokenizer's files; write anew what makes others read it unlike tokenizer.json. Returns whether anything was."""
    written: dict[str, dict[str, Any]] = {}
    try:
        Tokenizer.from_file(str(source / "tokenizer.json"))
        content = json.loads((source / "tokenizer.json").read_text())
    except Exception as error:  # tokenizers raises Exception itself
        raise UnusableModel(f"{source / 'tokenizer.json'} cannot be read: {_reason(error)}", key="model") from error
    if switched := [key for key in ("truncation", "padding") if content.get(key)]:
        written["tokenizer.json"] = content | dict.fromkeys(("truncation", "padding"))
        warnings.append(
            f"tokenizer.json was saved with {' and '.join(switched)} switched on, which is switched off: texts keep their length"
        )
    difference = _difference(source, source)
    if difference is not None:
        file = source / "tokenizer_config.json"
        settings = json.loads(file.read_text()) if file.is_file() else {}
        plain = {key: value for key, value in settings.items() if key not in _REBUILDS} | {"tokenizer_class": "PreTrainedTokenizerFast"}
        if plain != settings:
            written["tokenizer_config.json"] = plain
    for name in {*tokenizer_files(source), *written}:
        if name in written:
            (out / name).write_text(json.dumps(written[name], ensure_ascii=False, indent=2) + "\n")
        else:
            _link(source / name, out / name)
    if difference is not None:
        opens = _difference(source, out) is None
        warnings.append(
            f"transformers' AutoTokenizer does not follow tokenizer.json: {difference}. edgepress takes tokenizer.json as it is; what it writes "
            + ("opens like that in transformers too" if opens else "has to be opened with PreTrainedTokenizerFast in transformers")
        )
    return bool(written)


def _difference(source: Path, opened: Path) -> str | None:
    """The first text that AutoTokenizer on `opened` encodes unlike the tokenizer.json of `source`, with both ids; None where it encodes all alike."""
    ours = load_tokenizer(source)
    try:
        theirs = AutoTokenizer.from_pretrained(opened, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # noqa: BLE001  (of whatever class it takes for this model: said in the warning)
        return f"it does not open it ({_reason(error)})"
    for text in TEXTS:
        expected, found = ours(text).input_ids, theirs(text).input_ids
        if expected != found:
            return f"{text[:40]!r} is {expected[:12]} in the file and {found[:12]} there"
    return None


def _link(target: Path, link: Path) -> None:
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(target.resolve())


def _compression_limit(checkpoint: Checkpoint) -> str:
    """Why the linear layers of its blocks cannot be compressed, if they cannot."""
    model = skeleton(checkpoint)
    if renamed := set(model.state_dict()) - set(model.all_tied_weights_keys) - _dense_names(checkpoint):
        return f"transformers renames its tensors as it loads them: the files hold {first_of(renamed)} under other names"
    try:
        linear_layers(model, checkpoint)
    except (Incompatible, UnusableModel) as error:
        return str(error).removeprefix(f"{checkpoint.path}: ")
    return ""


@torch.no_grad()
def _training_limit(checkpoint: Checkpoint) -> str:
    """Why training cannot read the output head directly, if it cannot: the architecture changes its logits after it.

    Found by letting the model's own forward method work on hidden states that are given, through a head of eight tokens.
    """
    model = skeleton(checkpoint)
    if model.base_model is model:
        return f"{type(model).__name__} does not tell transformers which of its parts gives the hidden states that training reads"
    hidden = torch.linspace(-3, 3, 4 * checkpoint.hidden_size).reshape(1, 4, -1)
    head = nn.Linear(checkpoint.hidden_size, 8, bias=False)
    nn.init.constant_(head.weight, 20 / checkpoint.hidden_size)
    model.set_output_embeddings(head)

    def given(*_: Any, **__: Any) -> MoeModelOutputWithPast:
        return MoeModelOutputWithPast(last_hidden_state=hidden)

    model.base_model.forward = given
    try:
        logits = model(input_ids=torch.zeros(1, 4, dtype=torch.int64), use_cache=False).logits
    except Exception:  # noqa: BLE001  (an architecture that takes no such stand-in is judged when it is trained)
        return ""
    if logits.device.type == "meta":
        return ""  # parameters without values had a part in them: judged when it is trained
    if logits.shape == (1, 4, 8) and torch.allclose(logits, head(hidden), rtol=1e-4, atol=1e-4):
        return ""
    return f"{type(model).__name__} scales or caps its logits after the output head, which training reads directly"
